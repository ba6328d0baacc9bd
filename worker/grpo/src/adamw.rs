//! AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), updating variables in place.
//!
//! Moments are f32, one tensor `[2, elements]` per variable (first and second moment), so that they can be saved and
//! restored bit by bit. On the CPU an update is two passes over memory; other devices use composed operations.

use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, Var};

use crate::gradient::Gradients;

/// Parameters of the optimiser besides the rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parameters {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: f64,
}

/// What an update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// False where the norm was not finite: then nothing was changed.
    pub applied: bool,
}

/// The optimiser and its state.
#[derive(Debug)]
pub struct AdamW {
    parameters: Parameters,
    variables: Vec<Var>,
    moments: Vec<Tensor>,
    updates: u64,
}

impl AdamW {
    /// An optimiser of `variables` with moments of zero.
    pub fn new(variables: Vec<Var>, parameters: Parameters) -> Result<Self> {
        let moments = variables
            .iter()
            .map(|variable| Tensor::zeros((2, variable.elem_count()), DType::F32, variable.device()))
            .collect::<Result<_>>()?;
        Ok(Self {
            parameters,
            variables,
            moments,
            updates: 0,
        })
    }

    /// The variables, in the order in which gradients are given.
    pub fn variables(&self) -> &[Var] {
        &self.variables
    }

    /// Moments of each variable, `[2, elements]`, and the number of updates applied.
    pub fn state(&self) -> (&[Tensor], u64) {
        (&self.moments, self.updates)
    }

    /// Goes on from a saved state; shapes must be those of [`AdamW::state`].
    pub fn restore(&mut self, moments: &[Tensor], updates: u64) -> Result<()> {
        if moments.len() != self.moments.len() {
            candle_core::bail!("restore {} moments of {} variables", moments.len(), self.moments.len());
        }
        for (own, saved) in self.moments.iter_mut().zip(moments) {
            if own.dims() != saved.dims() || saved.dtype() != DType::F32 {
                candle_core::bail!("restore moments of shape {:?} as {:?}", saved.shape(), own.shape());
            }
            // A copy: updates change moments in place.
            *own = saved.to_device(own.device())?.copy()?;
        }
        self.updates = updates;
        Ok(())
    }

    /// Clips to the global norm and applies one update. A norm that is not finite changes nothing.
    pub fn update(&mut self, gradients: &Gradients, rate: f64) -> Result<Update> {
        let grad_norm = gradients.norm()?;
        if !grad_norm.is_finite() {
            return Ok(Update {
                grad_norm,
                applied: false,
            });
        }
        self.updates += 1;
        let p = self.parameters;
        let count = self.updates as f64;
        let step = Step {
            scale: (p.max_grad_norm / (grad_norm + 1e-6)).min(1.0),
            beta1: p.beta1,
            beta2: p.beta2,
            decay: 1.0 - rate * p.weight_decay,
            rate: rate / (1.0 - p.beta1.powf(count)),
            correction: 1.0 / (1.0 - p.beta2.powf(count)).sqrt(),
            epsilon: p.epsilon,
        };
        for ((variable, moments), gradient) in self.variables.iter().zip(&mut self.moments).zip(gradients.tensors()) {
            if let Some(gradient) = gradient {
                step.apply(variable, moments, gradient)?;
            }
        }
        Ok(Update {
            grad_norm,
            applied: true,
        })
    }
}

/// The numbers of one update.
#[derive(Clone, Copy, Debug)]
struct Step {
    scale: f64,
    beta1: f64,
    beta2: f64,
    decay: f64,
    rate: f64,
    correction: f64,
    epsilon: f64,
}

impl Step {
    fn apply(&self, variable: &Var, moments: &mut Tensor, gradient: &Tensor) -> Result<()> {
        if variable.device().is_cpu() && variable.dtype() == DType::F32 && variable.is_contiguous() {
            moments.inplace_op2(&gradient.contiguous()?, &UpdateMoments(*self))?;
            return variable.inplace_op2(moments, &UpdateWeights(*self));
        }
        self.apply_composed(variable, moments, gradient)
    }

    /// For any device and dtype.
    fn apply_composed(&self, variable: &Var, moments: &mut Tensor, gradient: &Tensor) -> Result<()> {
        let gradient = (gradient.flatten_all()?.to_dtype(DType::F32)? * self.scale)?;
        let first = ((moments.get(0)? * self.beta1)? + (&gradient * (1.0 - self.beta1))?)?;
        let second = ((moments.get(1)? * self.beta2)? + (gradient.sqr()? * (1.0 - self.beta2))?)?;
        let root = ((second.sqrt()? * self.correction)? + self.epsilon)?;
        let change = ((&first / root)? * self.rate)?;
        let weights = variable.as_detached_tensor().flatten_all()?.to_dtype(DType::F32)?;
        let weights = ((weights * self.decay)? - change)?;
        *moments = Tensor::stack(&[first, second], 0)?;
        variable.set(&weights.reshape(variable.shape())?.to_dtype(variable.dtype())?)
    }
}

/// Moments from moments and gradient.
struct UpdateMoments(Step);

impl InplaceOp2 for UpdateMoments {
    fn name(&self) -> &'static str {
        "adamw-moments"
    }

    fn cpu_fwd(&self, moments: &mut CpuStorage, own: &Layout, gradient: &CpuStorage, layout: &Layout) -> Result<()> {
        let step = &self.0;
        let (CpuStorage::F32(moments), CpuStorage::F32(gradient)) = (moments, gradient) else {
            candle_core::bail!("adamw-moments: not f32")
        };
        let moments = &mut moments[range(own)?];
        let gradient = &gradient[range(layout)?];
        let (first, second) = moments.split_at_mut(gradient.len());
        let [scale, beta1, beta2] = [step.scale, step.beta1, step.beta2].map(|value| value as f32);
        let [rest1, rest2] = [1.0 - step.beta1, 1.0 - step.beta2].map(|value| value as f32);
        for ((first, second), gradient) in first.iter_mut().zip(second).zip(gradient) {
            let gradient = gradient * scale;
            *first = *first * beta1 + gradient * rest1;
            *second = *second * beta2 + gradient * gradient * rest2;
        }
        Ok(())
    }
}

/// Weights from weights and moments.
struct UpdateWeights(Step);

impl InplaceOp2 for UpdateWeights {
    fn name(&self) -> &'static str {
        "adamw-weights"
    }

    fn cpu_fwd(&self, weights: &mut CpuStorage, own: &Layout, moments: &CpuStorage, layout: &Layout) -> Result<()> {
        let step = &self.0;
        let (CpuStorage::F32(weights), CpuStorage::F32(moments)) = (weights, moments) else {
            candle_core::bail!("adamw-weights: not f32")
        };
        let weights = &mut weights[range(own)?];
        let (first, second) = moments[range(layout)?].split_at(weights.len());
        let [decay, rate, correction, epsilon] =
            [step.decay, step.rate, step.correction, step.epsilon].map(|value| value as f32);
        for ((weight, first), second) in weights.iter_mut().zip(first).zip(second) {
            *weight = *weight * decay - first / (second.sqrt() * correction + epsilon) * rate;
        }
        Ok(())
    }
}

fn range(layout: &Layout) -> Result<std::ops::Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => candle_core::bail!("adamw: a tensor is not contiguous"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const PARAMETERS: Parameters = Parameters {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
    };

    fn variable() -> Var {
        Var::from_vec(vec![0.5_f32, -1.0, 2.0, 0.25], (2, 2), &Device::Cpu).expect("var")
    }

    /// Gradients of `sum(w * w * factor)`.
    fn gradients(variable: &Var, factor: f64) -> Gradients {
        let loss = (variable.as_tensor().sqr().expect("sqr") * factor)
            .expect("mul")
            .sum_all()
            .expect("sum");
        Gradients::collect(&loss.backward().expect("backward"), std::slice::from_ref(variable))
    }

    fn values(variable: &Var) -> Vec<f32> {
        variable.flatten_all().expect("flat").to_vec1().expect("f32")
    }

    /// The textbook, in f64.
    fn textbook(steps: usize, factor: f64) -> Vec<f64> {
        let p = PARAMETERS;
        let mut w = [0.5, -1.0, 2.0, 0.25_f64];
        let (mut m, mut v) = ([0.0; 4], [0.0; 4]);
        for step in 1..=steps {
            let g = w.map(|w| 2.0 * factor * w);
            let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            let scale = (p.max_grad_norm / (norm + 1e-6)).min(1.0);
            for i in 0..4 {
                let g = g[i] * scale;
                m[i] = p.beta1 * m[i] + (1.0 - p.beta1) * g;
                v[i] = p.beta2 * v[i] + (1.0 - p.beta2) * g * g;
                let m_hat = m[i] / (1.0 - p.beta1.powi(step as i32));
                let v_hat = v[i] / (1.0 - p.beta2.powi(step as i32));
                w[i] -= 0.1 * p.weight_decay * w[i];
                w[i] -= 0.1 * m_hat / (v_hat.sqrt() + p.epsilon);
            }
        }
        w.to_vec()
    }

    #[test]
    fn updates_follow_the_textbook_with_and_without_clipping() {
        for factor in [0.01, 10.0] {
            let own = variable();
            let mut optimizer = AdamW::new(vec![own.clone()], PARAMETERS).expect("optimizer");
            for _ in 0..7 {
                optimizer.update(&gradients(&own, factor), 0.1).expect("update");
            }
            for (found, expected) in values(&own).iter().zip(textbook(7, factor)) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
    }

    #[test]
    fn the_composed_path_agrees_with_the_in_place_one() {
        let (one, other) = (variable(), variable());
        let step = Step {
            scale: 0.5,
            beta1: 0.9,
            beta2: 0.99,
            decay: 0.99,
            rate: 0.3,
            correction: 2.0,
            epsilon: 1e-8,
        };
        let gradient = gradients(&one, 0.3).tensors()[0].clone().expect("gradient");
        let mut moments = [(); 2].map(|()| Tensor::zeros((2, 4), DType::F32, &Device::Cpu).expect("zeros"));
        for _ in 0..3 {
            step.apply(&one, &mut moments[0], &gradient).expect("in place");
            step.apply_composed(&other, &mut moments[1], &gradient)
                .expect("composed");
        }
        for (a, b) in values(&one).iter().zip(values(&other)) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn a_restored_optimizer_goes_on_bit_by_bit() {
        let straight = variable();
        let mut optimizer = AdamW::new(vec![straight.clone()], PARAMETERS).expect("optimizer");
        for _ in 0..3 {
            optimizer.update(&gradients(&straight, 1.0), 0.1).expect("update");
        }
        let resumed = Var::from_tensor(&straight.as_detached_tensor().copy().expect("copy")).expect("var");
        let mut second = AdamW::new(vec![resumed.clone()], PARAMETERS).expect("optimizer");
        let (moments, updates) = optimizer.state();
        second.restore(moments, updates).expect("restore");
        for _ in 0..3 {
            optimizer.update(&gradients(&straight, 1.0), 0.1).expect("update");
            second.update(&gradients(&resumed, 1.0), 0.1).expect("update");
        }
        assert_eq!(values(&straight), values(&resumed));
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let own = variable();
        let mut optimizer = AdamW::new(vec![own.clone()], PARAMETERS).expect("optimizer");
        let update = optimizer.update(&gradients(&own, f64::INFINITY), 0.1).expect("update");
        assert!(!update.applied);
        assert_eq!(values(&own), values(&variable()));
        assert_eq!(optimizer.state().1, 0);
    }

    #[test]
    fn state_of_another_shape_is_refused() {
        let mut optimizer = AdamW::new(vec![variable()], PARAMETERS).expect("optimizer");
        let other = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).expect("zeros");
        assert!(optimizer.restore(&[other], 1).is_err());
        assert!(optimizer.restore(&[], 1).is_err());
    }
}

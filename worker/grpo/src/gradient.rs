//! Gradients by variable: collected in the variables' order, added in a fixed order, measured by their global norm.

use candle_core::{Result, Storage, Tensor, Var, backprop::GradStore};

/// One gradient per variable, None where the loss does not depend on it.
#[derive(Clone, Debug)]
pub struct Gradients {
    tensors: Vec<Option<Tensor>>,
}

impl Gradients {
    /// Takes the gradients of `variables` out of a backward pass.
    pub fn collect(store: &GradStore, variables: &[Var]) -> Self {
        let tensors = variables
            .iter()
            .map(|variable| store.get(variable).map(Tensor::detach))
            .collect();
        Self { tensors }
    }

    /// Adds parts in their order: floating-point sums depend on order, so the order must not depend on timing.
    pub fn sum(parts: &[Self]) -> Result<Option<Self>> {
        let Some((first, rest)) = parts.split_first() else {
            return Ok(None);
        };
        let mut sum = first.tensors.clone();
        for part in rest {
            for (sum, own) in sum.iter_mut().zip(&part.tensors) {
                *sum = match (sum.take(), own) {
                    (Some(sum), Some(own)) => Some((sum + own)?),
                    (Some(one), None) => Some(one),
                    (None, own) => own.clone(),
                };
            }
        }
        Ok(Some(Self { tensors: sum }))
    }

    /// L2 norm of all gradients together.
    pub fn norm(&self) -> Result<f64> {
        let mut squares = 0.0;
        for tensor in self.tensors.iter().flatten() {
            squares += sum_of_squares(tensor)?;
        }
        Ok(squares.sqrt())
    }

    /// The gradient of each variable, in the variables' order.
    pub fn tensors(&self) -> &[Option<Tensor>] {
        &self.tensors
    }
}

fn sum_of_squares(tensor: &Tensor) -> Result<f64> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    if let Storage::Cpu(cpu) = &*storage
        && let (Ok(values), Some((start, end))) = (cpu.as_slice::<f32>(), layout.contiguous_offsets())
    {
        // Four sums at a time let the compiler use vector registers; their order is fixed.
        let mut sums = [0.0_f64; 4];
        let chunks = values[start..end].chunks_exact(4);
        let rest: f64 = chunks.remainder().iter().map(|value| f64::from(*value).powi(2)).sum();
        for chunk in chunks {
            for (sum, value) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(*value) * f64::from(*value);
            }
        }
        return Ok(sums.iter().sum::<f64>() + rest);
    }
    drop(storage);
    let sum = tensor.to_dtype(candle_core::DType::F32)?.sqr()?.sum_all()?;
    Ok(f64::from(sum.to_scalar::<f32>()?))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn gradients(values: &[Option<&[f32]>]) -> Gradients {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).expect("tensor");
        Gradients {
            tensors: values.iter().map(|values| values.map(tensor)).collect(),
        }
    }

    #[test]
    fn the_norm_is_that_of_all_values_together() {
        let norm = gradients(&[Some(&[3.0, 0.0, 0.0, 0.0, 4.0]), None, Some(&[12.0])]).norm();
        assert_eq!(norm.expect("norm"), 13.0);
    }

    #[test]
    fn parts_are_added_and_a_missing_one_counts_as_zero() {
        let parts = [
            gradients(&[Some(&[1.0]), None, None]),
            gradients(&[Some(&[2.0]), Some(&[5.0]), None]),
        ];
        let sum = Gradients::sum(&parts).expect("sum").expect("some");
        let values: Vec<Option<Vec<f32>>> = sum
            .tensors()
            .iter()
            .map(|t| t.as_ref().map(|t| t.to_vec1().expect("f32")))
            .collect();
        assert_eq!(values, vec![Some(vec![3.0]), Some(vec![5.0]), None]);
        assert!(Gradients::sum(&[]).expect("sum").is_none());
    }
}

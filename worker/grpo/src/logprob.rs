//! Log-probabilities of given tokens from hidden states: `log softmax(hidden · Wᵀ / temperature)[target]`.
//!
//! Composed of ordinary operations, autograd would keep several arrays of tokens x vocabulary alive. Here one operation has
//! its own backward: it works in chunks of tokens and keeps the probabilities only where one chunk holds all tokens.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, D, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage,
};

/// Logits of one chunk at most: 64 MiB in f32.
const CHUNK_LOGITS: usize = 16 << 20;

/// Log-probability of each target under the tempered distribution.
///
/// `hidden`: `[tokens, width]`, after the final norm; `weight`: `[vocabulary, width]`; `targets`: `[tokens]`, u32.
/// Returns `[tokens]`, differentiable in `hidden` and, unless it is detached, in `weight`.
pub fn token_log_probs(hidden: &Tensor, weight: &Tensor, targets: &Tensor, temperature: f64) -> Result<Tensor> {
    token_log_probs_in_chunks(hidden, weight, targets, temperature, CHUNK_LOGITS)
}

/// [`token_log_probs`] with another limit on the logits of one chunk.
pub fn token_log_probs_in_chunks(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    temperature: f64,
    chunk_logits: usize,
) -> Result<Tensor> {
    let hidden = hidden.contiguous()?;
    let (tokens, _) = hidden.dims2()?;
    let rows = (chunk_logits / weight.dim(0)?).max(1);
    let (plain_hidden, plain_weight) = (hidden.detach(), weight.detach());
    let mut values = Vec::new();
    let mut kept = None;
    for start in (0..tokens).step_by(rows) {
        let length = rows.min(tokens - start);
        let logits = tempered_logits(&plain_hidden.narrow(0, start, length)?, &plain_weight, temperature)?;
        let picked = logits.gather(&targets.narrow(0, start, length)?.unsqueeze(1)?, 1)?;
        let (log_sum, probabilities) = log_sum_exp(&logits)?;
        values.push((picked - log_sum)?.squeeze(1)?);
        kept = (length == tokens).then_some(probabilities);
    }
    let values = Tensor::cat(&values, 0)?;
    hidden.apply_op2(
        weight,
        TokenLogProbs {
            values,
            targets: targets.clone(),
            probabilities: kept,
            temperature,
            rows,
        },
    )
}

fn tempered_logits(hidden: &Tensor, weight: &Tensor, temperature: f64) -> Result<Tensor> {
    let logits = hidden.matmul(&weight.t()?)?;
    if temperature == 1.0 {
        Ok(logits)
    } else {
        logits / temperature
    }
}

/// Per row: log of the sum of exponentials `[rows, 1]`, and the softmax `[rows, vocabulary]`.
fn log_sum_exp(logits: &Tensor) -> Result<(Tensor, Tensor)> {
    let max = logits.max_keepdim(D::Minus1)?;
    let exponentials = logits.broadcast_sub(&max)?.exp()?;
    let sum = exponentials.sum_keepdim(D::Minus1)?;
    let probabilities = exponentials.broadcast_div(&sum)?;
    Ok(((sum.log()? + max)?, probabilities))
}

/// The result, computed before, and what its backward needs.
struct TokenLogProbs {
    values: Tensor,
    targets: Tensor,
    probabilities: Option<Tensor>,
    temperature: f64,
    rows: usize,
}

impl CustomOp2 for TokenLogProbs {
    fn name(&self) -> &'static str {
        "token-log-probs"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let (storage, _) = self.values.storage_and_layout();
        match &*storage {
            Storage::Cpu(values) => Ok((values.clone(), self.values.shape().clone())),
            _ => candle_core::bail!("token-log-probs: values are not on the CPU"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.values.storage_and_layout();
        match &*storage {
            Storage::Cuda(values) => Ok((values.try_clone(layout)?, self.values.shape().clone())),
            _ => candle_core::bail!("token-log-probs: values are not on the GPU"),
        }
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _result: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let weight_is_trained = weight.track_op();
        let (hidden, weight, upstream) = (hidden.detach(), weight.detach(), upstream.detach());
        let tokens = hidden.dim(0)?;
        let mut hidden_gradients = Vec::new();
        let mut weight_gradient: Option<Tensor> = None;
        for start in (0..tokens).step_by(self.rows) {
            let length = self.rows.min(tokens - start);
            let chunk = hidden.narrow(0, start, length)?;
            let probabilities = match &self.probabilities {
                Some(kept) => kept.clone(),
                None => log_sum_exp(&tempered_logits(&chunk, &weight, self.temperature)?)?.1,
            };
            let scale = (upstream.narrow(0, start, length)? / self.temperature)?.unsqueeze(1)?;
            let targets = self.targets.narrow(0, start, length)?.unsqueeze(1)?;
            // d logp / d logits = onehot - softmax, times the upstream gradient.
            let gradient = probabilities.broadcast_mul(&scale.neg()?)?.scatter_add(
                &targets.contiguous()?,
                &scale.contiguous()?,
                1,
            )?;
            hidden_gradients.push(gradient.matmul(&weight)?);
            if weight_is_trained {
                let own = gradient.t()?.matmul(&chunk)?;
                weight_gradient = Some(match weight_gradient {
                    Some(sum) => (sum + own)?,
                    None => own,
                });
            }
        }
        Ok((Some(Tensor::cat(&hidden_gradients, 0)?), weight_gradient))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn inputs() -> (Var, Var, Tensor, Tensor) {
        let device = Device::Cpu;
        let values = |count: usize, step: f32| -> Vec<f32> { (0..count).map(|i| (i as f32 * step).sin()).collect() };
        let hidden = Var::from_vec(values(5 * 3, 0.7), (5, 3), &device).expect("hidden");
        let weight = Var::from_vec(values(7 * 3, 1.3), (7, 3), &device).expect("weight");
        let targets = Tensor::new(&[0_u32, 6, 3, 3, 1], &device).expect("targets");
        let upstream = Tensor::from_vec(values(5, 2.1), 5, &device).expect("upstream");
        (hidden, weight, targets, upstream)
    }

    /// The plain way through autograd.
    fn composed(hidden: &Tensor, weight: &Tensor, targets: &Tensor, temperature: f64) -> Tensor {
        let logits = (hidden.matmul(&weight.t().expect("t")).expect("matmul") / temperature).expect("div");
        let max = logits.max_keepdim(1).expect("max").detach();
        let shifted = logits.broadcast_sub(&max).expect("sub");
        let log_sum = shifted
            .exp()
            .expect("exp")
            .sum_keepdim(1)
            .expect("sum")
            .log()
            .expect("log");
        let picked = shifted.gather(&targets.unsqueeze(1).expect("un"), 1).expect("gather");
        (picked - log_sum).expect("sub").squeeze(1).expect("squeeze")
    }

    fn vector(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().expect("flat").to_vec1().expect("f32")
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        for (a, b) in vector(a).iter().zip(vector(b)) {
            assert!((a - b).abs() < 2e-6, "{a} {b}");
        }
    }

    #[test]
    fn value_and_gradients_equal_those_of_composed_operations_for_every_chunk_size() {
        let (hidden, weight, targets, upstream) = inputs();
        for temperature in [1.0, 0.7] {
            let expected = composed(&hidden, &weight, &targets, temperature);
            let gradients = (&expected * &upstream)
                .expect("mul")
                .sum_all()
                .expect("sum")
                .backward()
                .expect("backward");
            for chunk_logits in [1, 14, 21, 1 << 20] {
                let found =
                    token_log_probs_in_chunks(&hidden, &weight, &targets, temperature, chunk_logits).expect("fused");
                assert_close(&found, &expected);
                let own = (&found * &upstream)
                    .expect("mul")
                    .sum_all()
                    .expect("sum")
                    .backward()
                    .expect("backward");
                for variable in [&hidden, &weight] {
                    assert_close(
                        own.get(variable).expect("gradient"),
                        gradients.get(variable).expect("gradient"),
                    );
                }
            }
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let (hidden, weight, targets, _) = inputs();
        let large = (hidden.as_tensor() * 1e4).expect("mul");
        let found = token_log_probs(&large, &weight, &targets, 1.0).expect("fused");
        assert!(vector(&found).iter().all(|value| value.is_finite() && *value <= 0.0));
    }
}

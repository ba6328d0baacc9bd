//! Each fused operation against its composed form: value and every gradient.

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Heads, Kernels, Segments};
use crate::{Result, rope::Rotary};

const TOLERANCE: f32 = 2e-5;

fn random(seed: u64, shape: &[usize]) -> Var {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values = (0..shape.iter().product())
        .map(|_| rng.random::<f32>() * 2.0 - 1.0)
        .collect::<Vec<f32>>();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference relative to the largest value.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (flat(a), flat(b));
    let largest = b.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// Value and gradients of `sum(f(inputs) * fixed weights)`, for both forms.
fn agree(inputs: &[Var], f: impl Fn(Kernels) -> Result<Tensor>) {
    let run = |kernels| {
        let value = f(kernels).unwrap();
        let weights = random(99, value.dims());
        let loss = (&value * weights.as_detached_tensor()).unwrap().sum_all().unwrap();
        (value, loss.backward().unwrap())
    };
    let ((fused, fused_grads), (composed, composed_grads)) = (run(Kernels::Auto), run(Kernels::Composed));
    assert!(
        difference(&fused, &composed) < TOLERANCE,
        "value: {}",
        difference(&fused, &composed)
    );
    for (index, input) in inputs.iter().enumerate() {
        let (a, b) = (fused_grads.get(input).unwrap(), composed_grads.get(input).unwrap());
        assert!(
            difference(a, b) < TOLERANCE,
            "gradient of input {index}: {}",
            difference(a, b)
        );
    }
}

#[test]
fn fused_norm_equals_composed() {
    let (x, w) = (random(1, &[5, 37]), random(2, &[37]));
    agree(&[x.clone(), w.clone()], |kernels| kernels.rms_norm(&x, &w, 1e-6));
}

#[test]
fn fused_linear_equals_composed() {
    let (x, w, b) = (random(1, &[7, 19]), random(2, &[11, 19]), random(3, &[11]));
    agree(&[x.clone(), w.clone(), b.clone()], |kernels| {
        kernels.linear(&x, &w, Some(&b))
    });
    agree(&[x.clone(), w.clone()], |kernels| kernels.linear(&x, &w, None));
}

#[test]
fn a_linear_map_sends_no_gradient_to_what_is_not_recorded() {
    let (x, w) = (random(1, &[7, 19]), random(2, &[11, 19]));
    let y = Kernels::Auto.linear(&x, &w.as_detached_tensor(), None).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some());
    assert_eq!(
        grads.get_ids().filter(|id| **id == w.as_detached_tensor().id()).count(),
        0
    );
}

#[test]
fn fused_gate_equals_composed() {
    let (gate, up) = (random(1, &[3, 41]), random(2, &[3, 41]));
    agree(&[gate.clone(), up.clone()], |kernels| kernels.swiglu(&gate, &up));
}

const HEADS: Heads = Heads {
    heads: 4,
    kv_heads: 2,
    head_dim: 24,
};

fn rotary(rows: usize) -> Rotary {
    let angles = (0..rows * 12).map(|i| i as f32 * 0.37).collect::<Vec<_>>();
    Rotary::from_angles(&angles, 12, candle_core::DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn fused_rotation_equals_composed() {
    let qkv = random(1, &[5, 8 * 24]);
    let rotary = rotary(5);
    agree(std::slice::from_ref(&qkv), |kernels| {
        kernels.rotate(&qkv, HEADS, &rotary)
    });
}

#[test]
fn fused_attention_equals_composed_over_ragged_windows() {
    let qkv = random(1, &[70, 8 * 24]);
    let segments = Segments::consecutive(&[16, 4, 33, 16, 1]);
    agree(std::slice::from_ref(&qkv), |kernels| {
        kernels.attention(&qkv, HEADS, &segments)
    });
}

#[test]
fn fused_causal_attention_equals_composed_at_real_tokens() {
    let qkv = random(1, &[3 * 20, 8 * 24]);
    let lengths = [20, 7, 17];
    let segments = Segments::padded(&lengths, 20);
    let real = (0..60u32)
        .filter(|row| row % 20 < lengths[*row as usize / 20] as u32)
        .collect::<Vec<_>>();
    let count = real.len();
    let real = Tensor::from_vec(real, count, &Device::Cpu).unwrap();
    agree(std::slice::from_ref(&qkv), |kernels| {
        Ok(kernels.attention(&qkv, HEADS, &segments)?.index_select(&real, 0)?)
    });
}

#[test]
fn fused_decoding_equals_composed() {
    let run = |kernels: Kernels| {
        let qkv = random(1, &[3, 8 * 24]).as_detached_tensor();
        let (keys, values) = (random(2, &[3, 9, 48]), random(3, &[3, 9, 48]));
        let (keys, values) = (keys.as_detached_tensor(), values.as_detached_tensor());
        kernels.store(&qkv, &keys, &values, &[4, 0, 8], HEADS).unwrap();
        let out = kernels
            .decode_attention(&qkv, &keys, &values, &[5, 1, 9], HEADS)
            .unwrap();
        (out, keys, values)
    };
    let (fused, composed) = (run(Kernels::Auto), run(Kernels::Composed));
    assert!(difference(&fused.0, &composed.0) < TOLERANCE);
    assert_eq!(flat(&fused.1), flat(&composed.1));
    assert_eq!(flat(&fused.2), flat(&composed.2));
}

#[test]
fn fused_log_probabilities_equal_composed() {
    let logits = random(1, &[4, 33]);
    let targets = [0, 32, 7, 7];
    agree(std::slice::from_ref(&logits), |kernels| {
        kernels.log_probs(&logits, &targets, 0.7)
    });
}

#[test]
fn a_target_outside_the_vocabulary_is_refused() {
    let logits = random(1, &[1, 33]);
    assert!(Kernels::Auto.log_probs(&logits, &[33], 1.0).is_err());
    assert!(Kernels::Auto.log_probs(&logits, &[3], 0.0).is_err());
}

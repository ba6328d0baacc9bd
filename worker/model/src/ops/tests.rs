//! Each fused operation against its composed form: value and every gradient.

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Heads, Kernels, PagedSpan, Segments};
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

/// Attention over blocks of 4 tokens of the last rows of sequences: `(stored, new)` tokens of each, whose blocks are
/// scattered over the pool. Also what plain attention over the whole sequences gives for the same rows.
fn paged(kernels: Kernels, sequences: &[(usize, usize)]) -> (Tensor, Tensor) {
    let lengths = sequences.iter().map(|(stored, new)| stored + new).collect::<Vec<_>>();
    let whole = random(5, &[lengths.iter().sum(), 8 * 24]).as_detached_tensor();
    let count = lengths.iter().map(|length| length.div_ceil(4)).sum::<usize>() as u32;
    let blocks = |seed| random(seed, &[count as usize + 1, 4, 48]).as_detached_tensor();
    let (keys, values) = (blocks(6), blocks(7));
    let mut next = 0;
    let tables = lengths.iter().map(|length| {
        let table = (next..next + length.div_ceil(4) as u32).map(|i| i * 7 % count.max(8));
        next += length.div_ceil(4) as u32;
        table.collect::<Vec<_>>()
    });
    let tables = tables.collect::<Vec<_>>();
    let (mut start, mut rows) = (0u32, Vec::new());
    let mut spans = Vec::new();
    for ((stored, new), table) in sequences.iter().zip(&tables) {
        let span = |stored, length| PagedSpan {
            stored,
            length,
            blocks: table,
        };
        let slots = span(0, stored + new).slots(4).collect::<Vec<_>>();
        let own = whole.narrow(0, start as usize, stored + new).unwrap();
        kernels.store(&own, &keys, &values, &slots, HEADS).unwrap();
        rows.extend(start + *stored as u32..start + (stored + new) as u32);
        start += (stored + new) as u32;
        spans.push(span(*stored, *new));
    }
    let rows = Tensor::new(rows, &Device::Cpu).unwrap();
    let new = whole.index_select(&rows, 0).unwrap();
    let mixed = kernels.paged_attention(&new, &keys, &values, &spans, HEADS).unwrap();
    let segments = Segments::consecutive(&lengths).causal();
    let plain = kernels.attention(&whole, HEADS, &segments).unwrap();
    (mixed, plain.index_select(&rows, 0).unwrap())
}

/// Fresh prompts, chunks of prompts and drawn tokens, at block borders and between them.
const SEQUENCES: [(usize, usize); 9] = [
    (0, 5),
    (0, 1),
    (3, 1),
    (8, 1),
    (4, 3),
    (7, 9),
    (0, 12),
    (15, 1),
    (12, 4),
];

#[test]
fn attention_over_blocks_equals_attention_over_whole_sequences() {
    for kernels in [Kernels::Auto, Kernels::Composed] {
        let (mixed, plain) = paged(kernels, &SEQUENCES);
        assert!(difference(&mixed, &plain) < TOLERANCE, "{kernels:?}");
    }
}

#[test]
fn a_chunk_is_computed_exactly_as_in_the_whole_prompt() {
    let (mixed, plain) = paged(Kernels::Auto, &[(4, 3), (7, 9), (33, 40)]);
    assert_eq!(flat(&mixed), flat(&plain));
}

#[test]
fn a_long_chunk_equals_the_whole_prompt() {
    let (mixed, plain) = paged(Kernels::Auto, &[(700, 530), (2, 2), (600, 1)]);
    assert!(difference(&mixed, &plain) < TOLERANCE);
}

#[test]
fn attention_of_many_rows_over_blocks_does_not_depend_on_threads() {
    let sequences = [(500, 1); 40];
    let threads = |count| rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
    let run = |count| flat(&threads(count).install(|| paged(Kernels::Auto, &sequences)).0);
    assert_eq!(run(1), run(3));
}

#[test]
fn what_is_written_into_blocks_is_the_same_fused_and_composed() {
    let run = |kernels: Kernels| {
        let qkv = random(1, &[3, 8 * 24]).as_detached_tensor();
        let (keys, values) = (
            random(2, &[5, 2, 48]).as_detached_tensor(),
            random(3, &[5, 2, 48]).as_detached_tensor(),
        );
        kernels.store(&qkv, &keys, &values, &[9, 0, 5], HEADS).unwrap();
        kernels.copy_blocks(&keys, &[(4, 1), (0, 3)]).unwrap();
        (flat(&keys), flat(&values))
    };
    let (fused, composed) = (run(Kernels::Auto), run(Kernels::Composed));
    assert_eq!(fused, composed);
    let qkv = flat(&random(1, &[3, 8 * 24]));
    let key = |row: usize| &qkv[row * 192 + 96..row * 192 + 144];
    assert_eq!(&fused.0[9 * 48..], key(0));
    assert_eq!(&fused.0[3 * 48..4 * 48], key(0), "block 4 was copied to block 1");
    assert_eq!(&fused.0[6 * 48..7 * 48], key(1), "block 0 was copied to block 3");
}

#[test]
fn a_slot_or_block_outside_the_pool_is_refused() {
    let qkv = random(1, &[1, 8 * 24]).as_detached_tensor();
    let blocks = random(2, &[2, 2, 48]).as_detached_tensor();
    assert!(
        Kernels::Auto
            .store(&qkv, &blocks, &blocks.copy().unwrap(), &[4], HEADS)
            .is_err()
    );
    assert!(Kernels::Auto.copy_blocks(&blocks, &[(0, 2)]).is_err());
    let span = PagedSpan {
        length: 1,
        stored: 2,
        blocks: &[0, 2],
    };
    let values = blocks.copy().unwrap();
    assert!(
        Kernels::Auto
            .paged_attention(&qkv, &blocks, &values, &[span], HEADS)
            .is_err()
    );
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

//! The least time that memory or arithmetic allow.

use flotilla_kernels::{Dtype, Float};
use half::bf16;
use serde::Serialize;

use crate::shape::{QwenVision, TextShape};

/// What a card reaches at best, measured before everything else.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceiling {
    /// Bytes per second of a large copy, read and written bytes both counted.
    pub bandwidth: f64,
    /// Operations per second of a large product of bf16 matrices.
    pub arithmetic: f64,
}

#[cfg(feature = "cuda")]
impl From<flotilla_kernels::bench::Ceilings> for Ceiling {
    fn from(measured: flotilla_kernels::bench::Ceilings) -> Self {
        Self {
            bandwidth: measured.bandwidth,
            arithmetic: measured.arithmetic,
        }
    }
}

/// The least seconds of something.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floor {
    /// Seconds.
    pub seconds: f64,
    /// What sets them: memory or arithmetic; both for the sum of parts that differ.
    pub bound: &'static str,
}

impl Floor {
    /// One after the other.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        let same = self.bound == next.bound || next.seconds == 0.0;
        Self {
            seconds: self.seconds + next.seconds,
            bound: if same { self.bound } else { "both" },
        }
    }
}

const BF16: Dtype = bf16::DTYPE;

/// Bytes that a decode step reads at least: every weight but the embedding table once, and the keys and values of
/// `contexts` tokens in all.
pub fn decode_bytes(shape: &TextShape, contexts: usize) -> f64 {
    (BF16.bytes() * (shape.read_parameters() + shape.kv_values() * contexts)) as f64
}

/// Operations of a decode step over `rows` sequences.
pub fn decode_operations(shape: &TextShape, rows: usize) -> f64 {
    shape.token_operations() * rows as f64
}

/// Operations of `tokens` tokens of each of `prompts` prompts after `stored` stored ones, with the head for the last tokens
/// alone; attention counts causal pairs.
pub fn prefill_operations(shape: &TextShape, prompts: usize, stored: usize, tokens: usize) -> f64 {
    let all = (prompts * tokens) as f64;
    let head = 2.0 * (shape.vocabulary * shape.hidden * prompts * tokens.saturating_sub(1)) as f64;
    let pairs = all * (stored as f64 + (tokens + 1) as f64 / 2.0);
    shape.token_operations() * all - head + shape.attention_operations(1) * pairs
}

/// Operations of one pass over `samples` sequences of `prompt` and `new` tokens, each computed whole, with the head for the new
/// ones alone; attention counts causal pairs.
pub fn forward_operations(shape: &TextShape, samples: usize, prompt: usize, new: usize) -> f64 {
    let sequence = (prompt + new) as f64;
    let head = 2.0 * (shape.vocabulary * shape.hidden * prompt) as f64;
    let pairs = sequence * (sequence + 1.0) / 2.0;
    samples as f64 * (shape.token_operations() * sequence - head + shape.attention_operations(1) * pairs)
}

/// Operations of one picture: matrices of every block and of the merger, attention in windows and over the whole.
pub fn vision_operations(shape: &QwenVision, patches: usize) -> f64 {
    let (hidden, inner, merged) = (shape.hidden, shape.intermediate, shape.merged());
    let block = 4 * hidden * hidden + 3 * hidden * inner;
    let matrices = shape.patch_values() * hidden + shape.depth * block;
    let merger = merged * merged + merged * shape.output;
    let unit = shape.merge * shape.merge;
    let window = (shape.window * shape.window * unit).min(patches);
    let seen = shape.full.len() * patches + (shape.depth - shape.full.len()) * window;
    let attention = 4.0 * (hidden * patches) as f64 * seen as f64;
    2.0 * (matrices * patches) as f64 + 2.0 * (merger * (patches / unit)) as f64 + attention
}

impl Ceiling {
    /// Of operations.
    pub fn arithmetic(&self, operations: f64) -> Floor {
        Floor {
            seconds: operations / self.arithmetic,
            bound: "arithmetic",
        }
    }

    /// Of a decode step over `rows` sequences with `contexts` tokens in all; a prefix that several share counts once.
    pub fn decode(&self, shape: &TextShape, rows: usize, contexts: usize) -> Floor {
        let memory = decode_bytes(shape, contexts) / self.bandwidth;
        let arithmetic = decode_operations(shape, rows) / self.arithmetic;
        Floor {
            seconds: memory.max(arithmetic),
            bound: if memory > arithmetic { "memory" } else { "arithmetic" },
        }
    }

    /// Of drawing `new` tokens for each of `rows` sequences whose contexts have `contexts` tokens in all before; the first of
    /// them comes with the prompt.
    pub fn draws(&self, shape: &TextShape, rows: usize, contexts: usize, new: usize) -> Floor {
        let steps = (1..new).map(|drawn| self.decode(shape, rows, contexts + rows * drawn));
        let none = Floor {
            seconds: 0.0,
            bound: "memory",
        };
        steps.reduce(Floor::then).unwrap_or(none)
    }

    /// Of whole requests: `prompts` prompts of `tokens` tokens, `n` samples of each with `new` tokens.
    pub fn requests(&self, shape: &TextShape, (prompts, n): (usize, usize), tokens: usize, new: usize) -> Floor {
        let prefill = self.arithmetic(prefill_operations(shape, prompts, 0, tokens));
        prefill.then(self.draws(shape, prompts * n, prompts * tokens, new))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub const CEILING: Ceiling = Ceiling {
        bandwidth: 3e12,
        arithmetic: 800e12,
    };

    pub fn seven() -> TextShape {
        TextShape::named("qwen2.5-vl-7b").unwrap()
    }

    #[test]
    fn a_prompt_in_two_parts_costs_what_it_costs_at_once_but_for_the_head() {
        let shape = seven();
        let parts = prefill_operations(&shape, 3, 0, 1000) + prefill_operations(&shape, 3, 1000, 536);
        let head = 2.0 * (shape.vocabulary * shape.hidden * 3) as f64;
        let whole = prefill_operations(&shape, 3, 0, 1536);
        assert!((parts - whole - head).abs() < 1e-9 * whole, "{parts} {whole}");
    }

    #[test]
    fn samples_of_one_prompt_cost_less_than_prompts_of_their_own() {
        let shape = seven();
        let group = CEILING.requests(&shape, (1, 128), 1536, 256);
        let alone = CEILING.requests(&shape, (128, 1), 1536, 256);
        assert_eq!((group.bound, alone.bound), ("both", "both"));
        assert!(group.seconds < alone.seconds / 3.0, "{group:?} {alone:?}");
        // 255 steps that read at least the weights.
        assert!(group.seconds > 255.0 * decode_bytes(&shape, 0) / CEILING.bandwidth);
    }

    #[test]
    fn the_first_token_comes_with_the_prompt() {
        let shape = seven();
        let one = CEILING.requests(&shape, (4, 1), 512, 1);
        assert_eq!(one, CEILING.arithmetic(prefill_operations(&shape, 4, 0, 512)));
        let two = CEILING.requests(&shape, (4, 1), 512, 2);
        let step = CEILING.decode(&shape, 4, 4 * 513);
        assert!((two.seconds - one.seconds - step.seconds).abs() < 1e-12);
    }

    #[test]
    fn many_rows_are_bound_by_arithmetic() {
        let shape = seven();
        assert_eq!(CEILING.decode(&shape, 1, 1024).bound, "memory");
        assert_eq!(CEILING.decode(&shape, 4096, 4096).bound, "arithmetic");
    }
}

//! Where a step of GRPO has its memory: while samples are drawn, and while they are learned from.
//!
//! Weights, gradients and moments stay. The engine's keys, values and activations are freed before the first gradient, since
//! an update makes them worthless; the learner's activations are freed before the engine comes again. So each of the two has
//! what the other has had.

use std::fmt;

use flotilla_kernels::{Dtype, Float};
use half::bf16;
use serde::Serialize;

use super::{Grpo, picture};
use crate::{
    learner::{Keep, Part, Plan, Settings},
    shape::{QwenVision, TextShape},
};

const BF16: Dtype = bf16::DTYPE;

/// Tokens of a block of keys and values.
pub(super) const BLOCK: usize = 16;

/// Tokens of a step of the engine.
pub(super) const STEP_TOKENS: usize = 8192;

/// The least tokens of a micro-batch.
const MICRO_BATCH: usize = 8192;

/// Blocks beyond what sequences take.
const SPARE_BLOCKS: usize = 64;

/// Beside the reserve of [`Plan::fits`]: what sizes here leave out, such as graphs and scratch memory of attention.
const RESERVE: usize = 1 << 30;

/// The plan of a step.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Sequences that are sampled at once.
    pub rows: usize,
    /// Blocks of keys and values.
    pub kv_blocks: usize,
    /// Whether there is a reference.
    pub reference: bool,
    /// Of the learner while samples are drawn.
    pub rest: Settings,
    /// Of the learner while it learns.
    pub settings: Settings,
    /// Bytes while samples are drawn.
    pub sampling: Vec<(&'static str, usize)>,
    /// Bytes while they are learned from.
    pub learning: Vec<(&'static str, usize)>,
    /// Bytes of the card.
    pub card: usize,
}

/// In a document.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    /// Sequences that are sampled at once.
    pub rows: usize,
    /// Whether there was a reference.
    pub reference: bool,
    /// The most tokens of a micro-batch.
    pub micro_batch: usize,
    /// Layers whose attention is kept for the backward pass.
    pub kept_attention: usize,
    /// Layers whose MLP is kept.
    pub kept_mlp: usize,
    /// Bytes as planned while samples are drawn.
    pub sampling_bytes: usize,
    /// Bytes as planned while they are learned from.
    pub learning_bytes: usize,
}

/// What is there all the time.
struct Lasting {
    /// Weights, gradients and moments with a learner at rest.
    learner: usize,
    reference: usize,
    pictures: usize,
}

impl Lasting {
    /// Beside what the learner plans for itself.
    fn others(&self) -> usize {
        self.reference + self.pictures + RESERVE
    }
}

impl Memory {
    /// Of a step on a card of `card` bytes. A reference is there if it leaves room for at least half of the rows. None if not
    /// even one sequence at a time fits.
    pub fn plan(shape: &TextShape, tower: Option<&QwenVision>, step: &Grpo, card: usize) -> Option<Self> {
        let without = Self::with_reference(shape, tower, step, card, false);
        let with = step
            .reference
            .then(|| Self::with_reference(shape, tower, step, card, true))
            .flatten();
        match (with, without) {
            (Some(with), Some(without)) if 2 * with.rows >= without.rows => Some(with),
            (_, without) => without,
        }
    }

    fn with_reference(
        shape: &TextShape,
        tower: Option<&QwenVision>,
        step: &Grpo,
        card: usize,
        reference: bool,
    ) -> Option<Self> {
        let rest = settings(1, 1);
        let lasting = Lasting {
            learner: Plan::new(shape, BF16, &rest, 0, card).bytes(),
            reference: if reference {
                shape.parameters() * BF16.bytes()
            } else {
                0
            },
            pictures: tower.map_or(0, |tower| picture::bytes(tower, step.lengths.prompts)),
        };
        let (lengths, left) = (step.lengths, card.checked_sub(lasting.others())?);
        // As many whole sequences as come near to the size that is wanted, or exceed it.
        let sequences = MICRO_BATCH.div_ceil(lengths.sequence());
        let wanted = settings(sequences * lengths.sequence(), sequences * lengths.new_tokens);
        let settings = match step.keep {
            true => Plan::fit(shape, BF16, &wanted, 0, left)?,
            false => wanted,
        };
        let learning = Plan::new(shape, BF16, &settings, 0, left);
        let rows = (0..=step.rows.min(lengths.samples()).ilog2())
            .map(|half| step.rows.min(lengths.samples()) >> half)
            .find(|rows| {
                let engine = engine_bytes(shape, *rows) + blocks(step, *rows) * block_bytes(shape);
                lasting.learner + engine + RESERVE <= left
            })?;
        let kv_blocks = blocks(step, rows);
        let parts = |own: Vec<(&'static str, usize)>| {
            let lasting = [("reference", lasting.reference), ("pictures", lasting.pictures)];
            let all = own.into_iter().chain(lasting);
            all.filter(|(_, bytes)| *bytes > 0).collect::<Vec<_>>()
        };
        learning.fits().then(|| Self {
            sampling: parts(vec![
                ("weights, gradients, moments", lasting.learner),
                ("keys and values", kv_blocks * block_bytes(shape)),
                ("steps of the engine", engine_bytes(shape, rows)),
            ]),
            learning: parts(vec![
                (
                    "weights, gradients, moments",
                    [Part::Weights, Part::Gradients, Part::Moments]
                        .map(|part| learning.part(part))
                        .iter()
                        .sum(),
                ),
                ("inputs of layers", learning.part(Part::Inputs)),
                ("kept activations", learning.part(Part::Kept)),
                (
                    "one layer and the head",
                    [Part::Layer, Part::Head, Part::Products]
                        .map(|part| learning.part(part))
                        .iter()
                        .sum(),
                ),
            ]),
            rows,
            kv_blocks,
            reference,
            rest,
            settings,
            card,
        })
    }

    /// In a document.
    pub fn summary(&self) -> Summary {
        let Keep { attention, mlp } = self.settings.keep;
        Summary {
            rows: self.rows,
            reference: self.reference,
            micro_batch: self.settings.tokens,
            kept_attention: attention,
            kept_mlp: mlp,
            sampling_bytes: bytes(&self.sampling),
            learning_bytes: bytes(&self.learning),
        }
    }
}

fn bytes(parts: &[(&'static str, usize)]) -> usize {
    parts.iter().map(|(_, bytes)| bytes).sum()
}

fn settings(tokens: usize, scored: usize) -> Settings {
    Settings {
        scored,
        logit_rows: scored.clamp(1, 4096),
        ..Settings::new(tokens)
    }
}

/// Blocks of keys and values of so many rows: prompts of groups once, samples each its own. One prompt more is there while
/// the last samples of one group run beside the first of the next.
fn blocks(step: &Grpo, rows: usize) -> usize {
    let lengths = step.lengths;
    let prompts = (rows.div_ceil(lengths.group) + 1).min(lengths.prompts);
    prompts * (lengths.prompt_tokens / BLOCK + 1) + rows * (lengths.new_tokens.div_ceil(BLOCK) + 2) + SPARE_BLOCKS
}

fn block_bytes(shape: &TextShape) -> usize {
    BLOCK * shape.kv_values() * BF16.bytes()
}

/// Activations of the engine's largest step, and logits, as the text model rounds them up.
fn engine_bytes(shape: &TextShape, rows: usize) -> usize {
    let token = 3 * shape.hidden + shape.packed_width() + 2 * shape.query_width() + 3 * shape.intermediate;
    let sequences = 2 * rows.next_multiple_of(32);
    (STEP_TOKENS + 256) * token * BF16.bytes() + sequences * (shape.vocabulary * 4 + shape.hidden * BF16.bytes())
}

/// Both phases in GB of a thousand million bytes.
impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gigabytes = |bytes: usize| bytes as f64 / 1e9;
        for (phase, parts) in [("sampling", &self.sampling), ("learning", &self.learning)] {
            let named = parts
                .iter()
                .map(|(name, bytes)| format!("{name} {:.1}", gigabytes(*bytes)));
            let named = named.collect::<Vec<_>>().join(", ");
            writeln!(f, "GB {phase}: {:.1} = {named}", gigabytes(bytes(parts)))?;
        }
        let Summary {
            rows,
            micro_batch,
            kept_attention,
            kept_mlp,
            ..
        } = self.summary();
        write!(
            f,
            "{rows} sequences at once, micro-batches of {micro_batch} tokens, attention of {kept_attention} layers and MLPs of \
             {kept_mlp} kept"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::VisionShape;

    /// Bytes of an H100 (80 GB) and an H200 (141 GB) as the driver counts them.
    const H100: usize = 85_029_158_912;
    const H200: usize = 150_109_880_320;

    fn plan(name: &str, lengths: &str, card: usize, change: impl FnOnce(&mut Grpo)) -> Option<Memory> {
        let mut step = Grpo::new(lengths.parse().unwrap());
        change(&mut step);
        let tower = match VisionShape::named(name).unwrap() {
            VisionShape::Qwen(tower) => Some(tower),
            VisionShape::Siglip(_) => None,
        };
        Memory::plan(&TextShape::named(name).unwrap(), tower.as_ref(), &step, card)
    }

    #[test]
    fn a_card_of_80_gb_keeps_everything_without_a_reference_and_a_part_beside_one() {
        let shape = TextShape::named("qwen2.5-vl-7b").unwrap();
        let alone = plan("qwen2.5-vl-7b", "8x8x1536+512", H100, |step| step.reference = false).unwrap();
        assert_eq!((alone.settings.keep, alone.rows), (Keep::all(&shape), 64));
        let beside = plan("qwen2.5-vl-7b", "8x8x1536+512", H100, |_| {}).unwrap();
        assert!(beside.reference && beside.rows == 64);
        let keep = beside.settings.keep;
        assert!(keep.attention == 28 && keep.mlp > 4 && keep.mlp < 28, "{keep:?}");
        let nothing = plan("qwen2.5-vl-7b", "8x8x1536+512", H100, |step| step.keep = false).unwrap();
        assert_eq!(nothing.settings.keep, Keep::default());
    }

    #[test]
    fn micro_batches_are_whole_sequences_of_at_least_8192_tokens() {
        for (lengths, tokens) in [
            ("8x8x1536+512", 8192),
            ("64x8x1536+1024", 10_240),
            ("8x8x512+256", 8448),
        ] {
            let memory = plan("qwen2.5-vl-7b", lengths, H200, |_| {}).unwrap();
            assert_eq!(memory.settings.tokens, tokens, "{lengths}");
        }
    }

    #[test]
    fn both_phases_stay_below_the_card() {
        for (name, lengths, card) in [
            ("qwen2.5-vl-7b", "64x8x1536+1024", H100),
            ("qwen2.5-vl-7b", "64x8x1536+1024", H200),
            ("qwen2.5-vl-3b", "64x8x1536+1024", H100),
            ("llava-onevision-0.5b", "64x8x1536+1024", H100),
        ] {
            let memory = plan(name, lengths, card, |_| {}).unwrap();
            let Summary {
                sampling_bytes,
                learning_bytes,
                rows,
                ..
            } = memory.summary();
            assert!(
                sampling_bytes + RESERVE <= card && learning_bytes + RESERVE <= card,
                "{name}\n{memory}"
            );
            assert!(rows >= 128, "{name}\n{memory}");
        }
    }

    #[test]
    fn what_does_not_fit_has_no_plan() {
        assert!(plan("qwen2.5-vl-72b", "8x8x1536+512", H200, |_| {}).is_none());
        assert!(plan("qwen2.5-vl-7b", "8x8x1536+512", 40_000_000_000, |_| {}).is_none());
    }

    #[test]
    fn prompts_of_a_group_count_once() {
        let step = Grpo::new("32x8x1536+512".parse().unwrap());
        // Of 33 prompts that could be there at once there are 32.
        assert_eq!(blocks(&step, 256), 32 * 97 + 256 * 34 + SPARE_BLOCKS);
        assert_eq!(blocks(&step, 8), 2 * 97 + 8 * 34 + SPARE_BLOCKS);
    }
}

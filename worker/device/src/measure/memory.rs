//! Where a step of GRPO has its memory: while samples are drawn, and while they are learned from.
//!
//! Weights, gradients and moments stay. The engine's keys, values and activations are freed before the first gradient, since
//! an update makes them worthless; the learner's activations are freed before the engine comes again. So each of the two has
//! what the other has had.

use std::{fmt, ops::Range};

use flotilla_kernels::{Dtype, Float};
use half::bf16;
use serde::Serialize;

use super::{Grpo, Tower, picture};
use crate::{
    learner::{Keep, Part, Plan, Settings, Shapes},
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

/// Bytes of what is there beside the learner.
#[derive(Default)]
struct Beside {
    /// The second copy of the weights, that of a trained tower too.
    reference: usize,
    /// A tower that is not trained.
    tower: usize,
    /// Features of pictures while samples are drawn.
    sampling: usize,
    /// Features and gradients by them while samples are learned from.
    learning: usize,
}

impl Beside {
    fn new(shape: &TextShape, shown: Option<Shown<'_>>, step: &Grpo, reference: bool) -> Self {
        let second = if reference {
            shape.parameters() * BF16.bytes()
        } else {
            0
        };
        let Some(Shown { tower, size, trained }) = shown else {
            return Self {
                reference: second,
                ..Self::default()
            };
        };
        let lengths = step.lengths;
        let (weights, each) = (tower_bytes(tower), size.feature_bytes(tower));
        let all = lengths.prompts * each;
        // Features of a micro-batch behind one another.
        let micro_batch = sequences(step) * each;
        if !trained {
            return Self {
                reference: second,
                tower: weights,
                sampling: all,
                learning: all + micro_batch,
            };
        }
        let of_update = prompts_of_update(step) * each;
        // Features by the tower that sampled are there until the first update; by the reference, those of one update at a time.
        let scored = all + if reference { of_update } else { 0 };
        // Gradients are sums in f32.
        let learned = of_update + 2 * of_update;
        Self {
            reference: if reference { second + weights } else { 0 },
            tower: 0,
            sampling: all,
            learning: scored.max(learned) + micro_batch,
        }
    }
}

/// Pictures of a step.
#[derive(Clone, Copy)]
struct Shown<'a> {
    tower: &'a QwenVision,
    size: picture::Size,
    trained: bool,
}

impl Memory {
    /// Of a step on a card of `card` bytes, with the pictures that it has by [`Grpo::picture`]. A reference is there if it
    /// leaves room for at least half of the rows. None if not even one sequence at a time fits.
    pub fn plan(shape: &TextShape, tower: Option<&QwenVision>, step: &Grpo, card: usize) -> Option<Self> {
        let shown = tower.and_then(|tower| {
            Some(Shown {
                tower,
                size: step.picture(tower)?,
                trained: step.tower == Tower::Trained,
            })
        });
        let without = Self::with_reference(shape, shown, step, card, false);
        let with = step
            .reference
            .then(|| Self::with_reference(shape, shown, step, card, true))
            .flatten();
        match (with, without) {
            (Some(with), Some(without)) if 2 * with.rows >= without.rows => Some(with),
            (_, without) => without,
        }
    }

    fn with_reference(
        shape: &TextShape,
        shown: Option<Shown<'_>>,
        step: &Grpo,
        card: usize,
        reference: bool,
    ) -> Option<Self> {
        let lengths = step.lengths;
        let beside = Beside::new(shape, shown, step, reference);
        let trained = shown.filter(|shown| shown.trained);
        let shapes = Shapes {
            text: shape,
            vision: trained.map(|shown| shown.tower),
        };
        let patches = shown.map_or(0, |shown| shown.size.patches() * shown.size.together());
        let left = |pictures: usize| card.checked_sub(beside.reference + beside.tower + pictures + RESERVE);
        // Pictures are encoded before the engine is there.
        let rest = Settings {
            encoded: 0,
            ..settings(1, 1, patches)
        };
        let at_rest = Plan::new(shapes, BF16, &rest, 0, card).bytes();
        let sequences = sequences(step);
        let wanted = settings(sequences * lengths.sequence(), sequences * lengths.new_tokens, patches);
        let for_learning = left(beside.learning)?;
        let settings = match step.keep {
            true => Plan::fit(shapes, BF16, &wanted, 0, for_learning)?,
            false => wanted,
        };
        let learning = Plan::new(shapes, BF16, &settings, 0, for_learning);
        let for_sampling = left(beside.sampling)?;
        let rows = (0..=step.rows.min(lengths.samples()).ilog2())
            .map(|half| step.rows.min(lengths.samples()) >> half)
            .find(|rows| {
                let engine = engine_bytes(shape, *rows) + blocks(step, *rows) * block_bytes(shape);
                at_rest + engine + RESERVE <= for_sampling
            })?;
        let kv_blocks = blocks(step, rows);
        let parts = |own: Vec<(&'static str, usize)>, pictures: usize| {
            let others = [
                ("reference", beside.reference),
                ("frozen tower", beside.tower),
                ("pictures", pictures),
            ];
            let all = own.into_iter().chain(others);
            all.filter(|(_, bytes)| *bytes > 0).collect::<Vec<_>>()
        };
        let together = |parts: &[Part]| parts.iter().map(|part| learning.part(*part)).sum::<usize>();
        learning.fits().then(|| Self {
            sampling: parts(
                vec![
                    ("weights, gradients, moments", at_rest),
                    ("keys and values", kv_blocks * block_bytes(shape)),
                    ("steps of the engine", engine_bytes(shape, rows)),
                ],
                beside.sampling,
            ),
            learning: parts(
                vec![
                    (
                        "weights, gradients, moments",
                        together(&[Part::Weights, Part::Gradients, Part::Moments, Part::Tower]),
                    ),
                    ("inputs of layers", learning.part(Part::Inputs)),
                    ("kept activations", learning.part(Part::Kept)),
                    (
                        "one layer and the head",
                        together(&[Part::Layer, Part::Head, Part::Products]),
                    ),
                    ("passes of the tower", learning.part(Part::Patches)),
                ],
                beside.learning,
            ),
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

/// Of micro-batches of so many tokens, with so many patches at once through the tower.
fn settings(tokens: usize, scored: usize, patches: usize) -> Settings {
    Settings {
        scored,
        logit_rows: scored.clamp(1, 4096),
        patches,
        encoded: patches,
        ..Settings::new(tokens)
    }
}

/// Sequences of a micro-batch: as many whole ones as come near to the size that is wanted, or exceed it.
fn sequences(step: &Grpo) -> usize {
    MICRO_BATCH.div_ceil(step.lengths.sequence())
}

/// The most prompts of which an update has samples.
fn prompts_of_update(step: &Grpo) -> usize {
    let group = step.lengths.group;
    let prompts = |update: Range<usize>| update.end.div_ceil(group) - update.start / group;
    step.lengths.updates().into_iter().map(prompts).max().unwrap_or(0)
}

/// Weights of a tower, with the zeros that fill up its MLP.
fn tower_bytes(tower: &QwenVision) -> usize {
    let filling = tower.depth * (tower.padded() - tower.intermediate) * (3 * tower.hidden + 2);
    (tower.parameters() + filling) * BF16.bytes()
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
        Memory::plan(&TextShape::named(name).unwrap(), tower(name).as_ref(), &step, card)
    }

    fn tower(name: &str) -> Option<QwenVision> {
        match VisionShape::named(name).unwrap() {
            VisionShape::Qwen(tower) => Some(tower),
            VisionShape::Siglip(_) => None,
        }
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
    fn the_share_of_one_of_the_papers_gpus_fits_beside_a_reference_with_a_trained_tower() {
        for lengths in ["32x8x1536+512", "64x5x431+300/4", "16x8x1536+1024"] {
            let memory = plan("qwen2.5-vl-7b", lengths, H100, |_| {}).unwrap();
            assert!(
                memory.reference && memory.settings.keep.attention > 0,
                "{lengths}\n{memory}"
            );
            let both = Memory::plan(
                &TextShape::named("qwen2.5-vl-7b").unwrap(),
                Some(&tower("qwen2.5-vl-7b").unwrap()),
                &Grpo::new(lengths.parse().unwrap()),
                H200,
            );
            assert_eq!(both.unwrap().rows, memory.rows, "{lengths}\n{memory}");
        }
    }

    #[test]
    fn a_frozen_tower_leaves_more_room_for_activations() {
        let part = |parts: &[(&'static str, usize)], name: &str| {
            let found = parts.iter().find(|(part, _)| *part == name);
            found.map_or(0, |(_, bytes)| *bytes)
        };
        let trained = plan("qwen2.5-vl-7b", "32x8x1536+512", H100, |_| {}).unwrap();
        let frozen = plan("qwen2.5-vl-7b", "32x8x1536+512", H100, |step| {
            step.tower = Tower::Frozen;
        })
        .unwrap();
        let (of_tower, of_text) = (trained.settings.keep, frozen.settings.keep);
        assert!(
            of_tower.attention + of_tower.mlp < of_text.attention + of_text.mlp,
            "{trained}\n{frozen}"
        );
        // One copy of the tower's weights with gradients and two moments of a byte, and a second one with the reference.
        let weights = tower_bytes(&tower("qwen2.5-vl-7b").unwrap());
        let lasting = part(&trained.learning, "weights, gradients, moments")
            - part(&frozen.learning, "weights, gradients, moments");
        assert_eq!(lasting / (weights / 100), 301, "{trained}");
        assert_eq!(
            part(&trained.learning, "reference") - part(&frozen.learning, "reference"),
            weights
        );
        assert_eq!(part(&frozen.learning, "frozen tower"), weights);
        // 32 pictures as sampled and 16 by the reference, or 16 with gradients in f32; and four of a micro-batch.
        let features = 1369 * 3584 * 2;
        assert_eq!(part(&trained.learning, "pictures"), (48 + 4) * features);
        assert_eq!(part(&frozen.learning, "pictures"), (32 + 4) * features);
        assert_eq!(part(&trained.sampling, "pictures"), 32 * features);
    }

    #[test]
    fn prompts_of_an_update_are_counted_where_it_has_a_part_of_their_samples() {
        let prompts = |lengths: &str| prompts_of_update(&Grpo::new(lengths.parse().unwrap()));
        assert_eq!(
            ["32x8x1536+512", "64x5x431+300/4", "5x3x9+9/2"].map(prompts),
            [16, 16, 3]
        );
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

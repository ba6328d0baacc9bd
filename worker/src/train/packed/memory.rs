//! What learner and engine of one process get of a card's memory, before anything is allocated.

use flotilla_device::{
    learner::{Plan, Settings, Shapes},
    vision::MOST_PATCHES,
};
use flotilla_engine::Limits;
use flotilla_kernels::{Dtype, optimizer::StateKind};

use crate::train::error::TrainError;

/// Tokens of a micro-batch, from the size at which products run at full speed to what a small card may have room for.
const MICRO_BATCHES: [usize; 4] = [8192, 4096, 2048, 1024];
/// Samples that are drawn at once, at most.
const MOST_ROWS: usize = 256;
/// With fewer at once most of a decode step is reading the weights: a plan with more room for them is looked for first.
const FEW_ROWS: usize = 32;

/// What a run asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wanted {
    /// Of weights and gradients.
    pub format: Dtype,
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Tokens of the longest completion.
    pub completion: usize,
    /// Samples of a step.
    pub samples: usize,
    /// Whether the embedding table and the head are trained.
    pub tables: bool,
    /// Patches of the largest picture.
    pub patches: usize,
    /// The form of moments that a checkpoint has; None at the beginning of a run.
    pub states: Option<StateKind>,
}

/// What it gets.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// Of the learner.
    pub settings: Settings,
    /// Blocks of keys and values of the engine.
    pub kv_blocks: usize,
    /// Bytes of all of it by purpose.
    pub plan: Plan,
}

impl Wanted {
    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.prompt + self.completion
    }

    /// Samples that the engine computes at once.
    pub fn rows(&self) -> usize {
        self.samples.clamp(1, MOST_ROWS)
    }

    /// Forms of the moments, the most exact first.
    fn states(&self) -> Vec<StateKind> {
        match (self.states, self.format) {
            (Some(states), _) => vec![states],
            (None, Dtype::F32) => vec![StateKind::F32],
            (None, _) => vec![StateKind::Bf16, StateKind::Bit8],
        }
    }

    fn settings(&self) -> Vec<Settings> {
        let longest = self.longest();
        let sizes = MICRO_BATCHES
            .into_iter()
            .filter(|size| *size > longest)
            .chain([longest]);
        let sizes = sizes.collect::<Vec<_>>();
        let of = |states: StateKind| {
            let settings = sizes.iter().map(move |tokens| Settings {
                gradients: self.format,
                states,
                tables: self.tables,
                patches: self.patches.max(MOST_PATCHES),
                encoded: self.patches.max(MOST_PATCHES),
                ..Settings::new(*tokens)
            });
            settings.collect::<Vec<_>>()
        };
        self.states().into_iter().flat_map(of).collect()
    }
}

/// Pictures of a run, as far as their features take memory beside the plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shows {
    /// Different pictures.
    pub pictures: usize,
    /// Those of one update, at most.
    pub of_update: usize,
    /// Numbers of the features of the largest one.
    pub numbers: usize,
    /// Bytes of a number.
    pub bytes: usize,
    /// Whether their tower is trained.
    pub trained: bool,
    /// Whether a reference has a tower of its own.
    pub reference: bool,
}

impl Shows {
    /// Bytes of the features of all.
    pub fn features(self) -> usize {
        self.pictures * self.numbers * self.bytes
    }

    /// Pictures of which features are held at once, beside those that the engine keeps: those of an update.
    pub fn at_once(self) -> usize {
        self.of_update.min(self.pictures).max(1)
    }

    /// Bytes that are still to come where the engine keeps so many bytes of features: those, the features that an update or a
    /// part of what is scored holds beside them (the reference's, or what the engine has no room for), and the gradients by them.
    pub fn to_come(self, kept: usize) -> usize {
        let beside = self.reference || self.features() > kept;
        let held = usize::from(beside) * self.at_once() * self.numbers * self.bytes;
        let summed = usize::from(self.trained) * self.of_update.min(self.pictures);
        kept + held + summed * self.numbers * size_of::<f32>()
    }
}

/// Divides `card` bytes, those of the weights included: the most exact moments that leave the engine room for some samples, the
/// largest micro-batch of those; then keys and values for all samples of a step, but no more than half of what is left; then
/// as many activations as there is room for.
///
/// # Errors
/// Not even one sample and the smallest micro-batch fit: the error has the plan.
pub fn divide<'a>(
    shapes: impl Into<Shapes<'a>>,
    wanted: &Wanted,
    limits: &Limits,
    card: usize,
) -> Result<Share, TrainError> {
    let shapes = shapes.into();
    let block = limits.block_size * shapes.text.kv_values() * wanted.format.bytes();
    // One block more for a prompt that is kept while its samples go on.
    let of_rows = |rows: usize| rows * (limits.blocks_of(wanted.prompt, wanted.completion) + 1);
    let settings = wanted.settings();
    for least in [wanted.rows().min(FEW_ROWS), 1] {
        for settings in &settings {
            let blocks_least = of_rows(least);
            let plan = Plan::new(shapes, wanted.format, settings, blocks_least * block, card);
            if !plan.fits() {
                continue;
            }
            let left = plan.left();
            let more = (left / 2 / block).min(of_rows(wanted.rows()) - blocks_least);
            let kv_blocks = blocks_least + more;
            let pool = kv_blocks * block;
            let Some(settings) = Plan::fit(shapes, wanted.format, settings, pool, card) else {
                continue;
            };
            return Ok(Share {
                plan: Plan::new(shapes, wanted.format, &settings, pool, card),
                settings,
                kv_blocks,
            });
        }
    }
    let smallest = settings
        .last()
        .copied()
        .unwrap_or_else(|| Settings::new(wanted.longest()));
    let plan = Plan::new(shapes, wanted.format, &smallest, of_rows(1) * block, card);
    Err(TrainError::Invalid(format!(
        "this model does not fit into the GPU with its gradients and moments; the smallest plan:\n{plan}\nTake a GPU with more memory, \
         precision BF16, freeze the embeddings, or shorten prompts and completions ({} and {} tokens)",
        wanted.prompt, wanted.completion
    )))
}

#[cfg(test)]
mod tests {
    use flotilla_device::{TextShape, VisionShape};

    use super::*;

    const H100: usize = 84_000_000_000;

    fn wanted(format: Dtype) -> Wanted {
        Wanted {
            format,
            prompt: 1536,
            completion: 512,
            samples: 2048,
            tables: true,
            patches: 0,
            states: None,
        }
    }

    fn shape(name: &str) -> TextShape {
        TextShape::named(name).expect("a released shape")
    }

    #[test]
    fn a_7b_model_learns_on_80_gigabytes_and_has_the_most_exact_moments_that_fit() {
        let shape = shape("qwen2.5-vl-7b");
        let share = |card| divide(&shape, &wanted(Dtype::Bf16), &Limits::default(), card).expect("fits");
        let reference = 2 * shape.parameters();
        let [alone, beside, small] = [H100, H100 - reference, H100 - 22_000_000_000].map(share);
        assert_eq!((alone.settings.states, alone.settings.tokens), (StateKind::Bf16, 8192));
        assert_eq!(
            (beside.settings.states, beside.settings.tokens),
            (StateKind::Bf16, 4096)
        );
        assert_eq!(small.settings.states, StateKind::Bit8);
        for share in [alone, beside, small] {
            assert!(share.kv_blocks >= 32 * 128 && share.plan.fits(), "{}", share.plan);
        }
    }

    #[test]
    fn its_vision_tower_is_trained_with_it() {
        let (text, vision) = (shape("qwen2.5-vl-7b"), VisionShape::named("qwen2.5-vl-7b"));
        let Some(VisionShape::Qwen(tower)) = vision else {
            panic!("a tower of Qwen2.5-VL")
        };
        let shapes = Shapes {
            text: &text,
            vision: Some(&tower),
        };
        let share = divide(shapes, &wanted(Dtype::Bf16), &Limits::default(), H100).expect("fits");
        let alone = divide(&text, &wanted(Dtype::Bf16), &Limits::default(), H100).expect("fits");
        assert!(
            share.plan.fits() && share.settings.keep.mlp < alone.settings.keep.mlp,
            "{}",
            share.plan
        );
    }

    #[test]
    fn a_small_model_keeps_everything_and_has_room_for_every_sample() {
        let share = divide(
            &shape("llava-onevision-0.5b"),
            &wanted(Dtype::F32),
            &Limits::default(),
            H100,
        )
        .expect("fits");
        assert_eq!(share.settings.states, StateKind::F32);
        assert_eq!(share.settings.keep.attention, 24);
        assert_eq!(share.kv_blocks, MOST_ROWS * 129);
    }

    #[test]
    fn features_are_counted_where_they_are_held_and_once() {
        let frozen = Shows {
            pictures: 10,
            of_update: 4,
            numbers: 100,
            bytes: 2,
            trained: false,
            reference: false,
        };
        assert_eq!((frozen.features(), frozen.at_once()), (2000, 4));
        assert_eq!(frozen.to_come(2000), 2000, "the engine keeps all of them");
        assert_eq!(frozen.to_come(500), 500 + 4 * 200);
        let trained = Shows {
            trained: true,
            reference: true,
            ..frozen
        };
        assert_eq!(trained.to_come(2000), 2000 + 4 * 200 + 4 * 400);
        let none = Shows { pictures: 0, ..trained };
        assert_eq!((none.at_once(), none.features()), (1, 0));
    }

    #[test]
    fn a_picture_of_more_patches_than_usual_can_be_learned_from() {
        let wanted = Wanted {
            patches: 3 * MOST_PATCHES,
            ..wanted(Dtype::Bf16)
        };
        let share = divide(&shape("qwen2.5-vl-3b"), &wanted, &Limits::default(), H100).expect("fits");
        assert_eq!(
            (share.settings.patches, share.settings.encoded),
            (wanted.patches, wanted.patches)
        );
    }

    #[test]
    fn a_run_goes_on_with_the_moments_of_its_checkpoint() {
        let wanted = Wanted {
            states: Some(StateKind::Bit8),
            ..wanted(Dtype::Bf16)
        };
        let share = divide(&shape("qwen2.5-vl-3b"), &wanted, &Limits::default(), H100).expect("fits");
        assert_eq!(share.settings.states, StateKind::Bit8);
    }

    #[test]
    fn what_does_not_fit_is_said_with_the_plan() {
        let refused = divide(&shape("qwen2.5-vl-72b"), &wanted(Dtype::Bf16), &Limits::default(), H100);
        let error = refused.expect_err("146 GB of weights").to_string();
        assert!(
            error.contains("weights") && error.contains("does not fit") && error.contains("1536"),
            "{error}"
        );
    }
}

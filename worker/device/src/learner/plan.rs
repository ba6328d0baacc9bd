//! How much memory learning takes, computed before anything is allocated; the learner allocates by the same numbers.

use std::fmt;

use flotilla_kernels::{Dtype, optimizer::StateKind};

use super::{batch, vision};
use crate::{
    shape::{QwenVision, TextShape},
    vision::MOST_PATCHES,
};

/// What of each layer is kept from the forward pass for the backward pass. Its input is; what is not kept is computed again.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Keep {
    /// Layers, from the first, whose turned queries, keys and values, attention output and sum after the attention are kept:
    /// spares two of the four products that would be computed again, and the attention.
    pub attention: usize,
    /// Layers, from the first, whose gate and up are kept: spares the largest product.
    pub mlp: usize,
}

impl Keep {
    /// Everything of every layer: no product is computed twice.
    pub fn all(shape: &TextShape) -> Self {
        Self {
            attention: shape.layers,
            mlp: shape.layers,
        }
    }
}

/// Sizes and formats of learning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// The most tokens of a micro-batch.
    pub tokens: usize,
    /// The most scored tokens of a micro-batch.
    pub scored: usize,
    /// The most sequences of a micro-batch.
    pub sequences: usize,
    /// Rows of logits that are held at once.
    pub logit_rows: usize,
    /// What is kept for the backward pass.
    pub keep: Keep,
    /// Format in which gradients of matrices are summed over micro-batches. Those of biases and norms are f32.
    pub gradients: Dtype,
    /// Format of the optimiser's moments.
    pub states: StateKind,
    /// Whether the embedding table and the head are trained.
    pub tables: bool,
    /// The most patches that go through the vision tower together, where it is trained; a frame may not have more. 157 KB
    /// each at the 7B shape in bf16.
    pub patches: usize,
    /// The most patches that are encoded together beside the learner's activations, where the tower is trained. 57 KB each at
    /// the 7B shape in bf16.
    pub encoded: usize,
}

impl Settings {
    /// For micro-batches of so many tokens, all of which may be scored: bf16 gradients, moments of 8 bits, nothing kept but
    /// the inputs of layers.
    pub fn new(tokens: usize) -> Self {
        Self {
            tokens,
            scored: tokens,
            sequences: tokens.div_ceil(64).max(16),
            logit_rows: tokens.clamp(1, 4096),
            keep: Keep::default(),
            gradients: Dtype::Bf16,
            states: StateKind::Bit8,
            tables: true,
            patches: MOST_PATCHES,
            encoded: MOST_PATCHES,
        }
    }

    /// Rows of activations: tokens, and the filling to a round number.
    pub fn rows(&self) -> usize {
        batch::rows(self.tokens)
    }

    /// Rows of the output head.
    pub fn scored_rows(&self) -> usize {
        batch::scored_rows(self.scored)
    }

    /// Rows of logits, at most those that are scored.
    pub fn chunk_rows(&self) -> usize {
        self.logit_rows.clamp(1, self.scored_rows())
    }
}

/// Scratch of matrix products, see `flotilla_kernels::gpu::gemm`.
const PRODUCTS: usize = 64 << 20;

/// What memory is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// The one copy of the weights, which the engine reads too.
    Weights,
    /// Sums over micro-batches.
    Gradients,
    /// The optimiser's moments.
    Moments,
    /// Inputs of layers, kept for the backward pass.
    Inputs,
    /// What else is kept of layers.
    Kept,
    /// What one layer needs while it is computed.
    Layer,
    /// What the output head needs.
    Head,
    /// Scratch of matrix products, and of the first one of a shape that adds to its result.
    Products,
    /// Weights of the vision tower with their gradients and moments, where it is trained.
    Tower,
    /// What the tower needs for a chunk of patches: to learn from them, and to encode them.
    Patches,
    /// Keys and values of the engine.
    Pool,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Gradients => "gradients",
            Self::Moments => "moments",
            Self::Inputs => "inputs of layers",
            Self::Kept => "kept activations",
            Self::Layer => "one layer",
            Self::Head => "output head",
            Self::Products => "matrix products",
            Self::Tower => "vision tower",
            Self::Patches => "patches",
            Self::Pool => "keys and values",
        }
    }
}

/// Shapes of what is trained: a language model, or one with its vision tower.
#[derive(Clone, Copy, Debug)]
pub struct Shapes<'a> {
    /// The language model.
    pub text: &'a TextShape,
    /// The tower; None where it is not trained.
    pub vision: Option<&'a QwenVision>,
}

impl<'a> From<&'a TextShape> for Shapes<'a> {
    fn from(text: &'a TextShape) -> Self {
        Self { text, vision: None }
    }
}

/// Bytes by what they are for.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    parts: Vec<(Part, usize)>,
    /// Bytes of the card that may be used.
    card: usize,
}

/// Bytes that the driver, the context and compiled kernels take of a card, and what must stay free.
const RESERVE: usize = 1 << 30;

impl Plan {
    /// Of learning a model of these shapes with weights in `format` on a card of `card` bytes, beside a pool of `pool` bytes.
    pub fn new<'a>(
        shapes: impl Into<Shapes<'a>>,
        format: Dtype,
        settings: &Settings,
        pool: usize,
        card: usize,
    ) -> Self {
        let Shapes { text: shape, vision } = shapes.into();
        let bytes = format.bytes();
        let (rows, scored) = (settings.rows(), settings.scored_rows());
        let vectors = vector_parameters(shape);
        let frozen = if settings.tables {
            0
        } else {
            shape.vocabulary * shape.hidden * if shape.tied { 1 } else { 2 }
        };
        let trained = shape.parameters() - frozen;
        let matrices = trained - vectors;
        let width = Width::new(shape);
        let kept = |all: usize| all.min(shape.layers);
        // What is not kept has one buffer, which all layers share.
        let shared = |kept: usize| usize::from(kept < shape.layers);
        let (mixed, mlp) = (kept(settings.keep.attention), kept(settings.keep.mlp));
        let of_mixed = width.mixed(rows, bytes);
        let of_mlp = rows * 2 * shape.intermediate * bytes;
        let tower = vision.map(|vision| vision::plan::Bytes::new(vision, format, settings));
        let largest = tower.map_or(0, |tower| tower.largest);
        let parts = vec![
            (Part::Weights, shape.parameters() * bytes),
            (Part::Gradients, matrices * settings.gradients.bytes() + 4 * vectors),
            (Part::Moments, settings.states.bytes(trained)),
            (Part::Inputs, (shape.layers + 1) * rows * shape.hidden * bytes),
            (Part::Kept, mixed * of_mixed + mlp * of_mlp),
            (
                Part::Layer,
                shared(mixed) * of_mixed + shared(mlp) * of_mlp + width.layer(rows, bytes),
            ),
            (
                Part::Head,
                head(shape, settings, bytes) + scored * (shape.hidden * bytes + 4 * 4),
            ),
            (
                Part::Products,
                PRODUCTS + largest.max(2 * shape.intermediate * shape.hidden * settings.gradients.bytes()),
            ),
            (
                Part::Tower,
                tower.map_or(0, |tower| tower.weights + tower.gradients + tower.moments),
            ),
            (Part::Patches, tower.map_or(0, |tower| tower.chunk + tower.encoding)),
            (Part::Pool, pool),
        ];
        Self { parts, card }
    }

    /// The settings that keep the most activations on the card, given the others; none where even keeping only inputs does not
    /// fit.
    pub fn fit<'a>(
        shapes: impl Into<Shapes<'a>>,
        format: Dtype,
        settings: &Settings,
        pool: usize,
        card: usize,
    ) -> Option<Settings> {
        let shapes = shapes.into();
        let shape = shapes.text;
        let with = |keep| Settings { keep, ..*settings };
        let fits = |keep| Self::new(shapes, format, &with(keep), pool, card).fits();
        let mut keep = Keep::default();
        if !fits(keep) {
            return None;
        }
        // A byte of either spares about as many operations; those of the MLP run faster when computed again.
        for _ in 0..shape.layers {
            let more = Keep {
                attention: keep.attention + 1,
                ..keep
            };
            if !fits(more) {
                break;
            }
            keep = more;
        }
        while keep.mlp < shape.layers {
            let more = Keep {
                mlp: keep.mlp + 1,
                ..keep
            };
            if !fits(more) {
                break;
            }
            keep = more;
        }
        Some(with(keep))
    }

    /// All bytes.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of one part.
    pub fn part(&self, wanted: Part) -> usize {
        let found = self.parts.iter().find(|(part, _)| *part == wanted);
        found.map_or(0, |(_, bytes)| *bytes)
    }

    /// Bytes that nothing is planned for, besides the reserve.
    pub fn left(&self) -> usize {
        self.card.saturating_sub(self.bytes() + RESERVE)
    }

    /// Whether the card has so much, and a reserve.
    pub fn fits(&self) -> bool {
        self.bytes() + RESERVE <= self.card
    }
}

/// A table, in GB of a thousand million bytes.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gigabytes = |bytes: usize| bytes as f64 / 1e9;
        for (part, bytes) in self.parts.iter().filter(|(_, bytes)| *bytes > 0) {
            writeln!(f, "{:<18} {:>8.2} GB", part.name(), gigabytes(*bytes))?;
        }
        let verdict = if self.fits() { "fits" } else { "does not fit" };
        let card = gigabytes(self.card);
        write!(
            f,
            "{:<18} {:>8.2} GB, {verdict} into {card:.1} GB",
            "together",
            gigabytes(self.bytes())
        )
    }
}

/// Parameters that are no matrix: biases and norms.
fn vector_parameters(shape: &TextShape) -> usize {
    shape.layers * (shape.packed_width() + 2 * shape.hidden) + shape.hidden
}

/// Elements per row of activations.
struct Width {
    hidden: usize,
    heads: usize,
    query: usize,
    packed: usize,
    intermediate: usize,
}

impl Width {
    fn new(shape: &TextShape) -> Self {
        Self {
            hidden: shape.hidden,
            heads: shape.heads,
            query: shape.query_width(),
            packed: shape.packed_width(),
            intermediate: shape.intermediate,
        }
    }

    /// Turned queries, keys and values, attention output, the sum after it, and the logarithms of the softmax.
    fn mixed(&self, rows: usize, bytes: usize) -> usize {
        rows * ((self.packed + self.query + self.hidden) * bytes + self.heads * 4)
    }

    /// What a layer needs besides.
    fn layer(&self, rows: usize, bytes: usize) -> usize {
        // Normed rows, packed rows before they are turned, the gated product.
        let forward = self.hidden + self.packed + self.intermediate;
        // Gradients: of the residual stream, of a norm's output, of the attention's output and of its inputs.
        let backward = 2 * self.hidden + self.query + self.packed;
        // Sums of rows, of heads and of norms; partial sums of columns.
        let sums = rows * (self.heads + 2) * 4 + 512 * self.hidden * 4;
        rows * (forward + backward) * bytes + sums
    }
}

/// Logits of a chunk of rows and a chunk of the vocabulary in f32 and their gradients, sums of hidden states in f32; see
/// `flotilla_kernels::vocabulary`.
fn head(shape: &TextShape, settings: &Settings, bytes: usize) -> usize {
    let rows = settings.chunk_rows();
    let chunk = shape.vocabulary.next_multiple_of(8).min(8448);
    rows * (chunk * (4 + bytes) + shape.hidden * 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::VisionShape;

    fn qwen_7b() -> TextShape {
        TextShape::named("qwen2.5-vl-7b").expect("a released shape")
    }

    /// Bytes of an H100 (80 GB) and an H200 (141 GB) as the driver counts them.
    const H100: usize = 85_029_158_912;
    const H200: usize = 150_109_880_320;

    #[test]
    fn parts_of_the_7b_shape_are_what_arithmetic_says() {
        let settings = Settings {
            states: StateKind::Bf16,
            ..Settings::new(8192)
        };
        let plan = Plan::new(&qwen_7b(), Dtype::Bf16, &settings, 0, H200);
        let gigabytes = |part| (plan.part(part) as f64 / 1e8).round() / 10.0;
        assert_eq!(gigabytes(Part::Weights), 15.2);
        assert_eq!(gigabytes(Part::Gradients), 15.2);
        assert_eq!(gigabytes(Part::Moments), 30.5);
        // 29 inputs of 3,584 numbers: 208 KB per token.
        assert_eq!(plan.part(Part::Inputs), 29 * 8192 * 3584 * 2);
        assert!(plan.bytes() < 70_000_000_000, "{plan}");
    }

    #[test]
    fn what_the_7b_shape_can_keep_on_80_and_on_141_gigabytes() {
        let shape = qwen_7b();
        let fit = |tokens, states, card| {
            let settings = Settings {
                states,
                ..Settings::new(tokens)
            };
            Plan::fit(&shape, Dtype::Bf16, &settings, 4 << 30, card).map(|settings| settings.keep)
        };
        let all = Some(Keep::all(&shape));
        assert_eq!(fit(16_384, StateKind::Bf16, H200), all, "everything of 16k tokens");
        assert_eq!(fit(8192, StateKind::F32, H200).map(|keep| keep.attention), Some(28));
        let small = fit(8192, StateKind::Bit8, H100).expect("fits");
        assert!(small.attention == 28 && small.mlp > 0, "{small:?}");
        assert!(fit(8192, StateKind::Bf16, H100).is_some(), "all inputs of 8k tokens");
        assert_eq!(fit(8192, StateKind::F32, H100), None, "f32 moments alone are 61 GB");
    }

    #[test]
    fn a_tower_takes_memory_of_what_can_be_kept() {
        let (text, Some(VisionShape::Qwen(vision))) = (qwen_7b(), VisionShape::named("qwen2.5-vl-7b")) else {
            unreachable!("a released shape")
        };
        let both = Shapes {
            text: &text,
            vision: Some(&vision),
        };
        let settings = Settings::new(8192);
        let (alone, together) = (
            Plan::new(&text, Dtype::Bf16, &settings, 0, H100),
            Plan::new(both, Dtype::Bf16, &settings, 0, H100),
        );
        let tower = together.part(Part::Tower) + together.part(Part::Patches);
        assert_eq!(together.bytes(), alone.bytes() + tower);
        // Weights, gradients and moments of 681 million numbers, 2 bytes each; 24,576 patches, 157 KB each to learn from and 57 to encode.
        assert_eq!(together.part(Part::Tower) / 10_000_000, 410, "{together}");
        assert_eq!(together.part(Part::Patches) / 100_000_000, 52, "{together}");
        let keep = |shapes: Shapes<'_>| {
            let fitted = Plan::fit(shapes, Dtype::Bf16, &settings, 4 << 30, H100);
            fitted.map(|settings| settings.keep.attention + settings.keep.mlp)
        };
        assert!(keep(both) < keep(Shapes::from(&text)) && keep(both).is_some());
    }

    #[test]
    fn a_plan_is_printed_as_a_table() {
        let plan = Plan::new(&qwen_7b(), Dtype::Bf16, &Settings::new(8192), 0, H100);
        let table = plan.to_string();
        assert!(
            table.contains("weights") && table.ends_with("fits into 85.0 GB"),
            "{table}"
        );
    }
}

//! How fast pictures and videos become features.

use flotilla_kernels::{Buffer, Gpu, bench::median};
use flotilla_model::{
    Layout, ModelError, Visual,
    llava_onevision::{
        Arrangement, SiglipConfig, VisionConfig,
        anyres::{Anyres, pinpoints},
    },
};
use half::bf16;

use super::{Mixture, SiglipTower, tower::Pass};
use crate::{
    error::DeviceError,
    measure::{Ceiling, Line, settled},
    shape::SiglipVision,
};

/// What is measured: a picture of one tile and one of nine, both beside the whole, and a video.
const VISUALS: [(&str, Visuals); 3] = [
    ("vision 1 picture of 384 x 384", Visuals::Picture(384, 384)),
    ("vision 1 picture of 1152 x 1152", Visuals::Picture(1152, 1152)),
    ("vision 1 video of 32 frames", Visuals::Video(32)),
];

/// Kinds of visuals by their sizes.
#[derive(Clone, Copy)]
enum Visuals {
    /// Height and width.
    Picture(usize, usize),
    /// Frames.
    Video(usize),
}

/// The configuration of released checkpoints around a tower of these sizes.
fn config(shape: &SiglipVision) -> Result<VisionConfig, ModelError> {
    let tiles = pinpoints(&serde_json::json!("(1x1),...,(6x6)"), shape.pixels)?;
    Ok(VisionConfig {
        tower: SiglipConfig {
            hidden_size: shape.hidden,
            intermediate_size: shape.intermediate,
            num_hidden_layers: shape.depth,
            num_attention_heads: shape.heads,
            image_size: shape.pixels,
            patch_size: shape.patch,
            ..SiglipConfig::default()
        },
        used_layers: shape.used,
        projector_bias: true,
        text_hidden_size: shape.output,
        anyres: Anyres::new(tiles, "anyres_max_9", shape.pixels, shape.side)?,
    })
}

/// A visual of these sizes with some values.
fn visual(config: &VisionConfig, visuals: Visuals) -> Result<Visual, ModelError> {
    let layout = match visuals {
        Visuals::Picture(height, width) => Layout::Anyres {
            tiles: config.anyres.plan(height, width)?.tiles(),
            height,
            width,
        },
        Visuals::Video(frames) => Layout::Frames { frames },
    };
    let squares = Arrangement::new(&layout, config)?.squares;
    let pixels = config.tower.num_channels * config.tower.image_size.pow(2);
    Ok(Visual {
        values: (0..squares * pixels)
            .map(|at| (at % 255) as f32 / 127.0 - 1.0)
            .collect(),
        layout,
    })
}

/// Operations of `squares` squares: patches, matrices of every layer that is used, attention within squares, the projector.
pub fn operations(shape: &SiglipVision, squares: usize) -> f64 {
    let (hidden, tokens) = (shape.hidden, shape.tokens());
    let layer = 4 * hidden * hidden + 2 * hidden * shape.intermediate;
    let projector = hidden * shape.output + shape.output * shape.output;
    let matrices = shape.patch_values() * hidden + shape.used * layer + projector;
    let attention = 4.0 * (shape.used * hidden * tokens) as f64;
    (2.0 * matrices as f64 + attention) * (squares * tokens) as f64
}

/// Pictures and a video through a random tower in bf16, from their values on the host to features on the card; the fastest of
/// five times counts.
pub fn lines(gpu: &Gpu, ceiling: &Ceiling, shape: &SiglipVision) -> Result<Vec<Line>, DeviceError> {
    let config = config(shape)?;
    let tower = SiglipTower::<bf16>::random(gpu, &config, 1)?;
    let line = |(what, visuals): &(&str, Visuals)| {
        let visual = visual(&config, *visuals)?;
        let seconds = settled(gpu, || tower.encode(&[&visual]).map(drop))?;
        let squares = Arrangement::new(&visual.layout, &config)?.squares;
        let floor = ceiling.arithmetic(operations(shape, squares));
        Ok(Line::new((*what).to_owned(), (1, "visuals"), seconds, floor))
    };
    VISUALS.iter().map(line).collect()
}

/// One part of the way from pixels to features.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// What it does.
    pub name: &'static str,
    /// Seconds of it in one pass, all layers together.
    pub seconds: f64,
    /// Operations on tensor cores.
    pub operations: f64,
}

/// The parts of a pass over `squares` squares, measured one by one on the card.
pub fn parts(gpu: &Gpu, shape: &SiglipVision, squares: usize) -> Result<Vec<Part>, DeviceError> {
    let config = config(shape)?;
    let tower = SiglipTower::<bf16>::random(gpu, &config, 1)?;
    let frames = visual(&config, Visuals::Video(squares))?;
    let pixels = config.tower.num_channels * config.tower.image_size.pow(2);
    let frames = frames.values.chunks_exact(pixels).collect::<Vec<_>>();
    let feed = || gpu.feed(squares * pixels)?.push(&frames);
    let on_card = feed()?;
    let pass = Pass::new(gpu, shape, squares)?;
    tower.embed(&on_card, &pass)?;
    let layers = &tower.weights.layers;
    let tokens: Buffer<bf16> = gpu.zeros((pass.rows + 1) * shape.output)?;
    let arrangement = Arrangement::new(&Layout::Frames { frames: squares }, &config)?;
    let mixture = Mixture::new(&arrangement.cells, 0, pass.rows);
    let (hidden, rows) = (shape.hidden, pass.rows as f64);
    let product = |outputs: usize, inputs: usize| 2.0 * rows * (outputs * inputs) as f64;
    let mut next = 0;
    // Another layer each time, so that no weight stays in the cache.
    let mut layer = || {
        next = (next + 1) % layers.len();
        &layers[next]
    };
    let mut parts = Vec::new();
    let mut add = |name, times: usize, operations: f64, seconds: f64| {
        parts.push(Part {
            name,
            seconds: seconds * times as f64,
            operations: operations * times as f64,
        });
    };
    let times = shape.used;
    add("pixels to the card", 1, 0.0, median(gpu, || feed().map(drop))?);
    let embedded = product(hidden, shape.patch_values());
    add("patches", 1, embedded, median(gpu, || tower.embed(&on_card, &pass))?);
    let seconds = median(gpu, || tower.norm(&layer().norm1, &pass))?;
    add("norms", 2 * times, 0.0, seconds);
    let seconds = median(gpu, || tower.queries(layer(), &pass))?;
    add("queries, keys, values", times, product(3 * hidden, hidden), seconds);
    let attention = 4.0 * rows * (hidden * shape.tokens()) as f64;
    add("attention", times, attention, median(gpu, || tower.attend(&pass))?);
    let seconds = median(gpu, || tower.output(layer(), &pass))?;
    add("output", times, product(hidden, hidden), seconds);
    let inner = product(hidden, shape.intermediate);
    add(
        "MLP, first half",
        times,
        inner,
        median(gpu, || tower.up(layer(), &pass))?,
    );
    add(
        "MLP, second half",
        times,
        inner,
        median(gpu, || tower.down(layer(), &pass))?,
    );
    let projector = product(shape.output, hidden) + product(shape.output, shape.output);
    let seconds = median(gpu, || tower.project(&pass, &tokens))?;
    add("projector", 1, projector, seconds);
    let seconds = median(gpu, || tower.arrange(&tokens, &mixture).map(drop))?;
    add("arrangement", 1, 0.0, seconds);
    Ok(parts)
}

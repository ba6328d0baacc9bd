//! Features of the card beside those of the host's model, for every layout.

use flotilla_engine::{Prompt, Request, Sampling};
use flotilla_kernels::{Float, Gpu, check::Draw};
use flotilla_model::{
    Config, Layout, LoadOptions, Pass, Row, Vision, Visual, Vlm,
    llava_onevision::{Arrangement, SiglipConfig, VisionConfig, anyres::Anyres},
};

use super::SiglipTower;
use crate::{
    check::{Difference, beside_host},
    error::DeviceError,
};

/// How far the features of one visual are from the host's.
#[derive(Clone, Debug)]
pub struct Apart {
    /// The visual.
    pub layout: Layout,
    /// Squares that went through the tower together at most.
    pub at_once: usize,
    /// `‖card − host‖ / ‖host‖`.
    pub relative: f64,
}

/// The tower of released checkpoints with two of its layers, before the language model of a small configuration. A picture
/// keeps two squares of features at most, so that few are enough to make a map smaller.
pub fn full_size(small: &Config) -> Result<Config, DeviceError> {
    let tower = SiglipConfig {
        hidden_size: 1152,
        intermediate_size: 4304,
        num_hidden_layers: 2,
        num_attention_heads: 16,
        image_size: 384,
        patch_size: 14,
        ..SiglipConfig::default()
    };
    let pinpoints = [(1, 1), (1, 2), (2, 1), (1, 3)].map(|(rows, columns)| (384 * rows, 384 * columns));
    Ok(Config {
        vision: Vision::LlavaOneVision(VisionConfig {
            used_layers: 2,
            projector_bias: true,
            text_hidden_size: small.text.hidden_size,
            anyres: Anyres::new(pinpoints.to_vec(), "anyres_max_2", 384, tower.side())?,
            tower,
        }),
        ..small.clone()
    })
}

/// Pictures alone (as it is, margins above and below, margins at the sides, a map that is made smaller), one of several, a
/// video.
fn layouts(config: &VisionConfig) -> Result<Vec<Layout>, DeviceError> {
    let side = config.tower.image_size;
    let pictures = [(1.0, 1.0), (0.9, 1.7), (1.7, 0.8), (0.95, 3.0), (5.9, 5.4)].map(|(height, width)| {
        let pixels = |sides: f64| (sides * side as f64) as usize;
        let (height, width) = (pixels(height), pixels(width));
        let tiles = config.anyres.plan(height, width)?.tiles();
        Ok::<_, DeviceError>(Layout::Anyres { tiles, height, width })
    });
    let others = [Layout::Square, Layout::Frames { frames: 3 }];
    pictures.into_iter().chain(others.map(Ok)).collect()
}

/// Random weights that `T` can represent, in `T` on the card and in f32 on the host, over every layout, all visuals together:
/// many squares at once, and few, so that visuals are cut apart.
pub fn features<T: Float>(gpu: &Gpu, config: &Config, seed: u64) -> Result<Vec<Apart>, DeviceError> {
    let Vision::LlavaOneVision(vision) = &config.vision else {
        return Err(DeviceError::Input("a model of another family".to_owned()));
    };
    let model = Vlm::random(config.clone(), seed, &LoadOptions::default())?;
    let mut draw = Draw::new(seed);
    vary::<T>(&model, &mut draw)?;
    let visuals = layouts(vision)?
        .into_iter()
        .map(|layout| visual(vision, layout, &mut draw));
    let visuals = visuals.collect::<Result<Vec<_>, _>>()?;
    let visuals = visuals.iter().collect::<Vec<_>>();
    let expected = model.encode(&visuals, Pass::Infer)?;
    let tower = SiglipTower::<T>::load(gpu, config, model.weights())?;
    let tower = tower.ok_or_else(|| DeviceError::Input("no tower".to_owned()))?;
    let mut apart = Vec::new();
    for at_once in [2, 9, 99] {
        let features = tower.clone().at_most(at_once).encode(&visuals)?;
        for ((visual, features), expected) in visuals.iter().zip(&features).zip(&expected) {
            let expected = expected.flatten_all()?.to_vec1::<f32>()?;
            let features = gpu.download(features)?;
            if features.len() != expected.len() {
                let (found, wanted) = (features.len(), expected.len());
                return Err(DeviceError::Input(format!("{found} features instead of {wanted}")));
            }
            apart.push(Apart {
                layout: visual.layout,
                at_once,
                relative: relative(&features, &expected),
            });
        }
    }
    Ok(apart)
}

/// A visual of random pixels.
fn visual(config: &VisionConfig, layout: Layout, draw: &mut Draw) -> Result<Visual, DeviceError> {
    let pixels = config.tower.num_channels * config.tower.image_size.pow(2);
    let squares = Arrangement::new(&layout, config)?.squares;
    let values = draw.normal::<f32>(squares * pixels, 0.5);
    Ok(Visual { values, layout })
}

/// Through the engine: prompts with a picture, with two, with a video between words, and two requests over one picture.
fn requests(config: &Config, vision: &VisionConfig, draw: &mut Draw) -> Result<Vec<Request<Prompt>>, DeviceError> {
    let kinds = layouts(vision)?;
    let (alone, square, frames) = (kinds[1], kinds[kinds.len() - 2], kinds[kinds.len() - 1]);
    let mut requests = Vec::new();
    for (index, layouts) in [vec![alone], vec![square, square], vec![frames, alone]]
        .iter()
        .enumerate()
    {
        let mut ids = vec![11, 12, 13];
        let mut visuals = Vec::new();
        for layout in layouts {
            let placeholder = if layout.is_video() {
                config.video_token_id
            } else {
                config.image_token_id
            };
            visuals.push((ids.len(), visual(vision, *layout, draw)?));
            let tokens = Arrangement::new(layout, vision)?.cells.len();
            ids.resize(ids.len() + tokens, placeholder);
            ids.extend([14, 15 + index as u32]);
        }
        let prompt = Prompt::new(Row::text(ids), visuals);
        for (n, temperature) in [(3, 1.0), (1, 0.0)] {
            let sampling = Sampling {
                temperature,
                max_tokens: 24,
                seed: index as u64,
                ..Sampling::default()
            };
            requests.push(Request::new(prompt.clone(), n, sampling));
        }
    }
    Ok(requests)
}

/// As [`check::text`](crate::check::text), over prompts with pictures and videos.
pub fn answers<T: Float>(gpu: &Gpu, config: &Config, seed: u64) -> Result<Difference, DeviceError> {
    let Vision::LlavaOneVision(vision) = &config.vision else {
        return Err(DeviceError::Input("a model of another family".to_owned()));
    };
    let model = Vlm::random(config.clone(), seed, &LoadOptions::default())?;
    let mut draw = Draw::new(seed);
    vary::<T>(&model, &mut draw)?;
    beside_host::<T>(gpu, &model, &requests(config, vision, &mut draw)?)
}

/// `‖a − b‖ / ‖b‖`.
fn relative<T: Float>(a: &[T], b: &[f32]) -> f64 {
    let (mut apart, mut size) = (0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        apart += (f64::from(a.to_f32()) - f64::from(*b)).powi(2);
        size += f64::from(*b).powi(2);
    }
    (apart / size).sqrt()
}

/// Random models have biases of zero and norms of one, which hide mistakes: what stands before the language model gets others.
/// Every weight there is rounded to what `T` can represent.
fn vary<T: Float>(model: &Vlm, draw: &mut Draw) -> Result<(), DeviceError> {
    for (name, var) in model.named_vars() {
        if !model.config().is_vision(&name) {
            continue;
        }
        let values = var.as_tensor().flatten_all()?.to_vec1::<f32>()?;
        let constant = values.iter().all(|value| *value == values[0]);
        let noise = draw.normal::<f32>(values.len(), if constant { 0.2 } else { 0.0 });
        let values = values.iter().zip(noise);
        let values = values.map(|(value, noise)| T::from_f32(value + noise).to_f32());
        let shape = var.as_tensor().shape().clone();
        var.set(&candle_core::Tensor::from_vec(
            values.collect::<Vec<_>>(),
            shape,
            var.as_tensor().device(),
        )?)?;
    }
    Ok(())
}

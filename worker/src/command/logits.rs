//! Everything that the model computes for a conversation, as a file: for comparing with another implementation.

use std::{collections::BTreeMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use clap::Args;
use flotilla_model::{Layout, Medium, MediumSize, Pass, Prompt, TextBatch, Vision, Visual, Vlm};

use super::{
    arguments::{MediaArguments, ModelArguments},
    messages,
};
use crate::{device::DeviceArguments, error::WorkerError};

/// Arguments of `logits`.
#[derive(Args, Debug)]
pub struct LogitsArguments {
    /// Which model.
    #[command(flatten)]
    pub model: ModelArguments,
    /// Where it runs.
    #[command(flatten)]
    pub device: DeviceArguments,
    /// How pictures and videos are read.
    #[command(flatten)]
    pub media: MediaArguments,
    /// File of messages (JSON, OpenAI content parts).
    #[arg(long, value_name = "FILE")]
    pub messages: PathBuf,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Tensors by name.
type Tensors = BTreeMap<String, Tensor>;

/// Writes the file.
pub fn run(arguments: &LogitsArguments) -> Result<(), WorkerError> {
    let processor = arguments.model.processor(&arguments.media)?;
    let conversation = messages::read(&arguments.messages, processor.sampling(), arguments.media.upright)
        .map_err(|error| WorkerError::permanent("failed to read the messages", error))?;
    let model = arguments.model.load(arguments.device.device)?;
    let prompt = processor
        .prepare(
            &conversation.messages,
            &conversation.media,
            model.config().text.max_position_embeddings,
        )
        .map_err(|error| WorkerError::permanent("failed to prepare the prompt", error))?;
    let tensors = compute(&model, &prompt, &conversation.media)
        .map_err(|error| WorkerError::permanent("failed to compute", error))?;
    let written = tensors
        .iter()
        .map(|(name, tensor)| format!("{name} {:?}", tensor.dims()));
    let written = written.collect::<Vec<_>>().join(", ");
    candle_core::safetensors::save(&tensors.into_iter().collect(), &arguments.out)
        .map_err(|error| WorkerError::permanent(format!("failed to write {}", arguments.out.display()), error))?;
    println!("{}: {written}", arguments.out.display());
    Ok(())
}

fn compute(model: &Vlm, prompt: &Prompt, media: &[Medium]) -> Result<Tensors, flotilla_model::ModelError> {
    let visuals = prompt.visuals.iter().collect::<Vec<_>>();
    let features = model.encode(&visuals, Pass::Infer)?;
    let row = prompt.row(&features)?;
    let batch = TextBatch::new(std::slice::from_ref(&row))?;
    let hidden = model.forward(&batch, Pass::Infer)?.squeeze(0)?;
    let logits = model.logits(&hidden, Pass::Infer)?.to_dtype(DType::F32)?;
    let mut tensors = inputs(model, prompt, media)?;
    tensors.insert("logits".to_owned(), logits);
    Ok(tensors)
}

/// What the processor made, under the names of the reference.
fn inputs(model: &Vlm, prompt: &Prompt, media: &[Medium]) -> Result<Tensors, flotilla_model::ModelError> {
    let mut tensors = Tensors::new();
    let ids = prompt.ids.iter().map(|id| i64::from(*id)).collect::<Vec<_>>();
    let length = ids.len();
    tensors.insert("input_ids".to_owned(), Tensor::from_vec(ids, length, &Device::Cpu)?);
    let axis = |axis: usize| prompt.positions.iter().map(move |position| i64::from(position[axis]));
    let positions = match &model.config().vision {
        Vision::Qwen25Vl(_) => Tensor::from_vec((0..3).flat_map(axis).collect(), (3, length), &Device::Cpu)?,
        Vision::LlavaOneVision(_) => Tensor::from_vec(axis(0).collect(), length, &Device::Cpu)?,
    };
    tensors.insert("position_ids".to_owned(), positions);
    for (video, values, grid) in [
        (false, "pixel_values", "image_grid_thw"),
        (true, "pixel_values_videos", "video_grid_thw"),
    ] {
        let own = prompt.visuals.iter().filter(|visual| visual.layout.is_video() == video);
        let own = own.collect::<Vec<_>>();
        match &model.config().vision {
            _ if own.is_empty() => {}
            Vision::Qwen25Vl(vision) => {
                patches(&mut tensors, &own, vision.patch_values(), values, grid)?;
                if video {
                    let seconds = own.iter().filter_map(|visual| match visual.layout {
                        Layout::Patches { time_step, .. } => Some((time_step / vision.tokens_per_second) as f32),
                        _ => None,
                    });
                    let seconds = seconds.collect::<Vec<_>>();
                    tensors.insert("second_per_grid_ts".to_owned(), Tensor::new(seconds, &Device::Cpu)?);
                }
            }
            Vision::LlavaOneVision(vision) => squares(&mut tensors, &own, vision.tower.image_size, values)?,
        }
    }
    if let (Vision::LlavaOneVision(_), Some(sizes)) = (&model.config().vision, picture_sizes(media)?) {
        tensors.insert("image_sizes".to_owned(), sizes);
    }
    Ok(tensors)
}

/// Rows of patches of all visuals together, and the grid of each.
fn patches(
    tensors: &mut Tensors,
    visuals: &[&Visual],
    width: usize,
    name: &str,
    grid_name: &str,
) -> Result<(), flotilla_model::ModelError> {
    let grids = visuals.iter().filter_map(|visual| match visual.layout {
        Layout::Patches { grid, .. } => Some(grid.map(|side| side as i64)),
        _ => None,
    });
    let grids = grids.flatten().collect::<Vec<_>>();
    let count = grids.len() / 3;
    tensors.insert(grid_name.to_owned(), Tensor::from_vec(grids, (count, 3), &Device::Cpu)?);
    let values = visuals
        .iter()
        .flat_map(|visual| visual.values.iter().copied())
        .collect::<Vec<_>>();
    let rows = values.len() / width;
    tensors.insert(name.to_owned(), Tensor::from_vec(values, (rows, width), &Device::Cpu)?);
    Ok(())
}

/// Squares of each visual, `[visuals, most squares, 3, side, side]`, zero where a visual has fewer.
fn squares(
    tensors: &mut Tensors,
    visuals: &[&Visual],
    side: usize,
    name: &str,
) -> Result<(), flotilla_model::ModelError> {
    let pixels = 3 * side * side;
    let most = visuals
        .iter()
        .map(|visual| visual.values.len() / pixels)
        .max()
        .unwrap_or(0);
    let mut values = Vec::with_capacity(visuals.len() * most * pixels);
    for (index, visual) in visuals.iter().enumerate() {
        values.extend_from_slice(&visual.values);
        values.resize((index + 1) * most * pixels, 0.0);
    }
    let shape = (visuals.len(), most, 3, side, side);
    tensors.insert(name.to_owned(), Tensor::from_vec(values, shape, &Device::Cpu)?);
    Ok(())
}

/// Height and width of each picture as it came.
fn picture_sizes(media: &[Medium]) -> Result<Option<Tensor>, flotilla_model::ModelError> {
    let sizes = media.iter().filter_map(|medium| match medium.size() {
        MediumSize::Picture { width, height } => Some([height as i64, width as i64]),
        MediumSize::Video { .. } => None,
    });
    let sizes = sizes.flatten().collect::<Vec<_>>();
    let count = sizes.len() / 2;
    if count == 0 {
        return Ok(None);
    }
    Ok(Some(Tensor::from_vec(sizes, (count, 2), &Device::Cpu)?))
}

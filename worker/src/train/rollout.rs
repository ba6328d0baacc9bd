//! Completions of prompts that are asked for, in fixed pieces: of the engine, or of rollout pods. The pieces are the same, so on
//! the CPU the completions are.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use flotilla_engine::{Group, Prompt, Request, Sampling};
use flotilla_model::Layout;

use super::{
    actor::{Draw, Turn},
    error::TrainError,
    examples::Example,
    fleet::{Batch, Fleet},
};
use crate::rollout::{
    ROWS_PER_PIECE,
    wire::{Piece, PieceFeatures, PieceImage, PiecePrompt},
};

/// Prompts with the seed of each, and how they are to be completed.
#[derive(Debug)]
pub struct Asked<'a> {
    prompts: Vec<(&'a Example, u64)>,
    /// How.
    pub draw: Draw,
}

impl<'a> Asked<'a> {
    /// One seed for each prompt.
    pub fn new(prompts: &[&'a Example], draw: Draw, seeds: &[u64]) -> Self {
        Self {
            prompts: prompts.iter().copied().zip(seeds.iter().copied()).collect(),
            draw,
        }
    }

    /// All prompts.
    pub fn prompts(&self) -> &[(&'a Example, u64)] {
        &self.prompts
    }

    /// Prompts that are completed together.
    pub fn pieces(&self) -> Vec<&[(&'a Example, u64)]> {
        self.prompts.chunks((ROWS_PER_PIECE / self.draw.n).max(1)).collect()
    }
}

/// Requests of an engine; `prompt` makes what it is asked.
pub fn requests(
    piece: &[(&Example, u64)],
    draw: Draw,
    stop_ids: &[u32],
    mut prompt: impl FnMut(&Example) -> Result<Prompt, TrainError>,
) -> Result<Vec<Request<Prompt>>, TrainError> {
    let request = |(example, seed): &(&Example, u64)| {
        let sampling = Sampling {
            temperature: draw.temperature as f32,
            top_p: draw.top_p as f32,
            max_tokens: draw.max_tokens,
            seed: *seed,
            stop_ids: stop_ids.to_vec(),
            ..Sampling::default()
        };
        Ok(Request::new(prompt(example)?, draw.n, sampling))
    };
    piece.iter().map(request).collect()
}

/// The completions of each prompt by rollout pods. `weights` are those as one safetensors file, `features` the features of a
/// picture, `[tokens, hidden]`.
pub fn ask(
    fleet: &Fleet,
    asked: &Asked<'_>,
    turn: Turn<'_>,
    weights: &dyn Fn() -> Result<Vec<u8>, TrainError>,
    features: &dyn Fn(&str) -> Result<Vec<f32>, TrainError>,
) -> Result<Vec<Group>, TrainError> {
    let pieces = asked.pieces();
    let pieces = pieces.iter().map(|piece| wire_piece(piece, asked.draw, features));
    let answered = fleet.sample(Batch {
        step: turn.step,
        weights,
        pieces: pieces.collect::<Result<_, TrainError>>()?,
        cancelled: turn.cancelled,
    })?;
    Ok(answered.into_iter().flatten().collect())
}

/// A piece as a pod reads it; its version is filled in by the fleet.
fn wire_piece(
    piece: &[(&Example, u64)],
    draw: Draw,
    features: &dyn Fn(&str) -> Result<Vec<f32>, TrainError>,
) -> Result<Piece, TrainError> {
    let mut images = BTreeMap::new();
    for (example, _) in piece {
        for (name, visual) in example.images.iter().zip(&example.prompt.visuals) {
            if !images.contains_key(name) {
                images.insert(name.clone(), image(visual.layout, &features(name)?));
            }
        }
    }
    let prompt = |(example, seed): &(&Example, u64)| PiecePrompt {
        token_ids: example.prompt.ids.clone(),
        images: example.images.clone(),
        seed: *seed,
    };
    Ok(Piece {
        weight_version: String::new(),
        n: draw.n,
        temperature: draw.temperature,
        top_p: draw.top_p,
        max_tokens: draw.max_tokens,
        prompts: piece.iter().map(prompt).collect(),
        images,
    })
}

fn image(layout: Layout, features: &[f32]) -> PieceImage {
    let bytes: Vec<u8> = features.iter().flat_map(|value| value.to_le_bytes()).collect();
    PieceImage::Features(PieceFeatures {
        layout,
        values: STANDARD.encode(bytes),
    })
}

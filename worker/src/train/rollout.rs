//! Completions of prompts, in fixed pieces: by the engine on several threads, or by rollout pods. The pieces are the same, so
//! the completions are.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use flotilla_engine::{Completion, Group, Limits, Prompt, Request, Sampling, VlmRunner, generate};
use flotilla_model::{Layout, Tokenizer, Vlm};

use super::{
    error::TrainError,
    examples::Example,
    features::Features,
    fleet::{Batch, Fleet},
    parallel::map_parts,
};
use crate::rollout::{
    ROWS_PER_PIECE,
    wire::{Piece, PieceFeatures, PieceImage, PiecePrompt},
};

/// How completions are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// Completions of each prompt.
    pub n: usize,
    /// 0: the most likely token.
    pub temperature: f64,
    /// Nucleus.
    pub top_p: f64,
    /// Longest completion.
    pub max_tokens: usize,
}

/// A model that answers prompts.
#[derive(Clone, Copy)]
pub struct Rollout<'a> {
    /// The model.
    pub model: &'a Vlm,
    /// Features of the prompts' pictures.
    pub features: &'a Features,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Threads that share the prompts.
    pub threads: usize,
    /// Rollout pods to ask; None: the engine in this process.
    pub remote: Option<Remote<'a>>,
    /// Asked between two tokens; once it says yes the rollout ends with [`TrainError::Cancelled`].
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
}

/// Rollout pods and the version of the weights that they sample with.
#[derive(Clone, Copy, Debug)]
pub struct Remote<'a> {
    /// The pods.
    pub fleet: &'a Fleet,
    /// Step after which the weights were made.
    pub step: u32,
}

impl std::fmt::Debug for Rollout<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rollout")
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl Rollout<'_> {
    /// The completions of each prompt, in order. `seed` gives the seed of the i-th prompt.
    pub fn complete(
        &self,
        prompts: &[&Example],
        draw: Draw,
        seed: impl Fn(usize) -> u64,
    ) -> Result<Vec<Vec<Completion>>, TrainError> {
        let seeded: Vec<(&Example, u64)> = prompts
            .iter()
            .enumerate()
            .map(|(index, example)| (*example, seed(index)))
            .collect();
        let pieces: Vec<_> = seeded.chunks((ROWS_PER_PIECE / draw.n).max(1)).collect();
        let groups = match self.remote {
            Some(remote) => self.ask(remote, &pieces, draw)?,
            None => self.generate(&pieces, draw)?,
        };
        Ok(groups.into_iter().flatten().map(|group| group.completions).collect())
    }

    /// By the engine in this process.
    fn generate(&self, pieces: &[&[(&Example, u64)]], draw: Draw) -> Result<Vec<Vec<Group>>, TrainError> {
        let limits = Limits {
            max_rows: ROWS_PER_PIECE,
            ..Limits::default()
        };
        map_parts(self.threads, pieces, |piece| {
            let requests = self.requests(piece, draw)?;
            let runner = VlmRunner::new(self.model, &limits);
            Ok(generate(runner, &requests, limits, &|| (self.cancelled)())?)
        })
    }

    fn requests(&self, piece: &[(&Example, u64)], draw: Draw) -> Result<Vec<Request<Prompt>>, TrainError> {
        let mut requests = Vec::with_capacity(piece.len());
        for (example, seed) in piece {
            let sampling = Sampling {
                temperature: draw.temperature as f32,
                top_p: draw.top_p as f32,
                max_tokens: draw.max_tokens,
                seed: *seed,
                stop_ids: self.tokenizer.stop_ids().to_vec(),
                ..Sampling::default()
            };
            requests.push(Request::new(
                Prompt::from(example.row(self.features)?),
                draw.n,
                sampling,
            ));
        }
        Ok(requests)
    }

    /// By rollout pods.
    fn ask(
        &self,
        remote: Remote<'_>,
        pieces: &[&[(&Example, u64)]],
        draw: Draw,
    ) -> Result<Vec<Vec<Group>>, TrainError> {
        let pieces = pieces.iter().map(|piece| -> Result<Piece, TrainError> {
            let mut images = BTreeMap::new();
            for (example, _) in *piece {
                for (name, visual) in example.images.iter().zip(&example.prompt.visuals) {
                    if !images.contains_key(name) {
                        images.insert(name.clone(), self.image(name, visual.layout)?);
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
        });
        remote.fleet.sample(Batch {
            step: remote.step,
            weights: &|| Ok(self.model.weights().to_bytes()?),
            pieces: pieces.collect::<Result<_, TrainError>>()?,
            cancelled: self.cancelled,
        })
    }

    fn image(&self, name: &str, layout: Layout) -> Result<PieceImage, TrainError> {
        let features = self.features.get(name);
        let features = features.ok_or_else(|| TrainError::Invalid(format!("no features of image {name}")))?;
        let values = features.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Ok(PieceImage::Features(PieceFeatures {
            layout,
            values: STANDARD.encode(bytes),
        }))
    }

    /// Text of a completion with its special tokens, without the token that ended it.
    pub fn text(&self, ids: &[u32]) -> Result<String, TrainError> {
        let kept = match ids.split_last() {
            Some((last, rest)) if self.tokenizer.stop_ids().contains(last) => rest,
            _ => ids,
        };
        Ok(self.tokenizer.decode_with_special(kept)?)
    }
}

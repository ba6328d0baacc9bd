//! Completions of prompts by the engine, in fixed pieces on several threads.

use std::sync::Arc;

use flotilla_engine::{Completion, Limits, Prompt, Request, Sampling, generate};
use flotilla_model::{Qwen25Vl, Tokenizer};

use super::{error::TrainError, examples::Example, features::Features, parallel::map_parts};

/// Rows that one engine decodes together. A constant, so that no result depends on the number of threads.
const ROWS_PER_PIECE: usize = 128;

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
    pub model: &'a Qwen25Vl,
    /// Features of the prompts' pictures.
    pub features: &'a Features,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Threads that share the prompts.
    pub threads: usize,
    /// Asked between two tokens; once it says yes the rollout ends with [`TrainError::Cancelled`].
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
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
        let mut requests = Vec::with_capacity(prompts.len());
        for (index, example) in prompts.iter().enumerate() {
            requests.push(Request {
                prompt: Arc::new(Prompt::from(example.row(self.features)?)),
                n: draw.n,
                sampling: Sampling {
                    temperature: draw.temperature as f32,
                    top_p: draw.top_p as f32,
                    max_tokens: draw.max_tokens,
                    seed: seed(index),
                    stop_ids: self.tokenizer.stop_ids().to_vec(),
                    ..Sampling::default()
                },
            });
        }
        let limits = Limits {
            max_rows: ROWS_PER_PIECE,
            ..Limits::default()
        };
        let pieces: Vec<&[Request<Prompt>]> = requests.chunks((ROWS_PER_PIECE / draw.n).max(1)).collect();
        let groups = map_parts(self.threads, &pieces, |piece| {
            Ok::<_, TrainError>(generate(self.model, piece, limits, &|| (self.cancelled)())?)
        })?;
        Ok(groups.into_iter().flatten().map(|group| group.completions).collect())
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

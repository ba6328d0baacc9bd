//! The runner of the vision-language models.

use candle_core::{DType, Tensor};
use flotilla_model::{
    Pass, Visual, Vlm,
    batch::{Row, TextBatch},
    cache::KvCache,
};

use crate::runner::{Cause, Logits, Runner};

/// A prompt: tokens with their positions, and pictures and videos as features or still as pixels.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// Tokens; its features are those of images that the caller has encoded (a trainer with a frozen vision tower does
    /// so once for a whole run).
    pub row: Row,
    /// Visuals that the engine encodes, with the index of the first placeholder token that each replaces.
    pub visuals: Vec<(usize, Visual)>,
}

impl From<Row> for Prompt {
    fn from(row: Row) -> Self {
        Self {
            row,
            visuals: Vec::new(),
        }
    }
}

impl From<flotilla_model::Prompt> for Prompt {
    fn from(prompt: flotilla_model::Prompt) -> Self {
        let row = Row {
            ids: prompt.ids,
            positions: prompt.positions,
            features: Vec::new(),
        };
        let starts = prompt.spans.iter().map(|(start, _)| *start);
        let visuals = starts.zip(prompt.visuals).collect();
        Self { row, visuals }
    }
}

impl Runner for Vlm {
    type Prompt = Prompt;
    type Cache = KvCache;

    fn prompt_ids<'a>(&self, prompt: &'a Prompt) -> &'a [u32] {
        &prompt.row.ids
    }

    fn prefill(&self, prompts: &[&Prompt], repeat: &[usize], room: usize) -> Result<(KvCache, Logits), Cause> {
        let batch = TextBatch::new(&with_features(self, prompts)?)?;
        let (cache, hidden) = Self::prefill(self, &batch, repeat, room)?;
        Ok((cache, logits(self, &hidden)?))
    }

    fn decode(&self, cache: &mut KvCache, ids: &[u32]) -> Result<Logits, Cause> {
        let hidden = Self::decode(self, cache, ids)?;
        Ok(logits(self, &hidden)?)
    }

    fn keep(&self, cache: &mut KvCache, rows: &[usize]) -> Result<(), Cause> {
        Ok(cache.keep(rows)?)
    }

    fn append(&self, cache: &mut KvCache, other: KvCache) -> Result<(), Cause> {
        Ok(cache.append(other)?)
    }
}

/// The rows of the prompts with all visuals encoded, those of all prompts together.
fn with_features(model: &Vlm, prompts: &[&Prompt]) -> Result<Vec<Row>, Cause> {
    let visuals: Vec<_> = prompts
        .iter()
        .flat_map(|prompt| prompt.visuals.iter().map(|(_, visual)| visual))
        .collect();
    let mut features = model.encode(&visuals, Pass::Infer)?.into_iter();
    let rows = prompts.iter().map(|prompt| {
        let mut row = prompt.row.clone();
        let starts = prompt.visuals.iter().map(|(start, _)| *start);
        row.features.extend(starts.zip(features.by_ref()));
        row
    });
    Ok(rows.collect())
}

fn logits(model: &Vlm, hidden: &Tensor) -> Result<Logits, flotilla_model::ModelError> {
    let logits = model.logits(hidden, Pass::Infer)?.to_dtype(DType::F32)?;
    let vocabulary = logits.dim(1)?;
    let values = logits.flatten_all()?.to_vec1()?;
    Ok(Logits { values, vocabulary })
}

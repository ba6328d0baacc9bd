//! Log-probabilities of completions, with or without gradient.

use candle_core::{Tensor, Var};
use flotilla_grpo::logprob::token_log_probs;
use flotilla_model::{Pass, TextBatch, Vlm};

use super::features::FeatureSource;
use crate::train::{actor::Scored, error::TrainError};

/// A model that scores.
#[derive(Clone, Copy, Debug)]
pub struct Scorer<'a> {
    /// The model.
    pub model: &'a Vlm,
    /// Its [`head`].
    pub head: &'a Tensor,
    /// With or without gradient.
    pub pass: Pass,
}

/// Log-probability of every completion token, rows one after the other: `[sum of completion lengths]`.
pub fn completion_log_probs(
    scorer: Scorer<'_>,
    rows: &[Scored<'_>],
    features: FeatureSource<'_>,
    temperature: f64,
) -> Result<Tensor, TrainError> {
    let Scorer { model, head, pass } = scorer;
    let names = rows.iter().flat_map(|row| row.example.images.iter().cloned()).collect();
    let features = features.of(model, &names)?;
    let mut batch = Vec::with_capacity(rows.len());
    for row in rows {
        // The last token predicts nothing that is trained.
        let seen = &row.completion[..row.completion.len().saturating_sub(1)];
        batch.push(row.example.row(&features)?.followed_by(seen));
    }
    let batch = TextBatch::new(&batch)?;
    let (mut slots, mut targets) = (Vec::new(), Vec::new());
    for (index, row) in rows.iter().enumerate() {
        let first = index * batch.width() + row.example.prompt.ids.len() - 1;
        slots.extend((first..first + row.completion.len()).map(|slot| slot as u32));
        targets.extend_from_slice(row.completion);
    }
    let hidden = model.forward(&batch, pass)?;
    let flat = hidden.flatten_to(1)?;
    let count = slots.len();
    let picked = flat.index_select(&Tensor::from_vec(slots, count, model.device())?, 0)?;
    let targets = Tensor::from_vec(targets, count, model.device())?;
    Ok(token_log_probs(&picked, head, &targets, temperature)?)
}

/// The matrix that gives logits, `[vocabulary, hidden]`; without `trained` no gradient of it is computed.
pub fn head(model: &Vlm, trained: bool) -> Result<Tensor, TrainError> {
    let name = model.config().text.head_name();
    let variable: &Var = model
        .weights()
        .get(&name)
        .ok_or_else(|| TrainError::Invalid(format!("the model has no parameter {name}")))?;
    Ok(if trained {
        variable.as_tensor().clone()
    } else {
        variable.as_detached_tensor()
    })
}

//! One step of supervised fine-tuning: cross-entropy of the answers, averaged over the tokens of the batch.

use std::collections::BTreeMap;

use flotilla_api::algorithm::Sft;
use flotilla_grpo::{
    batch::{Aggregation, shards_by_length, token_weights},
    loss::cross_entropy,
};

use super::{
    error::TrainError,
    examples::ExampleSet,
    features::{FeatureSource, Features, Gallery},
    journal::Stopwatch,
    learner::{Learner, ROWS_PER_SHARD},
    order::units_of_step,
    scoring::{Scored, completion_log_probs},
};

/// Supervised fine-tuning on an instruction set.
#[derive(Debug)]
pub struct SftSteps<'a> {
    /// Parameters.
    pub spec: Sft,
    /// Training rows, each with a completion.
    pub rows: &'a ExampleSet,
    /// Pictures of the rows.
    pub gallery: &'a Gallery,
    /// Seed of the run.
    pub seed: u64,
}

impl SftSteps<'_> {
    /// Takes one step, counted from 0. `known` holds features while the vision tower is frozen.
    pub fn step(
        &self,
        learner: &mut Learner,
        known: Option<&Features>,
        step: u32,
    ) -> Result<BTreeMap<String, f64>, TrainError> {
        let mut watch = Stopwatch::start();
        let units = units_of_step(self.rows.units.len(), self.spec.batch_size as usize, self.seed, step);
        let rows: Vec<Scored<'_>> = units
            .iter()
            .flat_map(|unit| &self.rows.units[*unit])
            .map(|index| &self.rows.examples[*index])
            .map(|example| Scored {
                example,
                completion: &example.completion,
            })
            .collect();
        let lengths: Vec<(usize, u32)> = rows.iter().map(|row| (row.completion.len(), 1)).collect();
        let weights = token_weights(&lengths, Aggregation::TokenMean);
        let shards = shards_by_length(&rows.iter().map(Scored::tokens).collect::<Vec<_>>(), ROWS_PER_SHARD);
        let source = known.map_or(FeatureSource::Trained(self.gallery), FeatureSource::Known);
        let rate = learner.rate(step);
        let (update, losses) = learner.update(&shards, rate, |scorer, shard| {
            let own: Vec<Scored<'_>> = shard.iter().map(|index| rows[*index]).collect();
            let log_probs = completion_log_probs(scorer, &own, source, 1.0)?;
            let spread: Vec<f32> = shard
                .iter()
                .flat_map(|index| std::iter::repeat_n(weights[*index], lengths[*index].0))
                .collect();
            let count = spread.len();
            let weights = candle_core::Tensor::from_vec(spread, count, scorer.model.device())?;
            let loss = cross_entropy(&log_probs, &weights)?;
            let value = f64::from(loss.to_scalar::<f32>()?);
            Ok((loss, value))
        })?;
        watch.lap("update");
        let tokens: usize = rows.iter().map(Scored::tokens).sum();
        let mut metrics = watch.finish();
        let seconds = metrics.get("timing_s/step").copied().unwrap_or_default();
        metrics.extend([
            ("loss".to_owned(), losses.iter().sum::<f64>()),
            ("actor/grad_norm".to_owned(), update.grad_norm),
            ("actor/lr".to_owned(), rate),
            ("perf/tokens_per_second".to_owned(), tokens as f64 / seconds.max(1e-9)),
        ]);
        Ok(metrics)
    }
}

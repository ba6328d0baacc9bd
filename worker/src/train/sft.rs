//! One step of supervised fine-tuning: cross-entropy of the answers, averaged over the tokens of the batch.

use std::collections::BTreeMap;

use flotilla_api::algorithm::Sft;
use flotilla_grpo::{
    batch::{Aggregation, token_weights},
    schedule::Schedule,
};

use super::{
    actor::{Actor, Scored, tell_skipped},
    error::TrainError,
    examples::ExampleSet,
    journal::Stopwatch,
    order::units_of_step,
};

/// Supervised fine-tuning on an instruction set.
#[derive(Debug)]
pub struct SftSteps<'a> {
    /// Parameters.
    pub spec: Sft,
    /// Training rows, each with a completion.
    pub rows: &'a ExampleSet,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// Seed of the run.
    pub seed: u64,
}

impl SftSteps<'_> {
    /// Takes one step, counted from 0.
    pub fn step(&self, actor: &mut dyn Actor, step: u32) -> Result<BTreeMap<String, f64>, TrainError> {
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
        let weighted: Vec<_> = rows.iter().copied().zip(weights).collect();
        let rate = self.schedule.rate(step);
        let (update, loss) = actor.imitate(&weighted, rate)?;
        tell_skipped(&update);
        watch.lap("update");
        let tokens: usize = rows.iter().map(Scored::tokens).sum();
        let mut metrics = watch.finish();
        let seconds = metrics.get("timing_s/step").copied().unwrap_or_default();
        metrics.extend([
            ("loss".to_owned(), loss),
            ("actor/grad_norm".to_owned(), update.grad_norm),
            ("actor/lr".to_owned(), rate),
            ("perf/tokens_per_second".to_owned(), tokens as f64 / seconds.max(1e-9)),
        ]);
        Ok(metrics)
    }
}

//! What a run reads before its first step.

use std::path::Path;

use flotilla_api::{
    algorithm::{Module, Optimizer, Schedule as Curve},
    role::{PreparedDataset, Train},
};
use flotilla_artifacts::dataset::Dataset;
use flotilla_grpo::schedule::{self, Schedule};
use flotilla_model::{Config, Processor};

use super::{
    checkpoint::ModelFiles,
    error::TrainError,
    evaluation::EvaluationSet,
    examples::ExampleSet,
    gallery::{Gallery, Images, Shown},
};
use crate::uri::Volumes;

/// Tokens that a greedy answer may have beyond the longest one imitated.
const SFT_ANSWER_MARGIN: usize = 8;

/// Rows, pictures and the small files of the model.
#[derive(Debug)]
pub struct Inputs {
    /// To train on.
    pub rows: ExampleSet,
    /// Held out.
    pub sets: Vec<EvaluationSet>,
    /// Pictures of both.
    pub gallery: Gallery,
    /// What every checkpoint carries on.
    pub files: ModelFiles,
}

impl Inputs {
    /// Reads what `spec` names; rows that are longer than the model's context, or leave it no room for an answer that is drawn,
    /// are left out.
    pub fn read(volumes: &Volumes, spec: &Train, base_dir: &Path, config: &Config) -> Result<Self, TrainError> {
        let processor = Processor::load(base_dir)?;
        let drawn = spec
            .algorithm
            .grpo
            .as_ref()
            .map_or(0, |grpo| grpo.max_completion_tokens as usize);
        let max_tokens = config.text.max_position_embeddings.saturating_sub(drawn);
        let mut images = Images::default();
        let mut read = |set: &mut ExampleSet, prepared: &PreparedDataset| -> Result<(), TrainError> {
            let dataset = Dataset::open(&volumes.resolve(&prepared.uri)?, Some(&prepared.digest))?;
            set.append(&dataset, prepared.max_rows, &processor, &mut images, max_tokens)
        };
        let mut rows = ExampleSet::default();
        for prepared in &spec.datasets {
            read(&mut rows, prepared)?;
        }
        let mut sets = Vec::new();
        for prepared in &spec.evaluation_sets {
            let mut examples = ExampleSet::default();
            read(&mut examples, prepared)?;
            sets.push(EvaluationSet {
                name: prepared.name.clone(),
                examples,
            });
        }
        check(spec, &rows, &sets)?;
        Ok(Self {
            rows,
            sets,
            gallery: Gallery { processor, images },
            files: ModelFiles::read(base_dir)?,
        })
    }

    fn every_set(&self) -> impl Iterator<Item = &ExampleSet> {
        std::iter::once(&self.rows).chain(self.sets.iter().map(|set| &set.examples))
    }

    /// The pictures that all rows show.
    pub fn shown(&self) -> Shown {
        Shown::by(self.every_set())
    }

    /// Pictures that one update shows, at most.
    pub fn pictures_of_update(&self, spec: &Train) -> usize {
        let units = match (&spec.algorithm.grpo, &spec.algorithm.sft) {
            (Some(grpo), _) => grpo.rows_per_step.div_ceil(grpo.mini_batches.max(1)),
            (None, Some(sft)) => sft.batch_size,
            (None, None) => 0,
        };
        let of_unit = |unit: &Vec<usize>| {
            let shown = unit.iter().map(|index| self.rows.examples[*index].images.len());
            shown.sum::<usize>()
        };
        units as usize * self.rows.units.iter().map(of_unit).max().unwrap_or_default()
    }

    /// Tokens of the longest prompt, and of the longest completion that is drawn or imitated.
    pub fn longest(&self, spec: &Train) -> (usize, usize) {
        let examples = self.every_set().flat_map(|set| &set.examples);
        let prompt = examples.map(|example| example.prompt.ids.len()).max();
        (prompt.unwrap_or_default(), self.longest_answer(spec))
    }

    /// Tokens that an answer may have.
    pub fn longest_answer(&self, spec: &Train) -> usize {
        match &spec.algorithm.grpo {
            Some(grpo) => grpo.max_completion_tokens as usize,
            None => {
                let longest = self.rows.examples.iter().map(|example| example.completion.len()).max();
                longest.unwrap_or_default() + SFT_ANSWER_MARGIN
            }
        }
    }
}

fn check(spec: &Train, rows: &ExampleSet, sets: &[EvaluationSet]) -> Result<(), TrainError> {
    let invalid = |what: String| Err(TrainError::Invalid(what));
    if rows.examples.is_empty() {
        return invalid("the training datasets have no rows".into());
    }
    let imitated = rows
        .examples
        .iter()
        .filter(|example| !example.completion.is_empty())
        .count();
    if spec.algorithm.sft.is_some() && imitated < rows.examples.len() {
        return invalid("sft needs instruction datasets: a row has no completion to imitate".into());
    }
    if spec.algorithm.grpo.is_some() && imitated > 0 {
        return invalid("grpo needs preference or exactMatch datasets: a row has a completion to imitate".into());
    }
    for set in sets {
        if set.examples.examples.iter().any(|example| example.target.is_none()) {
            return invalid(format!(
                "evaluation set {}: a row has no answer to compare with",
                set.name
            ));
        }
    }
    match &spec.guard {
        Some(guard) if !sets.iter().any(|set| set.name == guard.set) => invalid(format!(
            "guard.set {:?} is not an evaluation set of this job",
            guard.set
        )),
        _ => Ok(()),
    }
}

/// What a job freezes, and its optimiser.
pub fn method(spec: &Train) -> Result<(&[Module], &Optimizer), TrainError> {
    let (freeze, optimizer) = match (&spec.algorithm.grpo, &spec.algorithm.sft) {
        (Some(grpo), None) => (&grpo.freeze, &grpo.optimizer),
        (None, Some(sft)) => (&sft.freeze, &sft.optimizer),
        _ => {
            return Err(TrainError::Invalid(
                "algorithm takes exactly one of grpo and sft".into(),
            ));
        }
    };
    check_optimizer(optimizer)?;
    Ok((freeze, optimizer))
}

/// Refuses numbers with which no step would be one.
fn check_optimizer(optimizer: &Optimizer) -> Result<(), TrainError> {
    let decays = [("beta1", optimizer.beta1), ("beta2", optimizer.beta2)];
    let positive = [("epsilon", optimizer.epsilon), ("maxGradNorm", optimizer.max_grad_norm)];
    let wrong_decay = decays.iter().find(|(_, value)| !(0.0..1.0).contains(value));
    let wrong_size = positive
        .iter()
        .find(|(_, value)| !(f64::MIN_POSITIVE..).contains(value));
    let refused = |(name, value): &(&str, f64), rule: &str| {
        Err(TrainError::Invalid(format!(
            "algorithm.optimizer.{name} is {value}: it must be {rule}"
        )))
    };
    match (wrong_decay, wrong_size) {
        (Some(wrong), _) => refused(wrong, "at least 0 and less than 1"),
        (None, Some(wrong)) => refused(wrong, "more than 0"),
        (None, None) => Ok(()),
    }
}

/// The learning rate by step.
pub fn schedule(optimizer: &Optimizer, total: u32) -> Schedule {
    Schedule {
        peak: optimizer.learning_rate,
        curve: match optimizer.schedule {
            Curve::Constant => schedule::Curve::Constant,
            Curve::Linear => schedule::Curve::Linear,
            Curve::Cosine => schedule::Curve::Cosine,
        },
        final_fraction: optimizer.final_fraction,
        warmup: optimizer.warmup_steps,
        total,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_optimiser_with_which_no_step_would_be_one_is_refused_by_the_name_of_its_number() {
        assert!(check_optimizer(&Optimizer::default()).is_ok());
        let refusal = |change: fn(&mut Optimizer)| {
            let mut optimizer = Optimizer::default();
            change(&mut optimizer);
            check_optimizer(&optimizer).expect_err("is refused").to_string()
        };
        assert!(
            refusal(|optimizer| optimizer.beta1 = 1.0).contains("beta1 is 1: it must be at least 0 and less than 1")
        );
        assert!(refusal(|optimizer| optimizer.beta2 = f64::NAN).contains("beta2"));
        assert!(refusal(|optimizer| optimizer.epsilon = 0.0).contains("epsilon is 0: it must be more than 0"));
        assert!(refusal(|optimizer| optimizer.max_grad_norm = 0.0).contains("maxGradNorm"));
    }
}

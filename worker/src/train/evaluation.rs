//! Greedy answers on held-out rows: accuracy, format rate, and whether a verdict survives a swap of the responses.

use flotilla_api::evaluation::Score;
use flotilla_grpo::reward::{Graded, grade};

use super::{
    actor::{Actor, Draw, Turn},
    error::TrainError,
    examples::ExampleSet,
    gallery::Gallery,
};

/// A held-out set.
#[derive(Debug)]
pub struct EvaluationSet {
    /// Name in the job.
    pub name: String,
    /// Its rows.
    pub examples: ExampleSet,
}

/// Prompts that are sampled together: each brings its picture into memory.
const PROMPTS_AT_ONCE: usize = 512;

/// Scores a set at the step of `turn`.
pub fn evaluate(
    actor: &mut dyn Actor,
    gallery: &Gallery,
    set: &EvaluationSet,
    max_tokens: usize,
    turn: Turn<'_>,
) -> Result<Score, TrainError> {
    let prompts: Vec<_> = set.examples.examples.iter().collect();
    let greedy = Draw {
        n: 1,
        temperature: 0.0,
        top_p: 1.0,
        max_tokens,
    };
    let mut answers = Vec::with_capacity(prompts.len());
    for prompts in prompts.chunks(PROMPTS_AT_ONCE) {
        answers.extend(actor.sample(prompts, greedy, &vec![0; prompts.len()], turn)?);
    }
    let mut graded = Vec::with_capacity(prompts.len());
    for (example, completions) in prompts.iter().zip(&answers) {
        let ids = completions
            .first()
            .map(flotilla_engine::Completion::ids)
            .unwrap_or_default();
        let target = example.target.as_deref().unwrap_or_default();
        graded.push(grade(&gallery.text(&ids)?, target));
    }
    Ok(Score {
        set: set.name.clone(),
        step: turn.step,
        accuracy: share(graded.iter().filter(|graded| graded.correct).count(), graded.len()),
        format_rate: share(graded.iter().filter(|graded| graded.format).count(), graded.len()),
        swap_consistency: swap_consistency(&graded, &set.examples.units),
        prompts: u32::try_from(graded.len()).unwrap_or(u32::MAX),
    })
}

/// Share of pairs, shown in both orders, whose verdicts name the same response. None for a set without such pairs.
fn swap_consistency(graded: &[Graded], units: &[Vec<usize>]) -> Option<f64> {
    let pairs: Vec<_> = units.iter().filter(|unit| unit.len() == 2).collect();
    let consistent = |unit: &&&Vec<usize>| {
        let verdicts = [unit[0], unit[1]].map(|index| graded[index].answer.as_deref().map(str::trim));
        matches!(
            verdicts,
            [Some("1"), Some("2")] | [Some("2"), Some("1")] | [Some("tie"), Some("tie")]
        )
    };
    (!pairs.is_empty()).then(|| share(pairs.iter().filter(consistent).count(), pairs.len()))
}

fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graded(answers: &[&str]) -> Vec<Graded> {
        answers
            .iter()
            .map(|answer| grade(&format!("\\boxed{{{answer}}}"), "1"))
            .collect()
    }

    #[test]
    fn a_verdict_that_names_the_same_place_twice_is_not_consistent() {
        let units: Vec<Vec<usize>> = (0..4).map(|pair| vec![2 * pair, 2 * pair + 1]).collect();
        let graded = graded(&["1", "2", "1", "1", "tie", "tie", "2", "nonsense"]);
        assert_eq!(swap_consistency(&graded, &units), Some(0.5));
    }

    #[test]
    fn a_set_without_pairs_has_no_swap_consistency() {
        assert_eq!(swap_consistency(&graded(&["1", "2"]), &[vec![0], vec![1]]), None);
    }
}

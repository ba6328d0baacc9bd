//! The least time of each stage of a step of GRPO.

use super::{
    Ceiling, Floor, Grpo, Tower,
    floor::{forward_operations, prefill_operations, vision_operations},
};
use crate::shape::{QwenVision, TextShape};

/// What a step computes at least.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The language model.
    pub shape: &'a TextShape,
    /// Lengths, and whether the tower learns.
    pub step: &'a Grpo,
    /// Samples that are drawn at once.
    pub rows: usize,
    /// The tower and the patches of the picture of each prompt.
    pub picture: Option<(&'a QwenVision, usize)>,
}

impl Work<'_> {
    /// Seconds of a stage by its name in [`GrpoStep::stages`](super::GrpoStep::stages); 0 where neither memory nor arithmetic
    /// sets them. Activations that are computed again count once, reads and writes of all parameters by an update do not count.
    pub fn floor(&self, ceiling: &Ceiling, stage: &str) -> f64 {
        let lengths = &self.step.lengths;
        let learned = self.step.tower == Tower::Trained;
        let updates = lengths.updates();
        let prompts_of = |update: &std::ops::Range<usize>| {
            let first = update.start / lengths.group;
            update.end.div_ceil(lengths.group) - first
        };
        let of_updates = |skip: usize| updates.iter().skip(skip).map(prompts_of).sum::<usize>();
        let operations = match stage {
            "vision" if learned => self.pictures(lengths.prompts + of_updates(1)),
            "vision" => self.pictures(lengths.prompts),
            "sample" => return self.sampled(ceiling).seconds,
            "reference" if learned => self.pictures(of_updates(0)) + self.forward(lengths.samples()),
            "reference" => self.forward(lengths.samples()),
            "old" => self.forward(updates.iter().skip(1).map(ExactSizeIterator::len).sum()),
            "update" => 3.0 * self.forward(lengths.samples()),
            "tower" => 3.0 * self.pictures(of_updates(0)),
            _ => 0.0,
        };
        ceiling.arithmetic(operations).seconds
    }

    /// Operations of the tower over so many pictures.
    fn pictures(&self, count: usize) -> f64 {
        let of_one = self
            .picture
            .map_or(0.0, |(tower, patches)| vision_operations(tower, patches));
        count as f64 * of_one
    }

    /// Operations by which answers of samples are scored.
    fn forward(&self, samples: usize) -> f64 {
        let lengths = &self.step.lengths;
        forward_operations(self.shape, samples, lengths.prompt_tokens, lengths.new_tokens)
    }

    /// Prompts once each, then their samples, as many at once as there may be.
    fn sampled(&self, ceiling: &Ceiling) -> Floor {
        let lengths = &self.step.lengths;
        let rows = self.rows.clamp(1, lengths.samples().max(1));
        let prefill = prefill_operations(self.shape, lengths.prompts, 0, lengths.prompt_tokens);
        let draws = |rows: usize| {
            let contexts = rows.div_ceil(lengths.group) * lengths.prompt_tokens;
            ceiling.draws(self.shape, rows, contexts, lengths.new_tokens)
        };
        let (whole, rest) = (lengths.samples() / rows, lengths.samples() % rows);
        let all = draws(rows);
        let all = Floor {
            seconds: whole as f64 * all.seconds,
            ..all
        };
        let sampled = ceiling.arithmetic(prefill).then(all);
        if rest == 0 { sampled } else { sampled.then(draws(rest)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        VisionShape,
        measure::{
            Lengths,
            floor::tests::{CEILING, seven},
        },
    };

    fn step(lengths: &str, tower: Tower) -> Grpo {
        Grpo {
            tower,
            ..Grpo::new(lengths.parse::<Lengths>().unwrap())
        }
    }

    fn work<'a>(shape: &'a TextShape, step: &'a Grpo, rows: usize) -> Work<'a> {
        Work {
            shape,
            step,
            rows,
            picture: None,
        }
    }

    #[test]
    fn samples_that_are_drawn_at_once_cost_what_whole_requests_do() {
        let (shape, step) = (seven(), step("8x8x512+256/1", Tower::Frozen));
        let at_once = work(&shape, &step, 64).floor(&CEILING, "sample");
        let requests = CEILING.requests(&shape, (8, 8), 512, 256).seconds;
        assert!((at_once - requests).abs() < 1e-9, "{at_once} {requests}");
        // Every step reads all weights, for fewer samples twice as often.
        assert!(work(&shape, &step, 32).floor(&CEILING, "sample") > 1.8 * requests);
    }

    #[test]
    fn an_update_is_three_passes_and_the_first_mini_batch_needs_no_old_ones() {
        let (shape, one, two) = (
            seven(),
            step("8x8x512+256/1", Tower::Frozen),
            step("8x8x512+256/2", Tower::Frozen),
        );
        let floor = |step, stage| work(&shape, step, 64).floor(&CEILING, stage);
        let reference = floor(&one, "reference");
        assert!((floor(&one, "update") - 3.0 * reference).abs() < 1e-9 * reference);
        assert_eq!(floor(&one, "old"), 0.0);
        assert!((floor(&two, "old") - 0.5 * reference).abs() < 1e-9 * reference);
        assert_eq!(
            [floor(&one, "reward"), floor(&one, "memory"), floor(&one, "vision")],
            [0.0; 3]
        );
    }

    #[test]
    fn a_tower_that_learns_sees_the_pictures_of_later_updates_again() {
        let Some(VisionShape::Qwen(tower)) = VisionShape::named("qwen2.5-vl-7b") else {
            panic!("another tower");
        };
        let shape = seven();
        let (frozen, learns) = (
            step("8x8x512+256/2", Tower::Frozen),
            step("8x8x512+256/2", Tower::Trained),
        );
        let floor = |step, stage| {
            let work = Work {
                picture: Some((&tower, 1296)),
                ..work(&shape, step, 64)
            };
            work.floor(&CEILING, stage)
        };
        let once = floor(&frozen, "vision");
        assert!(once > 0.0 && (floor(&learns, "vision") - 1.5 * once).abs() < 1e-9 * once);
        assert!((floor(&learns, "tower") - 3.0 * once).abs() < 1e-9 * once);
        assert!((floor(&learns, "reference") - floor(&frozen, "reference") - once).abs() < 1e-9 * once);
    }
}

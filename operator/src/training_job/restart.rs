//! When a learner pod is made or replaced.

use super::decide::Decision;
use crate::{attempt::Verdict, refusal::Refusal};

/// A pod is made only when all that it needs is there; one that runs is left alone.
pub fn decide(verdict: Verdict, refusal: Option<&Refusal>) -> Decision {
    match (verdict, refusal) {
        (Verdict::Start { .. }, Some(refusal)) => Decision::Hold(refusal.clone()),
        (
            Verdict::Start {
                attempt,
                restarts,
                cause,
            },
            None,
        ) => Decision::Start {
            attempt,
            restarts,
            cause,
        },
        (Verdict::BackOff { until, cause }, _) => Decision::BackOff { until, cause },
        (Verdict::Wait | Verdict::Done(_) | Verdict::Fail { .. }, _) => Decision::Watch,
    }
}

//! Measuring a model during a run on rows that it does not train on.

use serde::{Deserialize, Serialize};

/// Stop before a second ability is lost.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Guard {
    /// Name of an evaluation set of this job whose accuracy is watched.
    #[cfg_attr(feature = "crd", schemars(length(min = 1, max = 63)))]
    pub set: String,
    /// Largest fall of its accuracy below that of step 0, as a share (0.03 is three points). When two evaluations in a row
    /// fall below, or the last one does, the run ends and its result is the newest evaluated checkpoint that still held.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0, max = 1.0)))]
    pub max_drop: f64,
}

/// Held-out accuracy of one set at one step.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Score {
    /// Name of the evaluation set in the job.
    pub set: String,
    /// Step after which it was measured; 0 is the model the run began with.
    pub step: u32,
    /// Share of right answers under greedy decoding, 0 to 1.
    pub accuracy: f64,
    /// Share of completions in the demanded format, 0 to 1.
    pub format_rate: f64,
    /// Preference sets prepared with `order: Both`: share of rows whose verdict names the same response in both orders.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_consistency: Option<f64>,
    /// Prompts measured.
    pub prompts: u32,
}

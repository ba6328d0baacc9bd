//! What a worker says about itself: the answer of `GET /progress` while it runs and, cut to
//! [`MAX_TERMINATION_MESSAGE`] bytes, the termination message of its container when it ends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::evaluation::Score;

/// Bytes of a termination message that the kubelet keeps.
pub const MAX_TERMINATION_MESSAGE: usize = 4096;

/// Where a role stands.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub enum Stage {
    /// The process has begun; nothing is loaded.
    #[default]
    Starting,
    /// Weights or data are being read.
    Loading,
    /// The role does its work.
    Running,
    /// The role was asked to stop and writes its last checkpoint.
    Stopping,
    /// The role stopped on request before its goal; it can be resumed.
    Suspended,
    /// The role reached its goal.
    Completed,
    /// The role cannot go on; `message` says why.
    Failed,
}

/// A stable checkpoint that the worker keeps.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointRecord {
    /// Step after which it was written.
    pub step: u32,
    /// Where it lies: `pvc://claim/path`.
    pub uri: String,
    /// `sha256:<hex>` of the manifest, which holds the digest of every file.
    pub digest: String,
    /// Bytes of all files.
    pub bytes: u64,
    /// Scores of the step, `<set>/accuracy` and so on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// A row that was left out, and why.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct BadRecord {
    /// Index in the source, from 0.
    pub row: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// What a conversion counted.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct ConversionReport {
    /// Rows read from the source.
    pub rows_in: u64,
    /// Canonical prompts written.
    pub rows_out: u64,
    /// Rows left out.
    pub bad_records: u64,
    /// Rows left out, by reason.
    pub bad_by_reason: BTreeMap<String, u64>,
    /// The first rows left out (at most 10).
    pub first_bad: Vec<BadRecord>,
    /// Distinct images.
    pub images: u64,
    /// Prompts by their label (`1`, `2`, `tie`): a lopsided count is a position bias of the data.
    pub labels: BTreeMap<String, u64>,
    /// `sha256:<hex>` of the prepared dataset.
    pub digest: String,
    /// Where it lies: `pvc://claim/path`.
    pub uri: String,
}

/// What a learner knows of its rollout pods.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RolloutProgress {
    /// [`crate::rollout::RolloutPods::revision`] of the list that it was given last; empty before the first.
    pub revision: String,
    /// Step after which the weights of the newest samples were made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_version: Option<u32>,
}

/// Everything the operator reads from a worker. Fields that do not concern a role stay empty.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// Where the role stands.
    pub stage: Stage,
    /// Why it stands there, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Steps (train) or rows (prepare) done.
    pub step: u32,
    /// Steps or rows of the whole run.
    pub total_steps: u32,
    /// Seconds until the goal at the present pace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
    /// Newest value of each metric: `loss`, `reward/overall`, `reward/<rule>`, `actor/kl_loss`, `actor/grad_norm`,
    /// `response_length/mean`, `perf/tokens_per_second`, `timing_s/<stage>` …
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// Scores at step 0, by set.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub initial_scores: Vec<Score>,
    /// Newest scores, by set.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<Score>,
    /// Stable checkpoints that are kept, oldest first. The last one is the run's result once it is complete.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checkpoints: Vec<CheckpointRecord>,
    /// Role `prepare`: what the conversion counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversion: Option<ConversionReport>,
    /// Role `train`: what the learner knows of its rollout pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutProgress>,
    /// Role `serve`: what the loaded weights are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
}

impl Progress {
    /// The JSON that fits a termination message: metrics go first, then all but the newest checkpoints, then long texts.
    pub fn termination_message(&self) -> String {
        let mut short = self.clone();
        loop {
            let text = serde_json::to_string(&short).unwrap_or_default();
            if text.len() <= MAX_TERMINATION_MESSAGE {
                return text;
            }
            if !short.metrics.is_empty() {
                short.metrics.clear();
            } else if short.checkpoints.len() > 1 {
                short.checkpoints.remove(0);
            } else if short
                .conversion
                .as_ref()
                .is_some_and(|report| !report.first_bad.is_empty())
            {
                if let Some(report) = &mut short.conversion {
                    report.first_bad.pop();
                }
            } else if short.message.len() > 256 {
                short.message = short.message.chars().take(short.message.chars().count() / 2).collect();
            } else {
                short = Self {
                    stage: short.stage,
                    message: short.message,
                    ..Self::default()
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_termination_message_never_exceeds_what_the_kubelet_keeps() {
        let mut progress = Progress {
            message: "é".repeat(9000),
            stage: Stage::Failed,
            ..Progress::default()
        };
        for step in 0..200 {
            progress.metrics.insert(format!("metric/{step}"), f64::from(step));
            progress.checkpoints.push(CheckpointRecord {
                step,
                uri: format!("pvc://claim/jobs/a/checkpoints/step-{step}"),
                digest: "sha256:0".into(),
                bytes: 1,
                metrics: BTreeMap::new(),
            });
        }
        let text = progress.termination_message();
        assert!(text.len() <= MAX_TERMINATION_MESSAGE);
        let read: Progress = serde_json::from_str(&text).expect("a termination message is JSON");
        assert_eq!(read.stage, Stage::Failed);
        assert_eq!(read.checkpoints.last().map(|c| c.step), Some(199));
    }
}

//! The two ways to change weights: GRPO on verifiable rewards and supervised fine-tuning.
//!
//! Defaults of [`Grpo`] are those of the released LLaVA-Critic-R1 scripts (EasyR1 fork, `examples/config.yaml` and the
//! run scripts) except where a field says otherwise.

use serde::{Deserialize, Serialize};

/// A part of the model whose weights stay as they are.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
pub enum Module {
    /// The vision tower and its merger.
    Vision,
    /// The token embeddings and the output head, tied or not.
    Embeddings,
}

/// How the learning rate moves over the run.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
pub enum Schedule {
    /// The same rate throughout.
    #[default]
    Constant,
    /// A straight line from the rate to `finalFraction` of it.
    Linear,
    /// Half a cosine from the rate to `finalFraction` of it.
    Cosine,
}

/// AdamW and its schedule.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Optimizer {
    /// Peak learning rate.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0, max = 1.0)))]
    pub learning_rate: f64,
    /// How the learning rate moves after the warm-up.
    pub schedule: Schedule,
    /// Share of the peak rate that is left at the last step (Linear and Cosine).
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0, max = 1.0)))]
    pub final_fraction: f64,
    /// Steps over which the rate rises from zero to its peak.
    pub warmup_steps: u32,
    /// Decay of the first moment.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0, max = 1.0)))]
    pub beta1: f64,
    /// Decay of the second moment.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0, max = 1.0)))]
    pub beta2: f64,
    /// Added to the root of the second moment.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0)))]
    pub epsilon: f64,
    /// Decoupled weight decay.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0)))]
    pub weight_decay: f64,
    /// Gradients are scaled down to this global L2 norm; a step whose norm is not finite is skipped.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0)))]
    pub max_grad_norm: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            learning_rate: 1e-6,
            schedule: Schedule::Constant,
            final_fraction: 0.1,
            warmup_steps: 0,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
        }
    }
}

/// How rewards of a group become advantages.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
pub enum RewardScaling {
    /// `(r - mean) / (std + 1e-6)`, std with n-1 (GRPO).
    #[default]
    Group,
    /// `r - mean` (Dr. GRPO).
    None,
}

/// Over what the loss is averaged.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
pub enum LossAggregation {
    /// Over all valid tokens of the mini-batch.
    #[default]
    TokenMean,
    /// Over the tokens of each sequence, then over the sequences.
    SequenceMean,
}

/// Group relative policy optimisation on verifiable rewards.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Grpo {
    /// Rollout steps of the whole run.
    #[cfg_attr(feature = "crd", schemars(range(min = 1)))]
    pub steps: u32,
    /// Dataset rows of one step. A preference row prepared with `order: Both` gives two prompts.
    #[cfg_attr(feature = "crd", schemars(range(min = 1, max = 65536)))]
    pub rows_per_step: u32,
    /// Completions sampled for each prompt (n); at least 2, since the advantage is relative to the group.
    #[cfg_attr(feature = "crd", schemars(range(min = 2, max = 1024)))]
    pub group_size: u32,
    /// Optimiser updates of one pass over a step's rollouts. The prompts of one row stay together.
    #[cfg_attr(feature = "crd", schemars(range(min = 1)))]
    pub mini_batches: u32,
    /// Passes over a step's rollouts.
    #[cfg_attr(feature = "crd", schemars(range(min = 1, max = 16)))]
    pub epochs: u32,
    /// Sampling temperature of the rollouts; log-probabilities are taken of the tempered distribution.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.01, max = 4.0)))]
    pub temperature: f64,
    /// Nucleus of the rollouts. Below 1 sampling is off-policy with respect to the full softmax of the loss
    /// (the released scripts use 0.99).
    #[cfg_attr(feature = "crd", schemars(range(min = 0.01, max = 1.0)))]
    pub top_p: f64,
    /// Longest completion, in tokens.
    #[cfg_attr(feature = "crd", schemars(range(min = 1)))]
    pub max_completion_tokens: u32,
    /// Coefficient of the k3 KL estimate against the frozen initial model; 0 leaves the reference out.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0)))]
    pub kl_coefficient: f64,
    /// The ratio is clipped below at `1 - clipLow`.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0, max = 1.0)))]
    pub clip_low: f64,
    /// The ratio is clipped above at `1 + clipHigh`.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0)))]
    pub clip_high: f64,
    /// For negative advantages the loss is at most `-dualClip * advantage`; 0 turns it off.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0)))]
    pub dual_clip: f64,
    /// How rewards of a group become advantages.
    pub reward_scaling: RewardScaling,
    /// Over what the loss is averaged.
    pub loss_aggregation: LossAggregation,
    /// Train identical completions of a prompt once, weighted by their count: the same loss, fewer tokens.
    pub deduplicate: bool,
    /// Modules whose weights stay as they are.
    #[cfg_attr(feature = "crd", schemars(length(max = 8)))]
    pub freeze: Vec<Module>,
    /// The optimiser.
    pub optimizer: Optimizer,
}

impl Default for Grpo {
    fn default() -> Self {
        Self {
            steps: 100,
            rows_per_step: 256,
            group_size: 8,
            mini_batches: 2,
            epochs: 1,
            temperature: 1.0,
            top_p: 1.0,
            max_completion_tokens: 2048,
            kl_coefficient: 0.01,
            clip_low: 0.2,
            clip_high: 0.3,
            dual_clip: 3.0,
            reward_scaling: RewardScaling::Group,
            loss_aggregation: LossAggregation::TokenMean,
            deduplicate: true,
            freeze: Vec::new(),
            optimizer: Optimizer::default(),
        }
    }
}

/// Supervised fine-tuning: cross-entropy on the answers of an instruction dataset.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Sft {
    /// Optimiser updates of the whole run.
    #[cfg_attr(feature = "crd", schemars(range(min = 1)))]
    pub steps: u32,
    /// Rows of one update.
    #[cfg_attr(feature = "crd", schemars(range(min = 1, max = 65536)))]
    pub batch_size: u32,
    /// Modules whose weights stay as they are.
    #[cfg_attr(feature = "crd", schemars(length(max = 8)))]
    pub freeze: Vec<Module>,
    /// The optimiser.
    pub optimizer: Optimizer,
}

impl Default for Sft {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 64,
            freeze: Vec::new(),
            optimizer: Optimizer {
                learning_rate: 1e-5,
                schedule: Schedule::Cosine,
                ..Optimizer::default()
            },
        }
    }
}

/// How a run changes the weights: exactly one member is set.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(kube::KubeSchema))]
#[cfg_attr(feature = "crd", x_kube(validation = kube::core::Rule::new("has(self.grpo) != has(self.sft)")
    .message("algorithm takes exactly one of grpo and sft")))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Algorithm {
    /// Group relative policy optimisation on verifiable rewards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpo: Option<Grpo>,
    /// Supervised fine-tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sft: Option<Sft>,
}

impl Algorithm {
    /// Steps of the whole run, 0 when no member is set.
    pub fn total_steps(&self) -> u32 {
        match (&self.grpo, &self.sft) {
            (Some(grpo), _) => grpo.steps,
            (None, Some(sft)) => sft.steps,
            (None, None) => 0,
        }
    }
}

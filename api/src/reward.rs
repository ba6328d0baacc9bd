//! Rewards that a program can verify.

use serde::{Deserialize, Serialize};

/// How a completion earns its reward.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub enum Rule {
    /// 1 where the boxed verdict is the row's preferred response, else 0 (LLaVA-Critic-R1's r_pref).
    Preference,
    /// 1 where the completion is `<think>…</think>…\boxed{…}…`, else 0 (r_format).
    Format,
    /// 1 where the boxed answer equals the row's answer after normalisation, else 0.
    ExactMatch,
}

/// One term of the reward; terms are summed by weight.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Reward {
    /// How the term is computed.
    pub rule: Rule,
    /// Factor of the term. The released critic scripts weigh preference 0.9 and format 0.1.
    #[cfg_attr(feature = "crd", schemars(range(min = 0.0, max = 1000.0)))]
    pub weight: f64,
}

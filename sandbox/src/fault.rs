//! Failures on demand: an API server that answers 409, 429 or 500, or ends watches, drawn by a seed so that a test that
//! fails can be run again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{server::status::ApiError, store::object::ResourceKey};

/// What happens instead of the request.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Failure {
    /// 409 `Conflict`.
    Conflict,
    /// 429 with `Retry-After: 1`.
    TooManyRequests,
    /// 500.
    Internal,
}

/// Which requests fail, and how often.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// Verbs (`create`, `update`, `patch`, `delete`, `get`, `list`, `watch`); empty for all.
    #[serde(default)]
    pub verbs: Vec<String>,
    /// Plurals; empty for all.
    #[serde(default)]
    pub resources: Vec<String>,
    /// What happens.
    pub failure: Failure,
    /// Chance of a request that fits, 0 to 1.
    #[serde(default = "always")]
    pub probability: f64,
    /// How many requests fail at most; without limit where absent.
    #[serde(default)]
    pub remaining: Option<u64>,
}

fn always() -> f64 {
    1.0
}

#[derive(Debug)]
struct State {
    random: ChaCha8Rng,
    rules: Vec<Rule>,
    injected: u64,
}

/// The rules in force; changed while the server runs.
#[derive(Debug)]
pub struct FaultPlan {
    state: Mutex<State>,
}

impl Default for FaultPlan {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                random: ChaCha8Rng::seed_from_u64(0),
                rules: Vec::new(),
                injected: 0,
            }),
        }
    }
}

impl FaultPlan {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces all rules and begins the draws anew from `seed`.
    pub fn set(&self, seed: u64, rules: Vec<Rule>) {
        let mut state = self.lock();
        state.random = ChaCha8Rng::seed_from_u64(seed);
        state.rules = rules;
    }

    /// Ends all failures.
    pub fn clear(&self) {
        self.lock().rules.clear();
    }

    /// The rules as they stand.
    pub fn rules(&self) -> Vec<Rule> {
        self.lock().rules.clone()
    }

    /// Requests that were made to fail so far.
    pub fn injected(&self) -> u64 {
        self.lock().injected
    }

    /// The failure of this request, if it is to fail.
    pub fn draw(&self, verb: &str, resource: &ResourceKey, name: &str) -> Option<ApiError> {
        let mut state = self.lock();
        let State {
            random,
            rules,
            injected,
        } = &mut *state;
        let fits = |list: &[String], item: &str| list.is_empty() || list.iter().any(|known| known == item);
        let rule = rules.iter_mut().find(|rule| {
            rule.remaining != Some(0)
                && fits(&rule.verbs, verb)
                && fits(&rule.resources, &resource.plural)
                && random.random_bool(rule.probability.clamp(0.0, 1.0))
        })?;
        if let Some(remaining) = &mut rule.remaining {
            *remaining -= 1;
        }
        *injected += 1;
        Some(match rule.failure {
            Failure::Conflict => ApiError::modified(resource, name),
            Failure::TooManyRequests => ApiError::too_many_requests(
                "the server has received too many requests and has asked us to try again later",
                1,
            ),
            Failure::Internal => ApiError::internal("injected by the fault plan"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(probability: f64, remaining: Option<u64>) -> Rule {
        Rule {
            verbs: vec!["create".into()],
            resources: vec!["pods".into()],
            failure: Failure::Internal,
            probability,
            remaining,
        }
    }

    #[test]
    fn a_rule_fails_as_many_requests_as_it_says() {
        let plan = FaultPlan::default();
        plan.set(1, vec![rule(1.0, Some(2))]);
        let pods = ResourceKey::new("", "pods");
        let failed = (0..5).filter(|_| plan.draw("create", &pods, "a").is_some()).count();
        assert_eq!((failed, plan.injected()), (2, 2));
        assert_eq!(plan.draw("get", &pods, "a"), None);
    }

    #[test]
    fn a_seed_draws_the_same_failures() {
        let draw = || {
            let plan = FaultPlan::default();
            plan.set(7, vec![rule(0.5, None)]);
            let pods = ResourceKey::new("", "pods");
            (0..64)
                .map(|_| plan.draw("create", &pods, "a").is_some())
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
        assert!(draw().contains(&true) && draw().contains(&false));
    }
}

//! Keeps the status of disruption budgets: how many healthy pods there are, and how many may be evicted.
//!
//! Pods count for themselves; there are no controllers here whose scale could be asked.

use k8s_openapi::{
    api::{
        core::v1::Pod,
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
    core::{Selector, SelectorExt},
    runtime::watcher,
};
use serde_json::json;
use tokio::task::JoinSet;

use super::{
    RESYNC, RETRY,
    mirror::{Bell, mirror},
};
use crate::server::write::metadata;

/// Watches and counts for ever.
pub async fn run(client: Client) {
    let (bell, mut tasks) = (Bell::default(), JoinSet::new());
    let config = watcher::Config::default();
    let pods = mirror(Api::<Pod>::all(client.clone()), config.clone(), &bell, &mut tasks);
    let budgets = mirror(
        Api::<PodDisruptionBudget>::all(client.clone()),
        config,
        &bell,
        &mut tasks,
    );
    loop {
        let mut well = true;
        for budget in budgets.state() {
            let guarded: Vec<_> = pods.state().into_iter().filter(|pod| guards(&budget, pod)).collect();
            if let Err(error) = report(&client, &budget, Count::of(&budget, &guarded)).await {
                tracing::debug!(budget = budget.name_any(), %error, "reporting a disruption budget");
                well = false;
            }
        }
        bell.wait(if well { RESYNC } else { RETRY }).await;
    }
}

/// Whether the budget is about the pod. One without a selector is about none.
fn guards(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.clone());
    budget.metadata.namespace == pod.metadata.namespace
        && selector
            .and_then(|selector| Selector::try_from(selector).ok())
            .is_some_and(|selector| selector.matches(pod.labels()))
}

/// What a budget comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Count {
    expected: i32,
    healthy: i32,
    desired: i32,
}

impl Count {
    fn of<P: AsRef<Pod>>(budget: &PodDisruptionBudget, pods: &[P]) -> Self {
        let phase = |pod: &Pod| {
            pod.status
                .as_ref()
                .and_then(|status| status.phase.clone())
                .unwrap_or_default()
        };
        let living = || {
            let pods = pods.iter().map(AsRef::as_ref);
            pods.filter(|pod| !matches!(phase(pod).as_str(), "Succeeded" | "Failed"))
        };
        let size = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        let expected = size(living().count());
        let healthy = size(living().filter(|pod| is_healthy(pod)).count());
        let desired = budget.spec.as_ref().map_or(0, |spec| desired(spec, expected));
        Self {
            expected,
            healthy,
            desired,
        }
    }

    fn allowed(self) -> i32 {
        (self.healthy - self.desired).max(0)
    }
}

fn is_healthy(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    pod.metadata.deletion_timestamp.is_none()
        && conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// How many of `expected` pods have to be healthy.
fn desired(spec: &PodDisruptionBudgetSpec, expected: i32) -> i32 {
    match (&spec.min_available, &spec.max_unavailable) {
        (Some(least), _) => share(least, expected),
        (None, Some(most)) => (expected - share(most, expected)).max(0),
        (None, None) => 0,
    }
}

/// A number, or a percentage of `whole`, rounded up.
fn share(part: &IntOrString, whole: i32) -> i32 {
    match part {
        IntOrString::Int(number) => *number,
        IntOrString::String(text) => {
            let percent: i32 = text.trim_end_matches('%').parse().unwrap_or(100);
            (whole * percent + 99) / 100
        }
    }
}

async fn report(client: &Client, budget: &PodDisruptionBudget, count: Count) -> Result<(), kube::Error> {
    let (state, reason) = if count.allowed() > 0 {
        ("True", "SufficientPods")
    } else {
        ("False", "InsufficientPods")
    };
    let known = budget.status.as_ref();
    let same = known.is_some_and(|known| {
        let condition = known.conditions.as_ref().and_then(|conditions| conditions.first());
        (
            known.expected_pods,
            known.current_healthy,
            known.desired_healthy,
            known.disruptions_allowed,
        ) == (
            Some(count.expected),
            Some(count.healthy),
            Some(count.desired),
            Some(count.allowed()),
        ) && known.observed_generation == budget.metadata.generation
            && condition.is_some_and(|condition| condition.status == state)
    });
    if same {
        return Ok(());
    }
    let generation = budget.metadata.generation;
    let patch = json!({
        // Evictions count down in the status, too: neither may overwrite what the other has just said.
        "metadata": {"resourceVersion": budget.metadata.resource_version},
        "status": {
            "expectedPods": count.expected, "currentHealthy": count.healthy, "desiredHealthy": count.desired,
            "disruptionsAllowed": count.allowed(), "observedGeneration": generation,
            "conditions": [{"type": "DisruptionAllowed", "status": state, "reason": reason, "message": "",
                "observedGeneration": generation, "lastTransitionTime": metadata::now()}]}});
    let api: Api<PodDisruptionBudget> = Api::namespaced(client.clone(), &budget.namespace().unwrap_or_default());
    api.patch_status(&budget.name_any(), &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn pod(ready: &str) -> Arc<Pod> {
        let pod = json!({"metadata": {"namespace": "a", "labels": {"app": "a"}},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn budget(spec: &serde_json::Value) -> PodDisruptionBudget {
        serde_json::from_value(json!({"metadata": {"namespace": "a"}, "spec": spec})).unwrap()
    }

    #[test]
    fn a_budget_is_about_what_it_selects() {
        let selected = budget(&json!({"selector": {"matchLabels": {"app": "a"}}}));
        assert!(guards(&selected, &pod("True")));
        let other = budget(&json!({"selector": {"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}}));
        assert!(!guards(&other, &pod("True")));
        assert!(!guards(&budget(&json!({})), &pod("True")));
    }

    #[test]
    fn numbers_and_percentages_leave_room_or_not() {
        let pods = [pod("True"), pod("True"), pod("False")];
        for (spec, allowed) in [
            (json!({"minAvailable": 1}), 1),
            (json!({"minAvailable": 2}), 0),
            (json!({"minAvailable": "50%"}), 0),
            (json!({"maxUnavailable": 1}), 0),
            (json!({"maxUnavailable": "100%"}), 2),
        ] {
            assert_eq!(Count::of(&budget(&spec), &pods).allowed(), allowed, "{spec}");
        }
    }
}

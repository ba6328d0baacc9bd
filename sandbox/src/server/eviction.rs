//! `POST …/pods/NAME/eviction`: a deletion that disruption budgets may forbid (kubernetes `registry/core/pod/storage`).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt};
use serde_json::{Value, json};

use super::{
    call::Call,
    reply::{self, Reply},
    status::ApiError,
    verb::{delete, update::ATTEMPTS},
};
use crate::{
    schema::Cause,
    store::{
        StoreError,
        object::{self, Object, ObjectKey, ResourceKey},
    },
};

/// Deletes the pod unless a disruption budget forbids it.
pub fn evict(call: &Call, body: &[u8]) -> Result<Reply, ApiError> {
    let eviction = reply::decode(call.content_type.as_deref(), body)?;
    let pod = call.stored()?;
    if !is_free(&pod) {
        take_from_budget(call, &pod)?;
    }
    delete::evict(call, &eviction)?;
    Ok(reply::json(
        201,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    ))
}

/// A pod that does not run, or ends anyway, costs no budget.
fn is_free(pod: &Value) -> bool {
    matches!(
        pod["status"]["phase"].as_str(),
        Some("Pending" | "Succeeded" | "Failed")
    ) || pod["metadata"]["deletionTimestamp"].is_string()
}

fn take_from_budget(call: &Call, pod: &Value) -> Result<(), ApiError> {
    let table = ResourceKey::new("policy", "poddisruptionbudgets");
    for _ in 0..ATTEMPTS {
        let budgets = call.server.store.list(&table, call.namespace()).objects;
        let mut guarding = budgets.into_iter().filter(|(_, budget)| guards(budget, pod));
        let Some((key, budget)) = guarding.next() else {
            return Ok(());
        };
        if guarding.next().is_some() {
            let why =
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
            return Err(ApiError::internal(why));
        }
        match take(call, &table, &key, &budget, pod) {
            // The controller has just written; what it wrote counts.
            Ok(false) => {}
            Ok(true) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Err(ApiError::too_many_requests(REFUSAL, 10))
}

const REFUSAL: &str = "Cannot evict pod as it would violate the pod's disruption budget.";

/// Counts the budget down by one; false when another write came between.
fn take(call: &Call, table: &ResourceKey, key: &ObjectKey, budget: &Object, pod: &Value) -> Result<bool, ApiError> {
    let (status, name) = (&budget["status"], &key.name);
    let number = |field: &str| status[field].as_i64().unwrap_or(0);
    let refuse = |why: String| {
        let mut error = ApiError::too_many_requests(REFUSAL, 10);
        if let Some(details) = &mut error.details {
            details.causes = vec![Cause::disruption_budget(&why)];
        }
        error
    };
    if status["observedGeneration"] != budget["metadata"]["generation"] {
        return Err(refuse(format!(
            "The disruption budget {name} is still being processed by the server."
        )));
    }
    let (healthy, desired) = (number("currentHealthy"), number("desiredHealthy"));
    if !is_ready(pod) && healthy >= desired && desired > 0 {
        return Ok(true);
    }
    if number("disruptionsAllowed") <= 0 {
        return Err(refuse(format!(
            "The disruption budget {name} needs {desired} healthy pods and has {healthy} currently"
        )));
    }
    if call.query.dry_run {
        return Ok(true);
    }
    let mut less = budget.as_ref().clone();
    less["status"]["disruptionsAllowed"] = json!(number("disruptionsAllowed") - 1);
    match call.server.store.replace(table, key, object::revision(budget), less) {
        Ok(_) => Ok(true),
        Err(StoreError::Stale { .. } | StoreError::Missing(_)) => Ok(false),
        Err(error) => Err(ApiError::from_store(table, name, &error)),
    }
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions
        .into_iter()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn guards(budget: &Value, pod: &Value) -> bool {
    let labels: BTreeMap<String, String> =
        serde_json::from_value(pod["metadata"]["labels"].clone()).unwrap_or_default();
    let selector: Option<LabelSelector> = serde_json::from_value(budget["spec"]["selector"].clone()).ok();
    selector
        .filter(|_| budget["spec"]["selector"].is_object())
        .and_then(|selector| Selector::try_from(selector).ok())
        .is_some_and(|selector| selector.matches(&labels))
}

//! Cells of a pod (kubernetes `pkg/printers/internalversion` `printPod`).

use serde_json::{Value, json};

use super::{Layout, cell, column};

/// Columns of `kubectl get pods`.
#[must_use]
pub fn layout() -> Layout {
    Layout {
        columns: vec![
            column("Name", "string", 0),
            column("Ready", "string", 0),
            column("Status", "string", 0),
            column("Restarts", "string", 0),
            column("Age", "string", 0),
            column("IP", "string", 1),
            column("Node", "string", 1),
            column("Nominated Node", "string", 1),
            column("Readiness Gates", "string", 1),
        ],
        row,
    }
}

fn row(pod: &Value) -> Vec<Value> {
    let statuses = || pod["status"]["containerStatuses"].as_array().into_iter().flatten();
    let ready = statuses().filter(|status| status["ready"] == true).count();
    let total = cell::count(&pod["spec"]["containers"]);
    vec![
        cell::name(pod),
        json!(format!("{ready}/{total}")),
        json!(status(pod)),
        json!(restarts(pod)),
        cell::object_age(pod),
        cell::text(&pod["status"]["podIP"], "<none>"),
        cell::text(&pod["spec"]["nodeName"], "<none>"),
        cell::text(&pod["status"]["nominatedNodeName"], "<none>"),
        json!("<none>"),
    ]
}

fn restarts(pod: &Value) -> String {
    let statuses = || pod["status"]["containerStatuses"].as_array().into_iter().flatten();
    let count: u64 = statuses().filter_map(|status| status["restartCount"].as_u64()).sum();
    let last = statuses()
        .filter_map(|status| status["lastState"]["terminated"]["finishedAt"].as_str())
        .max();
    match last {
        Some(last) if count > 0 => {
            format!("{count} ({} ago)", cell::age(&json!(last)).as_str().unwrap_or_default())
        }
        _ => count.to_string(),
    }
}

/// The one word (or two) for the state of a pod.
fn status(pod: &Value) -> String {
    let state = &pod["status"];
    let mut reason = state["reason"]
        .as_str()
        .or_else(|| state["phase"].as_str())
        .unwrap_or("Unknown")
        .to_owned();
    let conditions = state["conditions"].as_array().into_iter().flatten();
    if conditions
        .filter(|condition| condition["type"] == "PodScheduled")
        .any(|condition| condition["reason"] == "SchedulingGated")
    {
        "SchedulingGated".clone_into(&mut reason);
    }
    if let Some(text) = init_reason(pod) {
        reason = text;
    } else {
        let mut running = false;
        for status in state["containerStatuses"].as_array().into_iter().flatten().rev() {
            let (waiting, terminated) = (&status["state"]["waiting"], &status["state"]["terminated"]);
            if let Some(text) = waiting["reason"].as_str().filter(|text| !text.is_empty()) {
                text.clone_into(&mut reason);
            } else if terminated.is_object() {
                reason = ended(terminated);
            } else if status["ready"] == true && status["state"]["running"].is_object() {
                running = true;
            }
        }
        if reason == "Completed" && running {
            reason = if has_ready_condition(pod) {
                "Running".into()
            } else {
                "NotReady".into()
            };
        }
    }
    if pod["metadata"]["deletionTimestamp"].is_string() {
        return if state["reason"] == "NodeLost" {
            "Unknown".into()
        } else {
            "Terminating".into()
        };
    }
    reason
}

fn ended(terminated: &Value) -> String {
    match terminated["reason"].as_str().filter(|text| !text.is_empty()) {
        Some(text) => text.to_owned(),
        None => match terminated["signal"].as_i64().filter(|signal| *signal != 0) {
            Some(signal) => format!("Signal:{signal}"),
            None => format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or(0)),
        },
    }
}

/// What the first unfinished init container says.
fn init_reason(pod: &Value) -> Option<String> {
    let total = cell::count(&pod["spec"]["initContainers"]);
    let statuses = pod["status"]["initContainerStatuses"].as_array().into_iter().flatten();
    for (index, status) in statuses.enumerate() {
        let (waiting, terminated) = (&status["state"]["waiting"], &status["state"]["terminated"]);
        if terminated.is_object() && terminated["exitCode"] == 0 {
            continue;
        }
        if terminated.is_object() {
            return Some(format!("Init:{}", ended(terminated)));
        }
        return match waiting["reason"]
            .as_str()
            .filter(|text| !text.is_empty() && *text != "PodInitializing")
        {
            Some(text) => Some(format!("Init:{text}")),
            None => Some(format!("Init:{index}/{total}")),
        };
    }
    None
}

fn has_ready_condition(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions
        .into_iter()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_word_is_the_containers_where_it_says_more_than_the_phase() {
        let pod = |status: Value| json!({"metadata": {}, "spec": {"containers": [{}]}, "status": status});
        assert_eq!(status(&pod(json!({"phase": "Pending"}))), "Pending");
        let waiting =
            json!({"phase": "Running", "containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]});
        assert_eq!(status(&pod(waiting)), "CrashLoopBackOff");
        let ended = json!({"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"exitCode": 3}}}]});
        assert_eq!(status(&pod(ended)), "ExitCode:3");
        let mut deleted = pod(json!({"phase": "Running"}));
        deleted["metadata"]["deletionTimestamp"] = json!("2024-01-01T00:00:00Z");
        assert_eq!(status(&deleted), "Terminating");
    }
}

//! Events: core/v1 and events.k8s.io/v1 are two views of one object (kubernetes `pkg/apis/core/v1` conversion). The
//! core view is what is stored; it has room for the fields of both.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};

use crate::{
    schema::Cause,
    server::ApiServer,
    store::{
        Store,
        object::{self, ResourceKey},
    },
};

/// Events are kept this long after they were seen last (the real server's `--event-ttl`).
const LIFETIME: SignedDuration = SignedDuration::from_hours(1);
/// Time between two looks for old events.
const PERIOD: Duration = Duration::from_secs(60);

/// events.k8s.io name -> core name.
const RENAMED: &[(&str, &str)] = &[
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedCount", "count"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedSource", "source"),
];

fn rename(object: &Value, api_version: &str, names: impl Fn(&str) -> Option<&'static str>) -> Value {
    let mut converted = Map::new();
    for (key, value) in object.as_object().into_iter().flatten() {
        converted.insert(names(key).unwrap_or(key).to_owned(), value.clone());
    }
    converted.insert("apiVersion".into(), api_version.into());
    Value::Object(converted)
}

/// events.k8s.io/v1 from core/v1.
#[must_use]
pub fn from_core(object: &Value) -> Value {
    rename(object, "events.k8s.io/v1", |key| {
        RENAMED.iter().find(|(_, core)| *core == key).map(|(new, _)| *new)
    })
}

/// core/v1 from events.k8s.io/v1.
#[must_use]
pub fn to_core(object: &Value) -> Value {
    rename(object, "v1", |key| {
        RENAMED.iter().find(|(new, _)| *new == key).map(|(_, core)| *core)
    })
}

/// What is wrong with a new event of core/v1.
#[must_use]
pub fn check(event: &Value) -> Vec<Cause> {
    let (own, about) = (&event["metadata"]["namespace"], &event["involvedObject"]["namespace"]);
    let stated = about.as_str().unwrap_or_default();
    // What has no namespace is told of in `default`.
    if about == own || (stated.is_empty() && own == "default") {
        return Vec::new();
    }
    vec![Cause::invalid(
        "involvedObject.namespace",
        &stated.into(),
        "does not match event.namespace",
    )]
}

/// Removes old events until the server stops.
pub async fn expire(server: Arc<ApiServer>) {
    loop {
        tokio::select! {
            () = server.shutdown.cancelled() => return,
            () = tokio::time::sleep(PERIOD) => remove_before(&server.store, Timestamp::now() - LIFETIME),
        }
    }
}

fn remove_before(store: &Store, limit: Timestamp) {
    let events = ResourceKey::new("", "events");
    for (key, event) in store.list(&events, None).objects {
        let times = [
            &event["metadata"]["creationTimestamp"],
            &event["lastTimestamp"],
            &event["series"]["lastObservedTime"],
        ];
        let seen = times
            .into_iter()
            .filter_map(|time| time.as_str()?.parse::<Timestamp>().ok())
            .max();
        if seen.is_some_and(|seen| seen < limit) {
            // A rival write means that the event was seen again.
            store
                .remove(&events, &key, object::revision(&event), event.as_ref().clone())
                .ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_comes_back_from_the_core_form_unchanged() {
        let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "note": "x", "regarding": {"name": "a"},
            "reportingController": "c", "series": {"count": 2}});
        let core = to_core(&event);
        assert_eq!(core["message"], "x");
        assert_eq!(core["involvedObject"]["name"], "a");
        assert_eq!(from_core(&core), event);
    }
    #[test]
    fn only_old_events_are_removed() {
        let store = Store::in_memory();
        let events = ResourceKey::new("", "events");
        for (name, time) in [("old", "2024-01-01T00:00:00Z"), ("new", "2024-01-01T02:00:00Z")] {
            let event = json!({"metadata": {"name": name, "creationTimestamp": time}});
            store
                .create(&events, &object::ObjectKey::new("default", name), event)
                .unwrap();
        }
        remove_before(&store, "2024-01-01T01:00:00Z".parse().unwrap());
        let left: Vec<String> = store
            .list(&events, None)
            .objects
            .into_iter()
            .map(|(key, _)| key.name)
            .collect();
        assert_eq!(left, ["new"]);
    }
}

//! Events: core/v1 and events.k8s.io/v1 are two views of one object (kubernetes `pkg/apis/core/v1` conversion). The
//! core view is what is stored; it has room for the fields of both.

use serde_json::{Map, Value};

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
    rename(object, "events.k8s.io/v1", |key| RENAMED.iter().find(|(_, core)| *core == key).map(|(new, _)| *new))
}

/// core/v1 from events.k8s.io/v1.
#[must_use]
pub fn to_core(object: &Value) -> Value {
    rename(object, "v1", |key| RENAMED.iter().find(|(new, _)| *new == key).map(|(_, core)| *core))
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
}

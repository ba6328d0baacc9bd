use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::schema::ResourceSchema;

fn schema() -> Arc<Structural> {
    let spec = json!({"type": "object", "properties": {
        "replicas": {"type": "integer"}, "image": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "plain": {"type": "array", "items": {"type": "integer"}},
        "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "ports": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["port", "protocol"],
            "items": {"type": "object", "required": ["port"], "properties": {"port": {"type": "integer"},
                "protocol": {"type": "string", "default": "TCP"}, "name": {"type": "string"}}}}}});
    let crd = json!({"type": "object", "properties": {"spec": spec,
        "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}});
    Arc::new(ResourceSchema::custom(&crd).unwrap().root().clone())
}

fn by(manager: &str) -> Writer<'_> {
    Writer {
        manager,
        api_version: "v1",
        subresource: "",
        has_status: true,
        time: "2026-01-01T00:00:00Z",
    }
}

fn config(spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "K", "metadata": {"name": "n"}, "spec": spec})
}

fn applied(live: Option<&Value>, manager: &str, spec: &Value) -> Result<Value, ApplyError> {
    apply(live, &config(spec), &schema(), &by(manager), false)
}

fn message(result: Result<Value, ApplyError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_first_apply_creates_the_object_with_its_manager() {
    let object = applied(
        None,
        "a",
        &json!({"replicas": 1, "tags": ["x"], "ports": [{"port": 80}]}),
    )
    .unwrap();
    assert_eq!(object["spec"]["replicas"], 1);
    let entry = &object["metadata"]["managedFields"][0];
    assert_eq!(entry["manager"], "a");
    assert_eq!(entry["operation"], "Apply");
    assert_eq!(entry["time"], "2026-01-01T00:00:00Z");
    let fields = json!({"f:spec": {"f:ports": {r#"k:{"port":80,"protocol":"TCP"}"#: {".": {}, "f:port": {}}},
        "f:replicas": {}, "f:tags": {r#"v:"x""#: {}}}});
    assert_eq!(entry["fieldsV1"], fields);
}

#[test]
fn applying_the_same_again_changes_nothing_not_even_a_time() {
    let first = applied(None, "a", &json!({"replicas": 1})).unwrap();
    let later = Writer {
        time: "2027-01-01T00:00:00Z",
        ..by("a")
    };
    let again = apply(Some(&first), &config(&json!({"replicas": 1})), &schema(), &later, false).unwrap();
    assert_eq!(first, again);
}

#[test]
fn another_value_in_a_field_of_another_applier_is_a_conflict() {
    let first = applied(None, "a", &json!({"replicas": 1})).unwrap();
    let error = applied(Some(&first), "b", &json!({"replicas": 2})).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"Apply failed with 1 conflict: conflict with "a": .spec.replicas"#
    );
    assert_eq!(error.causes(), [Cause::manager_conflict(".spec.replicas", r#""a""#)]);
    assert_eq!(error.causes()[0].message, r#"conflict with "a""#);
    let forced = apply(
        Some(&first),
        &config(&json!({"replicas": 2})),
        &schema(),
        &by("b"),
        true,
    )
    .unwrap();
    assert_eq!(forced["spec"]["replicas"], 2);
    assert_eq!(forced["metadata"]["managedFields"].as_array().unwrap().len(), 1);
    assert_eq!(forced["metadata"]["managedFields"][0]["manager"], "b");
}

#[test]
fn a_conflict_with_an_updater_names_its_version() {
    let mut live = config(&json!({"replicas": 1, "image": "x"}));
    super::super::managed::track_update(None, &mut live, &schema(), &by("kubectl-client-side-apply"));
    assert_eq!(
        message(applied(Some(&live), "b", &json!({"replicas": 2}))),
        r#"Apply failed with 1 conflict: conflict with "kubectl-client-side-apply" using v1: .spec.replicas"#
    );
    assert_eq!(
        message(applied(Some(&live), "b", &json!({"replicas": 2, "image": "y"}))),
        "Apply failed with 2 conflicts: conflicts with \"kubectl-client-side-apply\" using v1:\n- .spec.image\n- .spec.replicas"
    );
}

#[test]
fn the_same_value_is_shared_and_leaving_it_out_gives_it_up() {
    let first = applied(None, "a", &json!({"replicas": 1, "image": "x"})).unwrap();
    let shared = applied(Some(&first), "b", &json!({"replicas": 1})).unwrap();
    let given_up = applied(Some(&shared), "a", &json!({"image": "x"})).unwrap();
    assert_eq!(given_up["spec"], json!({"replicas": 1, "image": "x"}));
    let gone = applied(Some(&given_up), "b", &json!({"image": "x"})).unwrap();
    assert_eq!(gone["spec"], json!({"image": "x"}));
}

#[test]
fn fields_left_out_go_and_other_managers_items_stay() {
    let first = applied(
        None,
        "a",
        &json!({"labels": {"p": "1", "q": "2"}, "ports": [{"port": 1, "name": "x"}, {"port": 2}]}),
    );
    let both = applied(
        Some(&first.unwrap()),
        "b",
        &json!({"labels": {"r": "3"}, "ports": [{"port": 3}]}),
    )
    .unwrap();
    let less = applied(Some(&both), "a", &json!({"labels": {"p": "1"}, "ports": [{"port": 1}]})).unwrap();
    assert_eq!(
        less["spec"],
        json!({"labels": {"p": "1", "r": "3"}, "ports": [{"port": 1}, {"port": 3}]})
    );
    let none = applied(Some(&less), "a", &json!({})).unwrap();
    assert_eq!(none["spec"], json!({"labels": {"r": "3"}, "ports": [{"port": 3}]}));
    let empty = applied(Some(&none), "b", &json!({})).unwrap();
    assert_eq!(empty["spec"], json!({}));
}

#[test]
fn a_field_that_others_changed_by_update_is_no_longer_the_appliers() {
    let first = applied(None, "a", &json!({"replicas": 1, "image": "x"})).unwrap();
    let mut scaled = first.clone();
    scaled["spec"]["replicas"] = json!(5);
    super::super::managed::track_update(Some(&first), &mut scaled, &schema(), &by("hpa"));
    let left_out = applied(Some(&scaled), "a", &json!({"image": "x"})).unwrap();
    assert_eq!(left_out["spec"]["replicas"], 5);
    assert!(message(applied(Some(&scaled), "a", &json!({"replicas": 1}))).contains(r#""hpa" using v1"#));
}

#[test]
fn the_status_is_applied_through_its_own_door() {
    let live = applied(None, "a", &json!({"replicas": 1})).unwrap();
    let door = Writer {
        subresource: "status",
        ..by("a")
    };
    let status = json!({"apiVersion": "v1", "kind": "K", "metadata": {"name": "n"}, "status": {"phase": "Running"}});
    let object = apply(Some(&live), &status, &schema(), &door, false).unwrap();
    assert_eq!(object["spec"]["replicas"], 1);
    assert_eq!(object["status"]["phase"], "Running");
    let entries = object["metadata"]["managedFields"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    assert!(
        entries
            .iter()
            .any(|e| e["subresource"] == "status" && e["fieldsV1"] == json!({"f:status": {"f:phase": {}}}))
    );
    let again = apply(Some(&object), &status, &schema(), &door, false).unwrap();
    assert_eq!(object, again);
}

#[test]
fn objects_without_managers_are_owned_before_the_first_apply() {
    let live = config(&json!({"replicas": 1}));
    let text = message(applied(Some(&live), "a", &json!({"replicas": 2})));
    assert!(
        text.contains(r#""before-first-apply" using v1: .spec.replicas"#),
        "{text}"
    );
}

#[test]
fn kubectl_takes_over_what_it_applied_from_the_client_side() {
    let mut live = config(&json!({"replicas": 1}));
    let text = format!("{}\n", config(&json!({"replicas": 1})));
    live["metadata"]["annotations"] = json!({LAST_APPLIED: text});
    super::super::managed::track_update(None, &mut live, &schema(), &by("kubectl-client-side-apply"));
    let object = applied(Some(&live), "kubectl", &json!({"replicas": 2})).unwrap();
    assert_eq!(object["spec"]["replicas"], 2);
    let remembered = object["metadata"]["annotations"][LAST_APPLIED].as_str().unwrap();
    assert!(remembered.contains(r#""replicas":2"#));
    assert!(applied(Some(&live), "other", &json!({"replicas": 2})).is_err());
}

#[test]
fn a_configuration_must_be_unambiguous() {
    let text = message(applied(
        None,
        "a",
        &json!({"ports": [{"port": 1}, {"port": 1, "protocol": "TCP"}]}),
    ));
    assert!(
        text.contains(r#".spec.ports: duplicate entries for key [port=1,protocol="TCP"]"#),
        "{text}"
    );
    let carrying = json!({"metadata": {"managedFields": []}});
    assert!(matches!(
        apply(None, &carrying, &schema(), &by("a"), false),
        Err(ApplyError::HasManagedFields)
    ));
}

#[test]
fn built_in_lists_merge_by_their_keys() {
    let pod = ResourceSchema::builtin("", "v1", "Pod").unwrap();
    let container = |name: &str| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": name, "image": "i"}]}});
    let first = apply(None, &container("a"), pod.root(), &by("x"), false).unwrap();
    let both = apply(Some(&first), &container("b"), pod.root(), &by("y"), false).unwrap();
    assert_eq!(both["spec"]["containers"].as_array().unwrap().len(), 2);
}

fn spec() -> impl Strategy<Value = Value> {
    // An empty keyed list sets no field, on the API server neither, so it has no owner to reason about.
    let label = prop::collection::btree_map("[ab]", "[xy]", 1..3);
    let tags = prop::collection::btree_set("[pqr]", 1..4);
    let ports = prop::collection::btree_map(1i64..4, prop::option::of("[uv]"), 1..3);
    let parts = (
        prop::option::of(0i64..3),
        prop::option::of(label),
        prop::option::of(tags),
        prop::option::of(ports),
    );
    parts.prop_map(|(replicas, labels, tags, ports)| {
        let mut spec = json!({});
        if let Some(n) = replicas {
            spec["replicas"] = json!(n);
        }
        if let Some(labels) = labels {
            spec["labels"] = json!(labels);
        }
        if let Some(tags) = tags {
            spec["tags"] = json!(tags);
        }
        if let Some(ports) = ports {
            let item = |(port, name): (i64, Option<String>)| match name {
                Some(name) => json!({"port": port, "name": name}),
                None => json!({"port": port}),
            };
            spec["ports"] = ports.into_iter().map(item).collect();
        }
        spec
    })
}

fn forced(live: Option<&Value>, manager: &str, spec: &Value) -> Value {
    apply(live, &config(spec), &schema(), &by(manager), true).unwrap()
}

proptest! {
    #[test]
    fn applying_is_idempotent(a in spec(), b in spec(), c in spec()) {
        let live = forced(Some(&forced(None, "a", &a)), "b", &b);
        let once = forced(Some(&live), "a", &c);
        prop_assert_eq!(&once, &forced(Some(&once), "a", &c));
    }

    #[test]
    fn managers_of_disjoint_fields_never_conflict(a in spec(), n in 0i64..3) {
        let mut first = a;
        first.as_object_mut().unwrap().remove("replicas");
        let live = forced(None, "a", &first);
        let both = applied(Some(&live), "b", &json!({"replicas": n})).unwrap();
        prop_assert!(applied(Some(&both), "a", &first).is_ok());
    }

    #[test]
    fn leaving_everything_out_removes_only_what_was_owned_alone(a in spec(), b in spec()) {
        let theirs = forced(None, "a", &a);
        let both = forced(Some(&theirs), "b", &b);
        let left = forced(Some(&both), "b", &json!({}));
        // Every field that the other manager still owned is there, with its value.
        let owned = Managers::read(&both).0.get(&by("a").identity(APPLY)).map(|e| e.set.clone()).unwrap_or_default();
        let schema = schema();
        let kept = typed::with_named_parents(&typed::field_set(&bare(&left), Some(&schema)), Some(&schema));
        prop_assert!(owned.difference(&kept).is_empty(), "{:?}", owned.difference(&kept).paths());
        let changes = typed::compare(&bare(&both), &bare(&left), Some(&schema));
        prop_assert!(changes.added.is_empty() && changes.modified.paths().iter().all(|p| p != ".spec.replicas"));
    }

    #[test]
    fn what_one_manager_applies_alone_is_what_is_stored(a in spec(), b in spec()) {
        let object = forced(Some(&forced(None, "a", &a)), "a", &b);
        let fresh = forced(None, "a", &b);
        let set = |o: &Value| typed::field_set(&bare(o), Some(&schema()));
        prop_assert_eq!(set(&object).difference(&set(&fresh)), FieldSet::default());
        prop_assert_eq!(set(&fresh).difference(&set(&object)), FieldSet::default());
    }
}

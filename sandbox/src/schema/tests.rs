use proptest::prelude::*;
use serde_json::json;

use super::*;

fn custom(spec: &Value) -> ResourceSchema {
    ResourceSchema::custom(&json!({"type": "object", "properties": {"spec": spec}})).unwrap()
}

fn messages(schema: &ResourceSchema, value: &Value, old: Option<&Value>) -> Vec<String> {
    schema.validate(value, old).iter().map(ToString::to_string).collect()
}

#[test]
fn types_and_bounds_are_refused_in_the_words_of_the_api_server() {
    let schema = custom(&json!({"type": "object", "required": ["name"], "properties": {
        "name": {"type": "string"},
        "replicas": {"type": "integer", "minimum": 1},
        "mode": {"type": "string", "enum": ["a", "b"]},
        "port": {"x-kubernetes-int-or-string": true},
        "tag": {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3},
        "list": {"type": "array", "maxItems": 1, "items": {"type": "string"}},
        "when": {"type": "string", "format": "date-time"}}}));
    let value =
        json!({"spec": {"replicas": "x", "mode": "c", "port": true, "tag": "ABCD", "list": [1, "b"], "when": "now"}});
    assert_eq!(
        messages(&schema, &value, None),
        [
            r#"spec.list[0]: Invalid value: "integer": spec.list[0] in body must be of type string: "integer""#,
            r"spec.list: Too many: 2: must have at most 1 item",
            r#"spec.mode: Unsupported value: "c": supported values: "a", "b""#,
            r#"spec.port: Invalid value: "boolean": spec.port in body must be of type integer,string: "boolean""#,
            r#"spec.replicas: Invalid value: "string": spec.replicas in body must be of type integer: "string""#,
            r"spec.tag: Too long: may not be more than 3 bytes",
            r#"spec.tag: Invalid value: "ABCD": spec.tag in body should match '^[a-z]+$'"#,
            r#"spec.when: Invalid value: "now": spec.when in body must be of type date-time: "now""#,
            r"spec.name: Required value",
        ]
    );
    let low = json!({"spec": {"name": "a", "replicas": 0, "tag": "a"}});
    assert_eq!(
        messages(&schema, &low, None),
        [
            "spec.replicas: Invalid value: 0: spec.replicas in body should be greater than or equal to 1",
            r#"spec.tag: Invalid value: "a": spec.tag in body should be at least 2 chars long"#,
        ]
    );
}

#[test]
fn a_union_by_one_of_is_refused_when_no_branch_or_two_hold() {
    let schema = custom(
        &json!({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}),
    );
    assert_eq!(
        messages(&schema, &json!({"spec": {}}), None),
        [
            r#"<nil>: Invalid value: "": "spec" must validate one and only one schema (oneOf). Found none valid"#,
            "spec.a: Required value"
        ]
    );
    let both = messages(&schema, &json!({"spec": {"a": "", "b": ""}}), None);
    assert!(both[0].ends_with("Found 2 valid alternatives"), "{both:?}");
    assert!(messages(&schema, &json!({"spec": {"a": ""}}), None).is_empty());
}

#[test]
fn rules_speak_with_their_message_reason_and_path() {
    let schema = custom(
        &json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"},
            "c": {"type": "string", "x-kubernetes-validations": [{"rule": "self != 'x'"}]}},
        "x-kubernetes-validations": [
            {"rule": "self.a <= self.b", "messageExpression": "'a is ' + string(self.a)", "fieldPath": ".a"},
            {"rule": "self.a != 7", "message": " seven ", "reason": "FieldValueForbidden"}]}),
    );
    assert_eq!(
        messages(&schema, &json!({"spec": {"a": 7, "b": 1, "c": "x"}}), None),
        [
            "spec.a: Invalid value: a is 7",
            "spec: Forbidden: seven",
            r#"spec.c: Invalid value: "x": failed rule: self != 'x'"#
        ]
    );
}

#[test]
fn rules_wait_until_the_value_has_its_shape() {
    let schema = custom(
        &json!({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}},
        "x-kubernetes-validations": [{"rule": "self.a > 1"}]}),
    );
    let found = messages(&schema, &json!({"spec": {}}), None);
    assert_eq!(found[0], "spec.a: Required value");
    assert!(
        found[1].starts_with("<nil>: Invalid value: null: some validation rules were not checked"),
        "{found:?}"
    );
}

#[test]
fn transition_rules_run_where_the_old_value_is_known() {
    let fixed = json!([{"rule": "self == oldSelf", "message": "immutable"}]);
    let schema = custom(&json!({"type": "object", "properties": {
        "a": {"type": "string", "x-kubernetes-validations": fixed},
        "m": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["n"], "items":
            {"type": "object", "required": ["n"], "properties": {"n": {"type": "string"},
                "v": {"type": "integer", "x-kubernetes-validations": fixed}}}},
        "l": {"type": "array", "items": {"type": "integer", "x-kubernetes-validations": fixed}},
        "o": {"type": "object", "x-kubernetes-validations":
            [{"rule": "!oldSelf.hasValue() || self == oldSelf.value()", "optionalOldSelf": true, "message": "fixed"}],
            "properties": {"x": {"type": "integer"}}}}}));
    let old = json!({"spec": {"a": "1", "m": [{"n": "p", "v": 1}, {"n": "q", "v": 2}], "l": [1], "o": {"x": 1}}});
    let new = json!({"spec": {"a": "2", "m": [{"n": "q", "v": 3}, {"n": "p", "v": 1}], "l": [2], "o": {"x": 2}}});
    assert_eq!(
        messages(&schema, &new, Some(&old)),
        [
            r#"spec.a: Invalid value: "2": immutable"#,
            "spec.m[0].v: Invalid value: 3: immutable",
            "spec.o: Invalid value: fixed"
        ]
    );
    assert!(messages(&schema, &new, None).is_empty());
}

#[test]
fn rules_at_the_root_see_the_name() {
    let schema = ResourceSchema::custom(&json!({"type": "object", "properties": {"spec": {"type": "object"}},
        "x-kubernetes-validations": [{"rule": "self.metadata.name.size() <= 3", "message": "long"}]}))
    .unwrap();
    let value = json!({"apiVersion": "x/v1", "kind": "A", "metadata": {"name": "abcd"}});
    assert_eq!(messages(&schema, &value, None), ["<nil>: Invalid value: long"]);
}

#[test]
fn values_reach_rules_with_the_types_of_the_schema() {
    let schema = custom(
        &json!({"type": "object", "properties": {"t": {"type": "string", "format": "date-time"},
            "n": {"type": "number"}, "q": {"type": "string"}, "a-b": {"type": "string"}, "d": {"type": "string", "format": "duration"},
            "m": {"type": "object", "additionalProperties": {"type": "integer"}}},
        "x-kubernetes-validations": [
            {"rule": "self.t < timestamp('2027-01-01T00:00:00Z')"}, {"rule": "self.n < 1.5"},
            {"rule": "quantity(self.q).isLessThan(quantity('2Gi'))"}, {"rule": "self.a__dash__b == 'x'"},
            {"rule": "self.m['a-b'] == 1 && self.m.all(k, self.m[k] > 0)"}, {"rule": "self.d > duration('1s')"},
            {"rule": "self.?q.hasValue()"}]}),
    );
    let value =
        json!({"spec": {"t": "2026-01-01T00:00:00Z", "n": 1, "q": "1Gi", "a-b": "x", "m": {"a-b": 1}, "d": "2s"}});
    assert_eq!(messages(&schema, &value, None), [] as [&str; 0]);
}

#[test]
fn metadata_of_a_custom_resource_is_object_metadata() {
    let schema = custom(&json!({"type": "object"}));
    let mut value = json!({"metadata": {"name": "a", "labels": {"x": "y"}, "foo": 1}, "spec": {}, "bar": 2});
    assert_eq!(schema.prune(&mut value), ["bar", "metadata.foo"]);
    assert_eq!(unknown_field("metadata.foo"), r#"unknown field "metadata.foo""#);
    let bad = json!({"metadata": {"labels": {"x": 1}}});
    assert_eq!(schema.validate(&bad, None)[0].field, "metadata.labels.x");
}

#[test]
fn built_in_kinds_are_pruned_defaulted_and_validated() {
    let schema = ResourceSchema::builtin("", "v1", "Pod").unwrap();
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "creationTimestamp": null},
        "spec": {"containers": [{"name": "c", "image": "x:1", "typo": 1, "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": 1}}}]}, "status": {}});
    assert_eq!(schema.prune(&mut pod), ["spec.containers[0].typo"]);
    schema.default(&mut pod);
    assert_eq!(pod["spec"]["restartPolicy"], "Always");
    assert_eq!(pod["spec"]["containers"][0]["imagePullPolicy"], "IfNotPresent");
    assert_eq!(pod["spec"]["containers"][0]["ports"][0]["protocol"], "TCP");
    assert!(pod["metadata"].get("creationTimestamp").is_none());
    assert_eq!(schema.validate(&pod, None), []);
    pod["spec"]["containers"][0] = json!({"image": "x"});
    assert_eq!(
        messages(&schema, &pod, None),
        ["spec.containers[0].name: Required value"]
    );
}

#[test]
fn free_form_parts_of_built_in_kinds_stay() {
    let schema = ResourceSchema::builtin("apiextensions.k8s.io", "v1", "CustomResourceDefinition").unwrap();
    let crd = json!({"metadata": {"name": "a", "managedFields": [{"fieldsV1": {"f:a": {}}}]}, "spec": {"versions": [
        {"name": "v1", "schema": {"openAPIV3Schema": {"type": "object", "properties": {"a": {"default": {"b": 1}}}}}}]}});
    let mut pruned = crd.clone();
    assert_eq!(schema.prune(&mut pruned), [] as [&str; 0]);
    assert_eq!(pruned, crd);
}

#[test]
fn every_built_in_kind_has_a_schema_that_parses() {
    let mut count = 0;
    for kind in builtin::kinds() {
        assert!(builtin::structural(kind).is_some(), "{kind:?}");
        count += 1;
    }
    assert!(count > 30);
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..3).prop_map(Value::from)
    ];
    let name = prop_oneof![Just("a"), Just("b"), Just("c"), Just("d")];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map(name.clone().prop_map(str::to_owned), inner, 0..4)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

fn nested() -> Structural {
    let inner =
        json!({"type": "object", "properties": {"a": {"type": "integer", "default": 1}, "b": {"type": "boolean"}}});
    let schema = json!({"type": "object", "properties": {"a": inner, "b": {"type": "array", "items": inner},
        "c": {"type": "object", "additionalProperties": inner, "default": {"x": {}}}}});
    (*Structural::parse(&schema).unwrap()).clone()
}

proptest! {
    #[test]
    fn pruning_twice_is_pruning_once(value in json_value()) {
        let schema = nested();
        let mut once = value;
        prune::prune(&mut once, &schema);
        let mut twice = once.clone();
        prop_assert!(prune::prune(&mut twice, &schema).is_empty());
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn defaulting_twice_is_defaulting_once(value in json_value()) {
        let schema = nested();
        let mut once = value;
        default::default(&mut once, &schema);
        let mut twice = once.clone();
        default::default(&mut twice, &schema);
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn the_last_of_repeated_keys_counts_none_when_text_comes_from_a_value(value in json_value()) {
        prop_assert!(duplicate::duplicate_fields(value.to_string().as_bytes()).is_empty());
    }
}

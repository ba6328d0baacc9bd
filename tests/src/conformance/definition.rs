//! The definitions that checks work with: one namespaced kind that uses everything a definition can say, one
//! cluster-scoped kind that uses nothing, and Flotilla's own under another group.

use anyhow::Context;
use serde_json::{Value, json};

/// A Widget.
#[must_use]
pub fn widget(group: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": format!("{group}/v1"), "kind": "Widget", "metadata": {"name": name}, "spec": spec})
}

/// A Gadget: cluster-scoped, without a status subresource.
#[must_use]
pub fn gadget(group: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": format!("{group}/v1"), "kind": "Gadget", "metadata": {"name": name}, "spec": spec})
}

/// All definitions of the suite, in `group`.
pub fn all(group: &str) -> anyhow::Result<Vec<Value>> {
    let mut all = vec![widgets(group), gadgets(group)];
    for entry in std::fs::read_dir(crate::root().join("crds"))? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path)?;
        let definition: Value = serde_yaml::from_str(&text).with_context(|| path.display().to_string())?;
        all.push(moved(definition, group)?);
    }
    Ok(all)
}

/// A definition under another group, so that a suite touches no one's objects.
fn moved(mut definition: Value, group: &str) -> anyhow::Result<Value> {
    let plural = definition["spec"]["names"]["plural"].as_str().context("a plural")?;
    definition["metadata"]["name"] = json!(format!("{plural}.{group}"));
    definition["spec"]["group"] = json!(group);
    for names in ["shortNames", "categories"] {
        if let Some(map) = definition["spec"]["names"].as_object_mut() {
            map.remove(names);
        }
    }
    Ok(definition)
}

fn gadgets(group: &str) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("gadgets.{group}")},
        "spec": {
            "group": group, "scope": "Cluster",
            "names": {"plural": "gadgets", "singular": "gadget", "kind": "Gadget"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object",
                "properties": {
                    "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                    "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}}]
        }
    })
}

fn widgets(group: &str) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("widgets.{group}")},
        "spec": {
            "group": group, "scope": "Namespaced",
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["wdg"],
                "categories": ["conformance"]},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.replicas",
                    "statusReplicasPath": ".status.replicas", "labelSelectorPath": ".status.selector"}},
                "selectableFields": [{"jsonPath": ".spec.mode"}],
                "additionalPrinterColumns": [
                    {"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
                    {"name": "Mode", "type": "string", "jsonPath": ".spec.mode", "priority": 1},
                    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}],
                "schema": {"openAPIV3Schema": {"type": "object", "description": "A thing to check with.",
                    "required": ["spec"],
                    "properties": {"spec": widget_spec(), "status": {"type": "object", "properties": {
                        "replicas": {"type": "integer"}, "selector": {"type": "string"},
                        "phase": {"type": "string"}, "observedGeneration": {"type": "integer"}}}}}}
            }]
        }
    })
}

fn widget_spec() -> Value {
    json!({
        "type": "object", "description": "What the widget shall be.", "required": ["size"],
        "properties": {
            "size": {"type": "integer", "minimum": 1, "maximum": 100, "description": "How large it is."},
            "replicas": {"type": "integer", "default": 1, "minimum": 0},
            "mode": {"type": "string", "enum": ["a", "b"]},
            "name": {"type": "string", "minLength": 2, "maxLength": 8, "pattern": "^[a-z]+$"},
            "when": {"type": "string", "format": "date-time"},
            "limit": {"x-kubernetes-int-or-string": true},
            "once": {"type": "string", "x-kubernetes-validations": [
                {"rule": "self == oldSelf", "message": "once is immutable"}]},
            "nested": {"type": "object", "default": {}, "properties": {
                "depth": {"type": "integer", "default": 3}, "empty": {"type": "string", "nullable": true}}},
            "ports": {"type": "array", "maxItems": 5, "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                "items": {"type": "object", "required": ["name"], "properties": {
                    "name": {"type": "string", "maxLength": 20}, "port": {"type": "integer"},
                    "protocol": {"type": "string", "default": "TCP"}}}},
            "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "words": {"type": "array", "items": {"type": "string"}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "one": {"type": "object", "properties": {"left": {"type": "string"}, "right": {"type": "string"}},
                "oneOf": [{"required": ["left"]}, {"required": ["right"]}]},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
        "x-kubernetes-validations": [
            {"rule": "self.size <= 10", "message": "a widget has at most ten"},
            {"rule": "self.size != 7", "messageExpression": "self.size == 7 ? 'seven is unlucky' : 'unlucky'",
                "fieldPath": ".size", "reason": "FieldValueForbidden"},
            {"rule": "!has(self.replicas) || self.replicas <= self.size"},
            {"rule": "oldSelf.size <= self.size", "message": "a widget does not shrink"}]
    })
}

//! ConfigMaps and Secrets: their keys, their size, and that immutable ones stay as they are.

use serde_json::{Value, json};

use crate::schema::Cause;

/// Bytes that the data of one object may have.
const MAX_BYTES: usize = 1 << 20;

/// What is wrong with a ConfigMap or a Secret.
#[must_use]
pub fn check(new: &Value, old: Option<&Value>) -> Vec<Cause> {
    let mut causes = Vec::new();
    check_keys(new, &mut causes);
    check_size(new, &mut causes);
    for key in required_keys(new["type"].as_str().unwrap_or_default()) {
        if new["data"][key].is_null() {
            causes.push(Cause::required(&format!("data[{key}]"), ""));
        }
    }
    if let Some(old) = old {
        check_immutable(new, old, &mut causes);
    }
    causes
}

/// What a Secret of a well-known type holds.
fn required_keys(kind: &str) -> &'static [&'static str] {
    match kind {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    }
}

fn check_keys(object: &Value, causes: &mut Vec<Cause>) {
    let rule = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
                'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
    for field in ["data", "binaryData"] {
        for key in object[field].as_object().into_iter().flatten().map(|(key, _)| key) {
            let at = format!("{field}[{key}]");
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if key.is_empty() || key.len() > 253 || !key.chars().all(fits) {
                causes.push(Cause::invalid(&at, &json!(key), rule));
            }
            if field == "data" && !object["binaryData"][key].is_null() {
                let why = "duplicate of key present in binaryData";
                causes.push(Cause::invalid(&at, &json!(key), why));
            }
        }
    }
}

fn check_size(object: &Value, causes: &mut Vec<Cause>) {
    let is_secret = object["kind"] == "Secret";
    let bytes = |field: &str, encoded: bool| -> usize {
        let entries = object[field].as_object().into_iter().flatten();
        entries
            .map(|(_, value)| {
                let text = value.as_str().unwrap_or_default();
                let padding = text.len() - text.trim_end_matches('=').len();
                if encoded {
                    text.len() / 4 * 3 - padding.min(2)
                } else {
                    text.len()
                }
            })
            .sum()
    };
    if bytes("data", is_secret) + bytes("binaryData", true) > MAX_BYTES {
        causes.push(Cause::too_long(if is_secret { "data" } else { "[]" }, MAX_BYTES as u64));
    }
}

fn check_immutable(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    if new["type"] != old["type"] {
        causes.push(Cause::invalid("type", &new["type"], "field is immutable"));
    }
    if old["immutable"] != true {
        return;
    }
    if new["immutable"] != true {
        causes.push(Cause::forbidden(
            "immutable",
            "field is immutable when `immutable` is set",
        ));
    }
    for field in ["data", "binaryData"] {
        if new[field] != old[field] {
            causes.push(Cause::forbidden(field, "field is immutable when `immutable` is set"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_sizes_have_limits() {
        let map = |data: Value| json!({"kind": "ConfigMap", "data": data});
        assert_eq!(check(&map(json!({"a.b-C_1": "x"})), None), []);
        assert_eq!(check(&map(json!({"a b": "x"})), None).len(), 1);
        assert_eq!(check(&map(json!({"k": "x".repeat(MAX_BYTES)})), None), []);
        assert_eq!(check(&map(json!({"k": "x".repeat(MAX_BYTES + 1)})), None).len(), 1);
    }
}

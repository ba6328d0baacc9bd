//! Is a Role as small as the calls of the program that runs under it? What it grants is read from the chart, what was used
//! from the API server's audit log.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use anyhow::Context;
use k8s_openapi::api::rbac::v1::PolicyRule;
use serde_json::Value;

/// One verb on one resource.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Permission {
    /// API group, empty for core.
    pub group: String,
    /// Plural, with the subresource after a slash.
    pub resource: String,
    /// As RBAC spells it.
    pub verb: String,
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group, resource, verb } = self;
        let group = if group.is_empty() { "core" } else { group };
        write!(f, "{verb} {resource} ({group})")
    }
}

/// A request as the API server recorded it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Request {
    /// The permission that was asked for first.
    pub permission: Permission,
    /// Namespace, empty for all of them.
    pub namespace: String,
    /// Name of the object, empty where the request has none.
    pub name: String,
    /// Status of the answer; 0 where none was recorded.
    pub code: u16,
    /// Whether the authorizer let it through. Admission answers 403 too, for example in a namespace that is being deleted.
    pub allowed: bool,
    /// How the client called itself.
    pub user_agent: String,
    /// When the API server received it, RFC 3339 with microseconds: texts compare like times.
    pub received: String,
}

impl Request {
    /// All permissions that it takes. A server-side apply that made the object was also asked for `create`.
    pub fn needs(&self) -> Vec<Permission> {
        let mut needs = vec![self.permission.clone()];
        if self.permission.verb == "patch" && self.code == 201 {
            needs.push(Permission {
                verb: "create".to_owned(),
                ..self.permission.clone()
            });
        }
        needs
    }

    /// Whether it changes something.
    pub fn writes(&self) -> bool {
        !matches!(self.permission.verb.as_str(), "get" | "list" | "watch")
    }
}

/// Requests of `user` in an audit log (JSON lines), each once. Requests for no resource, like discovery, are left out.
pub fn requests(log: &str, user: &str) -> anyhow::Result<Vec<Request>> {
    let mut order = Vec::new();
    let mut found: BTreeMap<String, Request> = BTreeMap::new();
    // The last line may be half written.
    let complete = log.rfind('\n').map_or("", |end| &log[..end]);
    for line in complete.lines().filter(|line| !line.trim().is_empty()) {
        let event: Value = serde_json::from_str(line).with_context(|| format!("audit log: {line}"))?;
        if text(&event, "/user/username") != user || event.pointer("/objectRef/resource").is_none() {
            continue;
        }
        let id = text(&event, "/auditID").to_owned();
        let code = event.pointer("/responseStatus/code").and_then(Value::as_u64);
        let code = code.and_then(|code| u16::try_from(code).ok()).unwrap_or(0);
        if let Some(known) = found.get_mut(&id) {
            known.code = known.code.max(code);
            continue;
        }
        order.push(id.clone());
        found.insert(id, request(&event, code));
    }
    Ok(order.into_iter().filter_map(|id| found.remove(&id)).collect())
}

fn request(event: &Value, code: u16) -> Request {
    let resource = text(event, "/objectRef/resource");
    let subresource = text(event, "/objectRef/subresource");
    Request {
        permission: Permission {
            group: text(event, "/objectRef/apiGroup").to_owned(),
            resource: if subresource.is_empty() {
                resource.to_owned()
            } else {
                format!("{resource}/{subresource}")
            },
            verb: text(event, "/verb").to_owned(),
        },
        namespace: text(event, "/objectRef/namespace").to_owned(),
        name: text(event, "/objectRef/name").to_owned(),
        code,
        allowed: event.pointer("/annotations/authorization.k8s.io~1decision") != Some(&Value::from("forbid")),
        user_agent: text(event, "/userAgent").to_owned(),
        received: text(event, "/requestReceivedTimestamp").to_owned(),
    }
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// A Role or ClusterRole that a ServiceAccount is bound to.
#[derive(Clone, Debug)]
pub struct BoundRole {
    /// Where it holds; None: everywhere.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// Its rules.
    pub rules: Vec<PolicyRule>,
}

/// What `objects` (a rendered chart) grant to a ServiceAccount.
pub fn roles_of(objects: &[Value], service_account: &str) -> anyhow::Result<Vec<BoundRole>> {
    let mut found = Vec::new();
    for binding in objects {
        let namespace = match text(binding, "/kind") {
            "RoleBinding" => Some(text(binding, "/metadata/namespace").to_owned()),
            "ClusterRoleBinding" => None,
            _ => continue,
        };
        let subjects = binding
            .pointer("/subjects")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        let mut subjects = subjects.map(|subject| text(subject, "/name"));
        if !subjects.any(|name| name == service_account) {
            continue;
        }
        let (kind, name) = (text(binding, "/roleRef/kind"), text(binding, "/roleRef/name"));
        let role = objects
            .iter()
            .find(|role| {
                text(role, "/kind") == kind
                    && text(role, "/metadata/name") == name
                    && (kind == "ClusterRole" || namespace.as_deref() == Some(text(role, "/metadata/namespace")))
            })
            .with_context(|| format!("{kind} {name} of a binding"))?;
        found.push(BoundRole {
            namespace,
            name: name.to_owned(),
            rules: serde_json::from_value(role["rules"].clone()).with_context(|| format!("rules of {kind} {name}"))?,
        });
    }
    Ok(found)
}

/// Every single verb that roles grant.
pub fn granted(roles: &[BoundRole]) -> BTreeSet<Permission> {
    let rules = roles.iter().flat_map(|role| &role.rules);
    rules.flat_map(permissions).collect()
}

/// Every single verb of a rule.
pub fn permissions(rule: &PolicyRule) -> Vec<Permission> {
    let mut found = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for verb in &rule.verbs {
                found.push(Permission {
                    group: group.clone(),
                    resource: resource.clone(),
                    verb: verb.clone(),
                });
            }
        }
    }
    found
}

/// How what was used differs from what is granted.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Difference {
    /// Requests that the authorizer refused.
    pub denied: BTreeSet<Permission>,
    /// Granted and never used.
    pub unused: BTreeSet<Permission>,
    /// Used and not granted by these roles: something else grants it.
    pub elsewhere: BTreeSet<Permission>,
}

impl Difference {
    /// Compares.
    pub fn between(requests: &[Request], roles: &[BoundRole]) -> Self {
        let denied = requests.iter().filter(|request| !request.allowed);
        let denied = denied.map(|request| request.permission.clone()).collect();
        let used: BTreeSet<_> = requests
            .iter()
            .filter(|request| request.allowed)
            .flat_map(Request::needs)
            .collect();
        let granted = granted(roles);
        Self {
            denied,
            unused: granted.difference(&used).cloned().collect(),
            elsewhere: used.difference(&granted).cloned().collect(),
        }
    }

    /// An error that names every difference.
    pub fn none(&self) -> anyhow::Result<()> {
        let list = |what: &str, set: &BTreeSet<Permission>| {
            let lines: Vec<_> = set
                .iter()
                .map(|permission| format!("\n  {what}: {permission}"))
                .collect();
            lines.concat()
        };
        anyhow::ensure!(
            *self == Self::default(),
            "the roles are not as small as the calls:{}{}{}",
            list("denied", &self.denied),
            list("granted and never used", &self.unused),
            list("used and granted elsewhere", &self.elsewhere),
        );
        Ok(())
    }
}

/// `roles` without one permission: what is left of them, rule by rule.
pub fn without(roles: &[BoundRole], removed: &Permission) -> Vec<BoundRole> {
    let mut left = roles.to_vec();
    for role in &mut left {
        role.rules = role.rules.iter().flat_map(|rule| split(rule, removed)).collect();
    }
    left
}

/// A rule without one permission: one rule for each resource, since the others keep the verb.
fn split(rule: &PolicyRule, removed: &Permission) -> Vec<PolicyRule> {
    let mut parts = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            let hit = *group == removed.group && *resource == removed.resource;
            let verbs = rule.verbs.iter().filter(|verb| !hit || **verb != removed.verb);
            let verbs: Vec<_> = verbs.cloned().collect();
            if !verbs.is_empty() {
                parts.push(PolicyRule {
                    api_groups: Some(vec![group.clone()]),
                    resources: Some(vec![resource.clone()]),
                    verbs,
                    ..rule.clone()
                });
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(id: &str, user: &str, verb: &str, resource: &str, code: u16) -> String {
        let event = json!({
            "auditID": id, "verb": verb, "user": {"username": user},
            "objectRef": {"resource": resource, "namespace": "lab", "name": "a"},
            "responseStatus": {"code": code},
            "annotations": {"authorization.k8s.io/decision": if code == 403 { "forbid" } else { "allow" }},
        });
        format!("{event}\n")
    }

    fn role(verbs: &[&str], resources: &[&str]) -> BoundRole {
        BoundRole {
            namespace: None,
            name: "operator".into(),
            rules: vec![PolicyRule {
                api_groups: Some(vec![String::new()]),
                resources: Some(resources.iter().map(ToString::to_string).collect()),
                verbs: verbs.iter().map(ToString::to_string).collect(),
                ..PolicyRule::default()
            }],
        }
    }

    #[test]
    fn an_apply_that_creates_uses_two_verbs() -> anyhow::Result<()> {
        let log = line("1", "op", "patch", "pods", 201) + &line("2", "else", "delete", "pods", 200);
        let requests = requests(&log, "op")?;
        assert_eq!(
            Difference::between(&requests, &[role(&["create", "patch"], &["pods"])]),
            Difference::default()
        );
        let only_patched = super::requests(&line("1", "op", "patch", "pods", 200), "op")?;
        let difference = Difference::between(&only_patched, &[role(&["create", "patch"], &["pods"])]);
        assert_eq!(difference.unused.len(), 1, "{difference:?}");
        Ok(())
    }

    #[test]
    fn a_denied_an_unused_and_an_ungranted_verb_are_each_named() -> anyhow::Result<()> {
        let log = line("1", "op", "get", "pods", 200) + &line("2", "op", "list", "secrets", 403);
        let difference = Difference::between(&requests(&log, "op")?, &[role(&["watch"], &["pods"])]);
        let error = difference.none().expect_err("differs").to_string();
        for part in [
            "denied: list secrets (core)",
            "never used: watch pods (core)",
            "granted elsewhere: get pods (core)",
        ] {
            assert!(error.contains(part), "{error}");
        }
        Ok(())
    }

    #[test]
    fn both_stages_of_one_request_are_one_request_and_half_a_line_is_none() -> anyhow::Result<()> {
        let log = line("1", "op", "watch", "pods", 200) + &line("1", "op", "watch", "pods", 200) + "{\"audit";
        assert_eq!(requests(&log, "op")?.len(), 1);
        Ok(())
    }

    #[test]
    fn a_role_without_one_verb_keeps_all_others() {
        let full = [role(&["get", "list"], &["pods", "secrets"])];
        let removed = Permission {
            group: String::new(),
            resource: "secrets".into(),
            verb: "list".into(),
        };
        let left = granted(&without(&full, &removed));
        let mut expected = granted(&full);
        assert!(expected.remove(&removed));
        assert_eq!(left, expected);
    }
}

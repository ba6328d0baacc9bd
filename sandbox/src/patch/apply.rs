//! Server-side apply: merge a configuration into the live object, with ownership of each field.
//!
//! Source: KEP-555 and `sigs.k8s.io/structured-merge-diff/v6/merge/update.go`.

use serde_json::{Value, json};

use super::{
    fields::FieldSet,
    managed::{APPLY, Entry, Identity, Managers, Writer, bare, record, unmanaged, writable_changes},
    typed,
};
use crate::schema::{Cause, Structural};

/// What client-side apply remembers of its last configuration.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// A field that another manager owns with another value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Conflict {
    /// The other manager as messages show it: `"alice" using v1`.
    pub manager: String,
    /// The field: `.spec.replicas`.
    pub path: String,
}

/// An apply that was refused.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Other managers own fields of the configuration: 409, reason Conflict.
    #[error("{}", conflict_message(.0))]
    Conflicts(Vec<Conflict>),
    /// The configuration has no unambiguous meaning: 400.
    #[error("failed to create typed patch object: {0}")]
    Ambiguous(String),
    /// The configuration carries managed fields: 400.
    #[error("metadata.managedFields must be nil")]
    HasManagedFields,
}

impl ApplyError {
    /// The causes of the Status, one per conflict.
    #[must_use]
    pub fn causes(&self) -> Vec<Cause> {
        match self {
            Self::Conflicts(conflicts) => conflicts
                .iter()
                .map(|c| Cause::manager_conflict(&c.path, &c.manager))
                .collect(),
            Self::Ambiguous(_) | Self::HasManagedFields => Vec::new(),
        }
    }
}

fn conflict_message(conflicts: &[Conflict]) -> String {
    if let [only] = conflicts {
        return format!(
            "Apply failed with 1 conflict: conflict with {}: {}",
            only.manager, only.path
        );
    }
    let mut lines = Vec::new();
    let mut current = None;
    for conflict in conflicts {
        if current != Some(&conflict.manager) {
            lines.push(format!("conflicts with {}:", conflict.manager));
            current = Some(&conflict.manager);
        }
        lines.push(format!("- {}", conflict.path));
    }
    format!("Apply failed with {} conflicts: {}", conflicts.len(), lines.join("\n"))
}

/// Applies `config` to `live` (absent: the object is created) and returns the merged object with its managed fields.
///
/// The result is neither pruned, defaulted nor validated. When nothing changed it equals `live`.
/// Fields that the manager applied before and now leaves out go, unless someone else owns them.
///
/// # Errors
/// When other managers own fields with other values and `force` is false, or the configuration is ambiguous.
pub fn apply(
    live: Option<&Value>,
    config: &Value,
    schema: &Structural,
    by: &Writer<'_>,
    force: bool,
) -> Result<Value, ApplyError> {
    if config.pointer("/metadata/managedFields").is_some_and(|m| !m.is_null()) {
        return Err(ApplyError::HasManagedFields);
    }
    if let Some(reason) = typed::refusal(config, Some(schema), "") {
        return Err(ApplyError::Ambiguous(reason));
    }
    let before = live.map_or_else(|| json!({}), bare);
    let mut managers = live.map(Managers::read).unwrap_or_default();
    if live.is_some() && managers.0.is_empty() {
        let untracked = Writer {
            manager: "before-first-apply",
            ..*by
        };
        record(&mut managers, &json!({}), &before, schema, &untracked);
    }
    let mut attempt = Attempt {
        before: &before,
        config,
        schema,
        by,
        managers: managers.clone(),
    };
    let merged = match attempt.run(force) {
        Err(ApplyError::Conflicts(conflicts)) if by.manager == "kubectl" => {
            let ours = last_applied(&before, schema, by);
            let left: Vec<Conflict> = conflicts.into_iter().filter(|c| !ours.contains(&c.path)).collect();
            if !left.is_empty() {
                return Err(ApplyError::Conflicts(left));
            }
            attempt = Attempt {
                before: &before,
                config,
                schema,
                by,
                managers,
            };
            attempt.run(true)?
        }
        other => other?,
    };
    let mut merged = merged;
    if by.manager == "kubectl" {
        remember(&mut merged, config);
    }
    let changed = merged != before;
    if !merged.get("metadata").is_some_and(Value::is_object) {
        merged["metadata"] = json!({});
    }
    let own = by.identity(APPLY);
    if let (true, Some(entry)) = (changed, attempt.managers.0.get_mut(&own)) {
        entry.time = Some(by.time.to_owned());
    }
    attempt.managers.write(&mut merged);
    if let Some(live) = live {
        super::managed::keep_times(&mut merged, live);
    }
    Ok(merged)
}

struct Attempt<'a> {
    before: &'a Value,
    config: &'a Value,
    schema: &'a Structural,
    by: &'a Writer<'a>,
    managers: Managers,
}

impl Attempt<'_> {
    fn run(&mut self, force: bool) -> Result<Value, ApplyError> {
        let own = self.by.identity(APPLY);
        let last = self.managers.0.get(&own).cloned();
        let set = self.by.writable(&typed::field_set(self.config, Some(self.schema)));
        let entry = Entry {
            set,
            api_version: self.by.api_version.to_owned(),
            time: last
                .as_ref()
                .and_then(|l| l.time.clone())
                .or_else(|| Some(self.by.time.to_owned())),
        };
        self.managers.0.insert(own.clone(), entry);
        let mut merged = typed::merge(self.before, self.config, Some(self.schema));
        if let Some(last) = last {
            merged = self.drop_abandoned(&merged, &last.set);
        }
        let changes = writable_changes(self.before, &merged, self.schema, self.by);
        let conflicts = self.conflicts(&own, &changes.modified.union(&changes.added));
        if !force && !conflicts.is_empty() {
            return Err(ApplyError::Conflicts(conflicts));
        }
        self.managers.yield_to(&own, &changes);
        if let Some(entry) = self.managers.0.get_mut(&own) {
            entry.set = entry.set.difference(&unmanaged());
        }
        self.managers.0.retain(|_, entry| !entry.set.is_empty());
        Ok(merged)
    }

    fn conflicts(&self, own: &Identity, changed: &FieldSet) -> Vec<Conflict> {
        let mut conflicts = Vec::new();
        for (identity, entry) in self.managers.0.iter().filter(|(identity, _)| *identity != own) {
            let manager = identity.to_string();
            let paths = entry.set.intersection(changed).paths();
            conflicts.extend(paths.into_iter().map(|path| Conflict {
                manager: manager.clone(),
                path,
            }));
        }
        conflicts
    }

    /// Removes what was applied last time and is owned by nobody now; the new configuration counts as an owner.
    fn drop_abandoned(&self, merged: &Value, last: &FieldSet) -> Value {
        let schema = Some(self.schema);
        let named = |set: &FieldSet| typed::with_named_parents(set, schema);
        let all = named(&typed::field_set(merged, schema));
        let owned = self
            .managers
            .0
            .values()
            .fold(FieldSet::default(), |owned, entry| owned.union(&entry.set));
        let first = typed::remove(merged, &named(last), schema);
        let remaining = named(&typed::field_set(&first, schema));
        // What the removal above took with it is given back where someone owns it ...
        let second = typed::remove(merged, &all.difference(&remaining.union(&named(&owned))), schema);
        // ... and where this manager never applied it.
        let remaining = named(&typed::field_set(&second, schema));
        typed::remove(merged, &all.difference(&remaining).intersection(&named(last)), schema)
    }
}

/// Fields of the last client-side apply that still have its value: kubectl may take them over without force.
fn last_applied(live: &Value, schema: &Structural, by: &Writer<'_>) -> Vec<String> {
    let text = live
        .pointer("/metadata/annotations")
        .and_then(|a| a.get(LAST_APPLIED))
        .and_then(Value::as_str);
    let Some(config) = text.and_then(|t| serde_json::from_str::<Value>(t).ok()) else {
        return Vec::new();
    };
    if config.get("apiVersion").and_then(Value::as_str) != Some(by.api_version) {
        return Vec::new();
    }
    let changes = typed::compare(&config, live, Some(schema));
    let set = typed::field_set(&config, Some(schema));
    let mut paths = set
        .difference(&changes.modified)
        .difference(&changes.added)
        .difference(&changes.removed)
        .paths();
    // The annotation itself and the managers' bookkeeping of it never block the migration.
    paths.push(format!(".metadata.annotations.{LAST_APPLIED}"));
    paths
}

/// Brings the annotation of client-side apply up to date where the object has it.
fn remember(merged: &mut Value, config: &Value) {
    let Some(Value::Object(annotations)) = merged.pointer_mut("/metadata/annotations") else {
        return;
    };
    if annotations
        .get(LAST_APPLIED)
        .and_then(Value::as_str)
        .is_none_or(str::is_empty)
    {
        return;
    }
    let mut plain = config.clone();
    if let Some(Value::Object(own)) = plain.pointer_mut("/metadata/annotations") {
        own.remove(LAST_APPLIED);
    }
    annotations.insert(LAST_APPLIED.to_owned(), Value::String(format!("{plain}\n")));
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;

//! `metadata.managedFields`: who set which field, read, kept up to date by writes that are not applies, and written.
//!
//! Source: `k8s.io/apimachinery/pkg/util/managedfields/internal`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{fields::FieldSet, typed};
use crate::schema::Structural;

/// Most entries of updates that one object keeps; older ones are put together.
const MAX_UPDATERS: usize = 10;

/// Who writes, to what part of an object and when.
#[derive(Clone, Copy, Debug)]
pub struct Writer<'a> {
    /// Name of the manager: `fieldManager`, or what the user agent begins with. See [`manager_name`].
    pub manager: &'a str,
    /// Version of the request: `v1`, `flotilla.dev/v1alpha1`.
    pub api_version: &'a str,
    /// Subresource of the request, "" for the main resource.
    pub subresource: &'a str,
    /// `/status` is a subresource of the kind, so that only it may set the status.
    pub has_status: bool,
    /// Time of the request in RFC 3339, whole seconds, UTC.
    pub time: &'a str,
}

/// The manager of a request: the `fieldManager` parameter, else the user agent up to its first slash.
#[must_use]
pub fn manager_name(parameter: Option<&str>, user_agent: Option<&str>) -> String {
    if let Some(name) = parameter.filter(|p| !p.is_empty()) {
        return name.to_owned();
    }
    let agent = user_agent.unwrap_or_default();
    let name: String = agent.split('/').next().unwrap_or_default().chars().take(128).collect();
    if name.is_empty() { "unknown".to_owned() } else { name }
}

impl Writer<'_> {
    /// The paths of `set` that this request may set.
    pub(super) fn writable(&self, set: &FieldSet) -> FieldSet {
        match self.subresource {
            "status" => set.filter(|step| step == "f:status"),
            "" if self.has_status => set.filter(|step| step != "f:status"),
            _ => set.clone(),
        }
    }

    pub(super) fn identity(&self, operation: &'static str) -> Identity {
        Identity {
            manager: self.manager.to_owned(),
            operation: operation.to_owned(),
            api_version: if operation == APPLY {
                String::new()
            } else {
                self.api_version.to_owned()
            },
            subresource: self.subresource.to_owned(),
        }
    }
}

pub(super) const APPLY: &str = "Apply";
pub(super) const UPDATE: &str = "Update";

/// What tells managers apart; appliers are one manager in whatever version they apply.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Identity {
    manager: String,
    operation: String,
    api_version: String,
    subresource: String,
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", crate::schema::cause::quoted(&self.manager))?;
        if !self.subresource.is_empty() {
            write!(
                f,
                " with subresource {}",
                crate::schema::cause::quoted(&self.subresource)
            )?;
        }
        if self.operation == UPDATE {
            write!(f, " using {}", self.api_version)?;
        }
        Ok(())
    }
}

/// One manager's fields.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) set: FieldSet,
    pub(super) api_version: String,
    pub(super) time: Option<String>,
}

/// All managers of an object.
#[derive(Clone, Debug, Default)]
pub(super) struct Managers(pub(super) BTreeMap<Identity, Entry>);

impl Managers {
    /// Reads `metadata.managedFields` of an object.
    pub(super) fn read(object: &Value) -> Self {
        let list = object.pointer("/metadata/managedFields").and_then(Value::as_array);
        let entry = |raw: &Value| {
            let text = |key: &str| raw.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let operation = text("operation");
            let api_version = text("apiVersion");
            let identity = Identity {
                manager: text("manager"),
                api_version: if operation == APPLY {
                    String::new()
                } else {
                    api_version.clone()
                },
                operation,
                subresource: text("subresource"),
            };
            let set = FieldSet::from_json(raw.get("fieldsV1").unwrap_or(&Value::Null));
            let time = raw.get("time").and_then(Value::as_str).map(str::to_owned);
            (identity, Entry { set, api_version, time })
        };
        Self(list.into_iter().flatten().map(entry).collect())
    }

    /// Writes `metadata.managedFields`; none without managers.
    pub(super) fn write(&self, object: &mut Value) {
        let mut entries: Vec<(&Identity, &Entry)> = self.0.iter().filter(|(_, e)| !e.set.is_empty()).collect();
        entries.sort_by(|(a, x), (b, y)| {
            (&a.operation, &x.time, a, &x.api_version).cmp(&(&b.operation, &y.time, b, &y.api_version))
        });
        let Some(Value::Object(metadata)) = object.get_mut("metadata") else {
            return;
        };
        if entries.is_empty() {
            metadata.remove("managedFields");
            return;
        }
        let list: Vec<Value> = entries
            .into_iter()
            .map(|(identity, entry)| encoded(identity, entry))
            .collect();
        metadata.insert("managedFields".to_owned(), Value::Array(list));
    }

    /// Takes what changed between two objects from all managers but `own`; the sets that own changed fields are conflicts.
    pub(super) fn yield_to(&mut self, own: &Identity, changes: &typed::Changes) {
        let changed = changes.modified.union(&changes.added).union(&changes.removed);
        for (identity, entry) in &mut self.0 {
            if identity != own {
                entry.set = entry.set.difference(&changed);
            }
        }
        self.0.retain(|_, entry| !entry.set.is_empty());
    }

    fn cap(&mut self) {
        let mut updaters: Vec<(Option<String>, Identity)> = self
            .0
            .iter()
            .filter(|(i, _)| i.operation == UPDATE)
            .map(|(i, e)| (e.time.clone(), i.clone()))
            .collect();
        updaters.sort();
        let mut excess = updaters.len().saturating_sub(MAX_UPDATERS);
        for (_, identity) in updaters {
            if excess == 0 {
                return;
            }
            let bucket = Identity {
                manager: "ancient-changes".to_owned(),
                subresource: String::new(),
                ..identity.clone()
            };
            if bucket == identity {
                continue;
            }
            let Some(old) = self.0.remove(&identity) else { continue };
            // The first entry only moves into the bucket; every further one makes the list shorter.
            if let Some(entry) = self.0.get_mut(&bucket) {
                entry.set = entry.set.union(&old.set);
                entry.time = old.time;
                excess -= 1;
            } else {
                self.0.insert(bucket, old);
            }
        }
    }
}

fn encoded(identity: &Identity, entry: &Entry) -> Value {
    let mut map = Map::new();
    map.insert("manager".to_owned(), json!(identity.manager));
    map.insert("operation".to_owned(), json!(identity.operation));
    map.insert("apiVersion".to_owned(), json!(entry.api_version));
    if let Some(time) = &entry.time {
        map.insert("time".to_owned(), json!(time));
    }
    map.insert("fieldsType".to_owned(), json!("FieldsV1"));
    map.insert("fieldsV1".to_owned(), entry.set.to_json());
    if !identity.subresource.is_empty() {
        map.insert("subresource".to_owned(), json!(identity.subresource));
    }
    Value::Object(map)
}

/// Fields that nobody manages.
pub(super) fn unmanaged() -> FieldSet {
    FieldSet::of(&[
        &["apiVersion"],
        &["kind"],
        &["metadata"],
        &["metadata", "name"],
        &["metadata", "namespace"],
        &["metadata", "creationTimestamp"],
        &["metadata", "selfLink"],
        &["metadata", "uid"],
        &["metadata", "generation"],
        &["metadata", "managedFields"],
        &["metadata", "resourceVersion"],
    ])
}

/// `object` without its managed fields.
pub(super) fn bare(object: &Value) -> Value {
    let mut bare = object.clone();
    if let Some(Value::Object(metadata)) = bare.get_mut("metadata") {
        metadata.remove("managedFields");
    }
    bare
}

/// Brings the managed fields of `new` up to date after a create, update or patch that is not an apply.
///
/// `live` is the stored object, absent on create; `new` is complete (pruned, defaulted) and may carry managed fields,
/// which then count instead of the live ones; an empty list or `[{}]` forgets all managers.
pub fn track_update(live: Option<&Value>, new: &mut Value, schema: &Structural, by: &Writer<'_>) {
    if !new.get("metadata").is_some_and(Value::is_object) {
        return;
    }
    let stored = live.map(Managers::read).unwrap_or_default();
    let given = new.pointer("/metadata/managedFields").and_then(Value::as_array);
    let reset = given.is_some_and(|l| l.is_empty() || (l.len() == 1 && l[0].as_object().is_some_and(Map::is_empty)));
    let mut managers = match given {
        Some(_) if !by.subresource.is_empty() => stored,
        Some(_) if reset => Managers::default(),
        Some(list) if !list.is_empty() => Managers::read(new),
        _ => stored,
    };
    let after = bare(new);
    // An object whose managers were forgotten is not tracked again until the next apply.
    if live.is_some() && managers.0.is_empty() {
        managers.write(new);
        return;
    }
    let before = live.map_or_else(|| json!({}), bare);
    record(&mut managers, &before, &after, schema, by);
    managers.cap();
    managers.write(new);
}

/// Gives the writer every field that changed.
pub(super) fn record(managers: &mut Managers, before: &Value, after: &Value, schema: &Structural, by: &Writer<'_>) {
    let own = by.identity(UPDATE);
    let changes = writable_changes(before, after, schema, by);
    // Nobody is "own" here: the writer's earlier fields are given back below, changed or not.
    let earlier = managers.0.get(&own).cloned();
    managers.yield_to(&own, &changes);
    let taken = changes.modified.union(&changes.added).difference(&unmanaged());
    if taken.is_empty() {
        if let Some(entry) = managers.0.get_mut(&own) {
            entry.set = entry.set.difference(&changes.removed);
        }
        return;
    }
    let kept = earlier.map(|e| e.set.difference(&changes.removed)).unwrap_or_default();
    let entry = Entry {
        set: kept.union(&taken),
        api_version: by.api_version.to_owned(),
        time: Some(by.time.to_owned()),
    };
    managers.0.insert(own, entry);
}

/// What changed in the part of the object that this request may set.
pub(super) fn writable_changes(before: &Value, after: &Value, schema: &Structural, by: &Writer<'_>) -> typed::Changes {
    let changes = typed::compare(before, after, Some(schema));
    typed::Changes {
        added: by.writable(&changes.added),
        modified: by.writable(&changes.modified),
        removed: by.writable(&changes.removed),
    }
}

/// Takes back new times in the managed fields of `new` when nothing else differs from `old`, so that nothing is written.
pub fn keep_times(new: &mut Value, old: &Value) {
    let timeless = |object: &Value| {
        let mut copy = object.clone();
        for entry in copy
            .pointer_mut("/metadata/managedFields")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if let Value::Object(entry) = entry {
                entry.remove("time");
            }
        }
        let list = copy
            .pointer_mut("/metadata/managedFields")
            .and_then(Value::as_array_mut);
        if let Some(list) = list {
            list.sort_by_key(Value::to_string);
        }
        copy
    };
    if new != old && timeless(new) == timeless(old) {
        *new = old.clone();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn schema() -> Arc<Structural> {
        Structural::parse(&json!({"type": "object", "properties": {
            "metadata": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}))
        .unwrap()
    }

    fn writer<'a>(manager: &'a str, subresource: &'a str, time: &'a str) -> Writer<'a> {
        Writer {
            manager,
            api_version: "x/v1",
            subresource,
            has_status: true,
            time,
        }
    }

    fn owned(object: &Value) -> Vec<(String, Vec<String>)> {
        let entries = object["metadata"]["managedFields"].as_array().unwrap();
        let paths = |e: &Value| FieldSet::from_json(&e["fieldsV1"]).paths();
        entries
            .iter()
            .map(|e| (e["manager"].as_str().unwrap().to_owned(), paths(e)))
            .collect()
    }

    #[test]
    fn a_writer_owns_what_it_changes_and_takes_it_from_others() {
        let schema = schema();
        let mut a = json!({"metadata": {"name": "n"}, "spec": {"x": 1, "y": 1}});
        track_update(None, &mut a, &schema, &writer("alice", "", "1"));
        assert_eq!(
            owned(&a),
            [(
                "alice".to_owned(),
                vec![".spec".to_owned(), ".spec.x".to_owned(), ".spec.y".to_owned()]
            )]
        );
        let mut b = a.clone();
        b["spec"]["y"] = json!(2);
        track_update(Some(&a), &mut b, &schema, &writer("bob", "", "2"));
        assert_eq!(owned(&b)[0].1, [".spec", ".spec.x"]);
        assert_eq!(owned(&b)[1], ("bob".to_owned(), vec![".spec.y".to_owned()]));
        let mut c = b.clone();
        c["spec"] = json!({"x": 1});
        track_update(Some(&b), &mut c, &schema, &writer("carol", "", "3"));
        assert_eq!(
            owned(&c),
            [("alice".to_owned(), vec![".spec".to_owned(), ".spec.x".to_owned()])]
        );
    }

    #[test]
    fn the_status_has_entries_of_its_own() {
        let schema = schema();
        let mut a = json!({"metadata": {"name": "n"}, "spec": {"x": 1}});
        track_update(None, &mut a, &schema, &writer("alice", "", "1"));
        let mut b = a.clone();
        b["status"] = json!({"z": 1});
        track_update(Some(&a), &mut b, &schema, &writer("alice", "status", "2"));
        let entries = b["metadata"]["managedFields"].as_array().unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[1]["subresource"], "status");
        assert_eq!(entries[1]["fieldsV1"], json!({"f:status": {".": {}, "f:z": {}}}));
    }

    #[test]
    fn an_unchanged_object_keeps_its_times() {
        let schema = schema();
        let mut a = json!({"metadata": {"name": "n"}, "spec": {"x": 1}});
        track_update(None, &mut a, &schema, &writer("alice", "", "1"));
        let mut b = a.clone();
        track_update(Some(&a), &mut b, &schema, &writer("alice", "", "2"));
        assert_eq!(a, b);
        b["metadata"]["managedFields"][0]["time"] = json!("9");
        keep_times(&mut b, &a);
        assert_eq!(a, b);
    }

    #[test]
    fn many_updaters_are_put_together() {
        let schema = schema();
        let mut object = json!({"metadata": {"name": "n"}, "spec": {}});
        track_update(None, &mut object, &schema, &writer("first", "", "00"));
        for i in 10..30 {
            let mut next = object.clone();
            next["spec"][format!("f{i}")] = json!(1);
            track_update(
                Some(&object),
                &mut next,
                &schema,
                &writer(&format!("m{i}"), "", &i.to_string()),
            );
            object = next;
        }
        let owners = owned(&object);
        assert_eq!(owners.len(), MAX_UPDATERS);
        assert!(
            owners
                .iter()
                .any(|(name, paths)| name == "ancient-changes" && paths.len() > 10)
        );
    }

    #[test]
    fn an_empty_list_forgets_all_managers() {
        let schema = schema();
        let mut a = json!({"metadata": {"name": "n"}, "spec": {"x": 1}});
        track_update(None, &mut a, &schema, &writer("alice", "", "1"));
        let mut b = a.clone();
        b["metadata"]["managedFields"] = json!([{}]);
        track_update(Some(&a), &mut b, &schema, &writer("bob", "", "2"));
        assert_eq!(b["metadata"].get("managedFields"), None);
    }

    #[test]
    fn the_manager_is_the_parameter_or_the_agent() {
        assert_eq!(manager_name(Some("m"), Some("kubectl/v1")), "m");
        assert_eq!(manager_name(None, Some("kubectl/v1.32 (linux)")), "kubectl");
        assert_eq!(manager_name(None, None), "unknown");
    }
}

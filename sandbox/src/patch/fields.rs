//! Sets of field paths, as `metadata.managedFields[].fieldsV1` writes them.
//!
//! Source: `sigs.k8s.io/structured-merge-diff/v6/fieldpath`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// A set of paths as a trie; a path is in the set when its node is a member.
///
/// The steps are written as in fieldsV1: `f:name`, `k:{"key":value}` with sorted keys, `v:value`, `i:index`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct FieldSet {
    member: bool,
    children: BTreeMap<String, Self>,
}

/// The step to a field of an object.
#[must_use]
pub fn field(name: &str) -> String {
    format!("f:{name}")
}

/// The step to an item of a list map.
#[must_use]
pub fn key(fields: &Map<String, Value>) -> String {
    let sorted: BTreeMap<&String, &Value> = fields.iter().collect();
    let pairs: Vec<String> = sorted
        .iter()
        .map(|(name, value)| format!("{}:{value}", Value::from(name.as_str())))
        .collect();
    format!("k:{{{}}}", pairs.join(","))
}

/// The step to an item of a set.
#[must_use]
pub fn value(item: &Value) -> String {
    format!("v:{item}")
}

impl FieldSet {
    /// A set of these paths.
    #[must_use]
    pub fn of(paths: &[&[&str]]) -> Self {
        let mut set = Self::default();
        for path in paths {
            let steps: Vec<String> = path.iter().map(|name| field(name)).collect();
            set.insert(&steps);
        }
        set
    }

    /// Reads fieldsV1; anything malformed in it is left out.
    #[must_use]
    pub fn from_json(fields: &Value) -> Self {
        let Value::Object(map) = fields else {
            return Self::default();
        };
        let mut set = Self::default();
        for (step, below) in map {
            if step == "." {
                set.member = true;
                continue;
            }
            let mut child = Self::from_json(below);
            child.member |= below.as_object().is_some_and(Map::is_empty);
            set.children.insert(canonical(step), child);
        }
        set
    }

    /// Writes fieldsV1.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        for (step, child) in &self.children {
            let mut below = child.to_json();
            if let (true, false, Value::Object(inner)) = (child.member, child.children.is_empty(), &mut below) {
                inner.insert(".".to_owned(), Value::Object(Map::new()));
            }
            map.insert(step.clone(), below);
        }
        Value::Object(map)
    }

    /// Adds a path.
    pub fn insert(&mut self, path: &[String]) {
        match path.split_first() {
            None => self.member = true,
            Some((step, rest)) => self.children.entry(step.clone()).or_default().insert(rest),
        }
    }

    /// True when no path is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.member && self.children.values().all(Self::is_empty)
    }

    /// True when the path of one step is in the set.
    #[must_use]
    pub fn has(&self, step: &str) -> bool {
        self.children.get(step).is_some_and(|c| c.member)
    }

    /// The paths below a step, without that step.
    #[must_use]
    pub fn below(&self, step: &str) -> Option<&Self> {
        self.children.get(step)
    }

    /// Paths in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut children = self.children.clone();
        for (step, child) in &other.children {
            let merged = children
                .get(step)
                .map_or_else(|| child.clone(), |mine| mine.union(child));
            children.insert(step.clone(), merged);
        }
        Self {
            member: self.member || other.member,
            children,
        }
    }

    /// Paths in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let shared =
            |(step, child): (&String, &Self)| Some((step.clone(), child.intersection(other.children.get(step)?)));
        Self {
            member: self.member && other.member,
            children: kept(self.children.iter().filter_map(shared)),
        }
    }

    /// Paths in this set and not in the other. Paths below a path of the other stay.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let without = |(step, child): (&String, &Self)| {
            (
                step.clone(),
                other
                    .children
                    .get(step)
                    .map_or_else(|| child.clone(), |theirs| child.difference(theirs)),
            )
        };
        Self {
            member: self.member && !other.member,
            children: kept(self.children.iter().map(without)),
        }
    }

    /// The paths whose first step `keep` accepts.
    #[must_use]
    pub fn filter(&self, keep: impl Fn(&str) -> bool) -> Self {
        let children = self.children.iter().filter(|(step, _)| keep(step));
        Self {
            member: self.member,
            children: children.map(|(step, child)| (step.clone(), child.clone())).collect(),
        }
    }

    /// Calls `visit` with each step and what lies below it, to mark steps as members.
    #[must_use]
    pub(super) fn map_children(&self, visit: &mut dyn FnMut(&str, &Self) -> (bool, Self)) -> Self {
        let mut children = BTreeMap::new();
        for (step, child) in &self.children {
            let (member, mut below) = visit(step, child);
            below.member = member;
            children.insert(step.clone(), below);
        }
        Self {
            member: self.member,
            children,
        }
    }

    /// True when this node itself is a member.
    #[must_use]
    pub(super) fn is_member(&self) -> bool {
        self.member
    }

    /// True when paths lie below this node.
    #[must_use]
    pub(super) fn has_children(&self) -> bool {
        !self.children.is_empty()
    }

    /// Every path in the set as people read it: `.spec.containers[name="a"].image`.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.collect("", &mut found);
        found
    }

    fn collect(&self, at: &str, found: &mut Vec<String>) {
        if self.member {
            found.push(at.to_owned());
        }
        for (step, child) in &self.children {
            child.collect(&format!("{at}{}", readable(step)), found);
        }
    }
}

fn kept(children: impl Iterator<Item = (String, FieldSet)>) -> BTreeMap<String, FieldSet> {
    children.filter(|(_, child)| !child.is_empty()).collect()
}

fn canonical(step: &str) -> String {
    let parsed = |text: &str| serde_json::from_str::<Value>(text).ok();
    match step.split_at_checked(2) {
        Some(("k:", text)) => match parsed(text) {
            Some(Value::Object(fields)) => key(&fields),
            _ => step.to_owned(),
        },
        Some(("v:", text)) => parsed(text).map_or_else(|| step.to_owned(), |v| value(&v)),
        _ => step.to_owned(),
    }
}

fn readable(step: &str) -> String {
    match step.split_at_checked(2) {
        Some(("f:", name)) => format!(".{name}"),
        Some(("v:", item)) => format!("[={item}]"),
        Some(("i:", index)) => format!("[{index}]"),
        Some(("k:", fields)) => {
            let parsed: BTreeMap<String, Value> = serde_json::from_str(fields).unwrap_or_default();
            let pairs: Vec<String> = parsed.iter().map(|(name, value)| format!("{name}={value}")).collect();
            format!("[{}]", pairs.join(","))
        }
        _ => step.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_v1_is_read_and_written_unchanged() {
        let text = json!({"f:metadata": {"f:labels": {".": {}, "f:a": {}}, "f:finalizers": {"v:\"x\"": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}}}}});
        let set = FieldSet::from_json(&text);
        assert_eq!(set.to_json(), text);
        assert_eq!(
            set.paths(),
            [
                r#".metadata.finalizers[="x"]"#,
                ".metadata.labels",
                ".metadata.labels.a",
                r#".spec.containers[name="c"]"#,
                r#".spec.containers[name="c"].image"#
            ]
        );
    }

    #[test]
    fn keys_are_compared_whatever_their_order_and_spacing() {
        let a = FieldSet::from_json(&json!({r#"k:{"b": 1, "a": "x"}"#: {}}));
        let b = FieldSet::from_json(&json!({r#"k:{"a":"x","b":1}"#: {}}));
        assert_eq!(a, b);
    }

    #[test]
    fn sets_of_paths_unite_intersect_and_differ_path_by_path() {
        let a = FieldSet::of(&[&["a"], &["a", "b"], &["c"]]);
        let b = FieldSet::of(&[&["a"], &["d"]]);
        assert_eq!(a.difference(&b), FieldSet::of(&[&["a", "b"], &["c"]]));
        assert_eq!(a.intersection(&b), FieldSet::of(&[&["a"]]));
        assert_eq!(a.union(&b), FieldSet::of(&[&["a"], &["a", "b"], &["c"], &["d"]]));
        assert!(a.difference(&a).is_empty());
    }
}

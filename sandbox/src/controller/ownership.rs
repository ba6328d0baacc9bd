//! Who must go, who may go, who waits: the rules of garbage collection on a graph of objects.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

/// Finalizer of foreground deletion: the object goes after the dependents that block it.
pub const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of orphaning: dependents lose their reference before the object goes.
pub const ORPHAN: &str = "orphan";

/// One object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Item {
    /// `group/plural`, in which the collector finds the resource again.
    pub resource: String,
    /// Namespace, unless cluster-scoped.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// Version that was seen.
    pub resource_version: Option<String>,
    /// Owners.
    pub owners: Vec<OwnerReference>,
    /// Finalizers.
    pub finalizers: Vec<String>,
    /// `deletionTimestamp` is set.
    pub deleting: bool,
}

/// Objects by uid.
pub type Graph = BTreeMap<String, Item>;

/// Owners that were looked up and do not exist, with the namespace they were looked up in.
pub type Absent = HashSet<(String, Option<String>)>;

/// How dependents of a deleted object are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Deleted by and by.
    Background,
    /// Deleted first.
    Foreground,
}

/// One thing to do. Objects are named by uid.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Look whether the owner exists; the graph does not know it.
    Check {
        /// The dependent.
        uid: String,
        /// Its owner.
        owner: OwnerReference,
    },
    /// Delete the object.
    Delete {
        /// The object.
        uid: String,
        /// How.
        policy: Policy,
    },
    /// Take owners off the object.
    RemoveOwners {
        /// The object.
        uid: String,
        /// The owners' uids.
        owners: BTreeSet<String>,
    },
    /// Take a finalizer off the object.
    RemoveFinalizer {
        /// The object.
        uid: String,
        /// The finalizer.
        finalizer: &'static str,
    },
}

impl Item {
    fn has(&self, finalizer: &str) -> bool {
        self.finalizers.iter().any(|known| known == finalizer)
    }

    fn waits_for_dependents(&self) -> bool {
        self.deleting && self.has(FOREGROUND)
    }
}

/// What must be done now. Doing it changes the graph, and so the next plan.
pub fn plan(graph: &Graph, absent: &Absent) -> Vec<Action> {
    let mut dependents: BTreeMap<&str, Vec<(&str, &OwnerReference)>> = BTreeMap::new();
    for (uid, item) in graph {
        for owner in &item.owners {
            dependents.entry(owner.uid.as_str()).or_default().push((uid, owner));
        }
    }
    let none = Vec::new();
    let mut actions = Vec::new();
    for (uid, item) in graph {
        let own = dependents.get(uid.as_str()).unwrap_or(&none);
        if item.deleting {
            actions.extend(of_deleting(uid, item, own));
        } else if !item.owners.is_empty() {
            actions.extend(of_dependent(uid, item, !own.is_empty(), graph, absent));
        }
    }
    actions
}

fn of_deleting(uid: &str, item: &Item, dependents: &[(&str, &OwnerReference)]) -> Vec<Action> {
    if item.has(ORPHAN) {
        if dependents.is_empty() {
            return vec![Action::RemoveFinalizer {
                uid: uid.to_owned(),
                finalizer: ORPHAN,
            }];
        }
        let release = |(dependent, _): &(&str, &OwnerReference)| Action::RemoveOwners {
            uid: (*dependent).to_owned(),
            owners: BTreeSet::from([uid.to_owned()]),
        };
        return dependents.iter().map(release).collect();
    }
    let blocked = dependents
        .iter()
        .any(|(_, reference)| reference.block_owner_deletion == Some(true));
    if item.has(FOREGROUND) && !blocked {
        return vec![Action::RemoveFinalizer {
            uid: uid.to_owned(),
            finalizer: FOREGROUND,
        }];
    }
    Vec::new()
}

fn of_dependent(uid: &str, item: &Item, has_dependents: bool, graph: &Graph, absent: &Absent) -> Vec<Action> {
    let (mut solid, mut waiting, mut leaving) = (false, false, BTreeSet::new());
    let mut checks = Vec::new();
    for owner in &item.owners {
        // A namespaced owner counts in its own namespace only.
        let found = graph
            .get(&owner.uid)
            .filter(|o| o.namespace.is_none() || o.namespace == item.namespace);
        match found {
            Some(found) if found.waits_for_dependents() => {
                waiting = true;
                leaving.insert(owner.uid.clone());
            }
            Some(_) => solid = true,
            None if absent.contains(&(owner.uid.clone(), item.namespace.clone())) => {
                leaving.insert(owner.uid.clone());
            }
            None => checks.push(Action::Check {
                uid: uid.to_owned(),
                owner: owner.clone(),
            }),
        }
    }
    if !checks.is_empty() {
        return checks;
    }
    match (solid, leaving.is_empty()) {
        (_, true) => Vec::new(),
        (true, false) => vec![Action::RemoveOwners {
            uid: uid.to_owned(),
            owners: leaving,
        }],
        (false, false) => {
            let policy = if waiting && has_dependents {
                Policy::Foreground
            } else {
                Policy::Background
            };
            vec![Action::Delete {
                uid: uid.to_owned(),
                policy,
            }]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(owners: &[&str], finalizers: &[&str], deleting: bool) -> Item {
        let owner = |uid: &&str| OwnerReference {
            uid: uid.trim_end_matches('!').to_owned(),
            block_owner_deletion: uid.ends_with('!').then_some(true),
            ..OwnerReference::default()
        };
        Item {
            namespace: Some("n".to_owned()),
            owners: owners.iter().map(owner).collect(),
            finalizers: finalizers.iter().map(|f| (*f).to_owned()).collect(),
            deleting,
            ..Item::default()
        }
    }

    fn graph(items: &[(&str, Item)]) -> Graph {
        items
            .iter()
            .map(|(uid, item)| ((*uid).to_owned(), item.clone()))
            .collect()
    }

    fn absent(uids: &[&str]) -> Absent {
        uids.iter()
            .map(|uid| ((*uid).to_owned(), Some("n".to_owned())))
            .collect()
    }

    fn delete(uid: &str, policy: Policy) -> Action {
        Action::Delete {
            uid: uid.to_owned(),
            policy,
        }
    }

    fn remove_owners(uid: &str, owners: &[&str]) -> Action {
        Action::RemoveOwners {
            uid: uid.to_owned(),
            owners: owners.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    #[test]
    fn an_unknown_owner_is_looked_up_before_anything_is_deleted() {
        let graph = graph(&[("d", item(&["o"], &[], false))]);
        assert!(matches!(&plan(&graph, &Absent::new())[..], [Action::Check { uid, .. }] if uid == "d"));
        assert_eq!(plan(&graph, &absent(&["o"])), [delete("d", Policy::Background)]);
    }

    #[test]
    fn an_object_with_a_living_owner_stays_and_loses_only_the_dead_one() {
        let graph = graph(&[("a", item(&[], &[], false)), ("d", item(&["a", "o"], &[], false))]);
        assert_eq!(plan(&graph, &absent(&["o"])), [remove_owners("d", &["o"])]);
    }

    #[test]
    fn an_owner_that_is_deleted_in_the_background_still_owns() {
        let graph = graph(&[("a", item(&[], &["x/y"], true)), ("d", item(&["a"], &[], false))]);
        assert_eq!(plan(&graph, &Absent::new()), []);
    }

    #[test]
    fn an_owner_of_another_namespace_does_not_count() {
        let mut other = item(&[], &[], false);
        other.namespace = Some("elsewhere".to_owned());
        let graph = graph(&[("a", other), ("d", item(&["a"], &[], false))]);
        assert!(matches!(&plan(&graph, &Absent::new())[..], [Action::Check { .. }]));
        assert_eq!(plan(&graph, &absent(&["a"])), [delete("d", Policy::Background)]);
    }

    #[test]
    fn a_cluster_scoped_owner_counts_everywhere() {
        let mut cluster = item(&[], &[], false);
        cluster.namespace = None;
        let graph = graph(&[("a", cluster), ("d", item(&["a"], &[], false))]);
        assert_eq!(plan(&graph, &Absent::new()), []);
    }

    #[test]
    fn foreground_deletion_deletes_dependents_and_waits_for_those_that_block() {
        let owner = item(&[], &[FOREGROUND], true);
        let before = graph(&[("a", owner.clone()), ("d", item(&["a!"], &[], false))]);
        assert_eq!(plan(&before, &Absent::new()), [delete("d", Policy::Background)]);
        let during = graph(&[("a", owner.clone()), ("d", item(&["a!"], &["x/y"], true))]);
        assert_eq!(plan(&during, &Absent::new()), []);
        let after = graph(&[("a", owner.clone())]);
        let done = Action::RemoveFinalizer {
            uid: "a".to_owned(),
            finalizer: FOREGROUND,
        };
        assert_eq!(plan(&after, &Absent::new()), std::slice::from_ref(&done));
        let not_blocking = graph(&[("a", owner), ("d", item(&["a"], &["x/y"], true))]);
        assert_eq!(plan(&not_blocking, &Absent::new()), [done]);
    }

    #[test]
    fn foreground_deletion_goes_down_the_whole_tree() {
        let graph = graph(&[
            ("a", item(&[], &[FOREGROUND], true)),
            ("d", item(&["a!"], &[], false)),
            ("e", item(&["d!"], &[], false)),
        ]);
        assert_eq!(plan(&graph, &Absent::new()), [delete("d", Policy::Foreground)]);
    }

    #[test]
    fn orphaning_releases_dependents_before_the_owner_goes() {
        let owner = item(&[], &[ORPHAN], true);
        let before = graph(&[("a", owner.clone()), ("d", item(&["a"], &[], false))]);
        assert_eq!(plan(&before, &Absent::new()), [remove_owners("d", &["a"])]);
        let after = graph(&[("a", owner), ("d", item(&[], &[], false))]);
        let done = Action::RemoveFinalizer {
            uid: "a".to_owned(),
            finalizer: ORPHAN,
        };
        assert_eq!(plan(&after, &Absent::new()), [done]);
    }
}

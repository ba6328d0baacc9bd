//! Who uses what: from the name of an object to the objects whose spec names it, kept up to date change by change, so
//! that an event costs as much as it has users and not as much as there are objects.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
};

use flotilla_api::{ModelDeployment, TrainingJob, reference::ModelReference};
use kube::{Resource, ResourceExt as _, runtime::reflector::ObjectRef};

use crate::cache::Change;

/// Something that a spec names.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Used {
    /// A Dataset, by its name.
    Dataset(String),
    /// A ModelCheckpoint, by its name.
    Checkpoint(String),
    /// The result of a TrainingJob, by its name.
    Job(String),
}

/// A kind whose specs name others.
pub trait Uses {
    /// Everything that the spec names, all in the object's own namespace.
    fn uses(&self) -> Vec<Used>;
}

impl Uses for TrainingJob {
    fn uses(&self) -> Vec<Used> {
        let held_out = self.spec.evaluation.iter().flat_map(|plan| &plan.sets);
        let sets = self.spec.datasets.iter().map(|set| &set.dataset_ref);
        let sets = sets.chain(held_out.map(|set| &set.dataset_ref));
        let datasets = sets.map(|reference| Used::Dataset(reference.name.clone()));
        datasets.chain(model(&self.spec.model)).collect()
    }
}

impl Uses for ModelDeployment {
    fn uses(&self) -> Vec<Used> {
        model(&self.spec.model).collect()
    }
}

fn model(reference: &ModelReference) -> impl Iterator<Item = Used> {
    let checkpoint = reference.checkpoint_ref.as_ref();
    let job = reference.training_job_ref.as_ref();
    let checkpoint = checkpoint.map(|reference| Used::Checkpoint(reference.name.clone()));
    checkpoint
        .into_iter()
        .chain(job.map(|reference| Used::Job(reference.name.clone())))
}

/// The objects of one kind, by what they use.
#[derive(Debug)]
pub struct Dependants<K: Resource<DynamicType = ()>> {
    by_used: HashMap<(String, Used), HashSet<ObjectRef<K>>>,
}

impl<K: Resource<DynamicType = ()>> Default for Dependants<K> {
    fn default() -> Self {
        Self {
            by_used: HashMap::new(),
        }
    }
}

impl<K: Resource<DynamicType = ()> + Uses> Dependants<K> {
    /// Takes note of a change.
    pub fn note(&mut self, change: &Change<K>) {
        let uses = |object: &K| {
            let namespace = object.namespace().unwrap_or_default();
            let used = object.uses().into_iter();
            used.map(|used| (namespace.clone(), used)).collect::<HashSet<_>>()
        };
        let before = change.before.as_deref().map(uses).unwrap_or_default();
        let after = change.after.as_deref().map(uses).unwrap_or_default();
        let Some(user) = change.object().map(|object| ObjectRef::from_obj(object.as_ref())) else {
            return;
        };
        for gone in before.difference(&after) {
            if let Some(users) = self.by_used.get_mut(gone) {
                users.remove(&user);
                if users.is_empty() {
                    self.by_used.remove(gone);
                }
            }
        }
        for key in after {
            self.by_used.entry(key).or_default().insert(user.clone());
        }
    }

    /// Users of `used` in `namespace`.
    pub fn of(&self, namespace: &str, used: Used) -> impl Iterator<Item = &ObjectRef<K>> {
        let users = self.by_used.get(&(namespace.to_owned(), used));
        users.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn job(name: &str, dataset: &str) -> Arc<TrainingJob> {
        let job = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "TrainingJob",
            "metadata": {"name": name, "namespace": "lab"},
            "spec": {"model": {"trainingJobRef": {"name": "base"}}, "datasets": [{"datasetRef": {"name": dataset}}],
                "algorithm": {"sft": {}}, "checkpoint": {"storage": {"claimName": "c"}}}});
        Arc::new(serde_json::from_value(job).expect("a job"))
    }

    fn users(index: &Dependants<TrainingJob>, namespace: &str, used: Used) -> Vec<String> {
        let mut names: Vec<String> = index.of(namespace, used).map(|user| user.name.clone()).collect();
        names.sort();
        names
    }

    #[test]
    fn users_are_found_by_what_they_name_until_they_are_gone() {
        let mut index = Dependants::default();
        for name in ["a", "b"] {
            index.note(&Change {
                before: None,
                after: Some(job(name, "rows")),
            });
        }
        let rows = || Used::Dataset("rows".to_owned());
        assert_eq!(users(&index, "lab", rows()), ["a", "b"]);
        assert_eq!(users(&index, "lab", Used::Job("base".to_owned())), ["a", "b"]);
        assert!(users(&index, "other", rows()).is_empty());
        assert!(users(&index, "lab", Used::Checkpoint("rows".to_owned())).is_empty());

        index.note(&Change {
            before: Some(job("a", "rows")),
            after: None,
        });
        // A namesake made later names other rows.
        index.note(&Change {
            before: Some(job("b", "rows")),
            after: Some(job("b", "columns")),
        });
        assert!(users(&index, "lab", rows()).is_empty());
        assert_eq!(users(&index, "lab", Used::Dataset("columns".to_owned())), ["b"]);
    }
}

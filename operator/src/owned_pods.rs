//! Pods by the object that controls them, read without a request and without a walk over all pods.
//!
//! The watch lags behind what the operator itself wrote: a pass that follows at once would make the pods of the pass before
//! again, and delete again what goes already. So writes are remembered here until the watch has seen them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use flotilla_api::names::label;
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::ResourceExt as _;

use crate::{cache::Change, owner::Owner, pod_view::PodView};

/// A write that the watch has not shown after so long was undone by somebody (or the watch is down, which lists anew).
const MEMORY: Duration = Duration::from_secs(60);

/// Pods by the UID of their controlling owner. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct OwnedPods(Arc<RwLock<HashMap<String, Children>>>);

/// Pods of one owner.
#[derive(Debug, Default)]
struct Children {
    /// As the watch has them, by name.
    seen: BTreeMap<String, Arc<Pod>>,
    /// Made by this process and not seen yet, by name.
    made: BTreeMap<String, (Arc<Pod>, Instant)>,
    /// Asked to go by this process and not seen going yet, by UID.
    going: HashMap<String, Instant>,
}

impl OwnedPods {
    /// Takes over what the watch tells.
    pub fn record(&self, change: &Change<Pod>) {
        let Some(pod) = change.object() else { return };
        let Some(owner) = controller(pod) else { return };
        let name = pod.name_any();
        let mut owners = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let children = owners.entry(owner).or_default();
        children.made.remove(&name);
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        match &change.after {
            Some(pod) => {
                if pod.metadata.deletion_timestamp.is_some() {
                    children.going.remove(uid);
                }
                children.seen.insert(name, Arc::clone(pod));
            }
            None => {
                children.going.remove(uid);
                children.seen.remove(&name);
            }
        }
        if children.seen.is_empty() && children.made.is_empty() {
            let owner = controller(pod).unwrap_or_default();
            owners.remove(&owner);
        }
    }

    /// Remembers a pod that was just made.
    pub fn made(&self, pod: Pod) {
        let Some(owner) = controller(&pod) else { return };
        let mut owners = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let children = owners.entry(owner).or_default();
        let name = pod.name_any();
        if !children.seen.contains_key(&name) {
            children.made.insert(name, (Arc::new(pod), Instant::now()));
        }
    }

    /// Remembers that a pod was just asked to go.
    pub fn going(&self, owner: &Owner, uid: &str) {
        let mut owners = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(children) = owners.get_mut(&owner.uid) {
            children.going.insert(uid.to_owned(), Instant::now());
        }
    }

    /// The pods of `owner`, by name.
    pub fn of(&self, owner: &Owner, now: Timestamp) -> Vec<PodView> {
        let owners = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(children) = owners.get(&owner.uid) else {
            return Vec::new();
        };
        let made = children.made.values().filter(|(_, at)| at.elapsed() < MEMORY);
        let pods = children.seen.values().chain(made.map(|(pod, _)| pod));
        pods.map(|pod| children.view(pod, now)).collect()
    }

    /// Whether every pod of a place (of a fleet of rollout pods) that has the same owner as `pod` is ready.
    pub fn siblings_are_ready(&self, pod: &Pod) -> bool {
        let owners = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let children = controller(pod).and_then(|owner| owners.get(&owner));
        let siblings = children.into_iter().flat_map(|children| children.seen.values());
        let mut siblings = siblings.filter(|pod| pod.labels().contains_key(label::INDEX));
        siblings.all(|pod| is_ready(pod))
    }

    /// The pod of `owner` with this name.
    pub fn get(&self, owner: &Owner, name: &str, now: Timestamp) -> Option<PodView> {
        let owners = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let children = owners.get(&owner.uid)?;
        let made = || {
            let (pod, at) = children.made.get(name)?;
            (at.elapsed() < MEMORY).then_some(pod)
        };
        let pod = children.seen.get(name).or_else(made)?;
        Some(children.view(pod, now))
    }
}

impl Children {
    fn view(&self, pod: &Pod, now: Timestamp) -> PodView {
        let mut view = PodView::of(pod, now);
        view.terminating |= self.going.get(&view.uid).is_some_and(|at| at.elapsed() < MEMORY);
        view
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// UID of the controlling owner.
fn controller(pod: &Pod) -> Option<String> {
    let references = pod.metadata.owner_references.iter().flatten();
    let mut controllers = references.filter(|reference| reference.controller == Some(true));
    controllers.next().map(|reference| reference.uid.clone())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn owner() -> Owner {
        Owner {
            kind: "TrainingJob".into(),
            api_version: "flotilla.dev/v1alpha1".into(),
            namespace: "lab".into(),
            name: "critic".into(),
            uid: "job".into(),
        }
    }

    fn pod(name: &str, deleted: bool) -> Pod {
        let mut pod = json!({"metadata": {"name": name, "namespace": "lab", "uid": format!("uid-{name}"), "ownerReferences":
            [{"apiVersion": "v", "kind": "TrainingJob", "name": "critic", "uid": "job", "controller": true}]}});
        if deleted {
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        serde_json::from_value(pod).expect("a pod")
    }

    fn seen(pods: &OwnedPods, pod: Pod) {
        let after = Some(Arc::new(pod));
        pods.record(&Change { before: None, after });
    }

    fn names(pods: &OwnedPods) -> Vec<(String, bool)> {
        let views = pods.of(&owner(), Timestamp::UNIX_EPOCH).into_iter();
        views.map(|view| (view.name, view.terminating)).collect()
    }

    #[test]
    fn a_pod_that_was_just_made_is_there_before_the_watch_tells_and_once() {
        let pods = OwnedPods::default();
        pods.made(pod("a", false));
        assert_eq!(names(&pods), [("a".to_owned(), false)]);
        seen(&pods, pod("a", false));
        pods.made(pod("a", false));
        assert_eq!(names(&pods), [("a".to_owned(), false)]);
        assert!(pods.get(&owner(), "a", Timestamp::UNIX_EPOCH).is_some());
    }

    #[test]
    fn a_pod_that_was_just_deleted_goes_before_the_watch_tells() {
        let pods = OwnedPods::default();
        seen(&pods, pod("a", false));
        pods.going(&owner(), "uid-a");
        assert_eq!(names(&pods), [("a".to_owned(), true)]);
        let before = Some(Arc::new(pod("a", true)));
        pods.record(&Change { before, after: None });
        assert!(names(&pods).is_empty());
    }

    #[test]
    fn nothing_is_kept_of_an_owner_without_pods() {
        let pods = OwnedPods::default();
        seen(&pods, pod("a", false));
        let before = Some(Arc::new(pod("a", false)));
        pods.record(&Change { before, after: None });
        assert!(pods.0.read().expect("unpoisoned").is_empty());
    }
}

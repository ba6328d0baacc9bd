//! Deletes what lost its owner: watches the metadata of every resource that can be deleted and does what
//! [`super::ownership`] plans.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use k8s_openapi::{
    api::core::v1::ObjectReference, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy},
    core::{ApiResource, DynamicObject, GroupVersionKind, PartialObjectMeta, gvk::ParseGroupVersionError},
    discovery::{Discovery, Scope, verbs},
    runtime::{WatchStreamExt, watcher},
};
use serde_json::json;
use tokio::task::{AbortHandle, JoinSet};

use super::{
    RESYNC, RETRY,
    mirror::{Bell, mirror},
    ownership::{self, Absent, Action, Graph, Item, Policy},
};
use crate::node::event::{EventRecorder, Severity};

/// Least pause between two passes: several changes at once are one reason to look.
const SETTLE: Duration = Duration::from_millis(20);
/// Owners remembered as absent.
const ABSENT_LIMIT: usize = 100_000;

/// Watches and collects for ever.
pub async fn run(client: Client, events: EventRecorder) {
    let (bell, mut tasks) = (Bell::default(), JoinSet::new());
    let definitions = Bell::default();
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    let _crds = mirror(crds, watcher::Config::default(), &definitions, &mut tasks);
    let collector = Collector {
        client: client.clone(),
        events,
        shared: Arc::default(),
    };
    tasks.spawn(keep_watching(
        client,
        Arc::clone(&collector.shared),
        bell.clone(),
        definitions,
    ));
    let mut absent = Absent::new();
    loop {
        let pause = if collector.pass(&mut absent).await {
            RESYNC
        } else {
            RETRY
        };
        bell.wait(pause).await;
        tokio::time::sleep(SETTLE).await;
    }
}

/// What the watches fill and the passes read.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    graph: Graph,
    resources: HashMap<String, (ApiResource, Scope)>,
    synced: HashSet<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts a watch for every resource and ends those of resources that are gone.
async fn keep_watching(client: Client, shared: Arc<Shared>, bell: Bell, definitions: Bell) {
    let mut tasks = JoinSet::new();
    let mut watches: HashMap<String, AbortHandle> = HashMap::new();
    loop {
        let found = match discover(&client).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "discovering resources for garbage collection");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let gone: Vec<String> = watches
            .keys()
            .filter(|key| !found.contains_key(*key))
            .cloned()
            .collect();
        for key in gone {
            if let Some(watch) = watches.remove(&key) {
                watch.abort();
            }
            shared.lock().graph.retain(|_, item| item.resource != key);
        }
        shared.lock().resources = found.clone().into_iter().collect();
        for (key, (resource, _)) in found {
            watches.entry(key.clone()).or_insert_with(|| {
                let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(client.clone(), &resource);
                tasks.spawn(watch(api, key, Arc::clone(&shared), bell.clone()))
            });
        }
        bell.ring();
        definitions.wait(RESYNC).await;
        // A definition is served a moment after it is stored.
        tokio::time::sleep(SETTLE).await;
    }
}

async fn discover(client: &Client) -> Result<BTreeMap<String, (ApiResource, Scope)>, kube::Error> {
    let discovery = Discovery::new(client.clone()).run().await?;
    let mut found = BTreeMap::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let usable = [verbs::LIST, verbs::WATCH, verbs::DELETE]
                .iter()
                .all(|v| capabilities.supports_operation(v));
            if usable && resource.kind != "Event" {
                found.insert(
                    format!("{}/{}", resource.group, resource.plural),
                    (resource, capabilities.scope),
                );
            }
        }
    }
    Ok(found)
}

async fn watch(api: Api<PartialObjectMeta<DynamicObject>>, key: String, shared: Arc<Shared>, bell: Bell) {
    let mut stream = Box::pin(watcher(api, watcher::Config::default()).default_backoff());
    let mut listed: HashSet<String> = HashSet::new();
    while let Some(event) = stream.next().await {
        match event {
            Ok(watcher::Event::Init) => listed.clear(),
            Ok(watcher::Event::InitApply(object)) => {
                if let Some((uid, item)) = item(&key, &object) {
                    listed.insert(uid.clone());
                    shared.lock().graph.insert(uid, item);
                }
            }
            Ok(watcher::Event::InitDone) => {
                let mut state = shared.lock();
                state
                    .graph
                    .retain(|uid, item| item.resource != key || listed.contains(uid));
                state.synced.insert(key.clone());
                bell.ring();
            }
            Ok(watcher::Event::Apply(object)) => {
                if let Some((uid, item)) = item(&key, &object) {
                    shared.lock().graph.insert(uid, item);
                    bell.ring();
                }
            }
            Ok(watcher::Event::Delete(object)) => {
                if let Some(uid) = &object.metadata.uid {
                    shared.lock().graph.remove(uid);
                    bell.ring();
                }
            }
            Err(error) => tracing::debug!(resource = key, %error, "watching for garbage collection"),
        }
    }
}

fn item(key: &str, object: &PartialObjectMeta<DynamicObject>) -> Option<(String, Item)> {
    let meta = &object.metadata;
    let item = Item {
        resource: key.to_owned(),
        namespace: meta.namespace.clone(),
        name: object.name_any(),
        resource_version: meta.resource_version.clone(),
        owners: meta.owner_references.clone().unwrap_or_default(),
        finalizers: meta.finalizers.clone().unwrap_or_default(),
        deleting: meta.deletion_timestamp.is_some(),
    };
    Some((meta.uid.clone()?, item))
}

struct Collector {
    client: Client,
    events: EventRecorder,
    shared: Arc<Shared>,
}

/// Why one action failed.
#[derive(Debug, thiserror::Error)]
enum CollectError {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("an owner reference names the API version {0:?}")]
    Version(String, #[source] ParseGroupVersionError),
}

impl Collector {
    /// Plans on what the watches saw and acts. False when something is to be tried again soon.
    async fn pass(&self, absent: &mut Absent) -> bool {
        if absent.len() > ABSENT_LIMIT {
            absent.clear();
        }
        let (actions, graph) = {
            let state = self.shared.lock();
            // Before every resource is known, a dependent might be overlooked.
            let known = !state.resources.is_empty() && state.resources.keys().all(|key| state.synced.contains(key));
            if !known {
                return false;
            }
            let actions = ownership::plan(&state.graph, absent);
            let involved = actions.iter().filter_map(|action| {
                let uid = subject(action);
                Some((uid.to_owned(), state.graph.get(uid)?.clone()))
            });
            let graph: Graph = involved.collect();
            (actions, graph)
        };
        let mut well = true;
        for action in actions {
            let Some(item) = graph.get(subject(&action)) else {
                continue;
            };
            match self.act(&action, item, absent).await {
                Ok(done) => well &= done,
                Err(CollectError::Api(kube::Error::Api(status))) if status.code == 404 || status.code == 409 => {}
                Err(error) => {
                    tracing::warn!(object = item.name, resource = item.resource, %error, "collecting garbage");
                    well = false;
                }
            }
        }
        well
    }

    fn api(&self, item: &Item) -> Option<Api<DynamicObject>> {
        let (resource, _) = self.shared.lock().resources.get(&item.resource)?.clone();
        Some(match &item.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        })
    }

    /// True when nothing more is to be done at once.
    async fn act(&self, action: &Action, item: &Item, absent: &mut Absent) -> Result<bool, CollectError> {
        let Some(api) = self.api(item) else { return Ok(true) };
        let params = PatchParams::default();
        match action {
            Action::Check { owner, .. } => {
                let missing = self.is_absent(owner, item).await?;
                if missing {
                    absent.insert((owner.uid.clone(), item.namespace.clone()));
                }
                return Ok(!missing);
            }
            Action::Delete { uid, policy } => {
                let policy = match policy {
                    Policy::Background => PropagationPolicy::Background,
                    Policy::Foreground => PropagationPolicy::Foreground,
                };
                let preconditions = Preconditions {
                    uid: Some(uid.clone()),
                    ..Preconditions::default()
                };
                let params = DeleteParams {
                    propagation_policy: Some(policy),
                    preconditions: Some(preconditions),
                    ..DeleteParams::default()
                };
                api.delete(&item.name, &params).await?;
            }
            Action::RemoveOwners { uid, owners } => {
                let rest: Vec<&OwnerReference> = item.owners.iter().filter(|o| !owners.contains(&o.uid)).collect();
                let patch = json!({"metadata": {
                    "uid": uid, "resourceVersion": item.resource_version, "ownerReferences": rest
                }});
                api.patch_metadata(&item.name, &params, &Patch::Merge(&patch)).await?;
            }
            Action::RemoveFinalizer { uid, finalizer } => {
                let rest: Vec<&String> = item.finalizers.iter().filter(|f| f != finalizer).collect();
                let patch = json!({"metadata": {
                    "uid": uid, "resourceVersion": item.resource_version, "finalizers": rest
                }});
                api.patch_metadata(&item.name, &params, &Patch::Merge(&patch)).await?;
            }
        }
        Ok(true)
    }

    /// Asks the API server itself: the owner in the dependent's namespace, with the uid that the dependent names.
    async fn is_absent(&self, owner: &OwnerReference, item: &Item) -> Result<bool, CollectError> {
        let gv = owner
            .api_version
            .parse::<kube::core::GroupVersion>()
            .map_err(|error| CollectError::Version(owner.api_version.clone(), error))?;
        let gvk = GroupVersionKind::gvk(&gv.group, &gv.version, &owner.kind);
        let known = {
            let state = self.shared.lock();
            state
                .resources
                .values()
                .find(|(r, _)| r.group == gvk.group && r.kind == gvk.kind)
                .cloned()
        };
        let Some((resource, scope)) = known else {
            // A kind that is not served may be served again: nothing is decided about its dependents.
            return Ok(false);
        };
        let api: Api<DynamicObject> = match (&scope, &item.namespace) {
            (Scope::Namespaced, Some(namespace)) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            (Scope::Namespaced, None) => {
                self.warn_about_namespace(owner, item);
                return Ok(false);
            }
            (Scope::Cluster, _) => Api::all_with(self.client.clone(), &resource),
        };
        let found = api.get_metadata_opt(&owner.name).await?;
        Ok(found.is_none_or(|found| found.metadata.uid.as_ref() != Some(&owner.uid)))
    }

    fn warn_about_namespace(&self, owner: &OwnerReference, item: &Item) {
        let about = ObjectReference {
            name: Some(item.name.clone()),
            namespace: item.namespace.clone(),
            ..ObjectReference::default()
        };
        let text = format!(
            "ownerRef [{}/{}, name: {}, uid: {}] names a namespaced owner of a cluster-scoped object",
            owner.api_version, owner.kind, owner.name, owner.uid
        );
        self.events
            .record(about, Severity::Warning, "OwnerRefInvalidNamespace", text);
    }
}

fn subject(action: &Action) -> &str {
    match action {
        Action::Check { uid, .. }
        | Action::Delete { uid, .. }
        | Action::RemoveOwners { uid, .. }
        | Action::RemoveFinalizer { uid, .. } => uid,
    }
}

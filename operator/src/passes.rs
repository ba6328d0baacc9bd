//! Whole passes against an API server that is a map: what is written, and that a second pass writes nothing.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flotilla_api::{Dataset, ModelCheckpoint, ModelDeployment, TrainingJob};
use http::{Method, Request, Response, StatusCode};
use k8s_openapi::api::core::v1::Pod;
use kube::{Client, client::Body, runtime::watcher::Event};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{
    OperatorConfig,
    cache::{Change, Writers, stores},
    context::Context,
    dataset,
    error::Error,
    metrics::Metrics,
    model_checkpoint, model_deployment, training_job,
};

mod rollout_pods;

const DIGEST: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
const KINDS: &str = "/apis/flotilla.dev/v1alpha1/namespaces/lab";
const CORE: &str = "/api/v1/namespaces/lab";

/// Objects by path, and what was written in which order.
#[derive(Default)]
struct Server {
    objects: BTreeMap<String, Value>,
    writes: Vec<String>,
    /// Every request but writes.
    reads: Vec<String>,
    /// Answers every status write with 409.
    conflicts: bool,
    version: u64,
}

type Shared = Arc<Mutex<Server>>;

fn lock(server: &Shared) -> MutexGuard<'_, Server> {
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(code: u16, reason: &str) -> (u16, Value) {
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": reason, "code": code}),
    )
}

impl Server {
    fn answer(&mut self, method: &Method, path: &str, body: &Value) -> (u16, Value) {
        if *method == Method::GET {
            self.reads.push(path.to_owned());
        }
        match *method {
            Method::GET if path.ends_with("/configmaps") => {
                let items: Vec<_> = self
                    .objects
                    .iter()
                    .filter(|(key, _)| key.starts_with(path))
                    .map(|(_, item)| item)
                    .collect();
                (200, json!({"metadata": {}, "items": items}))
            }
            Method::GET => self
                .objects
                .get(path)
                .map_or_else(|| failure(404, "NotFound"), |object| (200, object.clone())),
            Method::DELETE => {
                self.writes.push(format!("DELETE {path}"));
                self.objects
                    .remove(path)
                    .map_or_else(|| failure(404, "NotFound"), |object| (200, object))
            }
            Method::POST if path.ends_with("/events") => {
                self.writes
                    .push(format!("event {}", body["reason"].as_str().unwrap_or_default()));
                (201, body.clone())
            }
            Method::POST => {
                let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap_or_default());
                if self.objects.contains_key(&path) {
                    return failure(409, "AlreadyExists");
                }
                self.writes.push(last_two(&path));
                (201, self.apply(&path, body))
            }
            _ if path.ends_with("/status") && self.conflicts => failure(409, "Conflict"),
            _ => {
                self.writes.push(last_two(path));
                (200, self.apply(path, body))
            }
        }
    }

    fn apply(&mut self, path: &str, body: &Value) -> Value {
        let (key, is_status) = path.strip_suffix("/status").map_or((path, false), |key| (key, true));
        let uid = format!("uid-{}", self.objects.len());
        self.version += 1;
        let version = self.version.to_string();
        let object = self.objects.entry(key.to_owned()).or_insert_with(|| body.clone());
        if is_status {
            object["status"] = body["status"].clone();
        } else {
            let status = object["status"].clone();
            *object = body.clone();
            object["status"] = status;
            object["metadata"]["uid"] = json!(uid);
            object["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
            if path.contains("/services/") {
                object["spec"]["clusterIP"] = json!("127.9.0.1");
            }
        }
        object["metadata"]["resourceVersion"] = json!(version);
        object.clone()
    }
}

fn last_two(path: &str) -> String {
    let mut parts: Vec<_> = path.rsplit('/').take(2).collect();
    parts.reverse();
    parts.join("/")
}

fn client(server: &Shared) -> Client {
    let server = Arc::clone(server);
    let service = tower::service_fn(move |request: Request<Body>| {
        let server = Arc::clone(&server);
        async move {
            let (head, body) = request.into_parts();
            let bytes = body.collect_bytes().await.unwrap_or_default();
            let body = serde_json::from_slice(&bytes).unwrap_or_default();
            let (code, answer) = lock(&server).answer(&head.method, head.uri.path(), &body);
            let mut response = Response::new(Body::from(answer.to_string().into_bytes()));
            *response.status_mut() = StatusCode::from_u16(code).unwrap_or_default();
            Ok::<_, Infallible>(response)
        }
    });
    Client::new(service, "lab")
}

struct World {
    server: Shared,
    context: Arc<Context>,
    writers: Writers,
}

impl World {
    fn new() -> Self {
        let server = Shared::default();
        let (stores, writers) = stores();
        let context = Context::new(client(&server), OperatorConfig::default(), stores, Metrics::default());
        Self {
            context: Arc::new(context.expect("a context")),
            server,
            writers,
        }
    }

    /// Puts an object where a user's apply would.
    fn put<K: DeserializeOwned>(&mut self, plural: &str, kind: &str, name: &str, spec: &Value, status: &Value) -> K {
        let mut server = lock(&self.server);
        server.version += 1;
        let object = json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": kind, "status": status, "spec": spec,
            "metadata": {"name": name, "namespace": "lab", "uid": format!("0123456789-{name}"), "generation": 1,
                "resourceVersion": server.version.to_string()}});
        server
            .objects
            .insert(format!("{KINDS}/{plural}/{name}"), object.clone());
        serde_json::from_value(object).expect("an object")
    }

    /// What was written since the last call.
    fn writes(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.server).writes)
    }

    fn read(&self, plural: &str, name: &str) -> Value {
        let objects = &lock(&self.server).objects;
        objects
            .get(&format!("{KINDS}/{plural}/{name}"))
            .cloned()
            .unwrap_or_default()
    }

    /// Shows the operator a pod as the kubelet left it.
    fn pod(&mut self, name: &str, status: &Value) {
        let mut server = lock(&self.server);
        let pod = server
            .objects
            .get_mut(&format!("{CORE}/pods/{name}"))
            .expect("the pod was made");
        pod["status"] = status.clone();
        let pod: Pod = serde_json::from_value(pod.clone()).expect("a pod");
        drop(server);
        self.seen(Some(pod), None);
    }

    /// What the watch tells: a pod as it is, or one that is gone.
    fn seen(&mut self, after: Option<Pod>, before: Option<Pod>) {
        if let Some(pod) = &after {
            self.writers.pods.apply_watcher_event(&Event::Apply(pod.clone()));
        }
        let (before, after) = (before.map(Arc::new), after.map(Arc::new));
        self.context.stores.owned_pods.record(&Change { before, after });
    }

    /// Shows the operator every pod that it made, running and ready.
    fn all_run(&mut self) {
        let server = lock(&self.server);
        let pods = server
            .objects
            .keys()
            .filter_map(|key| key.strip_prefix(&format!("{CORE}/pods/")));
        let names: Vec<String> = pods.map(str::to_owned).collect();
        drop(server);
        let running = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
        for name in names {
            self.pod(&name, &running);
        }
    }

    /// What was read since the last call.
    fn reads(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.server).reads)
    }
}

fn exited(code: i32, message: &Value) -> Value {
    let state =
        json!({"terminated": {"exitCode": code, "message": message.to_string(), "finishedAt": "2026-01-01T00:00:00Z"}});
    json!({"phase": if code == 0 { "Succeeded" } else { "Failed" }, "containerStatuses": [{"name": "worker", "image": "",
        "imageID": "", "ready": false, "restartCount": 0, "state": state}]})
}

fn dataset(world: &mut World) -> Arc<Dataset> {
    let spec = json!({"source": {"uri": "pvc://digits/raw"}, "conversion": {"format": {"preference": {}}},
        "storage": {"claimName": "digits"}});
    let dataset: Dataset = world.put("datasets", "Dataset", "pairs", &spec, &Value::Null);
    world
        .writers
        .datasets
        .apply_watcher_event(&Event::Apply(dataset.clone()));
    Arc::new(dataset)
}

fn job(world: &mut World) -> Arc<TrainingJob> {
    let spec = json!({"model": {"uri": "pvc://digits/base"}, "datasets": [{"datasetRef": {"name": "pairs"}}],
        "algorithm": {"grpo": {"steps": 80}}, "rewards": [{"rule": "preference", "weight": 1.0}],
        "checkpoint": {"storage": {"claimName": "digits"}}});
    Arc::new(world.put("trainingjobs", "TrainingJob", "critic", &spec, &Value::Null))
}

fn deployment(world: &mut World) -> Arc<ModelDeployment> {
    let spec = json!({"model": {"uri": "pvc://digits/base"}});
    Arc::new(world.put("modeldeployments", "ModelDeployment", "critic", &spec, &Value::Null))
}

#[tokio::test]
async fn a_dataset_gets_its_pod_and_then_its_counts() {
    let mut world = World::new();
    let object = dataset(&mut world);
    dataset::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("first pass");
    let expected = [
        "secrets/pairs-prepare-token",
        "configmaps/pairs-prepare",
        "pods/pairs-prepare-1",
        "pairs/status",
        "event PodsCreated",
    ];
    assert_eq!(world.writes(), expected);
    dataset::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("second pass");
    assert_eq!(world.writes(), [""; 0]);

    let report = json!({"rowsIn": 5, "rowsOut": 5, "uri": "pvc://digits/datasets/lab/pairs-1", "digest": DIGEST});
    world.pod(
        "pairs-prepare-1",
        &exited(0, &json!({"stage": "Completed", "conversion": report})),
    );
    dataset::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("third pass");
    assert_eq!(world.writes(), ["pairs/status", "event Completed"]);
    assert_eq!(world.read("datasets", "pairs")["status"]["phase"], "Ready");
    assert_eq!(world.read("datasets", "pairs")["status"]["report"]["rowsOut"], 5);
    dataset::reconcile(object, Arc::clone(&world.context))
        .await
        .expect("fourth pass");
    assert_eq!(world.writes(), [""; 0]);
}

#[tokio::test]
async fn a_job_waits_trains_registers_its_checkpoint_and_rests() {
    let mut world = World::new();
    let object = job(&mut world);
    let pass = || training_job::reconcile(Arc::clone(&object), Arc::clone(&world.context));
    pass().await.expect("waits");
    assert_eq!(world.writes(), ["critic/status"]);
    pass().await.expect("waits still");
    assert_eq!(world.writes(), [""; 0]);

    let mut set = Dataset::clone(&dataset(&mut world));
    set.status =
        serde_json::from_value(json!({"phase": "Ready", "report": {"uri": "pvc://digits/x", "digest": DIGEST}})).ok();
    world.writers.datasets.apply_watcher_event(&Event::Apply(set));
    let pass = || training_job::reconcile(Arc::clone(&object), Arc::clone(&world.context));
    pass().await.expect("starts");
    assert_eq!(world.writes().len(), 5);
    pass().await.expect("nothing new");
    assert_eq!(world.writes(), [""; 0]);

    let checkpoint = json!({"step": 80, "uri": "pvc://digits/jobs/c", "digest": DIGEST, "bytes": 9});
    let last = json!({"stage": "Completed", "step": 80, "totalSteps": 80, "metrics": {"loss": 0.1}, "checkpoints": [checkpoint]});
    world.pod("critic-train-1", &exited(0, &last));
    let pass = || training_job::reconcile(Arc::clone(&object), Arc::clone(&world.context));
    pass().await.expect("completes");
    let expected = [
        "modelcheckpoints/critic-step-80",
        "critic/status",
        "event CheckpointRegistered",
        "event Completed",
    ];
    assert_eq!(world.writes(), expected);
    assert_eq!(world.read("trainingjobs", "critic")["status"]["phase"], "Complete");
    pass().await.expect("rests");
    assert_eq!(world.writes(), [""; 0]);
}

fn ready_dataset(world: &mut World) {
    let mut set = Dataset::clone(&dataset(world));
    set.status =
        serde_json::from_value(json!({"phase": "Ready", "report": {"uri": "pvc://digits/x", "digest": DIGEST}})).ok();
    world.writers.datasets.apply_watcher_event(&Event::Apply(set));
}

#[tokio::test]
async fn a_status_conflict_is_an_error_and_publishes_no_event() {
    let mut world = World::new();
    let object = dataset(&mut world);
    lock(&world.server).conflicts = true;
    let error = dataset::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect_err("conflict");
    assert_eq!(error.class(), "conflict");
    assert!(world.writes().iter().all(|write| !write.starts_with("event")));
    // The pod is there already: the next pass makes none and reports it.
    lock(&world.server).conflicts = false;
    dataset::reconcile(object, Arc::clone(&world.context))
        .await
        .expect("second pass");
    assert_eq!(world.writes(), ["pairs/status", "event PodsCreated"]);
}

#[tokio::test]
async fn children_of_a_deleted_namesake_are_waited_for() {
    let mut world = World::new();
    let object = dataset(&mut world);
    let foreign = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "pairs-prepare-token", "namespace": "lab",
        "uid": "x", "ownerReferences": [{"apiVersion": "v", "kind": "Dataset", "name": "pairs", "uid": "old", "controller": true}]}});
    lock(&world.server)
        .objects
        .insert(format!("{CORE}/secrets/pairs-prepare-token"), foreign);
    let error = dataset::reconcile(object, Arc::clone(&world.context))
        .await
        .expect_err("foreign");
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    let writes = world.writes();
    assert!(
        writes.iter().all(|write| !write.starts_with("pods/")),
        "no pod mounts a stranger's token: {writes:?}"
    );
}

#[tokio::test]
async fn a_deployment_gets_a_service_and_a_pod_and_is_available_when_that_is_ready() {
    let mut world = World::new();
    let object = deployment(&mut world);
    model_deployment::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("first pass");
    let writes = world.writes();
    assert_eq!(writes.len(), 6, "{writes:?}");
    let name = writes[3].trim_start_matches("pods/").to_owned();
    assert!(name.starts_with("critic-serve-") && name.ends_with("-0"), "{name}");
    assert_eq!(
        world.read("modeldeployments", "critic")["status"]["url"],
        "http://127.9.0.1:8080"
    );

    let running = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}], "containerStatuses": [{
        "name": "worker", "image": "", "imageID": "", "ready": false, "restartCount": 1,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 78, "message": r#"{"message":"digest differs"}"#}}}]});
    world.pod(&name, &running);
    model_deployment::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("second pass");
    let status = world.read("modeldeployments", "critic")["status"].clone();
    assert_eq!(
        (&status["phase"], &status["message"]),
        (&json!("Degraded"), &json!(format!("pod {name}: digest differs")))
    );

    world.pod(
        &name,
        &json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}),
    );
    model_deployment::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("third pass");
    let status = world.read("modeldeployments", "critic")["status"].clone();
    assert_eq!(
        (&status["phase"], &status["ready"]),
        (&json!("Available"), &json!("1/1"))
    );
    world.writes();
    model_deployment::reconcile(object, Arc::clone(&world.context))
        .await
        .expect("fourth pass");
    assert_eq!(world.writes(), [""; 0]);
}

#[tokio::test]
async fn an_update_ends_with_the_old_pod_and_its_role_gone() {
    let mut world = World::new();
    let object = deployment(&mut world);
    let serving = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
    let pod_of = |world: &World| {
        let made = world
            .writes()
            .into_iter()
            .find_map(|write| write.strip_prefix("pods/").map(str::to_owned));
        made.expect("a pod was made")
    };
    model_deployment::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("first pass");
    let old = pod_of(&world);
    world.pod(&old, &serving);
    let spec = json!({"model": {"uri": "pvc://digits/base"}, "maxQueue": 7});
    let status = world.read("modeldeployments", "critic")["status"].clone();
    let object: ModelDeployment = world.put("modeldeployments", "ModelDeployment", "critic", &spec, &status);
    let object = Arc::new(object);
    model_deployment::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("surge");
    let new = pod_of(&world);
    assert_ne!(old, new);
    world.pod(&new, &serving);
    model_deployment::reconcile(object, Arc::clone(&world.context))
        .await
        .expect("retire");
    let gone: Vec<_> = world
        .writes()
        .into_iter()
        .filter(|write| write.starts_with("DELETE"))
        .collect();
    let role = old.trim_end_matches("-0");
    assert_eq!(
        gone,
        [
            format!("DELETE {CORE}/pods/{old}"),
            format!("DELETE {CORE}/configmaps/{role}")
        ]
    );
}

#[tokio::test]
async fn a_produced_checkpoint_is_available_after_one_write() {
    let mut world = World::new();
    let spec =
        json!({"uri": "pvc://digits/x", "digest": DIGEST, "producedBy": {"name": "critic", "uid": "u", "step": 8}});
    let object: ModelCheckpoint = world.put(
        "modelcheckpoints",
        "ModelCheckpoint",
        "critic-step-8",
        &spec,
        &Value::Null,
    );
    let object = Arc::new(object);
    model_checkpoint::reconcile(Arc::clone(&object), Arc::clone(&world.context))
        .await
        .expect("first pass");
    assert_eq!(world.writes(), ["critic-step-8/status"]);
    model_checkpoint::reconcile(object, Arc::clone(&world.context))
        .await
        .expect("second pass");
    assert_eq!(world.writes(), [""; 0]);
}

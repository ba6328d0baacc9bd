//! Events about the objects that the node and the controllers act on. Repeats of one event raise its count.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams, PostParams},
};
use tokio::sync::mpsc;

/// Events that wait for the API server; more are dropped, as a real recorder does.
const QUEUE: usize = 1024;
/// Distinct events whose counts are remembered.
const REMEMBERED: usize = 4096;

/// `type` of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// Things go as they should.
    Normal,
    /// Something needs a look.
    Warning,
}

#[derive(Clone, Debug)]
struct Note {
    about: ObjectReference,
    severity: Severity,
    reason: &'static str,
    message: String,
}

/// Hands events to a task that posts them; never waits for the API server.
#[derive(Clone, Debug)]
pub struct EventRecorder {
    queue: mpsc::Sender<Note>,
}

impl EventRecorder {
    /// Starts the posting task; it ends when the last clone of the recorder is dropped.
    pub fn new(client: Client, component: &str, host: Option<&str>) -> Self {
        let (queue, notes) = mpsc::channel(QUEUE);
        let source = EventSource {
            component: Some(component.to_owned()),
            host: host.map(str::to_owned),
        };
        tokio::spawn(post_all(client, source, notes));
        Self { queue }
    }

    /// Records an event about `object`.
    pub fn record(&self, about: ObjectReference, severity: Severity, reason: &'static str, message: String) {
        tracing::debug!(object = ?about.name, reason, message, "event");
        if let Err(error) = self.queue.try_send(Note {
            about,
            severity,
            reason,
            message,
        }) {
            tracing::debug!(%error, "an event was dropped");
        }
    }
}

/// Reference to an object for its events.
pub fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    object.object_ref(&())
}

async fn post_all(client: Client, source: EventSource, mut notes: mpsc::Receiver<Note>) {
    let mut known: HashMap<String, (String, i32)> = HashMap::new();
    while let Some(note) = notes.recv().await {
        let namespace = note.about.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let key = format!(
            "{namespace}/{:?}/{:?}/{:?}/{}/{}",
            note.about.name, note.about.uid, note.about.field_path, note.reason, note.message
        );
        let now = Timestamp::now();
        if let Some((name, count)) = known.get_mut(&key) {
            *count += 1;
            let patch = serde_json::json!({"count": *count, "lastTimestamp": Time(now)});
            if api
                .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
                .await
                .is_ok()
            {
                continue;
            }
        }
        let event = event(&note, &namespace, &source, now);
        match api.create(&PostParams::default(), &event).await {
            Ok(created) => {
                if known.len() >= REMEMBERED {
                    known.clear();
                }
                known.insert(key, (created.metadata.name.unwrap_or_default(), 1));
            }
            Err(error) => tracing::debug!(reason = note.reason, %error, "an event was not recorded"),
        }
    }
}

fn event(note: &Note, namespace: &str, source: &EventSource, now: Timestamp) -> Event {
    let object = note.about.name.as_deref().unwrap_or("object");
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{object}.{}", uuid::Uuid::new_v4().simple())),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: note.about.clone(),
        type_: Some(format!("{:?}", note.severity)),
        reason: Some(note.reason.to_owned()),
        message: Some(note.message.clone()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        reporting_component: source.component.clone(),
        reporting_instance: source.host.clone(),
        source: Some(source.clone()),
        ..Event::default()
    }
}

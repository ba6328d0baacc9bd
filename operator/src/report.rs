//! The end of every pass: one status write if the status changed, then the events that the change is worth.

use std::fmt::Debug;

use flotilla_api::names::FIELD_MANAGER;
use k8s_openapi::{NamespaceResourceScope, api::core::v1::ObjectReference};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

use crate::{
    context::Context,
    error::{Error, Result},
};

/// An event in waiting.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Note {
    /// Something went wrong.
    pub warning: bool,
    /// CamelCase reason.
    pub reason: &'static str,
    /// What happened, for people.
    pub text: String,
    /// Kind and name of the object that it happened with. Events about the same are counted, not repeated.
    pub related: Option<(&'static str, String)>,
}

impl Note {
    /// Something happened as it should.
    pub fn normal(reason: &'static str, text: impl Into<String>) -> Self {
        Self {
            warning: false,
            reason,
            text: text.into(),
            related: None,
        }
    }

    /// Says with which object it happened.
    #[must_use]
    pub fn about(self, kind: &'static str, name: impl Into<String>) -> Self {
        Self {
            related: Some((kind, name.into())),
            ..self
        }
    }

    /// Something went wrong.
    pub fn warning(reason: &'static str, text: impl Into<String>) -> Self {
        Self {
            warning: true,
            ..Self::normal(reason, text)
        }
    }
}

/// Writes `next` unless `known` is the same, then publishes `notes`. The write carries the version that the pass began
/// with: a second operator, or an edit meanwhile, makes it a conflict and the pass is run again.
pub async fn report<K, S>(context: &Context, object: &K, known: Option<&S>, next: &S, notes: &[Note]) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
    S: PartialEq + Serialize,
{
    if known == Some(next) {
        return Ok(());
    }
    let (name, namespace) = (object.name_any(), object.namespace().unwrap_or_default());
    let api: Api<K> = Api::namespaced(context.client.clone(), &namespace);
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": { "name": name, "resourceVersion": object.resource_version() },
        "status": next,
    });
    let written = api
        .patch_status(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&patch))
        .await
        .map_err(Error::api(format!(
            "write the status of {} {namespace}/{name}",
            K::kind(&())
        )))?;
    context.latest.remember(written);
    publish(context, object, notes).await;
    Ok(())
}

/// Events are for people: one that cannot be written is logged and never fails a pass.
async fn publish<K: Resource<DynamicType = ()>>(context: &Context, object: &K, notes: &[Note]) {
    let reference = object.object_ref(&());
    for note in notes {
        let event = Event {
            type_: if note.warning {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason: note.reason.to_owned(),
            // events.k8s.io refuses notes of more than 1 kB.
            note: Some(note.text.chars().take(1000).collect()),
            action: "Reconcile".to_owned(),
            secondary: note.related.as_ref().map(|(kind, name)| ObjectReference {
                kind: Some((*kind).to_owned()),
                name: Some(name.clone()),
                namespace: reference.namespace.clone(),
                ..ObjectReference::default()
            }),
        };
        if let Err(error) = context.recorder.publish(&event, &reference).await {
            tracing::warn!(reason = note.reason, %error, "event not published");
        }
    }
}

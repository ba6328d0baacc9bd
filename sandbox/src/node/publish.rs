//! Writing a pod's status to the API and its record to disk.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};

use super::{agent::Context, leftover, record::PodRecord, status::pod_status};

/// Longest wait for one answer of the API server.
const PATIENCE: Duration = Duration::from_secs(10);

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It was done, or there was nothing to do.
    Done,
    /// The pod is not there any more.
    Gone,
    /// Try again later.
    Failed,
}

/// Writes one pod's status and record, each only when it changed.
#[derive(Debug)]
pub struct Publisher {
    context: Arc<Context>,
    saved: Option<PodRecord>,
    published: Option<PodStatus>,
}

impl Publisher {
    /// Nothing is written yet.
    pub fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            saved: None,
            published: None,
        }
    }

    /// `pod` as the API will show it once it has caught up with what was written here.
    pub fn with_own_status(&self, pod: &Pod) -> Pod {
        let mut pod = pod.clone();
        if let Some(published) = &self.published {
            let foreign = pod
                .status
                .take()
                .and_then(|status| status.conditions)
                .unwrap_or_default();
            let mut status = published.clone();
            let own = status.conditions.get_or_insert_default();
            let is_own = |c: &PodCondition, own: &[PodCondition]| own.iter().any(|o| o.type_ == c.type_);
            own.retain(|c| super::status::OWN_CONDITIONS.contains(&c.type_.as_str()));
            let rest: Vec<PodCondition> = foreign.into_iter().filter(|c| !is_own(c, own)).collect();
            own.extend(rest);
            pod.status = Some(status);
        }
        pod
    }

    /// Writes the record to disk.
    pub fn save(&mut self, record: &PodRecord) {
        if self.saved.as_ref() == Some(record) {
            return;
        }
        match leftover::save(&self.context.config.dir, record) {
            Ok(()) => self.saved = Some(record.clone()),
            Err(error) => tracing::error!(pod = record.name, %error, "a pod's record was not written"),
        }
    }

    /// Writes the status that follows from `record`.
    pub async fn publish(&mut self, pod: &Pod, record: &PodRecord) -> Written {
        self.save(record);
        let host = self.context.config.addresses.host();
        let status = pod_status(&self.with_own_status(pod), record, host, Timestamp::now());
        if self.published.as_ref() == Some(&status) {
            return Written::Done;
        }
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &record.namespace);
        let mut own = status.clone();
        own.conditions
            .get_or_insert_default()
            .retain(|c| super::status::OWN_CONDITIONS.contains(&c.type_.as_str()));
        let patch = serde_json::json!({"metadata": {"uid": record.uid}, "status": own});
        let (params, patch) = (PatchParams::default(), Patch::Strategic(&patch));
        let write = api.patch_status(&record.name, &params, &patch);
        match tokio::time::timeout(PATIENCE, write).await {
            Ok(Ok(_)) => {
                self.published = Some(status);
                Written::Done
            }
            Ok(Err(error)) => refused(record, &error, "a pod's status was not written"),
            Err(_) => Written::Failed,
        }
    }

    /// Removes the pod from the API, now that nothing of it runs.
    pub async fn delete(&self, record: &PodRecord) -> Written {
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &record.namespace);
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(record.uid.clone()),
                ..Preconditions::default()
            }),
            ..DeleteParams::default()
        };
        match tokio::time::timeout(PATIENCE, api.delete(&record.name, &params)).await {
            Ok(Ok(_)) => Written::Done,
            Ok(Err(error)) => refused(record, &error, "a pod was not deleted"),
            Err(_) => Written::Failed,
        }
    }
}

fn refused(record: &PodRecord, error: &kube::Error, what: &str) -> Written {
    if let kube::Error::Api(status) = error
        && (status.code == 404 || (status.code == 409 && status.message.contains("UID")))
    {
        return Written::Gone;
    }
    tracing::warn!(pod = record.name, namespace = record.namespace, %error, "{what}");
    Written::Failed
}

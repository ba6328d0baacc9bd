//! The one pod of a run (Dataset conversion, training, verification): found by its number, asked for its progress.

use flotilla_api::{pod::PodSettings, progress::Progress, role::RoleConfig};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::Api;

use crate::{
    apply::RunObjects,
    context::Context,
    error::{Error, Result},
    owner::Owner,
    pod_view::{PodStage, PodView},
    worker_pod::{WorkerPod, config_map, token_secret},
};

/// Names of the children of one run.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RunNames {
    stem: String,
}

impl RunNames {
    /// Names for the work of `role` for `owner`.
    pub fn new(owner: &Owner, role: &str) -> Self {
        Self { stem: owner.stem(role) }
    }

    /// The pod with this number.
    pub fn pod(&self, attempt: u32) -> String {
        format!("{}-{attempt}", self.stem)
    }

    /// The pod in this place, the `attempt`-th that has it.
    pub fn member(&self, index: u32, attempt: u32) -> String {
        format!("{}-{index}-{attempt}", self.stem)
    }

    /// The ConfigMap with the role.
    pub fn config_map(&self) -> String {
        self.stem.clone()
    }

    /// The Secret with the token.
    pub fn token(&self) -> String {
        format!("{}-token", self.stem)
    }
}

/// The pod with this number, if it is there and belongs to `owner`. The copy in memory may lag behind, so what it lacks is
/// asked for: an absent pod means that a new one is made.
pub async fn find(context: &Context, owner: &Owner, name: &str, now: Timestamp) -> Result<Option<PodView>> {
    if let Some(pod) = context.stores.owned_pods.get(owner, name, now) {
        return Ok(Some(pod));
    }
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &owner.namespace);
    let pod = api
        .get_opt(name)
        .await
        .map_err(Error::api(format!("get Pod {}/{name}", owner.namespace)))?;
    Ok(pod
        .filter(|pod| owner.controls(&pod.metadata))
        .map(|pod| PodView::of(&pod, now)))
}

/// What the worker in `pod` says, None where it does not (yet, or any more) answer. One that was silent just now is not
/// asked again at once.
pub async fn ask(context: &Context, owner: &Owner, token: &str, pod: &PodView) -> Result<Option<Progress>> {
    let (PodStage::Running, Some(ip)) = (&pod.stage, &pod.ip) else {
        return Ok(None);
    };
    if context.workers.silence(&pod.uid).is_some() {
        return Ok(None);
    }
    let Some(token) = context.tokens.of(&context.client, owner, token).await? else {
        return Ok(None);
    };
    let answer = context.workers.progress(ip, &token).await;
    context.workers.answered(&pod.uid, answer.is_ok());
    match answer {
        Ok(progress) => Ok(Some(progress)),
        Err(error) => {
            if error.is_unauthorized() {
                context.tokens.forget(owner);
            }
            tracing::debug!(pod = pod.name, %error, "no progress");
            Ok(None)
        }
    }
}

/// What the objects of one pod of a run are made from.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// The object it works for.
    pub owner: &'a Owner,
    /// Names of its children.
    pub names: &'a RunNames,
    /// What the pod does; its URIs were checked.
    pub config: &'a RoleConfig,
    /// What users set.
    pub settings: &'a PodSettings,
    /// The image where users set none.
    pub default_image: &'a str,
    /// Number of the pod.
    pub attempt: u32,
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_seconds: i64,
}

impl Run<'_> {
    /// The pod, its role and its token.
    pub fn build(&self) -> Result<RunObjects> {
        let (config_map_name, token_name) = (self.names.config_map(), self.names.token());
        let pod = WorkerPod {
            owner: self.owner,
            name: self.names.pod(self.attempt),
            config: self.config,
            config_map: &config_map_name,
            token: &token_name,
            settings: self.settings,
            default_image: self.default_image,
            attempt: Some(self.attempt),
            index: None,
            revision: None,
            grace_seconds: self.grace_seconds,
        };
        let pod = pod.build()?;
        let what = format!("the role of pod {}", self.names.pod(self.attempt));
        let config_map = config_map(self.owner, config_map_name, self.config);
        Ok(RunObjects {
            config_maps: vec![config_map.map_err(|source| Error::Serialize { what, source })?],
            token: Some(token_secret(self.owner, token_name, self.config.role.name())),
            pods: vec![pod],
        })
    }
}

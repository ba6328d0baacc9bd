//! Everything that a decision about a ModelDeployment needs.

use std::sync::Arc;

use flotilla_api::{ModelDeployment, ModelDeploymentStatus};
use k8s_openapi::jiff::Timestamp;

use super::validate::Plan;
use crate::{
    context::Context,
    error::Result,
    model::{Resolution, resolve},
    owner::Owner,
    pod_view::PodView,
    run_pod,
};

/// Role of the serving pods.
pub const ROLE: &str = "serve";

/// A ModelDeployment and its pods at one moment.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The ModelDeployment.
    pub deployment: ModelDeployment,
    /// Its identity.
    pub owner: Owner,
    /// Its status, empty before the first pass.
    pub status: ModelDeploymentStatus,
    /// Stem of the names of its children.
    pub stem: String,
    /// The model to serve.
    pub model: Resolution,
    /// All its pods, oldest first.
    pub pods: Vec<PodView>,
    /// The time of this pass.
    pub now: Timestamp,
}

impl Observed {
    /// Name of the Secret with the token.
    pub fn token(&self) -> String {
        format!("{}-token", self.stem)
    }
}

/// Reads; None where the deployment is gone or going.
pub async fn gather(context: &Context, object: &Arc<ModelDeployment>) -> Result<Option<Observed>> {
    let deployment = ModelDeployment::clone(&context.latest.of(object));
    if deployment.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let owner = Owner::of(&deployment)?;
    let now = context.now();
    Ok(Some(Observed {
        stem: owner.stem(ROLE),
        status: deployment.status.clone().unwrap_or_default(),
        model: resolve(&deployment.spec.model, &owner.namespace, &context.stores),
        pods: pods(context, &owner, now),
        deployment,
        owner,
        now,
    }))
}

/// Pods have names by revision and number, so a copy that lags behind makes none twice.
fn pods(context: &Context, owner: &Owner, now: Timestamp) -> Vec<PodView> {
    let mut pods = context.stores.owned_pods.of(owner, now);
    pods.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    pods
}

/// Digest of the weights that a ready pod of the plan's revision loaded, where the status does not say it yet.
pub async fn digest(context: &Context, observed: &Observed, plan: Option<&Plan>) -> Result<Option<String>> {
    let Some(plan) = plan else { return Ok(None) };
    if observed.status.model_digest.is_some() && observed.status.update_revision == plan.revision {
        return Ok(None);
    }
    let ready = observed
        .pods
        .iter()
        .find(|pod| pod.revision == plan.revision && pod.ready && pod.is_live());
    let Some(pod) = ready else { return Ok(None) };
    let progress = run_pod::ask(context, &observed.owner, &observed.token(), pod).await?;
    Ok(progress.and_then(|progress| progress.model_digest))
}

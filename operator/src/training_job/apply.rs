//! Writes what a pass built.

use flotilla_api::{
    ModelCheckpoint, TrainingJob, names::FIELD_MANAGER, rollout::RolloutPods, training_job::LastCheckpoint,
};
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
};

use super::{build::Objects, gather::Observed};
use crate::{
    apply::{delete, delete_pods},
    context::Context,
    error::{Error, Result},
};

/// What was written; the only way to a status that mentions it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Applied {
    /// Names of the ModelCheckpoints that were registered in this pass.
    pub registered: Vec<String>,
    /// The newest registered checkpoint.
    pub last: Option<LastCheckpoint>,
}

/// Writes `objects`.
pub async fn apply(context: &Context, observed: &Observed, objects: Objects) -> Result<Applied> {
    // No `..`: what is built and not written does not compile.
    let Objects {
        pods,
        register,
        forget,
        last,
        stop,
        release,
        tell,
        expire,
    } = objects;
    let owner = &observed.owner;
    for (name, uid) in forget {
        delete::<ModelCheckpoint>(context, &owner.namespace, &name, &uid, None).await?;
    }
    let mut registered = Vec::with_capacity(register.len());
    for checkpoint in register {
        registered.push(record(context, owner.namespace.as_str(), &checkpoint).await?);
    }
    let grace = observed.job.spec.checkpoint.on_suspend_timeout_seconds;
    delete_pods(context, owner, &stop, Some(grace)).await?;
    delete_pods(context, owner, &release, None).await?;
    Box::pin(pods.apply(context, owner)).await?;
    if let Some((ip, pods)) = tell {
        tell_learner(context, observed, &ip, &pods).await?;
    }
    if expire {
        tracing::info!(job = owner.name, "past its time to live");
        delete::<TrainingJob>(context, &owner.namespace, &owner.name, &owner.uid, None).await?;
    }
    Ok(Applied { registered, last })
}

/// Tells the learner which rollout pods there are. One that does not listen is told by a later pass: its progress shows what
/// it knows.
async fn tell_learner(context: &Context, observed: &Observed, ip: &str, pods: &RolloutPods) -> Result<()> {
    let secret = observed.names.token();
    let Some(token) = context.tokens.of(&context.client, &observed.owner, &secret).await? else {
        return Ok(());
    };
    match context.workers.tell(ip, &token, pods).await {
        Ok(()) => tracing::info!(
            job = observed.owner.name,
            pods = pods.pods.len(),
            "the learner knows its rollout pods"
        ),
        Err(error) => tracing::warn!(job = observed.owner.name, %error, "the learner was not told its rollout pods"),
    }
    Ok(())
}

async fn record(context: &Context, namespace: &str, checkpoint: &ModelCheckpoint) -> Result<String> {
    let name = checkpoint.name_any();
    let api: Api<ModelCheckpoint> = Api::namespaced(context.client.clone(), namespace);
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let written = api.patch(&name, &params, &Patch::Apply(checkpoint)).await;
    written.map_err(Error::api(format!("register ModelCheckpoint {namespace}/{name}")))?;
    Ok(name)
}

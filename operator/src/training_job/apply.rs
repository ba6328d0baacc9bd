//! Writes what a pass built.

use flotilla_api::{ModelCheckpoint, TrainingJob, names::FIELD_MANAGER, training_job::LastCheckpoint};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams},
};

use super::{build::Objects, gather::Observed};
use crate::{
    apply::delete,
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
        learner,
        register,
        forget,
        last,
        stop,
        expire,
    } = objects;
    let (client, owner) = (&context.client, &observed.owner);
    for (name, uid) in forget {
        delete::<ModelCheckpoint>(client, &owner.namespace, &name, &uid, None).await?;
    }
    let mut registered = Vec::with_capacity(register.len());
    for checkpoint in register {
        registered.push(record(context, owner.namespace.as_str(), &checkpoint).await?);
    }
    let grace = observed.job.spec.checkpoint.on_suspend_timeout_seconds;
    for (name, uid) in stop {
        delete::<Pod>(client, &owner.namespace, &name, &uid, Some(grace)).await?;
    }
    if let Some(learner) = learner {
        Box::pin(learner.apply(client, owner)).await?;
    }
    if expire {
        tracing::info!(job = owner.name, "past its time to live");
        delete::<TrainingJob>(client, &owner.namespace, &owner.name, &owner.uid, None).await?;
    }
    Ok(Applied { registered, last })
}

async fn record(context: &Context, namespace: &str, checkpoint: &ModelCheckpoint) -> Result<String> {
    let name = checkpoint.name_any();
    let api: Api<ModelCheckpoint> = Api::namespaced(context.client.clone(), namespace);
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let written = api.patch(&name, &params, &Patch::Apply(checkpoint)).await;
    written.map_err(Error::api(format!("register ModelCheckpoint {namespace}/{name}")))?;
    Ok(name)
}

//! Everything that a decision about a ModelCheckpoint needs.

use std::sync::Arc;

use flotilla_api::{ModelCheckpoint, ModelCheckpointStatus};
use k8s_openapi::jiff::Timestamp;

use crate::{
    attempt::Attempts,
    context::Context,
    error::Result,
    owner::Owner,
    pod_view::PodView,
    run_pod::{self, RunNames},
};

/// Role of the verification pod.
const ROLE: &str = "verify";

/// A ModelCheckpoint and its verification pod at one moment.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The ModelCheckpoint.
    pub checkpoint: ModelCheckpoint,
    /// Its identity.
    pub owner: Owner,
    /// Its status, empty before the first pass.
    pub status: ModelCheckpointStatus,
    /// Names of its children.
    pub names: RunNames,
    /// The verification pod of the current attempt.
    pub pod: Option<PodView>,
    /// The time of this pass.
    pub now: Timestamp,
}

impl Observed {
    /// The counters of the verification. It is never given up: weights that cannot be read are not proven wrong.
    pub fn attempts(&self) -> Attempts {
        Attempts {
            current: self.status.attempt,
            restarts: self.status.attempt.saturating_sub(1),
            max_restarts: u32::MAX,
        }
    }
}

/// Reads; None where the ModelCheckpoint is gone or going.
pub async fn gather(context: &Context, object: &Arc<ModelCheckpoint>) -> Result<Option<Observed>> {
    let checkpoint = ModelCheckpoint::clone(&context.latest.of(object));
    if checkpoint.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let owner = Owner::of(&checkpoint)?;
    let now = context.now();
    let names = RunNames::new(&owner, ROLE);
    let status = checkpoint.status.clone().unwrap_or_default();
    let pod = match status.attempt {
        0 => None,
        attempt => run_pod::find(context, &owner, &names.pod(attempt), now).await?,
    };
    Ok(Some(Observed {
        checkpoint,
        owner,
        status,
        names,
        pod,
        now,
    }))
}

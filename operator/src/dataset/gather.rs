//! Everything that a decision about a Dataset needs.

use std::sync::Arc;

use flotilla_api::{Dataset, DatasetStatus};
use k8s_openapi::jiff::Timestamp;

use crate::{
    attempt::Attempts,
    context::Context,
    error::Result,
    owner::Owner,
    pod_view::PodView,
    run_pod::{self, RunNames},
};

/// Role of the conversion pod.
const ROLE: &str = "prepare";

/// A Dataset and its pod at one moment.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The Dataset.
    pub dataset: Dataset,
    /// Its identity.
    pub owner: Owner,
    /// Its status, empty before the first pass.
    pub status: DatasetStatus,
    /// Names of its children.
    pub names: RunNames,
    /// The pod of the current attempt.
    pub pod: Option<PodView>,
    /// The time of this pass.
    pub now: Timestamp,
}

impl Observed {
    /// The counters of the run.
    pub fn attempts(&self) -> Attempts {
        Attempts {
            current: self.status.attempt,
            restarts: self.status.restarts,
            max_restarts: self.dataset.spec.max_restarts,
        }
    }
}

/// Reads; None where the Dataset is gone or going.
pub async fn gather(context: &Context, object: &Arc<Dataset>) -> Result<Option<Observed>> {
    let dataset = Dataset::clone(&context.latest.of(object));
    if dataset.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let owner = Owner::of(&dataset)?;
    let now = context.now();
    let names = RunNames::new(&owner, ROLE);
    let status = dataset.status.clone().unwrap_or_default();
    let pod = match status.attempt {
        0 => None,
        attempt => run_pod::find(context, &owner, &names.pod(attempt), now).await?,
    };
    Ok(Some(Observed {
        dataset,
        owner,
        status,
        names,
        pod,
        now,
    }))
}

//! Everything that a decision about a Dataset needs.

use flotilla_api::{Dataset, DatasetStatus};
use k8s_openapi::jiff::Timestamp;
use kube::Api;

use crate::{
    attempt::Attempts,
    context::Context,
    error::{Error, Result},
    owner::Owner,
    pod_view::PodView,
    run_pod::{self, RunNames},
};

/// Role of the conversion pod.
const ROLE: &str = "prepare";

/// A Dataset and its pod at one moment.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The Dataset, read in this pass: counters of a lagging copy would be counted twice.
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
pub async fn gather(context: &Context, object: &Dataset) -> Result<Option<Observed>> {
    let owner = Owner::of(object)?;
    let api: Api<Dataset> = Api::namespaced(context.client.clone(), &owner.namespace);
    let found = api.get_opt(&owner.name).await;
    let found = found.map_err(Error::api(format!("get Dataset {}/{}", owner.namespace, owner.name)))?;
    let Some(dataset) = found.filter(|dataset| dataset.metadata.deletion_timestamp.is_none()) else {
        return Ok(None);
    };
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

//! The generated custom resource definitions, in the order in which `crds/` holds them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

use crate::{Dataset, ModelCheckpoint, ModelDeployment, TrainingJob};

/// Bytes above which a plain `kubectl apply` of a definition fails: its last-applied annotation has no room.
pub const MAX_CRD_BYTES: usize = 262_144;

/// Every definition with the file name it has below `crds/`.
pub fn all() -> Vec<(String, CustomResourceDefinition)> {
    [
        Dataset::crd(),
        ModelCheckpoint::crd(),
        ModelDeployment::crd(),
        TrainingJob::crd(),
    ]
    .into_iter()
    .map(|crd| (format!("{}_{}.yaml", crd.spec.group, crd.spec.names.plural), crd))
    .collect()
}

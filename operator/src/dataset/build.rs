//! The conversion pod and what it mounts.

use flotilla_api::role::RoleConfig;

use super::gather::Observed;
use crate::{apply::RunObjects, error::Result, run_pod::Run};

/// Seconds that a conversion has to stop; it keeps nothing.
const GRACE_SECONDS: i64 = 10;

/// Objects of the pod with number `attempt`.
pub fn build(observed: &Observed, config: &RoleConfig, attempt: u32, default_image: &str) -> Result<RunObjects> {
    Run {
        owner: &observed.owner,
        names: &observed.names,
        config,
        settings: &observed.dataset.spec.prepare,
        default_image,
        attempt,
        grace_seconds: GRACE_SECONDS,
    }
    .build()
}

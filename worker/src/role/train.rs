//! Role `train`.

use flotilla_api::role::Train;
use tokio_util::sync::CancellationToken;

use crate::{context::Context, error::WorkerError};

/// Runs the role to its end.
pub async fn run(_context: Context, _spec: Train, _shutdown: CancellationToken) -> Result<(), WorkerError> {
    Err(WorkerError::invalid("role train is not part of this build"))
}

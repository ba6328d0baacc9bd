//! Role `train`: one learner, with rollouts in the same process or by rollout pods.

use flotilla_api::{role::Train, rollout::RolloutPods};
use tokio::{runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    error::WorkerError,
    train::{fleet::Fleet, parallel::STACK_BYTES, run::train},
};

/// Runs the role to its end; `pods` are the rollout pods, where it has any. At the first signal it writes a checkpoint and
/// ends as suspended.
pub async fn run(
    context: Context,
    spec: Train,
    pods: watch::Receiver<RolloutPods>,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let fleet = match &spec.rollout {
        Some(remote) => Some(Fleet::new(&context, remote.lanes, pods, Handle::current())?),
        None => None,
    };
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("learner".into())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let cancelled = || shutdown.is_cancelled();
            // The receiver is gone only if the process ends anyway.
            drop(sender.send(train(&context, &spec, fleet.as_ref(), &cancelled)));
        })
        .map_err(|error| WorkerError::retryable("failed to start the learner's thread", error))?;
    receiver.await.map_err(|_| WorkerError::Retryable {
        what: "the learner's thread ended without a result".into(),
        source: None,
    })?
}

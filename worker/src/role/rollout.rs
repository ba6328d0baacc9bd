//! Role `rollout`: samples completions for a learner, with the learner's weights, until it is asked to stop.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use candle_core::DType;
use flotilla_api::{
    progress::Stage,
    role::{Precision, Rollout},
};
use flotilla_model::Config;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use super::verify::check;
use crate::{
    context::Context,
    device::{Opened, Place, threads},
    error::WorkerError,
    http::{self, rollouts, server, weights, weights::RolloutApi},
    models::locate,
    rollout::sampler::Sampler,
    train::choice::stored_dtype,
};

/// Loads the model while probes are already answered, samples until `shutdown`, and stops at once: what it leaves undone
/// the learner asks another pod for. A process whose GPU is lost ends, to be started again.
pub async fn run(
    context: Context,
    spec: Rollout,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let opened = context.device.open()?;
    let lanes = threads(&opened.device, spec.threads as usize);
    let api = RolloutApi {
        token: context.token.clone(),
        slot: Arc::new(OnceLock::new()),
        lanes: Arc::new(Semaphore::new(lanes)),
    };
    let routes = rollouts::router(api.clone()).merge(weights::router(api.clone()));
    let app = http::application(http::Common::new(&context, "rollout"), routes);
    let (stop, settings) = (CancellationToken::new(), server::Settings::default());
    let server = tokio::spawn(server::serve(
        listener,
        app,
        settings,
        stop.clone(),
        http::CLOSE_TIMEOUT,
    ));
    let outcome = serve(&context, spec, opened, &api, &shutdown).await;
    if outcome.is_ok() {
        context.progress.enter(Stage::Completed, "stopped on request");
    }
    api.lanes.close();
    stop.cancel();
    let _ = server.await;
    outcome
}

async fn serve(
    context: &Context,
    spec: Rollout,
    opened: Opened,
    api: &RolloutApi,
    shutdown: &CancellationToken,
) -> Result<(), WorkerError> {
    let directory = tokio::select! {
        directory = locate(context, &spec.model.uri) => directory?,
        () = shutdown.cancelled() => return Ok(()),
    };
    context
        .progress
        .enter(Stage::Loading, format!("loading {}", spec.model.uri));
    let loading = tokio::task::spawn_blocking(move || {
        if spec.model.random_seed.is_none() {
            check(&directory, spec.model.digest.as_deref())?;
        }
        let dtype = sampler_dtype(opened.place, &directory, &spec)?;
        Sampler::load(&directory, spec.model.random_seed, &opened, dtype)
    });
    let sampler = tokio::select! {
        loaded = loading => loaded.map_err(|error| WorkerError::retryable("loading the model panicked", error))??,
        () = shutdown.cancelled() => return Ok(()),
    };
    let _ = api.slot.set(sampler.clone());
    context
        .progress
        .enter(Stage::Running, "waiting for the learner's weights and prompts");
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        why = sampler.lost() => Err(WorkerError::Retryable {
            what: format!("the GPU is lost: {why}"),
            source: None,
        }),
    }
}

/// The precision that the learner of these weights has: the job's, else that of the checkpoint on a GPU, and f32 on a CPU.
fn sampler_dtype(place: Place, directory: &Path, spec: &Rollout) -> Result<DType, WorkerError> {
    match (spec.dtype, place) {
        (Some(Precision::F32), _) | (None, Place::Cpu) => Ok(DType::F32),
        (Some(Precision::Bf16), _) => Ok(DType::BF16),
        (Some(Precision::F16), _) => Ok(DType::F16),
        (None, Place::Cuda(_)) if spec.model.random_seed.is_some() => Ok(DType::F32),
        (None, Place::Cuda(_)) => {
            let failed = || format!("failed to read the model in {}", directory.display());
            let config = Config::load(directory).map_err(|error| WorkerError::permanent(failed(), error))?;
            Ok(stored_dtype(directory, &config)?)
        }
    }
}

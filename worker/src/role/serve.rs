//! Role `serve`: one model as policy and critic, until it is asked to stop.

use std::{path::Path, time::Duration};

use flotilla_api::{
    progress::Stage,
    role::{Role, Serve},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::verify::check;
use crate::{
    context::Context,
    error::WorkerError,
    http::{
        self,
        api::{self, Api},
    },
    models::locate,
    prompt::critic::CriticTemplate,
    service::{Service, Slot, critics, metrics::Metrics},
};

/// New connections are still taken so long after the readiness probe has begun to fail, so that nobody who has not yet
/// heard of it is refused.
const LINGER: Duration = Duration::from_secs(1);
/// Answers that have begun may take so long to end.
const DRAIN: Duration = Duration::from_secs(25);

/// Loads the model while probes are already answered, serves until `shutdown`, and drains.
pub async fn run(
    context: Context,
    spec: Serve,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let slot = Slot::default();
    let role = Role::Serve(spec.clone());
    let mut registry = http::metrics::registry(&context, role.name());
    let metrics = Metrics::register(&mut registry, slot.clone());
    let app = http::common(http::Common::with_registry(&context, registry)).merge(api::router(Api {
        slot: slot.clone(),
        progress: context.progress.clone(),
        metrics: metrics.clone(),
    }));
    let stop = CancellationToken::new();
    let server = tokio::spawn(http::serve(listener, app, stop.clone(), DRAIN));

    let outcome = serve(&context, spec, metrics, slot, &shutdown).await;
    if outcome.is_ok() {
        context
            .progress
            .enter(Stage::Stopping, "finishing the answers that have begun");
        tokio::time::sleep(LINGER).await;
        stop.cancel();
        let _ = server.await;
        context.progress.enter(Stage::Completed, "stopped on request");
    }
    outcome
}

/// Loads and serves; ends with `shutdown` or with the engine.
async fn serve(
    context: &Context,
    spec: Serve,
    metrics: Metrics,
    slot: Slot,
    shutdown: &CancellationToken,
) -> Result<(), WorkerError> {
    let templates = critics::load(spec.critic_template.as_ref(), &spec.critic_templates, &context.volumes)?;
    let directory = tokio::select! {
        directory = locate(context, &spec.model.uri) => directory?,
        () = shutdown.cancelled() => return Ok(()),
    };
    context
        .progress
        .enter(Stage::Loading, format!("loading {}", spec.model.uri));
    let name = spec.served_model_name.clone();
    let loading = tokio::task::spawn_blocking(move || load(&directory, &spec, templates, metrics));
    let (digest, service, mut engine) = tokio::select! {
        loaded = loading => loaded.map_err(|error| WorkerError::retryable("loading the model panicked", error))??,
        () = shutdown.cancelled() => return Ok(()),
    };
    slot.fill(service);
    context.progress.update(|progress| progress.model_digest = digest);
    context.progress.enter(Stage::Running, format!("serving {name}"));
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        () = engine.ended() => Err(WorkerError::Retryable {
            what: "the engine's thread ended".to_owned(),
            source: None,
        }),
    }
}

fn load(
    directory: &Path,
    spec: &Serve,
    templates: Vec<(String, CriticTemplate)>,
    metrics: Metrics,
) -> Result<(Option<String>, Service, flotilla_engine::EngineThread), WorkerError> {
    let digest = check(directory, spec.model.digest.as_deref())?.digest;
    let (service, engine) = Service::load(directory, spec, templates, metrics)?;
    Ok((digest, service, engine))
}

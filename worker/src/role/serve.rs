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
    access::Keys,
    context::Context,
    device::Wanted,
    error::WorkerError,
    group::{Fate, Group, Places},
    http::{
        self,
        access::Gate,
        activity::Activity,
        api::{self, Api},
        cors::Origins,
        drain::{self, DrainState},
        server, tls,
    },
    models::locate,
    prompt::critic::CriticTemplate,
    service::{Service, Slot, critics, metrics::Metrics},
    spans::{ENDPOINT_VARIABLE, Spans},
    watched::{INTERVAL, WatchedFiles},
};

/// New connections are still taken so long after the readiness probe has begun to fail, so that nobody who has not yet
/// heard of it is refused.
const LINGER: Duration = Duration::from_secs(1);
/// Answers that have begun may take so long to end, where the spec does not say.
const DRAIN_SECONDS: u32 = 25;

/// The end of a rank's process is waited for so long after an error that may come from it.
const NEWS: Duration = Duration::from_secs(2);
/// A step that waits for a rank that ended notices it within two seconds.
const SETTLING: Duration = Duration::from_secs(5);
/// A server that lost a rank is ended by force if it is still there after this.
const LAST: Duration = Duration::from_secs(15);

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
    // Dropped with this function: whatever follows files ends with it.
    let following = CancellationToken::new();
    let _following = following.clone().drop_guard();
    let doors = Doors::open(&context, &spec, &following)?;
    let common = http::Common::with_registry(&context, registry)
        .of_model(metrics.clone(), slot.clone(), doors.spans.clone())
        .guarded(doors.origins.clone(), doors.gate.keys.is_some());
    let drain = DrainState {
        progress: context.progress.clone(),
        activity: doors.gate.activity.clone(),
    };
    let model = api::router(Api {
        slot: slot.clone(),
        progress: context.progress.clone(),
        metrics: metrics.clone(),
        gate: doors.gate.clone(),
    });
    let app = http::application(common, model.merge(drain::router(drain, context.token.clone())));
    let stop = CancellationToken::new();
    let patience = Duration::from_secs(u64::from(spec.drain_seconds.unwrap_or(DRAIN_SECONDS)));
    let server = tokio::spawn(server::serve(listener, app, doors.connections, stop.clone(), patience));

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
    if let Some(spans) = doors.spans {
        let _ = tokio::task::spawn_blocking(move || spans.close()).await;
    }
    outcome
}

/// What stands between clients and the model.
struct Doors {
    gate: Gate,
    connections: server::Settings,
    origins: Origins,
    spans: Option<Spans>,
}

impl Doors {
    /// Opened as the spec says; the files behind them are followed until `stop`.
    fn open(context: &Context, spec: &Serve, stop: &CancellationToken) -> Result<Self, WorkerError> {
        let access = &spec.access;
        let keys = access.api_key_file.as_ref().map(|path| follow_keys(path, stop.clone()));
        let tls = access
            .tls
            .as_ref()
            .map(|files| tls::acceptor(files, INTERVAL, stop.clone()));
        let from_environment = || {
            std::env::var(ENDPOINT_VARIABLE)
                .ok()
                .filter(|endpoint| !endpoint.is_empty())
        };
        let endpoint = spec.otlp_endpoint.clone().or_else(from_environment);
        let owner = &context.owner;
        let spans = endpoint.map(|endpoint| Spans::open(&endpoint, &owner.namespace, &owner.name));
        Ok(Self {
            gate: Gate {
                keys: keys.transpose()?,
                activity: Activity::default(),
            },
            connections: server::Settings {
                tls: tls.transpose()?,
                ..server::Settings::default()
            },
            origins: Origins::parse(&access.cors_origins)?,
            spans: spans.transpose()?,
        })
    }
}

/// The keys of a file, and those of every later version of it that is not broken.
fn follow_keys(path: &str, stop: CancellationToken) -> Result<Keys, WorkerError> {
    let keys =
        Keys::read(Path::new(path)).map_err(|fault| WorkerError::invalid(format!("API key file {path}: {fault}")))?;
    let watched = WatchedFiles::new("the API key file", vec![path.into()]);
    let replaced = keys.clone();
    tokio::spawn(watched.follow(INTERVAL, stop, move |contents| {
        let text = contents
            .first()
            .map(|bytes| String::from_utf8_lossy(bytes))
            .unwrap_or_default();
        let count = replaced.replace(&text)?;
        tracing::info!(keys = count, "API keys");
        Ok(())
    }));
    Ok(keys)
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
    let (name, device) = (spec.served_model_name.clone(), context.device);
    // Before the model is fetched, which may take an hour.
    let (places, spec) = looking(spec, move |spec| Places::find(spec, device)).await?;
    let directory = tokio::select! {
        directory = locate(context, &spec.model.uri) => directory?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let within = directory.clone();
    let hold = move |spec: &Serve| match &places {
        Some(places) => places.hold(&within, spec).map(|()| Some(places.clone())),
        None => Ok(None),
    };
    let (places, spec) = looking(spec, hold).await?;
    let group = places.map(|places| Group {
        places,
        fate: Fate::default(),
    });
    let (on, fate) = match &group {
        Some(group) => (format!(" on {}", group.places), group.fate.clone()),
        None => (String::new(), Fate::default()),
    };
    let shared = group.is_some();
    context
        .progress
        .enter(Stage::Loading, format!("loading {}{on}", spec.model.uri));
    let loading =
        tokio::task::spawn_blocking(move || load(&directory, &spec, templates, metrics, device, group.as_ref()));
    let loaded = tokio::select! {
        loaded = loading => loaded.map_err(|error| WorkerError::retryable("loading the model panicked", error))?,
        why = fate.fallen() => return Err(lost(why, &slot).await),
        () = shutdown.cancelled() => return Ok(()),
    };
    let (digest, service, mut engine) = match loaded {
        Ok(loaded) => loaded,
        Err(error) if shared => return Err(blamed(error, &fate, &slot).await),
        Err(error) => return Err(error),
    };
    slot.fill(service);
    context.progress.update(|progress| progress.model_digest = digest);
    context.progress.enter(Stage::Running, format!("serving {name}{on}"));
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        why = fate.fallen() => Err(lost(why, &slot).await),
        () = engine.ended() => Err(WorkerError::Retryable {
            what: "the engine's thread ended".to_owned(),
            source: None,
        }),
    }
}

/// A look at this machine's GPUs or at the model's files, which blocks.
async fn looking<R: Send + 'static>(
    spec: Serve,
    look: impl FnOnce(&Serve) -> Result<R, WorkerError> + Send + 'static,
) -> Result<(R, Serve), WorkerError> {
    let looking = tokio::task::spawn_blocking(move || look(&spec).map(|found| (found, spec)));
    let looked = looking.await;
    looked.map_err(|error| WorkerError::retryable("looking for GPUs panicked", error))?
}

/// A rank that ended, which a new attempt starts again. A step that waits for it is let go first.
async fn lost(why: String, slot: &Slot) -> WorkerError {
    // Libraries that are told of the process's end may wait for a GPU whose peer is gone, without end.
    let end = || {
        std::thread::sleep(LAST);
        std::process::abort();
    };
    if let Err(error) = std::thread::Builder::new().name("end".to_owned()).spawn(end) {
        tracing::warn!(%error, "nothing ends this process if it hangs");
    }
    if let Some(service) = slot.get() {
        service.idle(SETTLING).await;
    }
    WorkerError::Retryable {
        what: why,
        source: None,
    }
}

/// Loading fails here, too, where it failed at another rank: that one's end, which is heard of soon, says more.
async fn blamed(error: WorkerError, fate: &Fate, slot: &Slot) -> WorkerError {
    match tokio::time::timeout(NEWS, fate.fallen()).await {
        Ok(why) => lost(why, slot).await,
        Err(_) => error,
    }
}

fn load(
    directory: &Path,
    spec: &Serve,
    templates: Vec<(String, CriticTemplate)>,
    metrics: Metrics,
    device: Wanted,
    group: Option<&Group>,
) -> Result<(Option<String>, Service, flotilla_engine::EngineThread), WorkerError> {
    let digest = check(directory, spec.model.digest.as_deref())?.digest;
    let (service, engine) = Service::load(directory, spec, templates, metrics, device, group)?;
    Ok((digest, service, engine))
}

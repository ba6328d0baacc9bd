//! The whole operator: watches, controllers and endpoints, until it is asked to stop.

use std::sync::Arc;

use flotilla_api::names::label;
use k8s_openapi::{NamespaceResourceScope, api::core::v1::ObjectReference};
use kube::{
    Api, Client, Resource,
    runtime::{
        events::{Event, EventType},
        watcher,
    },
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    cache::{self, Writers, watch},
    config::OperatorConfig,
    context::Context,
    controller::drive,
    dataset,
    error::Result,
    http,
    leader::Candidate,
    metrics::Metrics,
    model_checkpoint, model_deployment,
    requests::Requests,
    training_job,
    triggers::{Queues, Triggers},
};

/// Objects of one answer while a kind is listed. A page is parsed whole before its objects are trimmed, so at the start it
/// decides how much memory is in use at once.
const PAGE: u32 = 100;

/// Runs the only operator until `shutdown`, then waits for the passes that run. Children are left as they are: a new operator
/// goes on where this one stopped.
pub async fn run(client: Client, config: OperatorConfig, shutdown: CancellationToken) -> Result<()> {
    operate(client, config, None, shutdown).await
}

/// Runs one of several operators: passes are made only while it leads. Ends with an error when it led and was deposed.
/// `client` must be the guarded one that belongs to `candidate` ([`crate::leader::candidate`]).
pub async fn run_elected(
    client: Client,
    config: OperatorConfig,
    candidate: Candidate,
    shutdown: CancellationToken,
) -> Result<()> {
    operate(client, config, Some(candidate), shutdown).await
}

async fn operate(
    client: Client,
    config: OperatorConfig,
    candidate: Option<Candidate>,
    shutdown: CancellationToken,
) -> Result<()> {
    let (stores, writers) = cache::stores();
    let (triggers, queues) = Triggers::new(stores.owned_pods.clone());
    let listen = config.listen;
    let requests = Requests::default();
    let (client, metrics) = (requests.count(client), Metrics::new(&requests));
    let context = Arc::new(Context::new(client, config, stores.clone(), metrics)?);
    let ready = CancellationToken::new();

    let mut background = JoinSet::new();
    if let Some(address) = listen {
        let listener = http::bind(address).await?;
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, "metrics and health");
        }
        background.spawn(http::serve(
            listener,
            Arc::clone(&context),
            ready.clone(),
            shutdown.clone(),
        ));
    }
    let listed = spawn_watches(&mut background, &context, writers, &triggers);

    // A pass before the first lists are complete would take what is not read yet for absent.
    let ended = tokio::select! {
        () = listed => {
            tracing::info!("every kind is listed");
            ready.cancel();
            match candidate {
                None => {
                    context.metrics.leads(true);
                    drive_all(&context, queues, &shutdown).await;
                    Ok(())
                }
                Some(candidate) => Box::pin(lead(&context, candidate, &triggers, queues, &shutdown)).await,
            }
        }
        () = shutdown.cancelled() => Ok(()),
    };
    tracing::info!("controllers stopped");
    background.shutdown().await;
    ended
}

/// Waits for its turn, then makes passes until `shutdown`, or until it is deposed: running passes are dropped then.
async fn lead(
    context: &Arc<Context>,
    candidate: Candidate,
    triggers: &Triggers,
    mut queues: Queues,
    shutdown: &CancellationToken,
) -> Result<()> {
    let identity = candidate.config().identity.clone();
    let mut term = tokio::select! {
        term = candidate.campaign() => term,
        () = queues.discard() => return Ok(()),
        () = shutdown.cancelled() => return Ok(()),
    };
    tracing::info!(%identity, "leading");
    context.metrics.leads(true);
    triggers.everything(&context.stores);
    let lease = term.reference();
    // Renewals go on until the last pass has ended, also after `shutdown`.
    let lost = tokio::select! {
        lost = term.hold() => Some(lost),
        _ = async { tokio::join!(announce(context, &identity, &lease), drive_all(context, queues, shutdown)) } => None,
    };
    context.metrics.leads(false);
    match lost {
        Some(lost) => Err(lost.into()),
        None => {
            term.release().await;
            Ok(())
        }
    }
}

/// Events are for people: one that cannot be written is logged.
async fn announce(context: &Context, identity: &str, lease: &ObjectReference) {
    let event = Event {
        type_: EventType::Normal,
        reason: "LeaderElection".to_owned(),
        note: Some(format!("{identity} became the leader")),
        action: "Lead".to_owned(),
        secondary: None,
    };
    if let Err(error) = context.recorder.publish(&event, lease).await {
        tracing::warn!(%error, "event not published");
    }
}

async fn drive_all(context: &Arc<Context>, queues: Queues, shutdown: &CancellationToken) {
    let stores = &context.stores;
    let (one, two, three, four) = (
        drive(
            dataset::reconcile,
            stores.datasets.clone(),
            queues.datasets,
            Arc::clone(context),
            shutdown.clone(),
        ),
        drive(
            training_job::reconcile,
            stores.training_jobs.clone(),
            queues.training_jobs,
            Arc::clone(context),
            shutdown.clone(),
        ),
        drive(
            model_checkpoint::reconcile,
            stores.model_checkpoints.clone(),
            queues.model_checkpoints,
            Arc::clone(context),
            shutdown.clone(),
        ),
        drive(
            model_deployment::reconcile,
            stores.model_deployments.clone(),
            queues.model_deployments,
            Arc::clone(context),
            shutdown.clone(),
        ),
    );
    tokio::join!(one, two, three, four);
}

/// Starts the watches; what it returns ends once the first list of every kind is read and told.
fn spawn_watches(
    tasks: &mut JoinSet<()>,
    context: &Context,
    writers: Writers,
    triggers: &Triggers,
) -> impl Future<Output = ()> + use<> {
    let listed: [CancellationToken; 5] = std::array::from_fn(|_| CancellationToken::new());
    let Writers {
        pods,
        datasets,
        training_jobs,
        model_checkpoints,
        model_deployments,
    } = writers;
    let config = watcher::Config::default().page_size(PAGE);
    let ours = config
        .clone()
        .labels(&format!("{}={}", label::MANAGED_BY, label::MANAGED_BY_VALUE));
    let [of_pods, of_datasets, of_jobs, of_checkpoints, of_deployments] = &listed;
    let tell = triggers.clone();
    tasks.spawn(watch(api(context), ours, pods, of_pods.clone(), move |change| {
        tell.pod(&change);
    }));
    let tell = triggers.clone();
    tasks.spawn(watch(
        api(context),
        config.clone(),
        datasets,
        of_datasets.clone(),
        move |change| tell.dataset(&change),
    ));
    let tell = triggers.clone();
    tasks.spawn(watch(
        api(context),
        config.clone(),
        training_jobs,
        of_jobs.clone(),
        move |change| tell.training_job(&change),
    ));
    let tell = triggers.clone();
    tasks.spawn(watch(
        api(context),
        config.clone(),
        model_checkpoints,
        of_checkpoints.clone(),
        move |change| tell.model_checkpoint(&change),
    ));
    let tell = triggers.clone();
    tasks.spawn(watch(
        api(context),
        config,
        model_deployments,
        of_deployments.clone(),
        move |change| tell.model_deployment(&change),
    ));
    async move {
        for kind in &listed {
            kind.cancelled().await;
        }
    }
}

fn api<K>(context: &Context) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match &context.config.namespace {
        Some(namespace) => Api::namespaced(context.client.clone(), namespace),
        None => Api::all(context.client.clone()),
    }
}

//! The dispatch from a role config to the role's file.
//!
//! Each role is `async fn run(context, spec, shutdown)`; what computes for long does so on its own OS thread and tells
//! through the progress cell how far it is. Every role answers `/healthz`, `/readyz`, `/metrics` and `/progress`.

pub mod prepare;
pub mod rollout;
pub mod serve;
pub mod train;
pub mod verify;

use flotilla_api::{role::Role, rollout::RolloutPods};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;
use utoipa_axum::router::OpenApiRouter;

use crate::{
    context::Context,
    error::WorkerError,
    http::{self, rollout_pods::RolloutPodsState, server},
};

/// Runs a role to its end; `shutdown` asks it to save its state and stop.
pub async fn run(
    context: Context,
    role: Role,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let owner = &context.owner;
    tracing::info!(role = role.name(), kind = %owner.kind, namespace = %owner.namespace, name = %owner.name, "starting");
    let name = role.name();
    let role = match role {
        Role::Serve(spec) => return Box::pin(serve::run(context, spec, listener, shutdown)).await,
        Role::Rollout(spec) => return Box::pin(rollout::run(context, spec, listener, shutdown)).await,
        role => role,
    };
    let mut routes = OpenApiRouter::new();
    let (told, pods) = watch::channel(RolloutPods::default());
    if matches!(&role, Role::Train(spec) if spec.rollout.is_some()) {
        routes = routes.merge(http::rollout_pods::router(RolloutPodsState {
            token: context.token.clone(),
            progress: context.progress.clone(),
            pods: told,
        }));
    }
    // The server outlives the role's work: progress is asked for until the last checkpoint is written.
    let stop = CancellationToken::new();
    let app = http::application(http::Common::new(&context, name), routes);
    let settings = server::Settings::default();
    let server = tokio::spawn(server::serve(
        listener,
        app,
        settings,
        stop.clone(),
        http::CLOSE_TIMEOUT,
    ));
    let outcome = match role {
        Role::Prepare(spec) => Box::pin(prepare::run(context, spec, shutdown)).await,
        Role::Train(spec) => Box::pin(train::run(context, *spec, pods, shutdown)).await,
        Role::Verify(spec) => Box::pin(verify::run(context, spec, shutdown)).await,
        Role::Serve(_) | Role::Rollout(_) => Ok(()),
    };
    stop.cancel();
    let _ = server.await;
    outcome
}

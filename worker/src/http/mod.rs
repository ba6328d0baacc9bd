//! HTTP: one endpoint per file.
//!
//! [`common`] is what every role answers; [`mod@api`] adds the model's endpoints for role `serve`, [`rollouts`] and
//! [`weights`] those of role `rollout`, [`rollout_pods`] that of a learner.

pub mod answer;
pub mod api;
pub mod chat;
pub mod chat_request;
pub mod completions;
pub mod critic;
pub mod error;
pub mod guard;
pub mod health;
pub mod metrics;
pub mod models;
pub mod page;
pub mod progress;
pub mod rollout_pods;
pub mod rollouts;
pub mod sampling_fields;
pub mod sse;
pub mod weights;

use std::{sync::Arc, time::Duration};

use axum::Router;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    context::{Context, Token},
    progress::ProgressCell,
};

/// How long open connections may take to end once a server that has no work of its own was asked to stop.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the endpoints of every role share.
#[derive(Clone, Debug)]
pub struct Common {
    progress: ProgressCell,
    token: Option<Token>,
    registry: Arc<Registry>,
}

impl Common {
    /// With the metrics that every role has.
    pub fn new(context: &Context, role: &'static str) -> Self {
        Self::with_registry(context, metrics::registry(context, role))
    }

    /// With a registry to which a role has added its own metrics.
    pub fn with_registry(context: &Context, registry: Registry) -> Self {
        Self {
            progress: context.progress.clone(),
            token: context.token.clone(),
            registry: Arc::new(registry),
        }
    }
}

/// `/healthz`, `/readyz`, `/metrics`, `/progress`.
pub fn common(state: Common) -> Router {
    Router::new()
        .merge(health::router(state.clone()))
        .merge(metrics::router(state.clone()))
        .merge(progress::router(state))
}

/// Answers on `listener` until `stop`, then lets open connections end for at most `patience`.
pub async fn serve(listener: TcpListener, app: Router, stop: CancellationToken, patience: Duration) {
    let stopped = stop.clone();
    let server = axum::serve(listener, app).with_graceful_shutdown(async move { stopped.cancelled().await });
    let deadline = async {
        stop.cancelled().await;
        tokio::time::sleep(patience).await;
    };
    tokio::select! {
        outcome = server => if let Err(error) = outcome { tracing::error!(%error, "the HTTP server ended") },
        () = deadline => tracing::debug!("connections were still open at the end"),
    }
}

//! `/metrics`, `/healthz` and `/readyz` of the operator.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    error::{Error, Result},
};

/// State of the endpoints.
#[derive(Clone, Debug)]
struct Endpoints {
    context: Arc<Context>,
    /// Cancelled once every watch has listed its kind.
    ready: CancellationToken,
}

/// Takes the address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|source| Error::Listen { address, source })
}

/// Serves until `shutdown`; `ready` is cancelled once the operator is.
pub async fn serve(
    listener: TcpListener,
    context: Arc<Context>,
    ready: CancellationToken,
    shutdown: CancellationToken,
) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(readyz))
        .with_state(Endpoints { context, ready });
    let served = axum::serve(listener, router).with_graceful_shutdown(async move { shutdown.cancelled().await });
    if let Err(error) = served.await {
        tracing::error!(%error, "metrics and health ended");
    }
}

async fn readyz(State(state): State<Endpoints>) -> impl IntoResponse {
    if state.ready.is_cancelled() {
        (StatusCode::OK, "ok")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the first list of every kind is not complete",
        )
    }
}

async fn metrics(State(state): State<Endpoints>) -> impl IntoResponse {
    match state.context.metrics.encode(&state.context.stores) {
        Ok(text) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

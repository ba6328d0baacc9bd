//! HTTP: one endpoint per file.
//!
//! A role gives [`application`] its endpoints: [`mod@api`] has the model's for role `serve`, [`rollouts`] and [`weights`] those
//! of role `rollout`, [`rollout_pods`] that of a learner. Every request then passes [`mod@exchange`] (id, log, metrics, traces,
//! panics), the model's also [`access`] (keys and limits). [`server`] accepts connections, [`tls`] has the certificate.

pub mod access;
pub mod activity;
pub mod answer;
pub mod api;
pub mod body;
pub mod chat;
pub mod chat_request;
pub mod completions;
pub mod cors;
pub mod critic;
pub mod docs;
pub mod drain;
pub mod error;
pub mod exchange;
pub mod first_bytes;
pub mod guard;
pub mod health;
pub mod held;
pub mod metrics;
pub mod models;
pub mod openapi;
pub mod page;
pub mod progress;
pub mod rollout_pods;
pub mod rollouts;
pub mod sampling_fields;
pub mod server;
pub mod sse;
pub mod tls;
pub mod weights;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    http::{Method, StatusCode, Uri},
    middleware::from_fn_with_state,
};
use prometheus_client::registry::Registry;
use utoipa_axum::router::OpenApiRouter;

use self::{
    cors::Origins,
    error::ApiError,
    exchange::{Exchanges, exchange},
    openapi::Locks,
};
use crate::{
    context::{Context, Token},
    progress::ProgressCell,
    service::{Slot, metrics::Metrics},
    spans::Spans,
};

/// How long open connections may take to end once a server that has no work of its own was asked to stop.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the endpoints of every role share.
#[derive(Clone, Debug)]
pub struct Common {
    progress: ProgressCell,
    token: Option<Token>,
    registry: Arc<Registry>,
    exchanges: Exchanges,
    origins: Origins,
    keyed: bool,
}

impl Common {
    /// With the metrics that every role has.
    pub fn new(context: &Context, role: &'static str) -> Self {
        Self::with_registry(context, metrics::registry(context, role))
    }

    /// With a registry to which a role has added its own metrics.
    pub fn with_registry(context: &Context, mut registry: Registry) -> Self {
        let exchanges = Exchanges::register(&mut registry);
        Self {
            progress: context.progress.clone(),
            token: context.token.clone(),
            registry: Arc::new(registry),
            exchanges,
            origins: Origins::default(),
            keyed: false,
        }
    }

    /// The same, of a server of models.
    pub fn of_model(self, metrics: Metrics, slot: Slot, spans: Option<Spans>) -> Self {
        Self {
            exchanges: self.exchanges.of_model(metrics, slot, spans),
            ..self
        }
    }

    /// The same, for web pages of other origins, and with keys before the model's endpoints or without.
    pub fn guarded(self, origins: Origins, keyed: bool) -> Self {
        Self { origins, keyed, ..self }
    }
}

/// The endpoints of a role and those that every role has (`/healthz`, `/readyz`, `/metrics`, `/progress`), with their
/// document, behind what every request passes.
pub fn application(state: Common, routes: OpenApiRouter) -> Router {
    let locks = Locks {
        api_key: state.keyed,
        job_token: state.token.is_some(),
    };
    let (exchanges, origins) = (state.exchanges.clone(), state.origins.clone());
    let routes = OpenApiRouter::new()
        .merge(routes)
        .merge(health::router(state.clone()))
        .merge(metrics::router(state.clone()))
        .merge(progress::router(state));
    openapi::described(routes, locks)
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(origins, cors::share))
        .layer(from_fn_with_state(exchanges, exchange))
}

async fn not_found(uri: Uri) -> ApiError {
    let message = format!("there is no {}; /docs lists what there is", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take {method}; /docs says what it takes", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

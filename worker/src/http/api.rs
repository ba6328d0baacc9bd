//! The model's endpoints and what they share.

use axum::{extract::DefaultBodyLimit, http::StatusCode, middleware::from_fn_with_state};
use flotilla_api::{progress::Stage, role::Purpose};
use utoipa_axum::router::OpenApiRouter;

pub use super::body::Body;
use super::{
    access::{self, Gate},
    chat, completions, critic,
    error::ApiError,
    models, page,
};
use crate::{
    progress::ProgressCell,
    service::{Service, Slot, metrics::Metrics},
};

/// The largest request body: a few pictures of the largest size, encoded.
const MAX_BODY_BYTES: usize = 64 << 20;

/// What the model's endpoints share.
#[derive(Clone, Debug)]
pub struct Api {
    /// The service, once the model is loaded.
    pub slot: Slot,
    /// Tells whether the server is draining.
    pub progress: ProgressCell,
    /// Counters.
    pub metrics: Metrics,
    /// Who is let in.
    pub gate: Gate,
}

impl Api {
    /// The service, if it takes requests for this purpose.
    pub fn service(&self, wanted: Purpose) -> Result<std::sync::Arc<Service>, ApiError> {
        let unavailable = |code, message: &str| {
            self.metrics.refused(code);
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
        };
        if self.progress.stage() == Stage::Stopping {
            return Err(unavailable(
                "draining",
                "this replica is shutting down: ask another one",
            ));
        }
        let Some(service) = self.slot.get() else {
            return Err(unavailable("loading", "the model is being loaded"));
        };
        if service.purpose != Purpose::Both && service.purpose != wanted {
            let message = match service.purpose {
                Purpose::Policy => "this deployment has purpose Policy: it answers /v1/chat/completions",
                _ => "this deployment has purpose Critic: it answers /v1/critic/compare and /v1/critic/score",
            };
            return Err(ApiError::new(StatusCode::FORBIDDEN, "purpose", message));
        }
        Ok(service)
    }

    /// Counts a refusal on its way to the client.
    pub fn refuse(&self, error: impl Into<ApiError>) -> ApiError {
        let error = error.into();
        self.metrics.refused(error.code());
        error
    }
}

/// Refuses a model name that is not the served one; no name means whatever is served.
pub fn check_model(service: &Service, named: Option<&str>) -> Result<(), ApiError> {
    match named {
        Some(name) if name != service.name => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            "model_not_found",
            format!("the model {name:?} is not served here, {:?} is", service.name),
        )),
        _ => Ok(()),
    }
}

/// All endpoints of the model, behind the keys.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new()
        .merge(models::router(state.clone()))
        .merge(chat::router(state.clone()))
        .merge(completions::router(state.clone()))
        .merge(critic::router(state.clone()))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .route_layer(from_fn_with_state(state, access::enter))
        .merge(page::router().into())
}

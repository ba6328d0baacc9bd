//! The model's endpoints and what they share.

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequest, Request},
    http::{Method, StatusCode, Uri},
};
use flotilla_api::{progress::Stage, role::Purpose};
use serde::de::DeserializeOwned;
use utoipa_axum::router::OpenApiRouter;

use super::{chat, completions, critic, error::ApiError, models, page};
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

/// All endpoints; unknown ones are answered in the same shape.
pub fn router(state: Api) -> Router {
    let (router, _document) = OpenApiRouter::new()
        .merge(models::router(state.clone()))
        .merge(chat::router(state.clone()))
        .merge(completions::router(state.clone()))
        .merge(critic::router(state))
        .split_for_parts();
    router
        .merge(page::router())
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
}

async fn not_found(uri: Uri) -> ApiError {
    let message = format!(
        "there is no {}; see /v1/models, /v1/chat/completions, /v1/critic/compare, /v1/critic/score, /v1/critic/best-of-n",
        uri.path()
    );
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// A JSON body; what is wrong with it is answered in the API's shape. The content type is not looked at.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            let message = match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => "the body is larger than this endpoint takes".to_owned(),
                _ => rejection.body_text(),
            };
            ApiError::new(rejection.status(), "invalid_body", message)
        })?;
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Self).map_err(|error| {
            let message = format!("the body is not the JSON that this endpoint takes: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message)
        })
    }
}

//! `GET /v1/models`: the one model that is served.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use flotilla_api::role::Purpose;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    api::{Api, check_model},
    error::{ApiError, ErrorBody},
};
use crate::service::Service;

/// The endpoints.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(models))
        .routes(routes!(model))
        .with_state(state)
}

/// The models that are served: one.
#[derive(Debug, Serialize, ToSchema)]
struct ModelList {
    /// `list`.
    #[schema(value_type = String)]
    object: &'static str,
    /// The model.
    data: Vec<Model>,
}

/// A model that is served.
#[derive(Debug, Serialize, ToSchema)]
struct Model {
    /// The name to send as `model`.
    id: String,
    /// `model`.
    #[schema(value_type = String)]
    object: &'static str,
    /// Seconds since 1970 at which it was loaded.
    created: i64,
    /// `flotilla`.
    #[schema(value_type = String)]
    owned_by: &'static str,
    /// Longest prompt plus completion, in tokens.
    max_model_len: usize,
    /// What it is for: `Policy` (completions), `Critic` (`/v1/critic/*`) or `Both`.
    #[schema(value_type = String)]
    purpose: Purpose,
}

impl Model {
    fn of(service: &Service) -> Self {
        Self {
            id: service.name.clone(),
            object: "model",
            created: service.created,
            owned_by: "flotilla",
            max_model_len: service.max_model_len,
            purpose: service.purpose,
        }
    }
}

/// Lists the model that is served.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "models",
    responses(
        (status = 200, description = "The model", body = ModelList),
        (status = 401, description = "The key is missing or wrong", body = ErrorBody),
        (status = 429, description = "Too many requests", body = ErrorBody),
        (status = 503, description = "The model is being loaded, or the server drains", body = ErrorBody),
    )
)]
async fn models(State(api): State<Api>) -> Result<Json<ModelList>, ApiError> {
    let service = service(&api)?;
    Ok(Json(ModelList {
        object: "list",
        data: vec![Model::of(&service)],
    }))
}

/// Describes the model that is served.
#[utoipa::path(
    get,
    path = "/v1/models/{model}",
    tag = "models",
    params(("model" = String, Path, description = "Its name, as the list has it")),
    responses(
        (status = 200, description = "The model", body = Model),
        (status = 400, description = "The name is not UTF-8", body = ErrorBody),
        (status = 401, description = "The key is missing or wrong", body = ErrorBody),
        (status = 404, description = "Another model is served", body = ErrorBody),
        (status = 429, description = "Too many requests", body = ErrorBody),
        (status = 503, description = "The model is being loaded, or the server drains", body = ErrorBody),
    )
)]
async fn model(State(api): State<Api>, name: Result<Path<String>, PathRejection>) -> Result<Json<Model>, ApiError> {
    let Path(name) = name.map_err(|rejection| ApiError::invalid("model", rejection.body_text()))?;
    let service = service(&api)?;
    check_model(&service, Some(&name))?;
    Ok(Json(Model::of(&service)))
}

/// The service, whatever its purpose.
fn service(api: &Api) -> Result<Arc<Service>, ApiError> {
    match api.service(Purpose::Policy) {
        Err(error) if error.code() == "purpose" => api.service(Purpose::Critic),
        other => other,
    }
}

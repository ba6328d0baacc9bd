//! `GET /v1/models`: the one model that is served.

use axum::{Json, extract::State};
use flotilla_api::role::Purpose;
use serde_json::{Value, json};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{api::Api, error::ApiError};

/// The endpoint.
pub fn router(state: Api) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(models)).with_state(state)
}

/// Lists the model that is served.
#[utoipa::path(get, path = "/v1/models", tag = "models", responses((status = 200, description = "The model")))]
async fn models(State(api): State<Api>) -> Result<Json<Value>, ApiError> {
    let service = match api.service(Purpose::Policy) {
        Err(error) if error.code() == "purpose" => api.service(Purpose::Critic)?,
        other => other?,
    };
    Ok(Json(json!({
        "object": "list",
        "data": [{
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "flotilla",
            "max_model_len": service.max_model_len,
            "purpose": service.purpose,
        }]
    })))
}

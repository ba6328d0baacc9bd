//! `GET /v1/models`: the one model that is served.

use axum::{Json, Router, extract::State, routing::get};
use flotilla_api::role::Purpose;
use serde_json::{Value, json};

use super::{api::Api, error::ApiError};

/// The endpoint.
pub fn router(state: Api) -> Router {
    Router::new().route("/v1/models", get(models)).with_state(state)
}

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
        }]
    })))
}

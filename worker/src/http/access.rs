//! The API keys before the model's endpoints: who is let in, and how often.

use axum::{
    extract::{Request, State},
    http::StatusCode,
    middleware::Next,
    response::Response,
};
use flotilla_api::progress::Stage;

use super::{activity::Activity, api::Api, error::ApiError, guard::bearer, held::hold};
use crate::{
    access::{Keys, Throttled},
    service::account::Account,
};

/// What stands before the model's endpoints.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// Everybody is let in if None.
    pub keys: Option<Keys>,
    /// Counts what is being answered.
    pub activity: Activity,
}

/// Lets a request in, and counts it until its answer has ended.
pub async fn enter(State(api): State<Api>, request: Request, next: Next) -> Result<Response, ApiError> {
    let place = match &api.gate.keys {
        None => None,
        Some(keys) => Some(admit(keys, &request).map_err(|error| api.refuse(error))?),
    };
    // Counted before the stage is read: a drain that finds nobody here has turned away everybody who comes later.
    let begun = api.gate.activity.begin();
    if api.progress.stage() == Stage::Stopping {
        let message = "this replica is shutting down: ask another one";
        return Err(api.refuse(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "draining", message)));
    }
    Ok(hold(next.run(request).await, (place, begun)))
}

fn admit(keys: &Keys, request: &Request) -> Result<crate::access::Place, ApiError> {
    let refused = |message: &str| ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message);
    let presented = bearer(request.headers()).ok_or_else(|| {
        refused("an API key is needed: send the header authorization: Bearer <key>, as OpenAI's clients do")
    })?;
    let key = keys
        .find(presented)
        .ok_or_else(|| refused("the API key is not known here"))?;
    if let Some(account) = Account::current() {
        account.came_with(key.name());
    }
    key.enter().map_err(|throttled| match throttled {
        Throttled::Rate { wait, .. } => too_many("rate_limit_exceeded", throttled).retry_after(wait),
        Throttled::Concurrency { .. } => too_many("concurrency_limit_exceeded", throttled),
    })
}

fn too_many(code: &'static str, throttled: Throttled) -> ApiError {
    ApiError::new(StatusCode::TOO_MANY_REQUESTS, code, throttled.to_string())
}

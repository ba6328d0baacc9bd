//! The bearer token before role-internal endpoints.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::Response,
};

use utoipa_axum::router::OpenApiRouter;

use super::error::ApiError;
use crate::context::Token;

/// Why a request is not let in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// It presents another token.
    Wrong,
    /// It presents none.
    Missing,
}

impl Refusal {
    fn message(self) -> &'static str {
        match self {
            Self::Wrong => "the bearer token is wrong",
            Self::Missing => "a bearer token is needed",
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", refusal.message())
    }
}

/// Puts the token before every route of `router`. A request without it is refused before its body is read.
pub fn guarded(router: OpenApiRouter, token: Option<Token>) -> OpenApiRouter {
    router.route_layer(from_fn_with_state(token, require))
}

async fn require(State(token): State<Option<Token>>, request: Request, next: Next) -> Result<Response, ApiError> {
    check(token.as_ref(), request.headers())?;
    Ok(next.run(request).await)
}

/// Lets in who presents `token`; without one everybody.
pub fn check(token: Option<&Token>, headers: &HeaderMap) -> Result<(), Refusal> {
    let Some(token) = token else { return Ok(()) };
    match bearer(headers) {
        Some(presented) if token.admits(presented) => Ok(()),
        Some(_) => Err(Refusal::Wrong),
        None => Err(Refusal::Missing),
    }
}

/// What a request presents as `authorization: Bearer ...`; the scheme's name may be written in any case.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, presented) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| presented.trim())
}

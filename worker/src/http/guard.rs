//! The bearer token before role-internal endpoints.

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::Response,
};

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

    /// As plain text, for people with curl.
    pub fn plain(self) -> (StatusCode, String) {
        (StatusCode::UNAUTHORIZED, format!("{}\n", self.message()))
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", refusal.message())
    }
}

/// Puts the token before every route of `router`. A request without it is refused before its body is read.
pub fn guarded(router: Router, token: Option<Token>) -> Router {
    router.route_layer(from_fn_with_state(token, require))
}

async fn require(State(token): State<Option<Token>>, request: Request, next: Next) -> Result<Response, ApiError> {
    check(token.as_ref(), request.headers())?;
    Ok(next.run(request).await)
}

/// Lets in who presents `token`; without one everybody.
pub fn check(token: Option<&Token>, headers: &HeaderMap) -> Result<(), Refusal> {
    let Some(token) = token else { return Ok(()) };
    let presented = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    match presented {
        Some(presented) if token.admits(presented) => Ok(()),
        Some(_) => Err(Refusal::Wrong),
        None => Err(Refusal::Missing),
    }
}

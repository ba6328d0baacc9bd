//! Errors in the shape that OpenAI clients read.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::service::ServiceError;

/// The body of every answer that is an error, as `OpenAI`'s clients read it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For people: what was wrong, where, and what to do.
    pub message: String,
    /// For programs: the kind of the error.
    #[serde(rename = "type")]
    #[schema(example = "invalid_request_error")]
    pub kind: String,
    /// The field of the request that is wrong, where one is.
    pub param: Option<String>,
    /// For programs: which error it is.
    #[schema(example = "invalid_value")]
    pub code: String,
}

/// A request that is not answered.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    param: Option<&'static str>,
    message: String,
    retry_after: Option<Duration>,
}

impl ApiError {
    /// With a code that programs read and a message that people read.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            param: None,
            message: message.into(),
            retry_after: None,
        }
    }

    /// With the time after which a new attempt may be answered. Where none is told, the time that requests take lately is.
    pub fn retry_after(self, wait: Duration) -> Self {
        Self {
            retry_after: Some(wait),
            ..self
        }
    }

    /// What went wrong inside; the log knows more.
    pub fn internal() -> Self {
        let message = "the server failed on this request; its log says why under the request id (x-request-id)";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// A field of the request is wrong.
    pub fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self {
            param: Some(param),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message)
        }
    }

    /// What programs read.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// The body.
    pub fn body(&self) -> ErrorBody {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorBody {
            error: ErrorDetail {
                message: self.message.clone(),
                kind: kind.to_owned(),
                param: self.param.map(str::to_owned),
                code: self.code.to_owned(),
            },
        }
    }

    /// The body, as an event of a stream that has begun carries it.
    pub fn json(&self) -> Value {
        json!(self.body())
    }
}

impl From<ServiceError> for ApiError {
    fn from(error: ServiceError) -> Self {
        let message = error.to_string();
        match error {
            ServiceError::Invalid { param, .. } => Self::invalid(param, message),
            ServiceError::TooLong { .. } => Self {
                param: Some("messages"),
                ..Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message)
            },
            ServiceError::Overloaded(_) => Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message),
            ServiceError::Engine(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "model_failure", message),
            ServiceError::Deadline => Self::new(StatusCode::GATEWAY_TIMEOUT, "deadline", message),
            ServiceError::Aborted => Self::new(StatusCode::SERVICE_UNAVAILABLE, "aborted", message),
            ServiceError::Stopped => Self::new(StatusCode::SERVICE_UNAVAILABLE, "stopped", message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(wait) = self.retry_after {
            // Whole seconds, and never too few of them.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, seconds.max(1).into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

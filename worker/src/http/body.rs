//! A JSON body, checked before it is parsed.

use std::time::Duration;

use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
    http::{HeaderMap, StatusCode, header},
};
use serde::de::DeserializeOwned;

use super::error::ApiError;

/// A body that is not there after so long is given up.
const BODY_TIME: Duration = Duration::from_secs(120);

/// A JSON body; what is wrong with it is answered in the API's shape. How deep values may lie in each other is bounded by
/// the parser, how large they may be by the endpoint.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        check_type(request.headers())?;
        let read = tokio::time::timeout(BODY_TIME, Bytes::from_request(request, state)).await;
        let read = read.map_err(|_| {
            let message = format!("the body was not there after {} s", BODY_TIME.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
        })?;
        let bytes = read.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                let message = "the body is larger than this endpoint takes";
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
            }
            status => ApiError::new(status, "invalid_body", rejection.body_text()),
        })?;
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Self).map_err(|error| {
            let message = format!("the body is not the JSON that this endpoint takes: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message)
        })
    }
}

/// Refuses a type that is not JSON. A body without a type is taken for JSON, as it was meant.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let text = value.to_str().unwrap_or_default().to_ascii_lowercase();
    let media = text.split(';').next().unwrap_or_default().trim();
    if media == "application/json" || (media.starts_with("application/") && media.ends_with("+json")) {
        return Ok(());
    }
    let shown: String = media.chars().take(60).collect();
    let message = format!("the content type is {shown:?}: send -H 'content-type: application/json'");
    Err(ApiError::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        message,
    ))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_json_or_nothing_at_all_is_taken_for_json() {
        let check = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(text));
            check_type(&headers)
        };
        assert!(check_type(&HeaderMap::new()).is_ok());
        for text in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/problem+json",
        ] {
            assert!(check(text).is_ok(), "{text}");
        }
        for text in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/jsonx",
            "text/json+json",
            "",
        ] {
            assert!(check(text).is_err(), "{text}");
        }
    }
}

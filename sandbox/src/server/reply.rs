//! HTTP answers and request bodies.

use std::{convert::Infallible, pin::pin, time::Duration};

use bytes::Bytes;
use futures::Stream;
use http::{HeaderValue, Response, header};
use http_body_util::{BodyExt, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde::Serialize;
use serde_json::Value;

use super::{
    protobuf::{self, ProtobufError},
    status::ApiError,
};

/// Body of every answer.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Every answer.
pub type Reply = Response<Body>;

/// Bytes a request body may have (that of the real API server).
pub const MAX_BODY: usize = 3 << 20;

/// Bytes that are read of a body that nobody wants.
const MAX_DRAINED: usize = 256 << 10;
/// How long they may take to come.
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// A complete body.
pub fn bytes(code: u16, content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(body.into()).boxed_unsync());
    *reply.status_mut() = http::StatusCode::from_u16(code).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    reply
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    reply
}

/// JSON.
pub fn json(code: u16, value: &impl Serialize) -> Reply {
    match serde_json::to_vec(value) {
        Ok(body) => bytes(code, "application/json", body),
        Err(error) => failure(&ApiError::internal(error)),
    }
}

/// Plain text.
pub fn text(code: u16, body: impl Into<Bytes>) -> Reply {
    bytes(code, "text/plain; charset=utf-8", body)
}

/// A `Status`, with `Retry-After` where it says so.
#[must_use]
pub fn failure(error: &ApiError) -> Reply {
    let body = serde_json::to_vec(&error.to_status()).unwrap_or_default();
    let mut reply = bytes(error.code, "application/json", body);
    if let Some(seconds) = error.details.as_ref().and_then(|details| details.retry_after_seconds) {
        reply
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    reply
}

/// The same answer in YAML, if it is JSON.
pub async fn as_yaml(reply: Reply) -> Reply {
    let is_json = reply
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|media| media == "application/json");
    if !is_json {
        return reply;
    }
    let (mut parts, body) = reply.into_parts();
    let bytes = match body.collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(never) => match never {},
    };
    let text = serde_json::from_slice::<Value>(&bytes)
        .map_err(ApiError::internal)
        .and_then(|mut value| {
            // As Kubernetes' YAML, whichever order the build's maps keep.
            value.sort_all_objects();
            serde_yaml::to_string(&value).map_err(ApiError::internal)
        });
    match text {
        Ok(text) => {
            let media = HeaderValue::from_static("application/yaml");
            parts.headers.insert(header::CONTENT_TYPE, media);
            Response::from_parts(parts, Full::new(Bytes::from(text)).boxed_unsync())
        }
        Err(error) => failure(&error),
    }
}

/// A body that goes on until the stream ends.
pub fn stream(content_type: &'static str, chunks: impl Stream<Item = Bytes> + Send + 'static) -> Reply {
    let frames = futures::StreamExt::map(chunks, |chunk| Ok(Frame::data(chunk)));
    let mut reply = Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)));
    reply
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    reply
}

/// Adds `Warning: 299` headers, which kubectl prints.
pub fn warn(reply: &mut Reply, warnings: &[String]) {
    for warning in warnings {
        let quoted = warning
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace(['\n', '\r'], " ");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            reply.headers_mut().append(header::WARNING, value);
        }
    }
}

/// Reads what a refusal has left of a request's body, if that is little and comes soon, as the API server does: a connection
/// with an unread body has to be closed, and a client that is about to use it again sees its next request break.
pub async fn drain<B>(body: B)
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let rest = Limited::new(body, MAX_DRAINED).collect();
    // Whatever comes of it, the answer is the same.
    drop(tokio::time::timeout(DRAIN_TIME, rest).await);
}

/// Reads a request's body up to [`MAX_BODY`]. What is left of one that is larger is drained, so that its sender reads the
/// answer rather than a broken connection.
pub async fn read_body<B>(body: B) -> Result<Bytes, ApiError>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut body = pin!(body);
    match Limited::new(body.as_mut(), MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            drain(body).await;
            Err(ApiError::too_large(MAX_BODY))
        }
        Err(error) => Err(ApiError::bad_request(format!("reading the request body: {error}"))),
    }
}

/// Media types of objects that this server reads.
const READ: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// Decodes an object by its content type: JSON, YAML or (of some kinds) protobuf.
pub fn decode(content_type: Option<&str>, body: &[u8]) -> Result<Value, ApiError> {
    let media = content_type
        .unwrap_or("application/json")
        .split(';')
        .next()
        .unwrap_or_default()
        .trim();
    let value: Value = match media {
        "application/json" | "" => serde_json::from_slice(body)
            .map_err(|error| ApiError::bad_request(format!("the object provided is unrecognized: {error}")))?,
        "application/yaml" => serde_yaml::from_slice(body)
            .map_err(|error| ApiError::bad_request(format!("the object provided is unrecognized: {error}")))?,
        protobuf::MEDIA_TYPE => protobuf::decode(body).map_err(|error| match error {
            ProtobufError::Malformed(_) => ApiError::bad_request(error.to_string()),
            ProtobufError::UnknownKind(_) => ApiError::unsupported_media_type(READ),
        })?,
        _ => return Err(ApiError::unsupported_media_type(READ)),
    };
    if value.is_object() {
        return Ok(value);
    }
    Err(ApiError::bad_request(
        "the object provided is unrecognized (must be of type object)",
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::{StreamExt as _, stream};

    use super::*;

    /// Bytes that are read of a body of so many, which comes in kibibytes.
    async fn drained(bytes: usize) -> usize {
        let read = AtomicUsize::new(0);
        let chunks = stream::iter(0..bytes / 1024).map(|_| {
            read.fetch_add(1024, Ordering::Relaxed);
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[0; 1024])))
        });
        drain(StreamBody::new(chunks)).await;
        read.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn what_a_refusal_leaves_of_a_body_is_read_up_to_a_bound() {
        assert_eq!(drained(8 << 10).await, 8 << 10);
        assert!(drained(4 << 20).await <= MAX_DRAINED + 1024);
    }

    #[tokio::test]
    async fn a_body_that_does_not_come_is_not_waited_for() {
        let never = StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let ended = tokio::time::timeout(DRAIN_TIME * 60, drain(never)).await;
        assert!(ended.is_ok());
    }
}

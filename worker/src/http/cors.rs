//! Which web pages of other origins may call the API from a browser.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use crate::error::WorkerError;

/// Seconds for which a browser need not ask again.
const MAX_AGE: &str = "600";
/// What scripts may send and read besides what browsers allow anyway.
const REQUEST_HEADERS: &str = "authorization, content-type, x-request-id, traceparent";
const ANSWER_HEADERS: &str = "x-request-id, retry-after";

/// The origins; none answers every page that asks as if nobody had asked.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    any: bool,
    listed: Arc<[HeaderValue]>,
}

impl Origins {
    /// From texts such as `https://example.com`, or `*` for all.
    pub fn parse(origins: &[String]) -> Result<Self, WorkerError> {
        let valid = |origin: &String| {
            let url = reqwest::Url::parse(origin).ok()?;
            let same = url.origin().ascii_serialization() == *origin && matches!(url.scheme(), "http" | "https");
            same.then(|| HeaderValue::from_str(origin).ok())?
        };
        let listed = origins.iter().filter(|origin| *origin != "*").map(|origin| {
            valid(origin).ok_or_else(|| {
                WorkerError::invalid(format!(
                    "CORS origin {origin:?} is no origin: write https://example.com, without a path, or *"
                ))
            })
        });
        Ok(Self {
            any: origins.iter().any(|origin| origin == "*"),
            listed: listed.collect::<Result<Vec<_>, _>>()?.into(),
        })
    }

    /// What `access-control-allow-origin` says to a page.
    fn admitted(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        if self.any {
            return Some(HeaderValue::from_static("*"));
        }
        self.listed.iter().find(|listed| *listed == origin).cloned()
    }
}

/// Answers a browser's question whether a page may call, and marks the answers to its calls.
pub async fn share(State(origins): State<Origins>, request: Request, next: Next) -> Response {
    let Some(origin) = origins.admitted(request.headers()) else {
        return next.run(request).await;
    };
    let asks =
        request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if asks {
        let allowed = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST"),
            (header::ACCESS_CONTROL_ALLOW_HEADERS, REQUEST_HEADERS),
            (header::ACCESS_CONTROL_MAX_AGE, MAX_AGE),
        ];
        (StatusCode::NO_CONTENT, allowed).into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static(ANSWER_HEADERS),
    );
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(origins: &[&str], origin: &str) -> Option<String> {
        let origins: Vec<String> = origins.iter().map(ToString::to_string).collect();
        let mut headers = HeaderMap::new();
        headers.insert(header::ORIGIN, HeaderValue::from_str(origin).expect("a value"));
        let admitted = Origins::parse(&origins).expect("origins").admitted(&headers)?;
        Some(admitted.to_str().expect("text").to_owned())
    }

    #[test]
    fn only_listed_origins_are_admitted_as_they_are_written() {
        let origins = ["https://a.example", "http://localhost:3000"];
        assert_eq!(
            admitted(&origins, "https://a.example").as_deref(),
            Some("https://a.example")
        );
        assert_eq!(
            admitted(&origins, "http://localhost:3000").as_deref(),
            Some("http://localhost:3000")
        );
        for other in [
            "http://a.example",
            "https://a.example.evil.test",
            "null",
            "https://a.example:444",
        ] {
            assert_eq!(admitted(&origins, other), None, "{other}");
        }
        assert_eq!(admitted(&["*"], "null").as_deref(), Some("*"));
    }

    #[test]
    fn what_is_no_origin_is_refused_at_the_start() {
        for text in [
            "example.com",
            "https://example.com/",
            "https://example.com/a",
            "ftp://a",
            "https://EXAMPLE.com",
            "",
        ] {
            assert!(Origins::parse(&[text.to_owned()]).is_err(), "{text}");
        }
    }
}

//! What every request passes, whatever its endpoint: it gets an id, a panic behind it becomes an answer, and when its last
//! byte is on its way (or its client has gone) it is logged, counted and told to the collector of traces.
//!
//! Neither the log nor a trace holds what was asked, what was answered, or a key.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use axum::{
    body::{Body, Bytes},
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use futures::FutureExt as _;
use hyper::body::{Frame, SizeHint};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tracing::Instrument as _;

use super::error::ApiError;
use crate::{
    service::{Slot, account::Account, metrics::Metrics},
    spans::{Span, Spans, TraceParent},
};

/// The header of a request's id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Characters of an id that a client may choose.
const MAX_ID: usize = 128;
/// Characters of a path that are logged.
const MAX_PATH: usize = 200;
/// The route of a request that no endpoint takes.
const NO_ROUTE: &str = "none";

/// Labels of an exchange.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Labels {
    method: &'static str,
    route: String,
    status: u16,
}

/// Where exchanges are told. Cloning shares the counters.
#[derive(Clone, Debug)]
pub struct Exchanges {
    requests: Family<Labels, Counter>,
    /// What a server of models adds: its load and name.
    served: Option<(Metrics, Slot)>,
    spans: Option<Spans>,
}

impl Exchanges {
    /// Counted in this registry.
    pub fn register(registry: &mut Registry) -> Self {
        let requests = Family::default();
        registry.register("flotilla_http_requests", "HTTP requests answered", requests.clone());
        Self {
            requests,
            served: None,
            spans: None,
        }
    }

    /// The same, of a server of models.
    pub fn of_model(self, metrics: Metrics, slot: Slot, spans: Option<Spans>) -> Self {
        Self {
            served: Some((metrics, slot)),
            spans,
            ..self
        }
    }

    /// Seconds after which a client that was refused may come again.
    fn retry_after(&self) -> u64 {
        self.served.as_ref().map_or(1, |(metrics, _)| metrics.retry_after())
    }
}

/// Passes a request on, and its answer back.
pub async fn exchange(State(exchanges): State<Exchanges>, request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let header = HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("none"));
    let span = tracing::info_span!("request", %id);
    let mut record = Record::begin(exchanges, &request, id);
    let answered = AssertUnwindSafe(next.run(request)).catch_unwind();
    let answered = Box::pin(record.account.clone().during(answered.instrument(span.clone()))).await;
    let mut response = answered.unwrap_or_else(|_| {
        span.in_scope(|| tracing::error!("the handler panicked"));
        ApiError::internal().into_response()
    });
    record.status = Some(response.status());
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, header);
    let refused = matches!(
        record.status,
        Some(StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
    );
    if refused && !headers.contains_key(header::RETRY_AFTER) {
        headers.insert(header::RETRY_AFTER, record.exchanges.retry_after().into());
    }
    response.map(|body| Body::new(Metered { body, record }))
}

/// The id that a client chose, if it is short and plain enough to be logged; else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let sane = |id: &&str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/".contains(&byte);
        (1..=MAX_ID).contains(&id.len()) && id.bytes().all(plain)
    };
    let chosen = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    chosen
        .filter(sane)
        .map_or_else(|| uuid::Uuid::new_v4().to_string(), str::to_owned)
}

/// What is known of a request so far. Dropping it tells it.
struct Record {
    exchanges: Exchanges,
    account: Arc<Account>,
    id: String,
    method: &'static str,
    path: String,
    route: String,
    begun: SystemTime,
    parent: Option<TraceParent>,
    /// None until the endpoint has answered.
    status: Option<StatusCode>,
    bytes: u64,
    /// Whether the last byte was taken.
    complete: bool,
}

impl Record {
    fn begin(exchanges: Exchanges, request: &Request, id: String) -> Self {
        let route = request.extensions().get::<MatchedPath>();
        Self {
            exchanges,
            account: Arc::default(),
            id,
            method: method_name(request.method()),
            path: request.uri().path().chars().take(MAX_PATH).collect(),
            route: route.map_or(NO_ROUTE, MatchedPath::as_str).to_owned(),
            begun: SystemTime::now(),
            parent: TraceParent::of(request.headers()),
            status: None,
            bytes: 0,
            complete: false,
        }
    }

    /// 499, as others write it, where the client went before there was an answer.
    fn status(&self) -> u16 {
        self.status.map_or(499, |status| status.as_u16())
    }

    fn log(&self, duration: Duration, model: Option<&str>) {
        let account = &self.account;
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "access",
                    id = %self.id,
                    method = self.method,
                    path = %self.path,
                    status = self.status(),
                    complete = self.complete,
                    duration_ms = duration.as_secs_f64() * 1e3,
                    bytes = self.bytes,
                    key = account.key(),
                    model,
                    prompt_tokens = account.prompt_tokens(),
                    completion_tokens = account.completion_tokens(),
                    trace = self.parent.as_ref().map(TraceParent::trace),
                )
            };
        }
        // Probes and scrapes come every few seconds.
        if matches!(self.route.as_str(), "/healthz" | "/readyz" | "/metrics" | "/progress") {
            line!(debug);
        } else {
            line!(info);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let account = &self.account;
        let duration = account.begun().elapsed();
        let served = self.exchanges.served.as_ref();
        let of_model = served.filter(|_| self.route.starts_with("/v1/"));
        let model = of_model
            .and_then(|(_, slot)| slot.get())
            .map(|service| service.name.clone());
        let labels = Labels {
            method: self.method,
            route: self.route.clone(),
            status: self.status(),
        };
        self.exchanges.requests.get_or_create(&labels).inc();
        if let (Some((metrics, _)), Some(first_token), true) = (of_model, account.first_token(), self.complete) {
            metrics.answered(account.completion_tokens(), first_token, duration);
        }
        self.log(duration, model.as_deref());
        if let Some(spans) = &self.exchanges.spans {
            spans.record(Span {
                method: self.method,
                route: &self.route,
                status: self.status(),
                id: &self.id,
                begun: self.begun,
                duration,
                first_token: account.first_token(),
                prompt_tokens: account.prompt_tokens(),
                completion_tokens: account.completion_tokens(),
                model: model.as_deref(),
                key: account.key(),
                parent: self.parent.as_ref(),
            });
        }
    }
}

/// A method as labels show it; clients may invent others.
fn method_name(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        "PATCH" => "PATCH",
        _ => "other",
    }
}

/// The body of an answer, which is computed on behalf of its request and counted.
struct Metered {
    body: Body,
    record: Record,
}

impl hyper::body::Body for Metered {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Self { body, record } = &mut *self;
        let poll = || record.account.within(|| Pin::new(&mut *body).poll_frame(context));
        let Ok(polled) = catch_unwind(AssertUnwindSafe(poll)) else {
            tracing::error!(id = %record.id, "a stream panicked");
            // Nothing more may be asked of it.
            *body = Body::empty();
            return Poll::Ready(Some(Err(axum::Error::new("the stream failed"))));
        };
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                record.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                record.complete = body.is_end_stream();
            }
            Poll::Ready(None) => record.complete = true,
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        // An empty body is never polled.
        self.record.complete |= hyper::body::Body::is_end_stream(&self.body);
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    fn id_of(value: &str) -> String {
        let mut headers = HeaderMap::new();
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(REQUEST_ID, value);
        }
        request_id(&headers)
    }

    #[test]
    fn a_sane_id_is_kept_and_any_other_replaced() {
        assert_eq!(id_of("job-7/step:3"), "job-7/step:3");
        for id in ["", "a b", "a\tb", "\"", "é", "<script>", &"a".repeat(MAX_ID + 1)] {
            assert!(uuid::Uuid::parse_str(&id_of(id)).is_ok(), "{id}");
        }
    }

    fn passing(routes: axum::Router) -> (axum::Router, Registry) {
        let mut registry = Registry::default();
        let exchanges = Exchanges::register(&mut registry);
        let layer = axum::middleware::from_fn_with_state(exchanges, exchange);
        (routes.layer(layer), registry)
    }

    async fn ask(app: &axum::Router, path: &str) -> Response {
        let request = Request::get(path).body(Body::empty()).expect("a request");
        tower::ServiceExt::oneshot(app.clone(), request).await.expect("answers")
    }

    fn counted(registry: &Registry, route: &str, status: u16) -> bool {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).expect("encodes");
        let line = format!("flotilla_http_requests_total{{method=\"GET\",route=\"{route}\",status=\"{status}\"}} 1");
        text.contains(&line)
    }

    #[tokio::test]
    async fn a_panic_is_answered_in_the_shape_of_errors_and_the_next_request_as_ever() {
        async fn failing() -> &'static str {
            panic!("a fault of a handler")
        }
        let routes = axum::Router::new()
            .route("/panic/{name}", axum::routing::get(failing))
            .route("/fine", axum::routing::get(|| async { "fine" }));
        let (app, registry) = passing(routes);
        let response = ask(&app, "/panic/a").await;
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(response.headers().contains_key(REQUEST_ID));
        let body = axum::body::to_bytes(response.into_body(), 4096).await.expect("a body");
        let body: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(body["error"]["code"], "internal_error");
        assert!(
            counted(&registry, "/panic/{name}", 500),
            "by its route, not by its path"
        );
        drop(ask(&app, "/fine").await);
        assert!(counted(&registry, "/fine", 200));
        drop(ask(&app, "/elsewhere").await);
        assert!(counted(&registry, NO_ROUTE, 404));
    }

    #[tokio::test]
    async fn a_stream_that_panics_breaks_off() {
        let streaming = || async {
            let chunks = futures::stream::iter([1, 0]).map(|number| {
                assert!(number > 0, "a fault of a stream");
                Ok::<_, std::convert::Infallible>(Bytes::from_static(b"one"))
            });
            Body::from_stream(chunks)
        };
        let (app, _registry) = passing(axum::Router::new().route("/", axum::routing::get(streaming)));
        let response = ask(&app, "/").await;
        assert!(axum::body::to_bytes(response.into_body(), 4096).await.is_err());
    }

    #[tokio::test]
    async fn a_client_that_leaves_before_the_answer_is_counted_as_such() {
        let routes = axum::Router::new().route("/", axum::routing::get(std::future::pending::<()>));
        let (app, registry) = passing(routes);
        let waiting = tokio::time::timeout(Duration::from_millis(20), ask(&app, "/")).await;
        assert!(waiting.is_err());
        assert!(counted(&registry, "/", 499));
    }
}

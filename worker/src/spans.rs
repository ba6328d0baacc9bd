//! Traces: one span per request, sent to an OpenTelemetry collector by OTLP over HTTP. It holds counts, times and names, no
//! text.

use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;
use opentelemetry::{
    Context, KeyValue,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId,
        TraceState, Tracer as _, TracerProvider as _,
    },
};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};

use crate::error::WorkerError;

/// The environment variable that names the collector, as OpenTelemetry defines it.
pub const ENDPOINT_VARIABLE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Where a collector takes traces.
const TRACES_PATH: &str = "/v1/traces";
/// A collector that does not answer in this time loses the spans.
const EXPORT_TIME: Duration = Duration::from_secs(10);
/// At the end of the process the spans that wait have so long.
const FLUSH_TIME: Duration = Duration::from_secs(3);

/// The trace that a request belongs to, as its `traceparent` header says (W3C Trace Context).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TraceParent(SpanContext);

impl TraceParent {
    /// Of a request, if its header is valid.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get("traceparent")?.to_str().ok()?)
    }

    /// `00-<32 hex digits>-<16 hex digits>-<2 hex digits>`; later versions may add more.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let mut part = |digits: usize| {
            let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            parts
                .next()
                .filter(|part| part.len() == digits && part.bytes().all(hex))
        };
        let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        if version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()? & 1);
        let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
        let context = SpanContext::new(trace, span, flags, true, TraceState::default());
        context.is_valid().then_some(Self(context))
    }

    /// The id of the trace.
    pub fn trace(&self) -> String {
        self.0.trace_id().to_string()
    }
}

/// What is told of a request.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    /// Its method.
    pub method: &'static str,
    /// The endpoint's path.
    pub route: &'a str,
    /// Status of the answer.
    pub status: u16,
    /// Its id.
    pub id: &'a str,
    /// When it came.
    pub begun: SystemTime,
    /// Until the last byte of its answer.
    pub duration: Duration,
    /// Until its first token.
    pub first_token: Option<Duration>,
    /// Tokens of its prompts.
    pub prompt_tokens: u64,
    /// Tokens drawn for it.
    pub completion_tokens: u64,
    /// The model that answered.
    pub model: Option<&'a str>,
    /// Name of its API key.
    pub key: Option<&'a str>,
    /// The trace that it belongs to.
    pub parent: Option<&'a TraceParent>,
}

/// Sends spans from a thread of its own; one that cannot be sent is lost. Cloning shares the thread.
#[derive(Clone, Debug)]
pub struct Spans {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Spans {
    /// To a collector such as `http://collector:4318`, in the name of a deployment.
    pub fn open(endpoint: &str, namespace: &str, name: &str) -> Result<Self, WorkerError> {
        let failed = |error| WorkerError::permanent(format!("failed to open the OTLP endpoint {endpoint:?}"), error);
        if !endpoint.starts_with("http://") {
            return Err(WorkerError::invalid(format!(
                "the OTLP endpoint {endpoint:?} is not of the form http://host:4318: traces are sent over plain HTTP, to a \
                 collector in the same network"
            )));
        }
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(format!("{}{TRACES_PATH}", endpoint.trim_end_matches('/')))
            .with_timeout(EXPORT_TIME)
            .build()
            .map_err(failed)?;
        let resource = Resource::builder()
            .with_service_name("flotilla-worker")
            .with_attributes([
                KeyValue::new("service.namespace", namespace.to_owned()),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("flotilla.deployment", name.to_owned()),
            ])
            .build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("flotilla-worker");
        Ok(Self { provider, tracer })
    }

    /// Tells one request. Attributes are named by the conventions for HTTP and for generative models.
    pub fn record(&self, span: Span<'_>) {
        let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let mut attributes = vec![
            KeyValue::new("http.request.method", span.method),
            KeyValue::new("http.route", span.route.to_owned()),
            KeyValue::new("http.response.status_code", i64::from(span.status)),
            KeyValue::new("http.request.id", span.id.to_owned()),
            KeyValue::new("gen_ai.usage.input_tokens", count(span.prompt_tokens)),
            KeyValue::new("gen_ai.usage.output_tokens", count(span.completion_tokens)),
            KeyValue::new("gen_ai.latency.e2e", span.duration.as_secs_f64()),
        ];
        if let Some(first_token) = span.first_token {
            attributes.push(KeyValue::new(
                "gen_ai.latency.time_to_first_token",
                first_token.as_secs_f64(),
            ));
        }
        if let Some(model) = span.model {
            attributes.push(KeyValue::new("gen_ai.response.model", model.to_owned()));
        }
        if let Some(key) = span.key {
            attributes.push(KeyValue::new("flotilla.api_key", key.to_owned()));
        }
        let parent = match span.parent {
            Some(parent) => Context::new().with_remote_span_context(parent.0.clone()),
            None => Context::new(),
        };
        let builder = SpanBuilder::from_name(format!("{} {}", span.method, span.route))
            .with_kind(SpanKind::Server)
            .with_start_time(span.begun)
            .with_attributes(attributes);
        let mut told = self.tracer.build_with_context(builder, &parent);
        if span.status >= 500 {
            told.set_status(Status::error(format!("status {}", span.status)));
        }
        told.end_with_timestamp(span.begun + span.duration);
    }

    /// Sends what waits. Blocks, but not for long.
    pub fn close(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIME) {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_parent_is_read_as_w3c_writes_it() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parent = TraceParent::parse(text).expect("valid");
        assert_eq!(parent.trace(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(parent.0.is_sampled() && parent.0.is_remote());
        assert!(TraceParent::parse(&format!("01{}-more", &text[2..])).is_some());
        for text in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            &format!("{text}-more"),
        ] {
            assert_eq!(TraceParent::parse(text), None, "{text}");
        }
    }
}

//! `GET /metrics`: OpenMetrics text.

use axum::{extract::State, http::header, response::IntoResponse};
use flotilla_api::progress::Stage;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge, info::Info},
    registry::Registry,
};

use utoipa_axum::{router::OpenApiRouter, routes};

use super::Common;
use crate::{context::Context, progress::ProgressCell};

/// A registry with what every role shows: who it is and how far it is.
pub fn registry(context: &Context, role: &'static str) -> Registry {
    let mut registry = Registry::default();
    let owner = &context.owner;
    registry.register(
        "flotilla_worker",
        "What this process is",
        Info::new(vec![
            ("role".to_owned(), role.to_owned()),
            ("kind".to_owned(), owner.kind.clone()),
            ("namespace".to_owned(), owner.namespace.clone()),
            ("name".to_owned(), owner.name.clone()),
            ("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ]),
    );
    registry.register_collector(Box::new(ProgressCollector(context.progress.clone())));
    registry
}

/// The endpoint, open to everybody.
pub fn router(state: Common) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(metrics)).with_state(state)
}

/// Counters, gauges and histograms for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "operation",
    responses((status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text")),
)]
async fn metrics(State(state): State<Common>) -> impl IntoResponse {
    let mut text = String::new();
    // Writing into a string does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &state.registry);
    (
        [(
            header::CONTENT_TYPE,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        )],
        text,
    )
}

/// Reads the progress cell at each scrape.
#[derive(Debug)]
struct ProgressCollector(ProgressCell);

impl Collector for ProgressCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let progress = self.0.snapshot();
        let mut gauge = |name: &str, help: &str, value: f64| {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
        };
        gauge("flotilla_step", "Steps or rows done", f64::from(progress.step))?;
        gauge(
            "flotilla_total_steps",
            "Steps or rows of the whole run",
            f64::from(progress.total_steps),
        )?;
        gauge(
            "flotilla_running",
            "1 while the role does its work",
            f64::from(u8::from(progress.stage == Stage::Running)),
        )?;
        let mut values = encoder.encode_descriptor(
            "flotilla_metric",
            "Newest value of each metric of the run",
            None,
            MetricType::Gauge,
        )?;
        for (name, value) in &progress.metrics {
            let labels = [("metric", name.as_str())];
            ConstGauge::new(*value).encode(values.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

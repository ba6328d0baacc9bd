//! Counters and latencies of a server. Names end as vLLM's do where they mean the same.

use std::time::Duration;

use flotilla_engine::FinishReason;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::ConstGauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::Slot;

/// Label of a finished sample.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Finished {
    finished_reason: &'static str,
}

/// Label of a refused request.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Refused {
    code: &'static str,
}

/// Shared counters. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Metrics {
    prompt_tokens: Counter,
    generation_tokens: Counter,
    finished: Family<Finished, Counter>,
    refused: Family<Refused, Counter>,
    failed: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    latency: Histogram,
}

impl Metrics {
    /// Registers everything that a server counts; queue lengths are read from the service in the slot.
    pub fn register(registry: &mut Registry, slot: Slot) -> Self {
        // 1 ms to about 65 s
        let histogram = || Histogram::new(exponential_buckets(0.001, 2.0, 17));
        let metrics = Self {
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            finished: Family::default(),
            refused: Family::default(),
            failed: Counter::default(),
            first_token: histogram(),
            inter_token: histogram(),
            latency: histogram(),
        };
        let registry = registry.sub_registry_with_prefix("flotilla");
        registry.register("prompt_tokens", "Prompt tokens accepted", metrics.prompt_tokens.clone());
        registry.register(
            "generation_tokens",
            "Tokens generated",
            metrics.generation_tokens.clone(),
        );
        registry.register(
            "request_success",
            "Samples that ended, by reason",
            metrics.finished.clone(),
        );
        registry.register("request_refused", "Requests refused, by code", metrics.refused.clone());
        registry.register(
            "request_failure",
            "Requests that the model failed",
            metrics.failed.clone(),
        );
        registry.register(
            "time_to_first_token_seconds",
            "From acceptance to the first token",
            metrics.first_token.clone(),
        );
        registry.register(
            "inter_token_latency_seconds",
            "Between two tokens of a request",
            metrics.inter_token.clone(),
        );
        registry.register(
            "e2e_request_latency_seconds",
            "From acceptance to the end of a sample",
            metrics.latency.clone(),
        );
        registry.register_collector(Box::new(Queues(slot)));
        metrics
    }

    pub(super) fn accepted(&self, prompt_tokens: usize) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
    }

    pub(super) fn token(&self) {
        self.generation_tokens.inc();
    }

    pub(super) fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    pub(super) fn next_token(&self, after: Duration) {
        self.inter_token.observe(after.as_secs_f64());
    }

    pub(super) fn finished(&self, reason: FinishReason, after: Duration) {
        let finished_reason = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        self.finished.get_or_create(&Finished { finished_reason }).inc();
        self.latency.observe(after.as_secs_f64());
    }

    pub(super) fn failed(&self) {
        self.failed.inc();
    }

    /// Counts a request that was not accepted.
    pub fn refused(&self, code: &'static str) {
        self.refused.get_or_create(&Refused { code }).inc();
    }
}

/// Reads the engine's load at each scrape.
#[derive(Debug)]
struct Queues(Slot);

impl Collector for Queues {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (waiting, running) = self.0.get().map_or((0, 0), |service| service.load_now());
        let values = [
            (
                "flotilla_num_requests_waiting",
                "Requests before their first token",
                waiting,
            ),
            (
                "flotilla_num_sequences_running",
                "Samples that are being decoded",
                running,
            ),
        ];
        for (name, help, value) in values {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

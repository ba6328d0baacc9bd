//! Counters and latencies of a server. Names end as vLLM's do where they mean the same; docs/serving.md has the table.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use flotilla_engine::{Figure, FinishReason, Stats};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::{Slot, account::Account};

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

/// Labels of a picture that was not in the request itself.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Image {
    source: &'static str,
    outcome: &'static str,
}

/// Where a picture was to come from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ImageSource {
    /// A file below the media root.
    File,
    /// Another host.
    Host,
}

/// What became of a picture.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ImageOutcome {
    /// It is there.
    Ok,
    /// It is not one that this server fetches.
    Refused,
    /// Its host did not give it.
    Failed,
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
    time_per_token: Histogram,
    latency: Histogram,
    images: Family<Image, Counter>,
    image_bytes: Counter,
    pace: Arc<Pace>,
}

/// How long a sample takes lately, in microseconds.
#[derive(Debug, Default)]
struct Pace(AtomicU64);

impl Pace {
    /// Each sample weighs an eighth, so that a burst of short ones is noticed after a few.
    fn observe(&self, latency: Duration) {
        let latency = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX / 8);
        let mean = self.0.load(Ordering::Relaxed);
        let next = if mean == 0 {
            latency
        } else {
            mean - mean / 8 + latency / 8
        };
        self.0.store(next, Ordering::Relaxed);
    }

    fn get(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }
}

impl Metrics {
    /// Registers everything that a server counts; what the engine holds is read from the service in the slot.
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
            time_per_token: histogram(),
            latency: histogram(),
            images: Family::default(),
            image_bytes: Counter::default(),
            pace: Arc::default(),
        };
        let registry = registry.sub_registry_with_prefix("flotilla");
        let it = &metrics;
        registry.register("prompt_tokens", "Prompt tokens accepted", it.prompt_tokens.clone());
        registry.register("generation_tokens", "Tokens generated", it.generation_tokens.clone());
        registry.register("request_success", "Samples that ended, by reason", it.finished.clone());
        registry.register("request_refused", "Requests refused, by code", it.refused.clone());
        registry.register("request_failure", "Requests that the model failed", it.failed.clone());
        registry.register(
            "time_to_first_token_seconds",
            "From acceptance to the first token",
            it.first_token.clone(),
        );
        registry.register(
            "inter_token_latency_seconds",
            "Between two tokens of a request",
            it.inter_token.clone(),
        );
        registry.register(
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of a request, the first one excepted",
            it.time_per_token.clone(),
        );
        registry.register(
            "e2e_request_latency_seconds",
            "From acceptance to the end of a sample",
            it.latency.clone(),
        );
        registry.register(
            "image_fetches",
            "Pictures that came from files and other hosts",
            it.images.clone(),
        );
        registry.register("image_fetched_bytes", "Bytes of these pictures", it.image_bytes.clone());
        registry.register_collector(Box::new(Load(slot)));
        metrics
    }

    pub(super) fn accepted(&self, prompt_tokens: usize) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
        if let Some(account) = Account::current() {
            account.accepted(prompt_tokens as u64);
        }
    }

    pub(super) fn token(&self) {
        self.generation_tokens.inc();
        if let Some(account) = Account::current() {
            account.token();
        }
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
        self.pace.observe(after);
    }

    pub(super) fn failed(&self) {
        self.failed.inc();
    }

    /// Counts a picture that was not in the request itself.
    pub(super) fn image(&self, source: ImageSource, outcome: ImageOutcome, bytes: usize) {
        let source = match source {
            ImageSource::File => "file",
            ImageSource::Host => "host",
        };
        let outcome = match outcome {
            ImageOutcome::Ok => "ok",
            ImageOutcome::Refused => "refused",
            ImageOutcome::Failed => "failed",
        };
        self.images.get_or_create(&Image { source, outcome }).inc();
        self.image_bytes.inc_by(bytes as u64);
    }

    /// Counts a request that was not accepted.
    pub fn refused(&self, code: &'static str) {
        self.refused.get_or_create(&Refused { code }).inc();
    }

    /// A request that had all its tokens: `completion_tokens` after a latency, of which the first token took `first_token`.
    pub fn answered(&self, completion_tokens: u64, first_token: Duration, latency: Duration) {
        if completion_tokens > 1 {
            let tokens = (completion_tokens - 1) as f64;
            self.time_per_token
                .observe(latency.saturating_sub(first_token).as_secs_f64() / tokens);
        }
    }

    /// Whole seconds after which a client that was refused for lack of room finds some: as long as a sample takes lately.
    pub fn retry_after(&self) -> u64 {
        self.pace.get().as_secs().saturating_add(1).min(60)
    }
}

/// Reads what the engine holds and has done at each scrape. Before the model is loaded all of it is 0.
#[derive(Debug)]
struct Load(Slot);

impl Collector for Load {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let service = self.0.get();
        let stats = service.as_ref().map(|service| service.stats());
        let waiting = service.as_ref().map_or(0, |service| service.waiting() as u64);
        let figure = |read: fn(&Stats) -> &Figure| stats.map_or(0, |stats| read(stats).get());
        let used = figure(|stats| &stats.kv_blocks_used) as f64 / figure(|stats| &stats.kv_blocks).max(1) as f64;
        let gauges = [
            (
                "num_requests_waiting",
                "Requests before their first token",
                waiting as f64,
            ),
            (
                "num_requests_running",
                "Samples that the engine works on",
                figure(|stats| &stats.running) as f64,
            ),
            (
                "kv_cache_usage_perc",
                "Share of the key-value cache that running samples hold, from 0 to 1",
                used,
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let counters = [
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache",
                figure(|stats| &stats.prefix_queries),
            ),
            (
                "prefix_cache_hits",
                "Prompt tokens found in the prefix cache",
                figure(|stats| &stats.prefix_hits),
            ),
            (
                "visual_cache_queries",
                "Pictures whose features were needed",
                figure(|stats| &stats.visual_queries),
            ),
            (
                "visual_cache_hits",
                "Pictures whose features were cached",
                figure(|stats| &stats.visual_hits),
            ),
            (
                "num_preemptions",
                "Samples whose place was taken and that were computed again",
                figure(|stats| &stats.preemptions),
            ),
            (
                "prefill_tokens",
                "Prompt tokens that went through the model",
                figure(|stats| &stats.prefill_tokens),
            ),
            ("engine_steps", "Steps of the engine", figure(|stats| &stats.steps)),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_told_to_wait_as_long_as_samples_take_lately() {
        let metrics = Metrics::register(&mut Registry::default(), Slot::default());
        assert_eq!(metrics.retry_after(), 1);
        for _ in 0..40 {
            metrics.finished(FinishReason::Stop, Duration::from_secs(8));
        }
        assert!((8..=9).contains(&metrics.retry_after()));
        for _ in 0..40 {
            metrics.finished(FinishReason::Stop, Duration::from_secs(3600));
        }
        assert_eq!(metrics.retry_after(), 60);
    }

    #[test]
    fn figures_of_the_engine_have_their_names_before_the_model_is_loaded() {
        let mut registry = Registry::default();
        let _metrics = Metrics::register(&mut registry, Slot::default());
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("encodes");
        for line in [
            "flotilla_num_requests_running 0",
            "flotilla_kv_cache_usage_perc 0",
            "flotilla_prefix_cache_hits_total 0",
            "flotilla_num_preemptions_total 0",
        ] {
            assert!(text.lines().any(|told| told.starts_with(line)), "{line} in\n{text}");
        }
    }
}

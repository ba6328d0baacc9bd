//! What the operator counts. Label values come from closed sets: kinds, classes of errors, phases.

use std::{fmt::Write as _, time::Duration};

use flotilla_api::{dataset::DatasetPhase, model_checkpoint::CheckpointPhase};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::cache::Stores;

/// Label `kind`.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Kind {
    kind: String,
}

/// Labels `kind` and `error`.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct KindError {
    kind: String,
    error: String,
}

/// Labels `kind` and `phase`.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct KindPhase {
    kind: String,
    phase: String,
}

/// All counters of one operator.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    passes: Family<Kind, Counter>,
    errors: Family<KindError, Counter>,
    seconds: Family<Kind, Histogram>,
    objects: Family<KindPhase, Gauge>,
    leader: Gauge,
}

/// 2 ms to 8 s.
fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.002, 2.0, 13))
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("flotilla_operator");
        let passes = Family::default();
        let errors = Family::default();
        let seconds: Family<Kind, Histogram> = Family::new_with_constructor(histogram);
        let objects = Family::default();
        registry.register("reconciles", "Passes, by kind", passes.clone());
        registry.register(
            "reconcile_errors",
            "Failed passes, by kind and class of error",
            errors.clone(),
        );
        registry.register(
            "reconcile_duration_seconds",
            "Duration of passes, by kind",
            seconds.clone(),
        );
        registry.register("objects", "Objects, by kind and phase", objects.clone());
        let leader = Gauge::default();
        registry.register(
            "leader",
            "1 in the operator that makes passes, 0 in a standby",
            leader.clone(),
        );
        Self {
            registry,
            passes,
            errors,
            seconds,
            objects,
            leader,
        }
    }
}

impl Metrics {
    /// Says whether this process makes passes.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// Counts one pass; `error` is the class of its error.
    pub fn passed(&self, kind: &str, took: Duration, error: Option<&'static str>) {
        let label = Kind { kind: kind.to_owned() };
        self.passes.get_or_create(&label).inc();
        self.seconds.get_or_create(&label).observe(took.as_secs_f64());
        if let Some(error) = error {
            let label = KindError {
                kind: kind.to_owned(),
                error: error.to_owned(),
            };
            self.errors.get_or_create(&label).inc();
        }
    }

    /// The text that Prometheus reads; objects are counted at this moment.
    pub fn encode(&self, stores: &Stores) -> Result<String, std::fmt::Error> {
        self.count_objects(stores);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    fn count_objects(&self, stores: &Stores) {
        self.objects.clear();
        for dataset in stores.datasets.state() {
            self.count(
                "Dataset",
                &dataset
                    .status
                    .as_ref()
                    .map_or(DatasetPhase::default(), |status| status.phase),
            );
        }
        for job in stores.training_jobs.state() {
            self.count(
                "TrainingJob",
                &job.status.as_ref().map(|status| status.phase).unwrap_or_default(),
            );
        }
        for checkpoint in stores.model_checkpoints.state() {
            let status = checkpoint.status.as_ref();
            self.count(
                "ModelCheckpoint",
                &status.map_or(CheckpointPhase::default(), |status| status.phase),
            );
        }
        for deployment in stores.model_deployments.state() {
            self.count(
                "ModelDeployment",
                &deployment
                    .status
                    .as_ref()
                    .map(|status| status.phase)
                    .unwrap_or_default(),
            );
        }
    }

    fn count(&self, kind: &str, phase: &impl std::fmt::Debug) {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = write!(text, "{phase:?}");
        let label = KindPhase {
            kind: kind.to_owned(),
            phase: text,
        };
        self.objects.get_or_create(&label).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_is_one_and_a_standby_zero() {
        let metrics = Metrics::default();
        let stores = crate::cache::stores().0;
        assert!(
            metrics
                .encode(&stores)
                .expect("encodes")
                .contains("flotilla_operator_leader 0")
        );
        metrics.leads(true);
        assert!(
            metrics
                .encode(&stores)
                .expect("encodes")
                .contains("flotilla_operator_leader 1")
        );
    }

    #[test]
    fn passes_and_errors_are_counted_by_kind() {
        let metrics = Metrics::default();
        metrics.passed("Dataset", Duration::from_millis(3), None);
        metrics.passed("Dataset", Duration::from_millis(3), Some("conflict"));
        let text = metrics.encode(&crate::cache::stores().0).expect("encodes");
        assert!(
            text.contains(r#"flotilla_operator_reconciles_total{kind="Dataset"} 2"#),
            "{text}"
        );
        assert!(
            text.contains(r#"flotilla_operator_reconcile_errors_total{kind="Dataset",error="conflict"} 1"#),
            "{text}"
        );
        assert!(
            text.contains(r#"flotilla_operator_reconcile_duration_seconds_count{kind="Dataset"} 2"#),
            "{text}"
        );
    }
}

//! What the operator counts. Label values come from closed sets: kinds, classes of errors, phases.

use std::{collections::BTreeMap, fmt::Debug, time::Duration};

use kube::{Resource, runtime::reflector::Store};
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

use crate::{cache::Stores, requests::Requests};

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
    compute: Family<Kind, Histogram>,
    objects: Family<KindPhase, Gauge>,
    leader: Gauge,
}

/// 2 ms to 8 s.
fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.002, 2.0, 13))
}

/// 10 µs to 0.25 s, fine enough to read a percentile from.
fn fine_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_01, 1.5, 26))
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(&Requests::default())
    }
}

impl Metrics {
    /// Counters of one operator whose requests to the API server are counted by `requests`.
    pub fn new(requests: &Requests) -> Self {
        let mut registry = Registry::with_prefix("flotilla_operator");
        let passes = Family::default();
        let errors = Family::default();
        let seconds: Family<Kind, Histogram> = Family::new_with_constructor(histogram);
        let compute: Family<Kind, Histogram> = Family::new_with_constructor(fine_histogram);
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
        registry.register(
            "reconcile_compute_seconds",
            "Time that passes compute, without what they wait for, by kind",
            compute.clone(),
        );
        registry.register(
            "api_requests",
            "Requests to the API server, by verb, resource and status code",
            requests.counters(),
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
            compute,
            objects,
            leader,
        }
    }

    /// Says whether this process makes passes.
    pub fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// Counts one pass that took so long and computed for `computed` of it; `error` is the class of its error.
    pub fn passed(&self, kind: &str, took: Duration, computed: Duration, error: Option<&'static str>) {
        let label = Kind { kind: kind.to_owned() };
        self.passes.get_or_create(&label).inc();
        self.seconds.get_or_create(&label).observe(took.as_secs_f64());
        self.compute.get_or_create(&label).observe(computed.as_secs_f64());
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
        let mut counts: BTreeMap<(&'static str, String), i64> = BTreeMap::new();
        count(&mut counts, "Dataset", &stores.datasets, |dataset| {
            dataset.status.as_ref().map(|status| status.phase)
        });
        count(&mut counts, "TrainingJob", &stores.training_jobs, |job| {
            job.status.as_ref().map(|status| status.phase)
        });
        count(
            &mut counts,
            "ModelCheckpoint",
            &stores.model_checkpoints,
            |checkpoint| checkpoint.status.as_ref().map(|status| status.phase),
        );
        count(
            &mut counts,
            "ModelDeployment",
            &stores.model_deployments,
            |deployment| deployment.status.as_ref().map(|status| status.phase),
        );
        self.objects.clear();
        for ((kind, phase), count) in counts {
            let kind = kind.to_owned();
            self.objects.get_or_create(&KindPhase { kind, phase }).set(count);
        }
    }
}

/// Adds the objects of one kind to `counts`, by phase.
fn count<K, P>(
    counts: &mut BTreeMap<(&'static str, String), i64>,
    kind: &'static str,
    store: &Store<K>,
    phase: impl Fn(&K) -> Option<P>,
) where
    K: Resource<DynamicType = ()> + Clone + 'static,
    P: Debug + Default + Eq + Copy,
{
    // Phases are few and objects many: each text is made once.
    let mut of_kind: Vec<(P, i64)> = Vec::new();
    for object in store.state() {
        let phase = phase(&object).unwrap_or_default();
        match of_kind.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, count)) => *count += 1,
            None => of_kind.push((phase, 1)),
        }
    }
    counts.extend(
        of_kind
            .into_iter()
            .map(|(phase, count)| ((kind, format!("{phase:?}")), count)),
    );
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher::Event;

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
        metrics.passed("Dataset", Duration::from_millis(3), Duration::from_micros(700), None);
        metrics.passed(
            "Dataset",
            Duration::from_millis(3),
            Duration::from_micros(700),
            Some("conflict"),
        );
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
        for line in [
            r#"reconcile_compute_seconds_bucket{le="0.0005766503906250001",kind="Dataset"} 0"#,
            r#"reconcile_compute_seconds_bucket{le="0.0008649755859375",kind="Dataset"} 2"#,
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn objects_are_counted_by_phase() {
        let (stores, mut writers) = crate::cache::stores();
        for (name, phase) in [("a", "Running"), ("b", "Running"), ("c", "Failed")] {
            let job = serde_json::json!({"apiVersion": "flotilla.dev/v1alpha1", "kind": "TrainingJob",
                "metadata": {"name": name, "namespace": "lab"},
                "spec": {"model": {"uri": "pvc://c/m"}, "datasets": [], "algorithm": {"sft": {}},
                    "checkpoint": {"storage": {"claimName": "c"}}},
                "status": {"phase": phase}});
            let job = serde_json::from_value(job).expect("a job");
            writers.training_jobs.apply_watcher_event(&Event::Apply(job));
        }
        let text = Metrics::default().encode(&stores).expect("encodes");
        for line in [
            r#"kind="TrainingJob",phase="Running"} 2"#,
            r#"kind="TrainingJob",phase="Failed"} 1"#,
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}

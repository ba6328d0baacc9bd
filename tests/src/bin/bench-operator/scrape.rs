//! Prometheus text: counters and percentiles of histograms.

use std::collections::BTreeMap;

use anyhow::Context as _;

/// The samples of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Scrape {
    /// Reads the text format; lines that are no samples are left out.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self {
            samples: lines.filter_map(sample).collect(),
        }
    }

    /// Sum of all samples of `name` whose labels have these values.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        // Folded from 0.0: the sum of no floats is -0.0.
        self.matching(name, labels).fold(0.0, |sum, sample| sum + sample.value)
    }

    /// Requests to the API server that may change something.
    pub fn writes(&self) -> f64 {
        let verbs = ["create", "update", "patch", "apply", "delete", "deletecollection"];
        verbs.iter().fold(0.0, |sum, verb| sum + self.requests(verb))
    }

    /// Requests to the API server with `verb`.
    pub fn requests(&self, verb: &str) -> f64 {
        self.sum("flotilla_operator_api_requests_total", &[("verb", verb)])
    }

    /// All requests to the API server.
    pub fn all_requests(&self) -> f64 {
        self.sum("flotilla_operator_api_requests_total", &[])
    }

    /// Requests by verb and resource.
    pub fn by_verb_and_resource(&self) -> BTreeMap<String, f64> {
        let mut counts = BTreeMap::new();
        for sample in self.matching("flotilla_operator_api_requests_total", &[]) {
            let label = |name: &str| sample.labels.get(name).map_or("", String::as_str);
            *counts
                .entry(format!("{} {}", label("verb"), label("resource")))
                .or_default() += sample.value;
        }
        counts
    }

    /// Passes of the TrainingJob controller.
    pub fn passes(&self) -> f64 {
        self.sum("flotilla_operator_reconciles_total", &[("kind", "TrainingJob")])
    }

    /// TrainingJobs in `phase`.
    pub fn jobs_in(&self, phase: &str) -> f64 {
        self.sum(
            "flotilla_operator_objects",
            &[("kind", "TrainingJob"), ("phase", phase)],
        )
    }

    /// Seconds below which the share `quantile` of the observations since `before` lies, read linearly within a bucket.
    pub fn percentile(&self, before: &Self, name: &str, quantile: f64) -> anyhow::Result<f64> {
        let now = self.buckets(name);
        let then = before.buckets(name);
        let since = |(bound, count): (&Bound, &f64)| (bound.0, count - then.get(bound).copied().unwrap_or(0.0));
        let buckets: Vec<(f64, f64)> = now.iter().map(since).collect();
        let total = buckets.last().map(|(_, count)| *count).filter(|count| *count > 0.0);
        let wanted = quantile * total.with_context(|| format!("{name} has no observations"))?;
        let (mut lower, mut below) = (0.0, 0.0);
        for (bound, count) in buckets {
            if count >= wanted {
                if bound.is_infinite() {
                    return Ok(lower);
                }
                return Ok(lower + (bound - lower) * (wanted - below) / (count - below).max(f64::MIN_POSITIVE));
            }
            (lower, below) = (bound, count);
        }
        Ok(lower)
    }

    fn buckets(&self, name: &str) -> BTreeMap<Bound, f64> {
        let mut buckets = BTreeMap::new();
        for sample in self.matching(&format!("{name}_bucket"), &[]) {
            let bound = sample.labels.get("le").and_then(|text| match text.as_str() {
                "+Inf" => Some(f64::INFINITY),
                text => text.parse().ok(),
            });
            if let Some(bound) = bound {
                *buckets.entry(Bound(bound)).or_default() += sample.value;
            }
        }
        buckets
    }

    fn matching<'a>(&'a self, name: &'a str, labels: &'a [(&'a str, &'a str)]) -> impl Iterator<Item = &'a Sample> {
        let fits = move |sample: &&Sample| {
            let has = |(key, value): &(&str, &str)| sample.labels.get(*key).is_some_and(|found| found == value);
            sample.name == name && labels.iter().all(has)
        };
        self.samples.iter().filter(fits)
    }
}

/// Upper bound of a bucket; none is NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bound(f64);

impl Eq for Bound {}

impl Ord for Bound {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Bound {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// `name{a="b",c="d"} 12`; values of the operator's labels hold neither quotes nor commas.
fn sample(line: &str) -> Option<Sample> {
    let (left, value) = line.rsplit_once(' ')?;
    let (name, labels) = left.split_once('{').unwrap_or((left, "}"));
    let labels = labels.trim_end_matches('}').split(',');
    let labels = labels.filter_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        Some((key.to_owned(), value.trim_matches('"').to_owned()))
    });
    Some(Sample {
        name: name.to_owned(),
        labels: labels.collect(),
        value: value.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# TYPE t histogram
t_bucket{le="0.1",kind="A"} 50
t_bucket{le="0.2",kind="A"} 100
t_bucket{le="+Inf",kind="A"} 100
flotilla_operator_api_requests_total{verb="get",resource="pods",code="200"} 7
flotilla_operator_api_requests_total{verb="apply",resource="pods",code="201"} 3
flotilla_operator_api_requests_total{verb="apply",resource="pods",code="409"} 1
# EOF"#;

    #[test]
    fn percentiles_are_read_within_a_bucket() {
        let (scrape, none) = (Scrape::parse(TEXT), Scrape::default());
        let percentile = |quantile| scrape.percentile(&none, "t", quantile).expect("observations");
        assert!((percentile(0.5) - 0.1).abs() < 1e-9);
        assert!((percentile(0.75) - 0.15).abs() < 1e-9);
        assert!(scrape.percentile(&scrape, "t", 0.5).is_err());
    }

    #[test]
    fn reads_are_no_writes() {
        let scrape = Scrape::parse(TEXT);
        assert_eq!((scrape.writes() as u32, scrape.all_requests() as u32), (4, 11));
    }
}

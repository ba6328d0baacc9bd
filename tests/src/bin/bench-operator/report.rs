//! Goals, verdicts, table and JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::{
    arguments::Arguments,
    measure::{Measured, Wave},
};

const MEBIBYTE: f64 = 1_048_576.0;

/// One row of the table.
#[derive(Clone, Debug)]
struct Row {
    what: String,
    value: String,
    goal: &'static str,
    reached: Option<bool>,
}

/// The whole report.
#[derive(Clone, Debug)]
pub struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
    json: Value,
}

impl Report {
    /// Judges what was measured.
    pub fn new(arguments: &Arguments, measured: &Measured) -> Self {
        let mut rows = speed(arguments, measured);
        rows.extend(cost(arguments, measured));
        rows.extend(rest(arguments, measured));
        Self {
            notes: notes(measured),
            json: json(arguments, measured, &rows),
            rows,
        }
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let width = self.rows.iter().map(|row| row.what.len()).max().unwrap_or(0);
        for row in &self.rows {
            let verdict = row
                .reached
                .map_or("", |reached| if reached { "reached" } else { "MISSED" });
            // Writing into a String cannot fail.
            let _ = writeln!(
                text,
                "{:width$}  {:>22}  {:25}  {verdict}",
                row.what, row.value, row.goal
            );
        }
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    /// The same for machines.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// Whether no goal was missed.
    pub fn all_reached(&self) -> bool {
        self.rows.iter().all(|row| row.reached != Some(false))
    }
}

/// Pods of both waves, in all.
fn sizes(arguments: &Arguments) -> (u32, u32) {
    (arguments.jobs.0 * arguments.pods, arguments.jobs.1 * arguments.pods)
}

/// How fast pods are created, beside what a bare client reaches.
fn speed(arguments: &Arguments, measured: &Measured) -> Vec<Row> {
    let (one, two) = &measured.waves;
    let (first, second) = sizes(arguments);
    let ceiling = f64::midpoint(measured.bare.0, measured.bare.1);
    let ratios = (one.rate() / ceiling, two.rate() / ceiling);
    let fast = |rate: f64| rate >= 100.0 || rate / ceiling >= 0.7;
    let growth = (two.seconds / f64::from(two.pods)) / (one.seconds / f64::from(one.pods));
    let gang = measured.gangs[measured.gangs.len() / 2];
    vec![
        goal(
            format!("pods/s, to {first} pods"),
            format!("{:.1}", one.rate()),
            "100 or 0.7 of the ceiling",
            fast(one.rate()),
        ),
        goal(
            format!("pods/s, {first} to {second} pods"),
            format!("{:.1}", two.rate()),
            "100 or 0.7 of the ceiling",
            fast(two.rate()),
        ),
        plain(
            "ceiling: bare client, pods/s, before and after",
            format!("{:.1}, {:.1}", measured.bare.0, measured.bare.1),
        ),
        goal(
            "operator / ceiling, both waves".into(),
            format!("{:.2}, {:.2}", ratios.0, ratios.1),
            "0.7",
            ratios.0.min(ratios.1) >= 0.7,
        ),
        goal(
            format!("one job of {} pods: all created, s", arguments.gang),
            format!("{gang:.2}"),
            "< 2",
            gang < 2.0,
        ),
        goal(
            "time per pod, second wave / first".into(),
            format!("{growth:.2}"),
            "<= 1.2",
            growth <= 1.2,
        ),
    ]
}

/// What passes cost.
fn cost(arguments: &Arguments, measured: &Measured) -> Vec<Row> {
    let (one, two) = &measured.waves;
    let slowest = one.compute.1.max(two.compute.1);
    let per_pod = |count: f64, wave: &Wave| count / f64::from(wave.pods);
    vec![
        plain(
            "computing per pass, p50, ms, both waves",
            format!("{:.2}, {:.2}", one.compute.0 * 1e3, two.compute.0 * 1e3),
        ),
        goal(
            "computing per pass, p99, ms, both waves".into(),
            format!("{:.2}, {:.2}", one.compute.1 * 1e3, two.compute.1 * 1e3),
            "< 100",
            slowest < 0.1,
        ),
        plain(
            "API requests per pod, both waves",
            format!("{:.2}, {:.2}", per_pod(one.totals.0, one), per_pod(two.totals.0, two)),
        ),
        plain(
            "API writes per pod, both waves",
            format!("{:.2}, {:.2}", per_pod(one.totals.1, one), per_pod(two.totals.1, two)),
        ),
        plain(
            "passes per job, both waves",
            format!(
                "{:.1}, {:.1}",
                one.passes / f64::from(arguments.jobs.0),
                two.passes / f64::from(arguments.jobs.1 - arguments.jobs.0)
            ),
        ),
    ]
}

/// What it costs when nothing happens, and after a restart.
fn rest(arguments: &Arguments, measured: &Measured) -> Vec<Row> {
    let (one, two) = &measured.waves;
    let (first, second) = sizes(arguments);
    let (quiet, restart) = (&measured.quiet, &measured.restart);
    let resident = two.memory.resident as f64 / MEBIBYTE;
    vec![
        goal(
            format!("writes in {:.0} passes without news", quiet.passes),
            format!("{:.0}", quiet.writes),
            "0",
            quiet.writes < 0.5,
        ),
        plain(
            "reads in them; operator's share of a core, %",
            format!("{:.0}; {:.1}", quiet.reads, 100.0 * quiet.processor / quiet.seconds),
        ),
        plain(
            &format!("operator's memory at {first} pods, MiB"),
            format!("{:.1}", one.memory.resident as f64 / MEBIBYTE),
        ),
        goal(
            format!("operator's memory at {second} pods, MiB"),
            format!("{resident:.1} (peak {:.1})", two.memory.peak as f64 / MEBIBYTE),
            "< 256",
            resident < 256.0,
        ),
        plain(
            &format!("restart at {second} pods: listed, converged, s"),
            format!("{:.2}, {:.2}", restart.listed, restart.converged),
        ),
        goal(
            "writes after the restart".into(),
            format!("{:.0}", restart.writes),
            "0",
            restart.writes < 0.5,
        ),
        plain(
            "memory after the restart, MiB",
            format!(
                "{:.1} (peak {:.1})",
                restart.memory.resident as f64 / MEBIBYTE,
                restart.memory.peak as f64 / MEBIBYTE
            ),
        ),
    ]
}

fn goal(what: String, value: String, goal: &'static str, reached: bool) -> Row {
    Row {
        what,
        value,
        goal,
        reached: Some(reached),
    }
}

fn plain(what: &str, value: String) -> Row {
    Row {
        what: what.to_owned(),
        value,
        goal: "",
        reached: None,
    }
}

fn notes(measured: &Measured) -> Vec<String> {
    let two = &measured.waves.1;
    let per_pod = |(name, count): &(String, f64)| format!("{name} {:.3}", count / f64::from(two.pods));
    let requests: Vec<String> = two.requests.iter().map(per_pod).collect();
    let share = |(name, seconds): &(String, f64)| format!("{name} {:.0}%", 100.0 * seconds / two.running_seconds);
    let processor: Vec<String> = two.processor.iter().map(share).collect();
    let (audited, own) = measured.audited;
    vec![
        format!("requests per pod, second wave: {}", requests.join(", ")),
        format!("shares of a core, second wave: {}", processor.join(", ")),
        format!(
            "the operator's requests by the audit log {} ({} writes), by its own count {own:.0}",
            audited.requests, audited.writes
        ),
    ]
}

fn json(arguments: &Arguments, measured: &Measured, rows: &[Row]) -> Value {
    let wave = |wave: &Wave| {
        json!({
            "pods": wave.pods,
            "seconds": wave.seconds,
            "running_seconds": wave.running_seconds,
            "pods_per_second": wave.rate(),
            "requests_per_pod": wave.totals.0 / f64::from(wave.pods),
            "writes_per_pod": wave.totals.1 / f64::from(wave.pods),
            "passes": wave.passes,
            "compute_p50_seconds": wave.compute.0,
            "compute_p99_seconds": wave.compute.1,
            "resident_bytes": wave.memory.resident,
            "peak_bytes": wave.memory.peak,
            "requests": wave.requests.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "processor_seconds": wave.processor.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        })
    };
    let (quiet, restart) = (&measured.quiet, &measured.restart);
    let missed: Vec<&str> = rows
        .iter()
        .filter(|row| row.reached == Some(false))
        .map(|row| row.what.as_str())
        .collect();
    json!({
        "jobs": [arguments.jobs.0, arguments.jobs.1],
        "pods_per_job": arguments.pods,
        "waves": [wave(&measured.waves.0), wave(&measured.waves.1)],
        "bare_pods_per_second": [measured.bare.0, measured.bare.1],
        "gang_pods": arguments.gang,
        "gang_seconds": measured.gangs,
        "quiet": {"seconds": quiet.seconds, "passes": quiet.passes, "writes": quiet.writes, "reads": quiet.reads,
            "processor_seconds": quiet.processor},
        "restart": {"listed_seconds": restart.listed, "converged_seconds": restart.converged,
            "writes": restart.writes, "resident_bytes": restart.memory.resident, "peak_bytes": restart.memory.peak},
        "audited_requests": measured.audited.0.requests,
        "missed": missed,
    })
}

//! `bench-operator`: how the operator fares with thousands of pods on a real API server.
//!
//! The control plane, a fleet of hollow nodes and the operator run as processes of their own on this machine; this program
//! applies TrainingJobs, counts, and compares the operator with a bare client that creates the same pods with as many
//! requests in flight. It prints a table with goals and verdicts, then one line of JSON.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | `arguments.rs` | the command line |
//! | `stage.rs` | control plane, nodes, operator |
//! | `objects.rs` | pure: the objects that are applied |
//! | `load.rs` | applying and counting |
//! | `bare.rs` | the API server's own ceiling |
//! | `scrape.rs` | pure: Prometheus text, percentiles |
//! | `process.rs` | memory and processor time of a process |
//! | `audit.rs` | what the API server's audit log says about the operator |
//! | `measure.rs` | the experiments, in order |
//! | `report.rs` | goals, verdicts, table and JSON |

mod arguments;
mod audit;
mod bare;
mod load;
mod measure;
mod objects;
mod process;
mod report;
mod scrape;
mod stage;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;

use self::{arguments::Arguments, measure::measure, report::Report, stage::Stage};

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse().sized();
    let mut stage = Stage::start(&arguments).await?;
    let measured = tokio::select! {
        measured = measure(&mut stage, &arguments) => measured,
        () = flotilla_cli::control_plane::interrupted() => Err(anyhow::anyhow!("interrupted")),
    };
    let measured = match measured {
        // A program that ended explains the error better than what failed for its sake.
        Err(error) => Err(stage.check().err().unwrap_or(error)),
        measured => measured,
    };
    let stopped = stage.stop();
    let report = Report::new(&arguments, &measured?);
    print!("{}", report.table());
    let line = report.json().to_string();
    println!("{line}");
    if let Some(path) = &arguments.json {
        std::fs::write(path, &line).with_context(|| format!("write {}", path.display()))?;
    }
    stopped?;
    let missed = arguments.strict && !report.all_reached();
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

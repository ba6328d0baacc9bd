//! The command line.

use std::path::PathBuf;

use clap::{Parser, value_parser};

/// Measures the operator with thousands of pods on a real kube-apiserver, scheduler and fake GPU nodes, on this machine.
///
/// Needs the control plane of `make test-cluster` (built from source at the first use) and the programs of `make build`.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "bench-operator",
    version,
    after_help = "Examples:\n  \
        make bench-operator                     about 6 minutes on 2 cores: 200, then 1,000 jobs of 10 pods\n  \
        make bench-operator BENCH=--quick       20, then 100 jobs\n  \
        bench-operator --jobs 50,400 --pods 4   other sizes\n\n\
        The last line of the output is JSON. Figures of a machine that does something else meanwhile say nothing."
)]
pub struct Arguments {
    /// TrainingJobs after the first and after the second wave.
    #[arg(long, value_name = "N,N", default_value = "200,1000", value_parser = waves)]
    pub jobs: (u32, u32),
    /// Pods of each of these jobs: one learner, the rest rollout pods.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = value_parser!(u32).range(1..=512))]
    pub pods: u32,
    /// Pods of the one large job.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u32).range(1..=512))]
    pub gang: u32,
    /// A small run of under two minutes: 20, then 100 jobs.
    #[arg(long)]
    pub quick: bool,
    /// Hollow nodes.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub nodes: u32,
    /// GPUs of each node; each pod asks for one.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub gpus: u32,
    /// Pod creations that the bare client has in flight: as many as the operator may have.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub in_flight: usize,
    /// The operator's own settings, after `run`; may be given several times.
    #[arg(long = "operator-flag", value_name = "FLAG", allow_hyphen_values = true)]
    pub operator_flags: Vec<String>,
    /// Seconds between two reads of a worker's progress.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub progress_interval: u64,
    /// Binary of the operator; that beside this program if absent.
    #[arg(long, value_name = "FILE")]
    pub operator: Option<PathBuf>,
    /// Directory of the control plane's data and of all logs; a temporary one if absent.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Write the JSON line to this file too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// End with exit code 1 if a goal is missed.
    #[arg(long)]
    pub strict: bool,
}

impl Arguments {
    /// With the sizes that `--quick` stands for.
    pub fn sized(mut self) -> Self {
        if self.quick {
            self.jobs = (20, 100);
        }
        self
    }
}

fn waves(text: &str) -> Result<(u32, u32), String> {
    let wrong = || format!("{text:?} is not two growing numbers of jobs, for example 200,1000");
    let (first, second) = text.split_once(',').ok_or_else(wrong)?;
    let first: u32 = first.trim().parse().map_err(|_| wrong())?;
    let second: u32 = second.trim().parse().map_err(|_| wrong())?;
    if first == 0 || second <= first {
        return Err(wrong());
    }
    Ok((first, second))
}

//! `flotilla-cluster`: the real control plane for tests and for people, on loopback.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use flotilla_tests::{cluster, control_plane::ControlPlane};

/// Kubernetes' own API server, controller manager, scheduler and etcd on this machine, for tests.
///
/// They are built from source at the first use (about 15 minutes on 2 cores) into ~/.cache/flotilla/control-plane. There is
/// no kubelet: `flotilla sandbox node` attaches one whose containers are local processes.
#[derive(Debug, Parser)]
#[command(version, name = "flotilla-cluster")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run until SIGINT or SIGTERM; DIR/kubeconfig is an administrator's.
    #[command(
        after_help = "Then, in another terminal:\n  export KUBECONFIG=DIR/kubeconfig\n  kubectl get --raw /readyz?verbose"
    )]
    Up(Up),
    /// Run a command against it: KUBECONFIG, FLOTILLA_CLUSTER_DIR and FLOTILLA_CONTROL_PLANE_BIN are set for the command.
    Run(Run),
}

#[derive(Args, Debug)]
struct Up {
    /// Directory of certificates, data and logs; loses what an earlier control plane left in it.
    #[arg(long, value_name = "DIR", default_value = ".flotilla/cluster")]
    dir: PathBuf,
}

#[derive(Args, Debug)]
struct Run {
    #[command(flatten)]
    place: Up,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().command {
        Command::Up(arguments) => up(arguments).await,
        Command::Run(arguments) => run(arguments).await,
    }
}

async fn up(arguments: Up) -> anyhow::Result<ExitCode> {
    let plane = ControlPlane::start(&arguments.dir).await?;
    eprintln!(
        "control plane in {}\n  export KUBECONFIG={}\n  export PATH={}:$PATH",
        plane.dir().display(),
        plane.kubeconfig().display(),
        plane.programs().folder().display()
    );
    flotilla_cli::control_plane::interrupted().await;
    plane.stop()?;
    Ok(ExitCode::SUCCESS)
}

async fn run(arguments: Run) -> anyhow::Result<ExitCode> {
    let plane = ControlPlane::start(&arguments.place.dir).await?;
    let (program, rest) = arguments.command.split_first().context("a command")?;
    let mut child = tokio::process::Command::new(program)
        .args(rest)
        .env("KUBECONFIG", plane.kubeconfig())
        .env(cluster::DIR_ENV, plane.dir())
        .env(flotilla_tests::control_plane::FOLDER_ENV, plane.programs().folder())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let status = tokio::select! {
        status = child.wait() => Some(status?),
        () = flotilla_cli::control_plane::interrupted() => None,
    };
    plane.stop()?;
    let code = status.and_then(|status| status.code()).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

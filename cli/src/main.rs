//! `flotilla`: run manifests on this machine, or keep a sandbox up.

use std::process::ExitCode;

use clap::Parser;
use flotilla_cli::arguments::{Arguments, Command};

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.command {
        Command::Run(run) => flotilla_cli::run::command(run).await,
        Command::Demo(demo) => flotilla_cli::demo::command(demo).await,
        Command::Sandbox(sandbox) => flotilla_cli::up::command(sandbox).await,
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{} {error:#}", console::style("error:").red().bold());
            ExitCode::FAILURE
        }
    }
}

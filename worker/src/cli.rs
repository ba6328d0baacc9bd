//! The command line: `run` is what the operator starts in a pod, `serve` is for people.

mod hash_key;
mod serve;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};
use flotilla_api::{
    names,
    progress::Stage,
    role::{Role, RoleConfig, SCHEMA_VERSION},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::{hash_key::HashKeyArguments, serve::ServeArguments};
use crate::{
    command::{
        self, arguments::ModelArguments, bench::BenchArguments, best_of_n::BestOfNArguments, convert::ConvertArguments,
        doctor::DoctorArguments, generate::GenerateArguments, inspect::InspectArguments, logits::LogitsArguments,
        plan::PlanArguments,
    },
    context::{Context, Token},
    device::{DeviceArguments, Wanted},
    error::{WorkerError, chain},
    group::{self, follow::FollowArguments},
    progress::ProgressCell,
    role,
    telemetry::LogFormat,
    uri::Volumes,
};

/// Trains and serves vision-language critics and policies.
///
/// In a cluster the operator starts `run` with a role config. By hand, `serve` puts any Hugging Face style directory of
/// the Qwen2.5-VL or LLaVA-OneVision family behind an OpenAI-compatible API with a critic endpoint; the other commands
/// work on such a directory without a server.
#[derive(Debug, Parser)]
#[command(name = "flotilla-worker", version, max_term_width = 110, after_help = EXIT_CODES)]
pub struct Cli {
    /// How log lines are written to standard error; RUST_LOG filters them.
    #[arg(long, global = true, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Where fetched models are kept; by default $XDG_CACHE_HOME/flotilla, else /var/cache/flotilla, else a temporary
    /// directory.
    #[arg(long, global = true, env = "FLOTILLA_CACHE", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 the goal was reached; 1 a new attempt may succeed; 78 configuration, data or \
                          weights are wrong; 143 stopped by SIGTERM with its state saved.\n\
                          RAYON_NUM_THREADS sets the threads of one matrix product (if unset: 1 for run and serve, else all cores).";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Become what a role config says: prepare data, train, serve or verify a checkpoint.
    #[command(after_help = RUN_EXAMPLE)]
    Run(RunArguments),
    /// Serve one model as policy and critic.
    #[command(after_help = serve::EXAMPLES)]
    Serve(Box<ServeArguments>),
    /// Read an API key from standard input and print its line for --api-key-file.
    #[command(after_help = hash_key::EXAMPLE)]
    HashKey(HashKeyArguments),
    /// Say what a checkpoint is, how much memory it takes, and whether its tensors fit.
    #[command(after_help = INSPECT_EXAMPLE)]
    Inspect(InspectArguments),
    /// Say how many tokens a request takes, before anything is computed.
    #[command(after_help = PLAN_EXAMPLE)]
    Plan(PlanArguments),
    /// Answer a conversation.
    #[command(after_help = GENERATE_EXAMPLE)]
    Generate(GenerateArguments),
    /// Write token ids, positions, pixels and logits of a conversation to a safetensors file.
    #[command(after_help = LOGITS_EXAMPLE)]
    Logits(LogitsArguments),
    /// Measure prefill, decode and training beside what this machine could do at most.
    #[command(after_help = BENCH_EXAMPLE)]
    Bench(BenchArguments),
    /// Measure what sharing prefixes saves in best of n.
    #[command(after_help = BENCH_BEST_OF_N_EXAMPLE)]
    BenchBestOfN(BestOfNArguments),
    /// Say what this machine has for models, how fast it is, and whether the GPU's kernels compute what they should.
    #[command(after_help = DOCTOR_EXAMPLE)]
    Doctor(DoctorArguments),
    /// Write a checkpoint in another precision, or with an adapter merged.
    #[command(after_help = CONVERT_EXAMPLE)]
    Convert(ConvertArguments),
    /// Compute a part of a model for a server of several GPUs, which starts this.
    #[command(hide = true)]
    Follow(FollowArguments),
}

impl Command {
    /// The model of a command for people; the others have their URI resolved by the role.
    fn model(&mut self) -> Option<&mut ModelArguments> {
        match self {
            Self::Run(_)
            | Self::Serve(_)
            | Self::HashKey(_)
            | Self::BenchBestOfN(_)
            | Self::Doctor(_)
            | Self::Follow(_) => None,
            Self::Inspect(arguments) => Some(&mut arguments.model),
            Self::Plan(arguments) => Some(&mut arguments.model),
            Self::Generate(arguments) => Some(&mut arguments.model),
            Self::Bench(arguments) => arguments.model.0.as_mut(),
            Self::Logits(arguments) => Some(&mut arguments.model),
            Self::Convert(arguments) => Some(&mut arguments.model),
        }
    }
}

const INSPECT_EXAMPLE: &str = "Example:\n  \
    flotilla-worker inspect --model ./Qwen2.5-VL-7B-Instruct --dtype bf16\n\
    A directory with config.json alone is enough for sizes.";

const PLAN_EXAMPLE: &str = "Examples:\n  \
    flotilla-worker plan --model ./checkpoint --image 1920x1080 --text 'What is this?' --max-tokens 512\n  \
    flotilla-worker plan --model ./checkpoint --video 32x1280x720@2 --n 8\n  \
    flotilla-worker plan --model ./checkpoint --messages messages.json --json";

const GENERATE_EXAMPLE: &str = "Example:\n  \
    flotilla-worker generate --model ./checkpoint --messages messages.json --max-tokens 64\n\
    messages.json, pictures named relative to it:\n  \
    [{\"role\": \"user\", \"content\": [\n    \
      {\"type\": \"image_url\", \"image_url\": {\"url\": \"cat.png\"}},\n    \
      {\"type\": \"video\", \"video\": [\"0.png\", \"1.png\"], \"fps\": 2.0},\n    \
      {\"type\": \"text\", \"text\": \"What is this?\"}]}]";

const LOGITS_EXAMPLE: &str = "Example:\n  \
    flotilla-worker logits --model ./checkpoint --messages messages.json --out logits.safetensors\n\
    The file has input_ids, position_ids, logits, and pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw,\n\
    second_per_grid_ts, image_sizes where the conversation has them.";

const BENCH_EXAMPLE: &str = "Examples:\n  \
    RAYON_NUM_THREADS=2 flotilla-worker bench --model ./checkpoint --prompt-tokens 512 --batch 8\n  \
    flotilla-worker bench --shape qwen2.5-vl-7b --random --parts request,grpo --grpo 8x8x1536+512   on a GPU: docs/gpu-bench.md";

const BENCH_BEST_OF_N_EXAMPLE: &str = "Example, with a tiny model of random weights:\n  \
    flotilla-worker bench-best-of-n --model manifests/samples/critic-digits/base --random-seed 1 --n 128";

const DOCTOR_EXAMPLE: &str = "Examples:\n  \
    flotilla-worker doctor                 which device models would run on and why, measured, and the kernels checked\n  \
    flotilla-worker doctor --quick         the same without measuring and checking\n  \
    flotilla-worker doctor --device cuda   an error where no GPU can be used\n  \
    flotilla-worker doctor --model ./small-checkpoint   computes it on the device and on the CPU and compares\n\
    docs/gpu.md says what to do about each message.";

const CONVERT_EXAMPLE: &str = "Example:\n  \
    flotilla-worker convert --model ./checkpoint --adapter ./lora --dtype bf16 --out ./merged";

const RUN_EXAMPLE: &str = "Example, without Kubernetes:\n  \
    flotilla-worker run --config role.json --volume data=./data --listen 127.0.0.1:0\n\
    Data are named in the role config as pvc://data/path or file:///path, models also as hf://org/name, s3://bucket/prefix,\n\
    gs://bucket/prefix or az://container/prefix.";

/// Arguments of `run`.
#[derive(Args, Debug)]
pub struct RunArguments {
    /// The role config (JSON).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Where a claim is mounted; may be repeated.
    #[arg(long = "volume", value_name = "CLAIM=DIR")]
    pub volumes: Vec<String>,
    /// File with the bearer token that guards /progress; open if absent.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// File that receives the last progress when the process ends.
    #[arg(long, value_name = "FILE")]
    pub termination_log: Option<PathBuf>,
    /// Address of the HTTP server; by default $POD_IP:8080, or 0.0.0.0:8080. Port 0 takes a free one and prints it.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Address of the pod.
    #[arg(long, env = names::POD_IP_ENV, hide = true)]
    pub pod_ip: Option<IpAddr>,
    /// Where models run.
    #[command(flatten)]
    pub device: DeviceArguments,
}

/// What a process does, gathered from its arguments and files.
#[derive(Debug)]
struct Assignment {
    config: RoleConfig,
    volumes: Volumes,
    token: Option<Token>,
    listen: SocketAddr,
    device: Wanted,
}

/// Runs a command to its end and gives the exit code, one of [`names::exit`].
pub fn main(mut command: Command, cache: Option<PathBuf>) -> ExitCode {
    // An empty variable is none.
    let cache = cache.filter(|cache| !cache.as_os_str().is_empty());
    let located = command.model().map_or(Ok(()), |model| model.locate(cache.as_deref()));
    let for_people = |run: &dyn Fn() -> Result<(), WorkerError>| tell(located.and_then(|()| run()));
    let code = match command {
        Command::Run(arguments) => work(in_a_pod(&arguments), cache, arguments.termination_log.as_deref()),
        Command::Serve(arguments) => work(serve::by_hand(*arguments), cache, None),
        Command::HashKey(arguments) => for_people(&|| hash_key::run(&arguments)),
        Command::Inspect(arguments) => for_people(&|| command::inspect::run(&arguments)),
        Command::Plan(arguments) => for_people(&|| command::plan::run(&arguments)),
        Command::Generate(arguments) => for_people(&|| command::generate::run(&arguments)),
        Command::Bench(arguments) => for_people(&|| command::bench::run(&arguments)),
        Command::BenchBestOfN(arguments) => for_people(&|| command::best_of_n::run(&arguments)),
        Command::Logits(arguments) => for_people(&|| command::logits::run(&arguments)),
        Command::Doctor(arguments) => for_people(&|| command::doctor::run(&arguments)),
        Command::Convert(arguments) => for_people(&|| command::convert::run(&arguments)),
        Command::Follow(arguments) => for_people(&|| group::follow::run(&arguments)),
    };
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// Does what a process is to do, and leaves its end in the termination log.
fn work(assignment: Result<Assignment, WorkerError>, cache: Option<PathBuf>, termination_log: Option<&Path>) -> i32 {
    let progress = ProgressCell::default();
    let outcome = assignment.and_then(|mut assignment| {
        assignment.volumes = assignment.volumes.with_cache(cache);
        carry_out(assignment, &progress)
    });
    let code = conclude(outcome, &progress);
    if let Some(path) = termination_log
        && let Err(error) = progress.write_termination_log(path)
    {
        tracing::warn!(%error, path = %path.display(), "the termination log cannot be written");
    }
    code
}

/// Tells a person why a command failed.
fn tell(outcome: Result<(), WorkerError>) -> i32 {
    match outcome {
        Ok(()) => names::exit::OK,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            error.exit_code()
        }
    }
}

/// Writes the last stage into the progress and gives the exit code.
fn conclude(outcome: Result<(), WorkerError>, progress: &ProgressCell) -> i32 {
    match outcome {
        Ok(()) => {
            if progress.stage() != Stage::Completed {
                progress.enter(Stage::Completed, "done");
            }
            names::exit::OK
        }
        Err(error @ WorkerError::Suspended { .. }) => {
            progress.enter(Stage::Suspended, chain(&error));
            error.exit_code()
        }
        Err(error) => {
            let message = chain(&error);
            tracing::error!(code = error.exit_code(), "{message}");
            progress.update(|progress| {
                progress.stage = Stage::Failed;
                progress.message = message;
            });
            error.exit_code()
        }
    }
}

fn in_a_pod(arguments: &RunArguments) -> Result<Assignment, WorkerError> {
    Ok(Assignment {
        config: read_config(&arguments.config)?,
        volumes: Volumes::parse(&arguments.volumes)?,
        token: read_token(arguments.token_file.as_deref())?,
        listen: arguments.listen.unwrap_or_else(|| {
            let address = arguments.pod_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            SocketAddr::new(address, names::HTTP_PORT)
        }),
        device: arguments.device.device,
    })
}

fn read_config(path: &Path) -> Result<RoleConfig, WorkerError> {
    let text = std::fs::read_to_string(path).map_err(|source| WorkerError::ReadFile {
        what: "role config",
        path: path.to_owned(),
        source,
    })?;
    let invalid = |source: serde_json::Error| WorkerError::InvalidConfig {
        path: path.to_owned(),
        source: source.into(),
    };
    // The version first: a document of another version has other fields.
    let document: serde_json::Value = serde_json::from_str(&text).map_err(invalid)?;
    let found = document["schemaVersion"].as_u64().unwrap_or(0);
    if found != u64::from(SCHEMA_VERSION) {
        return Err(WorkerError::SchemaVersion {
            found: u32::try_from(found).unwrap_or(u32::MAX),
            expected: SCHEMA_VERSION,
        });
    }
    serde_json::from_str(&text).map_err(invalid)
}

fn read_token(path: Option<&Path>) -> Result<Option<Token>, WorkerError> {
    let Some(path) = path else { return Ok(None) };
    let text = std::fs::read_to_string(path).map_err(|source| WorkerError::ReadFile {
        what: "token",
        path: path.to_owned(),
        source,
    })?;
    match Token::parse(&text) {
        Some(token) => Ok(Some(token)),
        None => Err(WorkerError::invalid(format!("token file {} is empty", path.display()))),
    }
}

fn carry_out(assignment: Assignment, progress: &ProgressCell) -> Result<(), WorkerError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| WorkerError::retryable("failed to start the async runtime", error))?;
    let outcome = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        stop_on_signal(shutdown.clone())?;
        let secure = matches!(&assignment.config.role, Role::Serve(serve) if serve.access.tls.is_some());
        let listener = listen(assignment.listen, if secure { "https" } else { "http" }).await?;
        let context = Context {
            owner: assignment.config.owner,
            progress: progress.clone(),
            volumes: assignment.volumes,
            token: assignment.token,
            device: assignment.device,
        };
        Box::pin(role::run(context, assignment.config.role, listener, shutdown)).await
    });
    // A thread that still computes must not keep a process alive whose role has ended.
    runtime.shutdown_background();
    outcome
}

async fn listen(address: SocketAddr, scheme: &str) -> Result<TcpListener, WorkerError> {
    let failed = |source| WorkerError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    // Standard output carries this one line, so that a script that asked for port 0 can read the port.
    println!("listening on {scheme}://{bound}");
    Ok(listener)
}

/// Cancels the token at the first SIGTERM or SIGINT.
fn stop_on_signal(shutdown: CancellationToken) -> Result<(), WorkerError> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error| WorkerError::retryable("failed to install a signal handler", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
        shutdown.cancel();
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_role_config_of_another_version_is_refused_by_its_version() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("role.json");
        std::fs::write(&path, r#"{"schemaVersion": 9, "later": true}"#).expect("writes");
        let error = read_config(&path).expect_err("another version");
        assert_eq!(
            error.to_string(),
            "role config has schema version 9, this worker reads 1"
        );
        assert_eq!(error.exit_code(), names::exit::PERMANENT);
    }

    #[test]
    fn an_empty_token_file_does_not_open_the_worker() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        std::fs::write(&path, "\n").expect("writes");
        assert!(read_token(Some(&path)).is_err());
    }

    #[test]
    fn failure_and_suspension_are_told_apart_in_progress_and_exit_code() {
        let progress = ProgressCell::default();
        assert_eq!(conclude(Err(WorkerError::Suspended { step: 4 }), &progress), 143);
        assert_eq!(progress.stage(), Stage::Suspended);
        assert_eq!(conclude(Err(WorkerError::invalid("no rows")), &progress), 78);
        assert_eq!(progress.snapshot().message, "no rows");
        assert_eq!(conclude(Ok(()), &progress), 0);
        assert_eq!(progress.stage(), Stage::Completed);
    }
}

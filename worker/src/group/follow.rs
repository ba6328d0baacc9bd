//! What every rank but 0 does: loads its part of the model, and repeats the steps of rank 0 until that ends.

use std::io::{BufRead, Read, Write};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::duty::Duty;
use crate::error::WorkerError;

/// Arguments of `follow`, which rank 0 starts. What it is to do comes over its standard input.
#[derive(Args, Debug)]
pub struct FollowArguments {
    /// Which rank it is.
    #[arg(long)]
    pub rank: usize,
}

/// Follows to the end of rank 0.
pub fn run(arguments: &FollowArguments) -> Result<(), WorkerError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| WorkerError::retryable("failed to start the async runtime", error))?;
    let _deaf = runtime.enter();
    // A service manager may tell all processes to end at once: rank 0 drains, and needs this one until then.
    let ignored = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
    for ignored in ignored {
        let _ignored = ignored.map_err(|error| WorkerError::retryable("failed to install a signal handler", error))?;
    }
    let duty = read_duty()?;
    if duty.rank != arguments.rank {
        return Err(WorkerError::invalid(format!(
            "rank {} was started with the duty of rank {}",
            arguments.rank, duty.rank
        )));
    }
    end_with_leader().map_err(|error| WorkerError::retryable("failed to watch rank 0", error))?;
    work(&duty)
}

fn read_duty() -> Result<Duty, WorkerError> {
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    read.map_err(|error| WorkerError::retryable("failed to read what rank 0 says", error))?;
    let wrong = |error| WorkerError::permanent("`follow` is started by a server of several GPUs, not by hand", error);
    serde_json::from_str(&line).map_err(wrong)
}

/// Ends this process once rank 0 is gone, whatever it is doing: loading may take minutes, in which it reads from nobody.
fn end_with_leader() -> std::io::Result<()> {
    /// A step that is under way ends by the group's own connections, with a word on why.
    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);
    let watch = || {
        let mut rest = [0; 64];
        while !matches!(std::io::stdin().lock().read(&mut rest), Ok(0) | Err(_)) {}
        std::thread::sleep(PATIENCE);
        // The pipe of standard error ended with rank 0, unless somebody else holds it.
        let _ = writeln!(std::io::stderr(), "rank 0 has ended");
        // Neither unwinding nor exit handlers: those of libraries may wait for a GPU whose peer is gone, without end.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    };
    std::thread::Builder::new()
        .name("leader".to_owned())
        .spawn(watch)
        .map(drop)
}

#[cfg(not(feature = "nccl"))]
fn work(duty: &Duty) -> Result<(), WorkerError> {
    Err(WorkerError::permanent(
        format!("rank {} cannot follow", duty.rank),
        super::GroupFault::Unbuilt,
    ))
}

#[cfg(feature = "nccl")]
fn work(duty: &Duty) -> Result<(), WorkerError> {
    use candle_core::DType;
    use flotilla_device::{
        DeviceError,
        parallel::{Membership, Nccl, Tcp, Token},
        runner::follow,
    };
    use flotilla_engine::Limits;
    use half::bf16;

    use super::PATIENCE;
    use crate::{
        device::Wanted,
        runner::{ModelFiles, dtype_of},
    };

    let membership = Membership {
        rank: duty.rank,
        size: duty.size,
        token: Token::new(duty.token.clone()),
        timeout: PATIENCE,
    };
    let what = || format!("failed to follow on cuda:{}", duty.gpu);
    let failed = |error: DeviceError| WorkerError::retryable(what(), error);
    let group = Tcp::join(&duty.address, &membership).map_err(|error| failed(error.into()))?;
    // Held as long as the GPU is used: what it has set ends with the last that does.
    let _opened = Wanted::Cuda(Some(duty.gpu)).open()?;
    let dtype = dtype_of(duty.dtype);
    let files = ModelFiles::open(&duty.directory, duty.random_seed, dtype)?;
    let limits = Limits {
        max_rows: duty.max_rows,
        max_step_tokens: duty.max_step_tokens,
        block_size: duty.block_size,
        ..Limits::default()
    };
    let gpu = flotilla_kernels::Gpu::new(duty.gpu).map_err(|error| failed(error.into()))?;
    let nccl = Nccl::new(&gpu, group).map_err(|error| failed(error.into()))?;
    let (config, source) = (files.config(), files.tensors());
    let followed = if dtype == DType::BF16 {
        follow::<bf16>(&gpu, config, source, &limits, duty.max_tokens, nccl)
    } else {
        follow::<f32>(&gpu, config, source, &limits, duty.max_tokens, nccl)
    };
    followed.map_err(failed)
}

//! Rank 0: the model with its followers, as the engine runs it.

use candle_core::DType;
use flotilla_engine::{
    Limits, Prompt, Runner,
    blocks::Block,
    runner::{Answers, Cause, Chunk},
};
#[cfg(feature = "nccl")]
use {
    super::{PATIENCE, duty::Duty, followers::Recruit},
    crate::{runner::precision_of, telemetry},
    flotilla_device::{
        DeviceError, DeviceRunner,
        parallel::{Membership, Nccl, Tcp, Token},
    },
    flotilla_kernels::{Float, Gpu},
    std::net::TcpListener,
    tokio::process::Command,
};

use super::{Fate, Group, followers::Followers};
use crate::{
    error::WorkerError,
    runner::{ModelFiles, ModelPool, ModelRunner},
};

/// After a step has failed, the end of a process that it failed for is heard of so much later.
const NEWS: std::time::Duration = std::time::Duration::from_millis(500);

/// A model that GPUs share, and the processes of the others. Followers are told of the end before they are let go: fields are
/// dropped in this order.
#[derive(Debug)]
pub struct Led {
    runner: ModelRunner,
    fate: Fate,
    _followers: Followers,
}

impl Led {
    /// The model itself.
    pub fn runner(&self) -> &ModelRunner {
        &self.runner
    }

    /// The model itself.
    pub fn runner_mut(&mut self) -> &mut ModelRunner {
        &mut self.runner
    }

    /// Copies blocks at all ranks.
    pub fn copy(&mut self, pool: &mut ModelPool, pairs: &[(Block, Block)]) -> Result<(), Cause> {
        let copied = self.runner.copy(pool, pairs);
        self.noted(copied)
    }

    /// Computes a step at all ranks.
    pub fn step(&mut self, pool: &mut ModelPool, chunks: &[Chunk<'_, Prompt>]) -> Result<Answers, Cause> {
        let answers = self.runner.step(pool, chunks);
        self.noted(answers)
    }

    /// After a failure: tells the fate where the GPU of rank 0 is lost, which ends the process.
    pub fn look(&mut self) {
        if let Some(why) = self.runner.lost() {
            self.fate.fall(format!("the GPU of rank 0 is lost: {why}"));
        }
    }

    /// After a failure that broke the group nothing can be computed any more, and the process must end.
    fn noted<R>(&mut self, done: Result<R, Cause>) -> Result<R, Cause> {
        if done.is_err()
            && let Some(why) = self.runner.broken()
        {
            // A process that ended says more than the step that failed without it.
            std::thread::sleep(NEWS);
            self.fate.fall(format!("the group of GPUs broke: {why}"));
        }
        done
    }
}

/// Starts the other ranks and loads the model together with them; within a tokio runtime. `max_tokens` is the longest sequence.
#[cfg(not(feature = "nccl"))]
pub fn lead(
    group: &Group,
    files: &ModelFiles,
    dtype: DType,
    limits: &Limits,
    max_tokens: usize,
) -> Result<ModelRunner, WorkerError> {
    let _ = (files, dtype, limits, max_tokens);
    let what = format!("failed to put the model on {}", group.places);
    Err(WorkerError::permanent(what, super::GroupFault::Unbuilt))
}

/// Starts the other ranks and loads the model together with them; within a tokio runtime. `max_tokens` is the longest sequence.
#[cfg(feature = "nccl")]
pub fn lead(
    group: &Group,
    files: &ModelFiles,
    dtype: DType,
    limits: &Limits,
    max_tokens: usize,
) -> Result<ModelRunner, WorkerError> {
    let places = &group.places;
    let what = || format!("failed to put the model on {places}");
    let failed = |error: std::io::Error| WorkerError::retryable(what(), error);
    let dtype_name = precision_of(dtype);
    let precision = dtype_name.ok_or_else(|| WorkerError::invalid(format!("{}: it is {dtype:?}", what())))?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?.to_string();
    let token = hex::encode(rand::random::<[u8; 32]>());
    let duties = places.numbers().iter().enumerate().skip(1).map(|(rank, gpu)| Duty {
        rank,
        size: places.size(),
        address: address.clone(),
        token: token.clone(),
        gpu: *gpu,
        directory: files.directory().to_owned(),
        random_seed: files.random_seed(),
        dtype: precision,
        max_tokens,
        max_rows: limits.max_rows,
        max_step_tokens: limits.max_step_tokens,
        block_size: limits.block_size,
    });
    let recruits = duties.map(|duty| recruit(&duty)).collect::<Result<_, _>>();
    let followers = Followers::start(recruits.map_err(failed)?, &group.fate)?;
    let membership = Membership {
        rank: 0,
        size: places.size(),
        token: Token::new(token),
        timeout: PATIENCE,
    };
    let loaded = Tcp::host(&listener, &membership)
        .map_err(DeviceError::from)
        .and_then(|ranks| load(group, files, dtype, limits, max_tokens, ranks));
    let runner = match loaded {
        Ok(runner) => runner,
        Err(error) => {
            // Where another rank failed, its end is heard of before it is let go.
            if matches!(error, DeviceError::Group(_)) {
                std::thread::sleep(NEWS);
            }
            return Err(WorkerError::retryable(what(), error));
        }
    };
    Ok(ModelRunner::Led(Box::new(Led {
        runner,
        fate: group.fate.clone(),
        _followers: followers,
    })))
}

/// This program again, as a follower.
#[cfg(feature = "nccl")]
fn recruit(duty: &Duty) -> std::io::Result<Recruit> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--log-format").arg(telemetry::format().name());
    // The rank is for people who look at processes.
    command.arg("follow").arg("--rank").arg(duty.rank.to_string());
    Ok(Recruit {
        rank: duty.rank,
        gpu: duty.gpu,
        command,
        told: serde_json::to_string(duty)?,
    })
}

#[cfg(feature = "nccl")]
fn load(
    group: &Group,
    files: &ModelFiles,
    dtype: DType,
    limits: &Limits,
    max_tokens: usize,
    ranks: Tcp,
) -> Result<ModelRunner, DeviceError> {
    fn of<T: Float>(
        gpu: &Gpu,
        files: &ModelFiles,
        limits: &Limits,
        max_tokens: usize,
        nccl: Nccl,
    ) -> Result<Box<DeviceRunner<T>>, DeviceError> {
        let source = files.tensors();
        DeviceRunner::load_in_group(gpu, files.config(), source, limits, max_tokens, nccl).map(Box::new)
    }
    let gpu = Gpu::new(group.places.first())?;
    let nccl = Nccl::new(&gpu, ranks)?;
    Ok(if dtype == DType::BF16 {
        ModelRunner::Rounded(of(&gpu, files, limits, max_tokens, nccl)?)
    } else {
        ModelRunner::Exact(of(&gpu, files, limits, max_tokens, nccl)?)
    })
}

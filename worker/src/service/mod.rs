//! What role `serve` offers, apart from HTTP: messages in, text and verdicts out, over one engine thread.
//!
//! | file | what |
//! |---|---|
//! | [`media`] | image URLs to pictures, hostile ones refused |
//! | [`prompt`](mod@prompt) | messages to prompts, off the async threads |
//! | [`raw_prompt`] | a text or its tokens to a prompt |
//! | [`rehearsal`] | the first steps on a GPU, before anybody asks |
//! | [`wanted`] | what is drawn after a prompt, and what its text must be |
//! | [`generation`] | tokens of one request as text, per sample |
//! | [`text`] | ids to text piece by piece, stop strings |
//! | [`critics`] | the templates by which the critic is asked, by name |
//! | [`visuals`] | prompts over pictures that are prepared already |
//! | [`verdict`] | what a critic's text says, and how sure its tokens were |
//! | [`metrics`] | counters and latencies |
//! | [`account`] | what one HTTP request has cost so far |

pub mod account;
pub mod critics;
pub mod generation;
pub mod media;
pub mod metrics;
pub mod prompt;
pub mod raw_prompt;
pub mod rehearsal;
pub mod text;
pub mod verdict;
pub mod visuals;
pub mod wanted;

use std::{
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use candle_core::DType;
use flotilla_api::role::{EngineSettings, Purpose, Serve};
use flotilla_engine::{EngineHandle, EngineThread, Limits, Overloaded};
use flotilla_model::{Config, Processor};
use tokio::sync::Semaphore;

use self::{critics::Critics, media::Media, metrics::Metrics, wanted::Compiler};
use crate::{
    device::{Place, Wanted},
    error::WorkerError,
    group::Group,
    prompt::critic::CriticTemplate,
    runner::{CACHE_SHARE, ModelRunner, default_dtype, dtype_of},
};

/// Bytes that keys and values of all running samples may take.
const CACHE_BYTES: usize = 2 << 30;

/// Version of weights whose digest nobody told.
const BASE_VERSION: &str = "base";

/// Prompts that are prepared at once. Each may hold decoded pictures; the others wait with their encoded ones.
const PREPARED_AT_ONCE: usize = 4;

/// A loaded model with everything that turns requests into prompts and tokens into answers.
#[derive(Debug)]
pub struct Service {
    /// Name under which the model is listed.
    pub name: String,
    /// Which endpoints are offered.
    pub purpose: Purpose,
    /// Longest prompt plus completion, in tokens.
    pub max_model_len: usize,
    /// Seconds since 1970 at which the model was loaded.
    pub created: i64,
    /// Counters and latencies.
    pub metrics: Metrics,
    engine: EngineHandle<ModelRunner>,
    processor: Processor,
    critics: Critics,
    media: Media,
    preparing: Arc<Semaphore>,
    compiler: Compiler,
    preparations: AtomicUsize,
    max_queue: usize,
}

/// A place for the service, empty while the model is being loaded. Cloning shares the place.
#[derive(Clone, Debug, Default)]
pub struct Slot(Arc<OnceLock<Arc<Service>>>);

impl Slot {
    /// The service, once it is there.
    pub fn get(&self) -> Option<Arc<Service>> {
        self.0.get().cloned()
    }

    /// Puts the service in its place; only the first one stays.
    pub fn fill(&self, service: Service) {
        let _ = self.0.set(Arc::new(service));
    }
}

impl Service {
    /// Reads model and processor files and starts the engine's thread. The critic is asked by the first of the templates
    /// where a request names none. With a group, the GPUs of that share the model; its processes are watched by the tokio
    /// runtime within which this is called.
    pub fn load(
        directory: &Path,
        spec: &Serve,
        templates: Vec<(String, CriticTemplate)>,
        metrics: Metrics,
        device: Wanted,
        group: Option<&Group>,
    ) -> Result<(Self, EngineThread), WorkerError> {
        Self::load_within(directory, spec, templates, metrics, device, group, |limits| limits)
    }

    /// As [`Self::load`], with the engine's limits adjusted.
    pub fn load_within(
        directory: &Path,
        spec: &Serve,
        templates: Vec<(String, CriticTemplate)>,
        metrics: Metrics,
        device: Wanted,
        group: Option<&Group>,
        adjust: impl FnOnce(Limits) -> Limits,
    ) -> Result<(Self, EngineThread), WorkerError> {
        let failed = |what: &str| format!("failed to {what} in {}", directory.display());
        let media = Media::new(&spec.media, metrics.clone())?;
        // A group has its GPUs, whatever they look like by now: the CPU would be no way out.
        let device = group.map_or(device, |group| Wanted::Cuda(Some(group.places.first())));
        let opened = device.open()?;
        let dtype = spec.engine.dtype.map_or(default_dtype(opened.place), dtype_of);
        let config =
            Config::load(directory).map_err(|error| WorkerError::permanent(failed("load the model"), error))?;
        let processor =
            Processor::load(directory).map_err(|error| WorkerError::permanent(failed("load the processor"), error))?;
        let critics = Critics::new(templates, processor.tokenizer());
        let copies = group.map_or(1, |group| group.places.copies(&config));
        let mut limits = limits(&spec.engine, copies * bytes_per_token(&config, dtype));
        let version = spec.model.digest.as_deref().unwrap_or(BASE_VERSION);
        let max_model_len = config.text.max_position_embeddings.min(spec.max_model_len as usize);
        let seed = spec.model.random_seed;
        let mut runner = ModelRunner::read(directory, seed, dtype, &opened, &limits, max_model_len, group)?;
        if spec.engine.kv_blocks.is_none() && spec.engine.kv_cache_bytes.is_none() {
            let room = runner.room(CACHE_SHARE, limits.block_size);
            limits.kv_blocks = room.unwrap_or(limits.kv_blocks);
        } else if group.is_some() {
            // The others allocate at the first step: too late for a server that is ready.
            has_room(&limits, runner.room(1.0, limits.block_size))?;
        }
        let limits = adjust(limits);
        if opened.place != Place::Cpu {
            rehearsal::rehearse(&mut runner, &processor, limits, max_model_len.min(limits.kv_tokens()))?;
        }
        let (thread, engine) = EngineThread::spawn(runner, version, limits, spec.max_queue as usize)
            .map_err(|error| WorkerError::retryable("failed to start the engine's thread", error))?;
        let service = Self {
            name: spec.served_model_name.clone(),
            purpose: spec.purpose,
            max_model_len: max_model_len.min(limits.kv_tokens()),
            created: jiff::Timestamp::now().as_second(),
            metrics,
            engine,
            processor,
            critics,
            media,
            preparing: Arc::new(Semaphore::new(PREPARED_AT_ONCE)),
            compiler: Compiler::default(),
            preparations: AtomicUsize::new(0),
            max_queue: spec.max_queue as usize,
        };
        Ok((service, thread))
    }

    /// Requests before their first token: those whose prompt is being prepared and those that the engine has.
    pub fn waiting(&self) -> usize {
        self.preparations.load(Ordering::Relaxed) + self.engine.queued()
    }

    /// A place among the prompts that are prepared, if not too many requests wait.
    fn queue(self: &Arc<Self>) -> Result<Preparing, ServiceError> {
        let (waiting, limit) = (self.waiting(), self.max_queue);
        if waiting >= limit {
            return Err(Overloaded { waiting, limit }.into());
        }
        self.preparations.fetch_add(1, Ordering::Relaxed);
        Ok(Preparing(self.clone()))
    }

    /// Work that blocks, few at a time, beside the async threads. Its permit and its place are held as long as it works, also
    /// where the client that wanted it is gone.
    async fn apart<R: Send + 'static>(
        self: &Arc<Self>,
        what: &str,
        place: Option<Preparing>,
        work: impl FnOnce(&Self) -> Result<R, ServiceError> + Send + 'static,
    ) -> Result<R, ServiceError> {
        let permit = self.preparing.clone().acquire_owned().await;
        let held = (permit.map_err(|_| ServiceError::Stopped)?, place);
        let service = self.clone();
        let working = tokio::task::spawn_blocking(move || {
            let _held = held;
            work(&service)
        });
        let done = working.await;
        done.map_err(|error| ServiceError::Engine(format!("failed to {what}: {error}")))?
    }

    /// Waits until the engine computes nothing, at most so long.
    pub async fn idle(&self, limit: Duration) {
        let mut health = self.engine.health();
        // Whoever asks goes on either way.
        let _ = tokio::time::timeout(limit, health.wait_for(|health| !health.busy)).await;
    }

    /// The processor of the checkpoint.
    pub fn processor(&self) -> &Processor {
        &self.processor
    }

    /// The templates by which the critic is asked.
    pub fn critics(&self) -> &Critics {
        &self.critics
    }

    /// What the engine holds and has done.
    pub fn stats(&self) -> &flotilla_engine::Stats {
        self.engine.stats()
    }
}

/// A place among the prompts that are prepared; dropping it gives it back.
struct Preparing(Arc<Service>);

impl Drop for Preparing {
    fn drop(&mut self) {
        self.0.preparations.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The engine's limits: what is set, else what [`CACHE_BYTES`] and the engine's own defaults give.
fn limits(settings: &EngineSettings, bytes_per_token: usize) -> Limits {
    let defaults = Limits::default();
    let bytes = settings
        .kv_cache_bytes
        .map_or(CACHE_BYTES, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    let given = |value: Option<u32>, otherwise: usize| value.map_or(otherwise, |value| value as usize).max(1);
    Limits {
        kv_blocks: given(settings.kv_blocks, bytes / (bytes_per_token * defaults.block_size)),
        max_rows: given(settings.max_rows, defaults.max_rows),
        max_step_tokens: given(settings.max_step_tokens, defaults.max_step_tokens),
        ..defaults
    }
}

/// Whether the blocks that were asked for fit on every GPU of a group, the fullest of which has `room`.
fn has_room(limits: &Limits, room: Option<usize>) -> Result<(), WorkerError> {
    let (blocks, tokens) = (limits.kv_blocks, limits.kv_tokens());
    match room {
        Some(room) if room < blocks => Err(WorkerError::invalid(format!(
            "keys and values of {tokens} tokens ({blocks} blocks) were asked for, and the GPU with the least free memory has room \
             for {} ({room} blocks): take fewer by kvCacheBytes or kvBlocks, or leave both out for as many as fit",
            room * limits.block_size
        ))),
        _ => Ok(()),
    }
}

/// Bytes of keys and values that one token of one sample takes, over all layers.
fn bytes_per_token(config: &Config, dtype: DType) -> usize {
    (config.text.kv_values_per_token() * dtype.size_in_bytes()).max(1)
}

/// Why a request is not answered.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The request itself is wrong; `param` names the field.
    #[error("{message}")]
    Invalid {
        /// The field.
        param: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The prompt leaves no room for a completion.
    #[error(
        "this model's context is {limit} tokens, but the prompt has {prompt} tokens and {completion} more were asked \
         for"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        completion: usize,
        /// Tokens of the context.
        limit: usize,
    },
    /// Too many requests wait.
    #[error(transparent)]
    Overloaded(#[from] flotilla_engine::Overloaded),
    /// The model failed on the request.
    #[error("the model failed: {0}")]
    Engine(String),
    /// The request took longer than it may.
    #[error("the request took longer than it may: ask for fewer tokens, or later")]
    Deadline,
    /// New weights were loaded, and the request was to end.
    #[error("new weights were loaded while the request ran: ask again")]
    Aborted,
    /// The engine has stopped.
    #[error("the engine has stopped")]
    Stopped,
}

impl ServiceError {
    /// A field that is wrong.
    pub fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid {
            param,
            message: message.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_for_which_the_fullest_gpu_has_no_room_are_refused_with_the_number_that_fits() {
        let limits = Limits {
            kv_blocks: 100,
            block_size: 16,
            ..Limits::default()
        };
        assert!(has_room(&limits, Some(100)).is_ok() && has_room(&limits, None).is_ok());
        let text = has_room(&limits, Some(60)).expect_err("no room").to_string();
        assert!(
            text.contains("1600 tokens (100 blocks)") && text.contains("960 (60 blocks)"),
            "{text}"
        );
    }

    #[test]
    fn a_cache_is_sized_by_its_blocks_else_by_its_bytes() {
        let by_bytes = EngineSettings {
            kv_cache_bytes: Some(1 << 20),
            max_rows: Some(0),
            ..EngineSettings::default()
        };
        let sized = limits(&by_bytes, 64);
        assert_eq!(sized.kv_blocks * sized.block_size * 64, 1 << 20);
        assert_eq!(
            (sized.max_rows, sized.max_step_tokens),
            (1, Limits::default().max_step_tokens)
        );
        let by_blocks = EngineSettings {
            kv_blocks: Some(7),
            ..by_bytes
        };
        assert_eq!(limits(&by_blocks, 64).kv_blocks, 7);
    }
}

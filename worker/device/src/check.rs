//! The model on the card beside the model of the host, through the engine: the same requests, the same tokens.

use flotilla_engine::{Group, Limits, Prompt, Request, Sampling, VlmRunner, generate};
use flotilla_kernels::{Float, Gpu};
use flotilla_model::{Config, LoadOptions, Row, Vlm};

use crate::{error::DeviceError, runner::DeviceRunner};
#[cfg(feature = "nccl")]
use crate::{
    parallel::{Collective, Nccl},
    runner::follow,
};

/// How the card's answers differ from the host's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Difference {
    /// Tokens that were compared: up to the first that differs in each sample.
    pub tokens: usize,
    /// Samples, and those that are equal to their end.
    pub samples: usize,
    /// Equal samples.
    pub equal: usize,
    /// Mean of `|d|` of log-probabilities of equal tokens.
    pub mean: f64,
    /// The largest, of watched tokens too.
    pub most: f64,
}

impl Difference {
    /// Of both comparisons.
    fn and(self, other: Self) -> Self {
        let tokens = self.tokens + other.tokens;
        let sum = self.mean * self.tokens as f64 + other.mean * other.tokens as f64;
        // Not `max`, which drops what is no number.
        let less = self.most < other.most || other.most.is_nan();
        Self {
            tokens,
            samples: self.samples + other.samples,
            equal: self.equal + other.equal,
            mean: sum / tokens.max(1) as f64,
            most: if less { other.most } else { self.most },
        }
    }
}

/// Requests of every kind over a model's vocabulary: groups and single samples, long and short prompts, greedy and drawn, with
/// watched tokens and without.
pub fn requests(vocabulary: usize) -> Vec<Request<Prompt>> {
    let kinds = [
        (5, 1, 0.0, 1.0, 0),
        (200, 6, 1.0, 1.0, 0),
        (33, 2, 0.7, 1.0, 0),
        (1, 3, 1.0, 1.0, 0),
        (150, 9, 1.3, 1.0, 0),
        (64, 1, 0.0, 1.0, 0),
    ];
    let request = |(index, (tokens, n, temperature, top_p, top_k)): (usize, (usize, usize, f32, f32, usize))| {
        let id = |at: usize| ((at * 7919 + index * 104_729 + 13) % vocabulary) as u32;
        let sampling = Sampling {
            temperature,
            top_p,
            top_k,
            max_tokens: 40,
            seed: index as u64,
            watched_ids: match index % 2 {
                0 => vec![id(1), id(2), id(1)],
                _ => Vec::new(),
            },
            ..Sampling::default()
        };
        let row = Row::text((0..tokens).map(id).collect());
        Request::new(Prompt::new(row, Vec::new()), n, sampling)
    };
    kinds.into_iter().enumerate().map(request).collect()
}

/// Compares groups of the card with those of the host.
pub fn compare(card: &[Group], host: &[Group]) -> Difference {
    let mut difference = Difference::default();
    let mut sum = 0.0;
    for (card, host) in card
        .iter()
        .zip(host)
        .flat_map(|(a, b)| a.completions.iter().zip(&b.completions))
    {
        difference.samples += 1;
        let mut equal = card.tokens.len() == host.tokens.len();
        for (a, b) in card.tokens.iter().zip(&host.tokens) {
            if a.id != b.id {
                equal = false;
                break;
            }
            let apart = f64::from((a.log_probability - b.log_probability).abs());
            difference.tokens += 1;
            sum += apart;
            let watched = a.watched.iter().zip(&b.watched).map(|(a, b)| f64::from((a - b).abs()));
            let missing = (a.watched.len() != b.watched.len()).then_some(f64::INFINITY);
            for apart in watched.chain(missing).chain([apart]) {
                if apart.is_nan() || apart > difference.most {
                    difference.most = apart;
                }
            }
        }
        difference.equal += usize::from(equal);
    }
    difference.mean = sum / difference.tokens.max(1) as f64;
    difference
}

/// The longest sequence of [`requests`].
const MAX_TOKENS: usize = 512;

/// Small blocks and steps, so that prompts come in chunks and prefixes are shared.
fn limits() -> Limits {
    Limits {
        max_rows: 12,
        max_step_tokens: 64,
        kv_blocks: 512,
        block_size: 16,
        ..Limits::default()
    }
}

/// Random weights of a configuration, in `T` on the card and in f32 on the host, over [`requests`], and over the same that watch
/// no tokens: their decode steps are begun before the tokens of the one before are read.
pub fn text<T: Float>(gpu: &Gpu, config: &Config, seed: u64) -> Result<Difference, DeviceError> {
    let model = Vlm::random(config.clone(), seed, &LoadOptions::default())?;
    let mut requests = requests(config.text.vocab_size);
    let watching = beside_host::<T>(gpu, &model, &requests)?;
    for request in &mut requests {
        request.sampling.watched_ids.clear();
    }
    Ok(watching.and(beside_host::<T>(gpu, &model, &requests)?))
}

/// The same by a group of GPUs, of which each rank calls this: what rank 0 finds.
#[cfg(feature = "nccl")]
pub fn text_in_group<T: Float>(
    gpu: &Gpu,
    config: &Config,
    seed: u64,
    nccl: Nccl,
) -> Result<Option<Difference>, DeviceError> {
    let model = Vlm::random(config.clone(), seed, &LoadOptions::default())?;
    if nccl.rank() > 0 {
        follow::<T>(gpu, config, model.weights(), &limits(), MAX_TOKENS, nccl)?;
        return Ok(None);
    }
    let runner = DeviceRunner::<T>::load_in_group(gpu, config, model.weights(), &limits(), MAX_TOKENS, nccl)?;
    generated(runner, &model, &requests(config.text.vocab_size)).map(Some)
}

/// A model of the host and the same on the card over these requests.
pub(crate) fn beside_host<T: Float>(
    gpu: &Gpu,
    model: &Vlm,
    requests: &[Request<Prompt>],
) -> Result<Difference, DeviceError> {
    let runner = DeviceRunner::<T>::load(gpu, model, &limits(), MAX_TOKENS)?;
    generated(runner, model, requests)
}

fn generated<T: Float>(
    runner: DeviceRunner<T>,
    model: &Vlm,
    requests: &[Request<Prompt>],
) -> Result<Difference, DeviceError> {
    let limits = limits();
    let failed = |error: flotilla_engine::EngineError| DeviceError::Engine(Box::new(error));
    let card = generate(runner, requests, limits, &|| false).map_err(failed)?;
    let host = generate(VlmRunner::new(model, &limits), requests, limits, &|| false).map_err(failed)?;
    Ok(compare(&card, &host))
}

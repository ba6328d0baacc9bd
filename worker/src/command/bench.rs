//! How fast a model runs on this machine, beside what the machine could do at most.

mod shape;

use std::{hint::black_box, time::Instant};

use candle_core::{DType, Device, Tensor};
use clap::{ArgMatches, Args, FromArgMatches, ValueEnum};
use flotilla_grpo::{gradient::Gradients, logprob::token_log_probs};
use flotilla_model::{ModelError, Pass, Row, Span, TextBatch, Vlm};
use serde_json::json;

pub use self::shape::ShapeArguments;
use super::{arguments::ModelArguments, bytes, throughput};
use crate::{
    device::{DeviceArguments, threads},
    error::WorkerError,
    train::parallel::map_parts,
};

/// Arguments of `bench`.
#[derive(Args, Debug)]
pub struct BenchArguments {
    /// Which model.
    #[command(flatten)]
    pub model: MaybeModel,
    /// A shape instead.
    #[command(flatten)]
    pub shape: ShapeArguments,
    /// Where it runs.
    #[command(flatten)]
    pub device: DeviceArguments,
    /// Tokens of the prompt, and of a training row.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub prompt_tokens: usize,
    /// Tokens that are decoded.
    #[arg(long, value_name = "TOKENS", default_value_t = 32)]
    pub new_tokens: usize,
    /// Rows that are decoded and trained together.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Repetitions; the fastest counts.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// What is measured. Training needs memory for the gradient of every parameter.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [What::Prefill, What::Decode, What::Train])]
    pub what: Vec<What>,
    /// Threads that share the rows of a training batch, as those of a learner do; give each one core
    /// (RAYON_NUM_THREADS=1).
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Print one JSON document instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// A model, which may be left out where a shape is named.
#[derive(Clone, Debug, Default)]
pub struct MaybeModel(pub Option<ModelArguments>);

impl Args for MaybeModel {
    fn augment_args(command: clap::Command) -> clap::Command {
        let optional = |argument: clap::Arg| argument.required(false).required_unless_present("shape");
        ModelArguments::augment_args(command).mut_arg("model", optional)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        ModelArguments::augment_args_for_update(command)
    }
}

impl FromArgMatches for MaybeModel {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let model = matches
            .contains_id("model")
            .then(|| ModelArguments::from_arg_matches(matches));
        Ok(Self(model.transpose()?))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Bytes that are read to measure the memory: more than any cache holds. A copy on a GPU is of twice as many.
const MEMORY_BYTES: usize = 1 << 29;
/// Side of the matrices that measure the arithmetic of cores; a GPU needs larger ones.
const MATRIX: usize = 2048;

/// Tokens of a block of keys and values.
const BLOCK: usize = 16;

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum What {
    /// A prompt.
    Prefill,
    /// One token after another.
    Decode,
    /// Log-probabilities of every token, and the gradient of their mean.
    Train,
    /// Requests through the engine: 1, 8, 32 and 128 at once and a group over one prompt, beside one after the other.
    Engine,
}

/// One line of the table.
#[derive(Debug)]
struct Line {
    kind: What,
    what: String,
    tokens_per_second: f64,
    ceiling: f64,
    ceiling_is: &'static str,
}

/// Prints the table.
pub fn run(arguments: &BenchArguments) -> Result<(), WorkerError> {
    let fits = arguments.prompt_tokens > 0 && arguments.new_tokens > 0 && arguments.batch > 0 && arguments.rounds > 0;
    if !fits {
        return Err(WorkerError::invalid(
            "--prompt-tokens, --new-tokens, --batch and --rounds must be at least 1",
        ));
    }
    let Some(named) = &arguments.model.0 else {
        return shape::run(&arguments.shape, arguments.device.device, arguments.json);
    };
    let model = named.load(arguments.device.device)?;
    let failed = |error: ModelError| WorkerError::permanent("failed to compute", error);
    let bandwidth = memory_bandwidth(model.device(), arguments.rounds).map_err(failed)?;
    let arithmetic = matrix_rate(model.device(), model.dtype(), arguments.rounds).map_err(failed)?;
    let lines = measure(arguments, &model, bandwidth, arithmetic).map_err(failed)?;
    let engine = if arguments.what.contains(&What::Engine) {
        let measured = throughput::measure(&model, arguments.prompt_tokens, arguments.new_tokens);
        measured.map_err(|error| WorkerError::permanent("failed to generate", error))?
    } else {
        Vec::new()
    };
    if arguments.json {
        let measured = lines.iter().map(|line| {
            json!({
                "name": name(line.kind), "what": line.what, "tokens_per_second": line.tokens_per_second, "ceiling": line.ceiling,
                "ratio": line.tokens_per_second / line.ceiling,
            })
        });
        let document = json!({
            "memory_bytes_per_second": bandwidth, "flops": arithmetic, "dtype": named.dtype.to_string(),
            "measured": measured.collect::<Vec<_>>(), "engine": throughput::document(&engine),
        });
        println!("{document:#}");
        return Ok(());
    }
    println!(
        "memory {}/s, matrix products {:.1} GFLOP/s in {}",
        bytes(bandwidth as u64),
        arithmetic / 1e9,
        named.dtype
    );
    print(&lines, &engine);
    Ok(())
}

fn print(lines: &[Line], engine: &[throughput::Throughput]) {
    println!(
        "{:<34} {:>12} {:>12} {:>7}  AT MOST BY",
        "WHAT", "TOKENS/S", "AT MOST", "RATIO"
    );
    for line in lines {
        let ratio = line.tokens_per_second / line.ceiling;
        println!(
            "{:<34} {:>12.1} {:>12.1} {ratio:>7.2}  {}",
            line.what, line.tokens_per_second, line.ceiling, line.ceiling_is
        );
    }
    if !engine.is_empty() {
        throughput::print(engine);
    }
}

fn measure(arguments: &BenchArguments, model: &Vlm, bandwidth: f64, arithmetic: f64) -> Result<Vec<Line>, ModelError> {
    let costs = Costs::of(model, bandwidth, arithmetic);
    let measured = arguments.what.iter().filter_map(|what| match what {
        What::Prefill => Some(prefill(arguments, model, &costs)),
        What::Decode => Some(decode(arguments, model, &costs)),
        What::Train => Some(train(arguments, model, &costs)),
        What::Engine => None,
    });
    measured.collect()
}

fn name(what: What) -> String {
    what.to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What a token costs, and what the machine can do.
#[derive(Debug)]
struct Costs {
    /// Values of the layers' matrices.
    layers: f64,
    /// Values of the output head.
    head: f64,
    /// Bytes of a value.
    size: f64,
    /// Bytes per second.
    bandwidth: f64,
    /// Floating-point operations per second.
    arithmetic: f64,
}

impl Costs {
    fn of(model: &Vlm, bandwidth: f64, arithmetic: f64) -> Self {
        let text = &model.config().text;
        Self {
            layers: matrix_values(model) as f64,
            head: (text.vocab_size * text.hidden_size) as f64,
            size: model.dtype().size_in_bytes() as f64,
            bandwidth,
            arithmetic,
        }
    }
}

/// Token ids of a prompt.
fn ids(model: &Vlm, length: usize) -> Vec<u32> {
    let vocabulary = model.config().text.vocab_size;
    (0..length).map(|i| ((i * 7919 + 13) % vocabulary) as u32).collect()
}

/// A prompt that is computed at once.
fn whole<'a>(row: &'a Row, blocks: &'a [u32]) -> Span<'a> {
    Span {
        ids: &row.ids,
        positions: &row.positions,
        features: Vec::new(),
        stored: 0,
        blocks,
        wanted: true,
    }
}

/// Only the last position's logits are computed.
fn prefill(arguments: &BenchArguments, model: &Vlm, costs: &Costs) -> Result<Line, ModelError> {
    let length = arguments.prompt_tokens;
    let row = Row::text(ids(model, length));
    let blocks = (0..length.div_ceil(BLOCK) as u32).collect::<Vec<_>>();
    let mut pool = model.pool(blocks.len(), BLOCK)?;
    let seconds = fastest(model.device(), arguments.rounds, || {
        let hidden = model.extend(&mut pool, &[whole(&row, &blocks)])?;
        model.logits(&hidden, Pass::Infer)
    })?;
    Ok(Line {
        kind: What::Prefill,
        what: format!("prefill of {length} tokens"),
        tokens_per_second: length as f64 / seconds,
        ceiling: costs.arithmetic / (2.0 * costs.layers),
        ceiling_is: "matrix products",
    })
}

fn decode(arguments: &BenchArguments, model: &Vlm, costs: &Costs) -> Result<Line, ModelError> {
    let (length, batch, new) = (arguments.prompt_tokens, arguments.batch, arguments.new_tokens);
    let text = &model.config().text;
    let row = Row::text(ids(model, length));
    // Every row has blocks of its own, as samples over different prompts do.
    let own = (length + new).div_ceil(BLOCK) as u32;
    let tables = (0..batch as u32).map(|row| (row * own..(row + 1) * own).collect::<Vec<_>>());
    let tables = tables.collect::<Vec<_>>();
    let mut pool = model.pool(batch * own as usize, BLOCK)?;
    for blocks in &tables {
        model.extend(&mut pool, &[whole(&row, blocks)])?;
    }
    let mut best = f64::INFINITY;
    for _ in 0..arguments.rounds {
        let start = Instant::now();
        for step in 0..new {
            let ids = [(step * 31 % text.vocab_size) as u32];
            let positions = [[(length + step) as u32; 3]];
            let spans = tables.iter().map(|blocks| Span {
                ids: &ids,
                positions: &positions,
                features: Vec::new(),
                stored: length + step,
                blocks,
                wanted: true,
            });
            let hidden = model.extend(&mut pool, &spans.collect::<Vec<_>>())?;
            black_box(model.logits(&hidden, Pass::Infer)?);
        }
        model.device().synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    let cached = (batch * (length + new / 2) * text.kv_values_per_token()) as f64;
    let by_memory = batch as f64 * costs.bandwidth / ((costs.layers + costs.head + cached) * costs.size);
    let by_arithmetic = costs.arithmetic / (2.0 * (costs.layers + costs.head));
    Ok(Line {
        kind: What::Decode,
        what: format!("decode of {batch} rows after {length}"),
        tokens_per_second: (batch * new) as f64 / best,
        ceiling: by_memory.min(by_arithmetic),
        ceiling_is: if by_memory < by_arithmetic {
            "memory"
        } else {
            "matrix products"
        },
    })
}

/// As a learner does it: the rows in one part for each thread, the parts' gradients added.
fn train(arguments: &BenchArguments, model: &Vlm, costs: &Costs) -> Result<Line, ModelError> {
    let (length, batch) = (arguments.prompt_tokens, arguments.batch);
    let head = model.weights().get(&model.config().text.head_name());
    let head = head.ok_or_else(|| ModelError::Input("the model has no head".to_owned()))?;
    let variables = model.named_vars().into_iter().map(|(_, var)| var).collect::<Vec<_>>();
    let row = Row::text(ids(model, length));
    let rows = vec![row; batch];
    let threads = threads(model.device(), arguments.threads);
    let parts = rows.chunks(batch.div_ceil(threads)).collect::<Vec<_>>();
    let seconds = fastest(model.device(), arguments.rounds, || {
        let gradients = map_parts(threads, &parts, |rows| {
            let targets = Tensor::new(vec![5u32; rows.len() * length], model.device())?;
            let hidden = model.forward(&TextBatch::new(rows)?, Pass::Train)?.flatten_to(1)?;
            let loss = token_log_probs(&hidden, head.as_tensor(), &targets, 1.0)?.mean_all()?;
            Ok::<_, ModelError>(Gradients::collect(&loss.backward()?, &variables))
        })?;
        Ok(Gradients::sum(&gradients)?)
    })?;
    Ok(Line {
        kind: What::Train,
        what: format!("forward and backward, {batch}x{length}"),
        tokens_per_second: (batch * length) as f64 / seconds,
        ceiling: costs.arithmetic / (6.0 * (costs.layers + costs.head)),
        ceiling_is: "matrix products",
    })
}

/// Values of the language model's matrices that every token is multiplied with, the head left out.
fn matrix_values(model: &Vlm) -> usize {
    let text = &model.config().text;
    let attention = text.hidden_size * (2 * text.q_size() + 2 * text.kv_size());
    text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)
}

/// Seconds of the fastest of several runs, after one that does not count; a GPU is waited for.
fn fastest<T>(
    device: &Device,
    rounds: usize,
    mut work: impl FnMut() -> Result<T, ModelError>,
) -> Result<f64, ModelError> {
    black_box(work()?);
    let mut best = f64::INFINITY;
    for _ in 0..rounds {
        device.synchronize()?;
        let start = Instant::now();
        black_box(work()?);
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Bytes per second that all cores together read, or that a copy on a GPU reads and writes.
pub(super) fn memory_bandwidth(device: &Device, rounds: usize) -> Result<f64, ModelError> {
    if !device.is_cpu() {
        let values = Tensor::zeros(MEMORY_BYTES / 2, DType::F32, device)?;
        let seconds = fastest(device, rounds, || Ok(values.copy()?))?;
        return Ok(4.0 * MEMORY_BYTES as f64 / seconds);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let values = vec![1u64; MEMORY_BYTES / 8];
    let mut best = f64::INFINITY;
    for _ in 0..=rounds {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in values.chunks(values.len().div_ceil(cores)) {
                scope.spawn(move || black_box(part.iter().fold(0u64, |sum, value| sum.wrapping_add(*value))));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(MEMORY_BYTES as f64 / best)
}

/// Floating-point operations per second of a large matrix product.
pub(super) fn matrix_rate(device: &Device, dtype: DType, rounds: usize) -> Result<f64, ModelError> {
    let side = if device.is_cpu() { MATRIX } else { 4 * MATRIX };
    let matrix = Tensor::rand(-1f32, 1f32, (side, side), device)?.to_dtype(dtype)?;
    let seconds = fastest(device, rounds, || Ok(matrix.matmul(&matrix.t()?)?))?;
    Ok(2.0 * (side as f64).powi(3) / seconds)
}

//! What sharing saves in best of n: one request for n candidates and comparisons over an engine that remembers prefixes,
//! beside n requests and the same comparisons over one that does not.

use std::{
    collections::{BTreeMap, HashSet},
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Args;
use flotilla_api::role::{ModelSource, Purpose, Serve};
use flotilla_engine::{EngineThread, Limits, Sampling};
use flotilla_model::Message;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::grouped;
use crate::{
    critic::{
        best_of_n::{Job, Plan},
        bracket::Kind,
        contest::{Round, Rules, play},
        field::Field,
        judge::{Case, Judge, Manner, harmless},
        selector::Selector,
    },
    device::DeviceArguments,
    error::WorkerError,
    prompt::critic::Shows,
    service::{
        Service, ServiceError, Slot, critics, metrics::Metrics, prompt::Conversation, visuals::visuals_of,
        wanted::Wanted,
    },
    uri::Volumes,
};

/// Arguments of `bench-best-of-n`.
#[derive(Args, Clone, Debug)]
pub struct BestOfNArguments {
    /// Directory with config.json, tokenizer.json and, unless the weights are drawn, safetensors.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Draw the weights from this seed in place of reading them.
    #[arg(long, value_name = "SEED")]
    pub random_seed: Option<u64>,
    /// Where it runs.
    #[command(flatten)]
    pub device: DeviceArguments,
    /// Candidates.
    #[arg(long, default_value_t = 128)]
    pub n: usize,
    /// Tokens of a candidate.
    #[arg(long, value_name = "TOKENS", default_value_t = 32)]
    pub max_tokens: usize,
    /// What is asked about the picture.
    #[arg(long, default_value = "What digit is this?")]
    pub question: String,
    /// Side of the picture, in pixels.
    #[arg(long, value_name = "PIXELS", default_value_t = 224)]
    pub picture: u32,
    /// Longest prompt plus completion, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    pub max_model_len: u32,
    /// Of all draws.
    #[arg(long, default_value_t = 0)]
    pub seed: u32,
    /// Print one JSON document instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// What one part of one run took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Tokens of all prompts; that of candidates counts for each of them.
    pub asked: usize,
    /// Prompt tokens that went through the model.
    pub computed: u64,
    /// How long it took.
    pub time: Duration,
}

/// Both parts of one run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    /// Generating the candidates.
    pub candidates: Cost,
    /// Comparing them.
    pub comparisons: Cost,
}

/// Both runs over the same picture and question.
#[derive(Clone, Debug)]
pub struct Measured {
    /// n requests, and comparisons without a memory of prefixes.
    pub naive: Run,
    /// One request for n candidates, and comparisons that share prefixes.
    pub shared: Run,
    /// Comparisons of either run.
    pub compared: usize,
    /// The most prompt tokens that a run may compute that computes no full block of a prefix twice.
    pub distinct: u64,
}

/// Measures and prints.
pub fn run(arguments: &BestOfNArguments) -> Result<(), WorkerError> {
    let measured = measure(arguments)?;
    if arguments.json {
        println!("{:#}", document(arguments, &measured));
    } else {
        print(arguments, &measured);
    }
    Ok(())
}

/// Runs both ways.
pub fn measure(arguments: &BestOfNArguments) -> Result<Measured, WorkerError> {
    if !(1..=128).contains(&arguments.n) || arguments.max_tokens == 0 || arguments.picture == 0 {
        return Err(WorkerError::invalid(
            "--n takes 1 to 128, --max-tokens and --picture at least 1",
        ));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| WorkerError::retryable("failed to start the async runtime", error))?;
    let failed = |error: ServiceError| WorkerError::permanent("failed to compute", error);
    runtime.block_on(async {
        let (service, _thread) = load(arguments, |limits| limits)?;
        let block = Limits::default().block_size;
        let (shared, rounds, texts) = shared(arguments, &service).await.map_err(failed)?;
        let distinct = distinct(arguments, &service, &rounds, &texts, block)
            .await
            .map_err(failed)?;
        // Only full blocks are remembered: none is full before the context is. Pictures are encoded each time.
        let (service, _thread) = load(arguments, |limits| Limits {
            block_size: service.max_model_len,
            kv_blocks: limits.max_rows,
            feature_bytes: 0,
            ..limits
        })?;
        let naive = naive(arguments, &service, &texts).await.map_err(failed)?;
        Ok(Measured {
            naive,
            shared,
            compared: rounds.iter().map(|round| round.matches.len()).sum(),
            distinct,
        })
    })
}

fn load(
    arguments: &BestOfNArguments,
    adjust: impl FnOnce(Limits) -> Limits,
) -> Result<(Arc<Service>, EngineThread), WorkerError> {
    let spec: Serve = spec(arguments, &arguments.model)?;
    let templates = critics::load(None, &BTreeMap::new(), &Volumes::default())?;
    let metrics = Metrics::register(&mut Registry::default(), Slot::default());
    let (service, thread) = Service::load_within(
        &arguments.model,
        &spec,
        templates,
        metrics,
        arguments.device.device,
        None,
        adjust,
    )?;
    Ok((Arc::new(service), thread))
}

fn spec(arguments: &BestOfNArguments, model: &Path) -> Result<Serve, WorkerError> {
    // Fields that a benchmark leaves as they are by default are not named here.
    let spec = json!({
        "model": ModelSource {
            uri: format!("file://{}", model.display()),
            digest: None,
            random_seed: arguments.random_seed,
        },
        "servedModelName": "bench",
        "purpose": Purpose::Both,
        "maxModelLen": arguments.max_model_len,
        "maxQueue": 1024,
    });
    serde_json::from_value(spec).map_err(|error| WorkerError::permanent("failed to describe the server", error))
}

/// A picture of which every row and column is different.
fn picture(side: u32) -> String {
    let pixel = |x: u32, y: u32| image::Rgb([(x * 255 / side) as u8, (y * 255 / side) as u8, (x ^ y) as u8]);
    let mut png = Cursor::new(Vec::new());
    // Writing to memory does not fail.
    let _ = image::RgbImage::from_fn(side, side, pixel).write_to(&mut png, image::ImageFormat::Png);
    format!("data:image/png;base64,{}", STANDARD.encode(png.into_inner()))
}

fn conversation(arguments: &BestOfNArguments) -> Conversation {
    Conversation {
        messages: vec![Message::user(1, &arguments.question)],
        image_urls: vec![picture(arguments.picture)],
    }
}

fn wanted(arguments: &BestOfNArguments, n: usize, seed: u64) -> Wanted {
    Wanted {
        n,
        sampling: Sampling {
            seed,
            ..Sampling::default()
        },
        max_tokens: Some(arguments.max_tokens),
        stops: Vec::new(),
        ignore_eos: true,
        form: None,
    }
}

fn manner() -> Manner {
    Manner {
        think: false,
        temperature: 0.0,
        seed: 0,
        max_tokens: None,
        patient: true,
    }
}

fn rules(arguments: &BestOfNArguments) -> Rules {
    Rules {
        seed: u64::from(arguments.seed),
        both_orders: false,
    }
}

/// One job, as `/v1/critic/best-of-n` does it. Also its rounds, and the candidates as the critic was shown them.
async fn shared(
    arguments: &BestOfNArguments,
    service: &Arc<Service>,
) -> Result<(Run, Vec<Round>, Vec<String>), ServiceError> {
    let plan = Plan {
        conversation: conversation(arguments),
        question: arguments.question.clone(),
        wanted: wanted(arguments, arguments.n, u64::from(arguments.seed)),
        selectors: vec![Selector::Knockout],
        rules: rules(arguments),
        manner: manner(),
        template: None,
        score_template: None,
        strip_thoughts: false,
    };
    let begun = Instant::now();
    let before = computed(service);
    let mut job = Job::begin(service.clone(), plan).await?;
    let (events, _heard) = mpsc::unbounded_channel();
    let candidates = job.candidates(&events).await?;
    let prompt_tokens = job.prompt_tokens();
    let generated = Cost {
        asked: prompt_tokens * arguments.n,
        computed: computed(service) - before,
        time: begun.elapsed(),
    };
    let begun = Instant::now();
    let outcome = job.choose(candidates, &events).await?;
    let report = &outcome.reports[0];
    let compared = Cost {
        asked: report.tally.prompt_tokens,
        computed: computed(service) - before - generated.computed,
        time: begun.elapsed(),
    };
    let run = Run {
        candidates: generated,
        comparisons: compared,
    };
    Ok((run, report.rounds.clone(), outcome.shown))
}

/// n requests, then the same comparisons.
async fn naive(arguments: &BestOfNArguments, service: &Arc<Service>, texts: &[String]) -> Result<Run, ServiceError> {
    let begun = Instant::now();
    let before = computed(service);
    let one = |index: usize| {
        let service = service.clone();
        let wanted = wanted(arguments, 1, u64::from(arguments.seed) + index as u64);
        let conversation = conversation(arguments);
        async move {
            let (prompt, room) = service.prepare(conversation, wanted.max_tokens).await?;
            let visuals = visuals_of(&prompt);
            let generation = service.draw(prompt, room, &wanted).await?;
            let prompt_tokens = generation.prompt_tokens();
            generation.collect().await?;
            Ok::<_, ServiceError>((prompt_tokens, visuals))
        }
        .boxed()
    };
    let generated: Vec<_> = stream::iter((0..arguments.n).map(one))
        .buffered(arguments.n)
        .try_collect()
        .await?;
    let candidates = Cost {
        asked: generated.iter().map(|(tokens, _)| tokens).sum(),
        computed: computed(service) - before,
        time: begun.elapsed(),
    };
    let visuals = generated
        .into_iter()
        .next()
        .map(|(_, visuals)| visuals)
        .unwrap_or_default();
    let begun = Instant::now();
    let case = Case {
        question: arguments.question.clone(),
        visuals,
        texts: texts.to_vec(),
    };
    let judge = judge(service, case)?;
    let entrants = Field::new(texts).entrants();
    let played = play(Kind::Knockout, &entrants, rules(arguments), &judge, |_| {}).await?;
    let comparisons = Cost {
        asked: played.tally.prompt_tokens,
        computed: computed(service) - before - candidates.computed,
        time: begun.elapsed(),
    };
    Ok(Run {
        candidates,
        comparisons,
    })
}

fn judge(service: &Arc<Service>, case: Case) -> Result<Judge, ServiceError> {
    let asking = service.critics().find(None, Shows::Pair)?;
    Judge::new(service.clone(), asking, manner(), case)
}

fn computed(service: &Service) -> u64 {
    service.stats().prefill_tokens.get()
}

/// Tokens of all different full blocks of prefixes of all prompts, and what is left of each prompt after its last one.
async fn distinct(
    arguments: &BestOfNArguments,
    service: &Arc<Service>,
    rounds: &[Round],
    texts: &[String],
    block: usize,
) -> Result<u64, ServiceError> {
    let (prompt, _) = service
        .prepare(conversation(arguments), Some(arguments.max_tokens))
        .await?;
    let case = Case {
        question: harmless(&arguments.question),
        visuals: visuals_of(&prompt),
        texts: texts.to_vec(),
    };
    let judge = judge(service, case)?;
    let mut prompts = vec![prompt.row.ids.clone()];
    for decided in rounds.iter().flat_map(|round| &round.matches) {
        let prompt = judge.forced_prompt(decided.comparison.pair).await?;
        prompts.push(prompt.row.ids.clone());
    }
    Ok(distinct_tokens(&prompts, block))
}

/// The last block of a prompt is computed even if it is known: the logits after its last token are needed.
fn distinct_tokens(prompts: &[Vec<u32>], block: usize) -> u64 {
    let mut seen = HashSet::new();
    let mut tokens = 0;
    for ids in prompts {
        let full = ids.len().saturating_sub(1) / block;
        let fresh = (1..=full).filter(|count| seen.insert(&ids[..count * block])).count();
        tokens += fresh * block + (ids.len() - full * block);
    }
    tokens as u64
}

type Part = fn(&Run) -> Cost;
const PARTS: [(&str, Part); 2] = [
    ("candidates", |run| run.candidates),
    ("comparisons", |run| run.comparisons),
];

fn print(arguments: &BestOfNArguments, measured: &Measured) {
    println!(
        "best of {}, {} comparisons; naive: {} requests, no memory of prefixes; shared: one request, prefixes shared",
        arguments.n, measured.compared, arguments.n
    );
    println!("{:<28} {:>12} {:>12} {:>8}", "", "NAIVE", "SHARED", "RATIO");
    for (name, part) in PARTS {
        let (naive, shared) = (part(&measured.naive), part(&measured.shared));
        let asked = [naive.asked, shared.asked].map(|tokens| grouped(tokens as u64));
        println!(
            "{:<28} {:>12} {:>12}",
            format!("{name}: prompt tokens"),
            asked[0],
            asked[1]
        );
        let (slow, fast) = (naive.computed as f64, shared.computed.max(1) as f64);
        println!(
            "{:<28} {:>12} {:>12} {:>8.1}",
            format!("{name}: computed"),
            grouped(naive.computed),
            grouped(shared.computed),
            slow / fast
        );
        let (slow, fast) = (naive.time.as_secs_f64(), shared.time.as_secs_f64());
        println!(
            "{:<28} {slow:>12.2} {fast:>12.2} {:>8.1}",
            format!("{name}: seconds"),
            slow / fast.max(1e-9)
        );
    }
    println!(
        "a run that computes no full block twice computes at most {} prompt tokens",
        grouped(measured.distinct)
    );
}

fn document(arguments: &BestOfNArguments, measured: &Measured) -> Value {
    let cost = |cost: Cost| json!({"prompt_tokens": cost.asked, "computed": cost.computed, "seconds": cost.time.as_secs_f64()});
    let run = |run: &Run| json!({"candidates": cost(run.candidates), "comparisons": cost(run.comparisons)});
    json!({
        "n": arguments.n,
        "comparisons": measured.compared,
        "naive": run(&measured.naive),
        "shared": run(&measured.shared),
        "distinct_prefix_tokens": measured.distinct,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_block_counts_once_and_what_follows_the_last_block_each_time() {
        let first: Vec<u32> = (0..10).collect();
        let mut second = first.clone();
        second[9] = 99;
        // Two blocks of four are shared, two tokens follow in each.
        assert_eq!(distinct_tokens(&[first.clone(), second], 4), 8 + 2 + 2);
        // A prompt of whole blocks computes its last one for the logits.
        assert_eq!(
            distinct_tokens(&[first[..8].to_vec(), first[..8].to_vec()], 4),
            4 + 4 + 4
        );
    }
}

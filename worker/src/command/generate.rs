//! Answers to a conversation.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    time::Instant,
};

use clap::Args;
use flotilla_engine::{FinishReason, Limits, Prompt, Request, Sampling, engine_for};
use flotilla_model::Tokenizer;
use serde_json::{Value, json};

use super::{
    arguments::{MediaArguments, ModelArguments},
    messages,
};
use crate::{device::DeviceArguments, error::WorkerError, runner::ModelRunner, service::text::Detokenizer};

/// Arguments of `generate`.
#[derive(Args, Debug)]
pub struct GenerateArguments {
    /// Which model.
    #[command(flatten)]
    pub model: ModelArguments,
    /// Where it runs.
    #[command(flatten)]
    pub device: DeviceArguments,
    /// How pictures and videos are read.
    #[command(flatten)]
    pub media: MediaArguments,
    /// File of messages (JSON, OpenAI content parts).
    #[arg(long, value_name = "FILE")]
    pub messages: PathBuf,
    /// Completions; they share one computation of the prompt.
    #[arg(long, default_value_t = 1)]
    pub n: usize,
    /// Divides the logits; 0 takes the most likely token.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Draw from the smallest set of tokens whose probability reaches this share.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Seed of every draw.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Tokens after which a completion ends.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub max_tokens: usize,
    /// Go on after a token that ends a turn.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Print one JSON document instead of text.
    #[arg(long)]
    pub json: bool,
}

/// One completion on its way.
#[derive(Debug, Default)]
struct Draft {
    ids: Vec<u32>,
    log_probabilities: Vec<f32>,
    finish: Option<FinishReason>,
    detokenizer: Detokenizer,
    text: String,
}

/// Prints the completions; a single one as its tokens come.
pub fn run(arguments: &GenerateArguments) -> Result<(), WorkerError> {
    if arguments.n == 0 {
        return Err(WorkerError::invalid("--n is 0: at least one completion is drawn"));
    }
    let processor = arguments.model.processor(&arguments.media)?;
    let conversation = messages::read(&arguments.messages, processor.sampling(), arguments.media.upright)
        .map_err(|error| WorkerError::permanent("failed to read the messages", error))?;
    let begin = Instant::now();
    let opened = arguments.device.device.open()?;
    let model = arguments.model.load_for_engine(&opened)?;
    let context = model.config().text.max_position_embeddings;
    let room = context.saturating_sub(arguments.max_tokens);
    let prepared = processor
        .prepare(&conversation.messages, &conversation.media, room)
        .map_err(|error| WorkerError::permanent("failed to prepare the prompt", error))?;
    let prompt_tokens = prepared.ids.len();
    tracing::info!(prompt_tokens, seconds = begin.elapsed().as_secs_f64(), "model loaded");
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_p: arguments.top_p,
        seed: arguments.seed,
        max_tokens: arguments.max_tokens,
        stop_ids: if arguments.ignore_eos {
            Vec::new()
        } else {
            processor.tokenizer().stop_ids().to_vec()
        },
        ..Sampling::default()
    };
    let request = Request::new(Prompt::from(prepared), arguments.n, sampling);
    let begin = Instant::now();
    let failed = |error: flotilla_engine::EngineError| WorkerError::permanent("failed to generate", error);
    let limits = Limits::default();
    let runner = ModelRunner::new(model, &opened, &limits, context)?;
    let mut engine = engine_for(runner, "", std::slice::from_ref(&request), limits).map_err(failed)?;
    engine.submit(&request).map_err(failed)?;
    let mut drafts = Vec::new();
    drafts.resize_with(arguments.n, Draft::default);
    let mut out = std::io::stdout();
    let streams = arguments.n == 1 && !arguments.json;
    let mut first_token = None;
    while !engine.is_idle() {
        let step = engine.step().map_err(failed)?;
        if let Some((_, error)) = step.failures.into_iter().next() {
            return Err(failed(error));
        }
        for event in step.events {
            first_token.get_or_insert_with(|| begin.elapsed().as_secs_f64());
            let Some(draft) = drafts.get_mut(event.sample) else {
                continue;
            };
            let piece = draft.push(&event, processor.tokenizer());
            if streams {
                print_piece(&mut out, &piece)?;
            }
        }
        report_progress(&drafts, streams, begin);
    }
    let seconds = begin.elapsed().as_secs_f64();
    clear_progress(streams);
    if arguments.json {
        println!("{:#}", document(&drafts, prompt_tokens, first_token, seconds));
    } else if streams {
        println!();
    } else {
        for (index, draft) in drafts.iter().enumerate() {
            println!("--- {index} ({} tokens, {})", draft.ids.len(), draft.reason());
            println!("{}", draft.text);
        }
    }
    let tokens = drafts.iter().map(|draft| draft.ids.len()).sum::<usize>();
    let rate = tokens as f64 / seconds;
    tracing::info!(prompt_tokens, tokens, seconds, rate, "generated");
    Ok(())
}

impl Draft {
    /// Takes a token in; the text that it adds.
    fn push(&mut self, event: &flotilla_engine::Event, tokenizer: &Tokenizer) -> String {
        self.ids.push(event.token.id);
        self.log_probabilities.push(event.token.log_probability);
        self.finish = event.finish;
        let mut piece = if event.finish == Some(FinishReason::Stop) {
            String::new()
        } else {
            self.detokenizer.push(event.token.id, tokenizer)
        };
        if event.finish.is_some() {
            piece.push_str(&self.detokenizer.finish());
        }
        self.text.push_str(&piece);
        piece
    }

    fn reason(&self) -> &'static str {
        match self.finish {
            Some(FinishReason::Stop) => "stop",
            Some(FinishReason::Length) | None => "length",
        }
    }
}

fn print_piece(out: &mut std::io::Stdout, piece: &str) -> Result<(), WorkerError> {
    let written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| WorkerError::permanent("failed to write to standard output", error))
}

/// One line on the terminal that is written over at each step, where nothing else is printed meanwhile.
fn report_progress(drafts: &[Draft], streams: bool, begin: Instant) {
    if streams || !std::io::stderr().is_terminal() {
        return;
    }
    let tokens = drafts.iter().map(|draft| draft.ids.len()).sum::<usize>();
    let ended = drafts.iter().filter(|draft| draft.finish.is_some()).count();
    let rate = tokens as f64 / begin.elapsed().as_secs_f64().max(1e-9);
    eprint!(
        "\r\x1b[2K{ended} of {} completions, {tokens} tokens, {rate:.1} tokens/s",
        drafts.len()
    );
}

fn clear_progress(streams: bool) {
    if !streams && std::io::stderr().is_terminal() {
        eprint!("\r\x1b[2K");
    }
}

fn document(drafts: &[Draft], prompt_tokens: usize, first_token: Option<f64>, seconds: f64) -> Value {
    let completions = drafts.iter().enumerate().map(|(index, draft)| {
        json!({
            "index": index, "text": draft.text, "token_ids": draft.ids, "logprobs": draft.log_probabilities,
            "finish_reason": draft.reason(),
        })
    });
    let tokens = drafts.iter().map(|draft| draft.ids.len()).sum::<usize>();
    json!({
        "completions": completions.collect::<Vec<_>>(),
        "usage": {
            "prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens
        },
        "seconds": {"first_token": first_token, "total": seconds},
    })
}

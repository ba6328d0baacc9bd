//! The tokens of one request as text, per sample.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use flotilla_engine::{EngineError, FinishReason, Prompt, Request, Token, Tokens, thread::Output};

use serde::{Serialize, Serializer};
use utoipa::ToSchema;

use super::{
    Service, ServiceError,
    text::{Detokenizer, Piece, StopMatcher},
};

/// Something new about one sample.
#[derive(Clone, Debug)]
pub struct Delta {
    /// Index of the sample.
    pub sample: usize,
    /// Text that is certain by now; may be empty.
    pub text: String,
    /// The token behind it.
    pub token: Token,
    /// Set with the last delta of the sample.
    pub finish: Option<FinishReason>,
    /// Versions of the weights behind the sample so far.
    pub versions: Versions,
}

/// A finished sample.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Text without stop token and stop string.
    pub text: String,
    /// Tokens, a stop token included.
    pub tokens: Vec<Token>,
    /// Why it ended.
    pub finish: Option<FinishReason>,
    /// Versions of the weights that drew it.
    pub versions: Versions,
}

/// Versions of the weights behind a sample; two of them where new ones were loaded while it was drawn.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, ToSchema)]
pub struct Versions {
    /// Of the first token.
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String)]
    pub begun: Arc<str>,
    /// Of the last token.
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String)]
    pub ended: Arc<str>,
}

fn as_text<S: Serializer>(version: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(version)
}

impl Versions {
    /// Takes note of the version behind a token.
    fn push(&mut self, version: Arc<str>) {
        if self.begun.is_empty() {
            self.begun = version.clone();
        }
        self.ended = version;
    }
}

/// A request that is being generated. Dropping it cancels what is left.
#[derive(Debug)]
pub struct Generation {
    service: Arc<Service>,
    output: Tokens,
    samples: Vec<Progress>,
    stop_ids: Vec<u32>,
    min_tokens: usize,
    ready: VecDeque<Delta>,
    unfinished: usize,
    prompt_tokens: usize,
    completion_tokens: usize,
    begun: Instant,
    last_token: Option<Instant>,
}

/// One sample on its way.
#[derive(Clone, Debug)]
struct Progress {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    tokens: usize,
    versions: Versions,
    finished: bool,
}

impl Service {
    /// Sends a request to the engine.
    pub fn generate(
        self: &Arc<Self>,
        request: Request<Prompt>,
        stop_strings: &[String],
    ) -> Result<Generation, ServiceError> {
        let (prompt_tokens, n) = (request.prompt.row.ids.len(), request.n);
        let (stop_ids, min_tokens) = (request.sampling.stop_ids.clone(), request.sampling.min_tokens);
        let output = self.engine.submit(request)?;
        self.metrics.accepted(prompt_tokens);
        let progress = Progress {
            detokenizer: Detokenizer::default(),
            stops: StopMatcher::new(stop_strings.to_vec()),
            tokens: 0,
            versions: Versions::default(),
            finished: false,
        };
        Ok(Generation {
            service: self.clone(),
            output,
            samples: vec![progress; n],
            stop_ids,
            min_tokens,
            ready: VecDeque::new(),
            unfinished: n,
            prompt_tokens,
            completion_tokens: 0,
            begun: Instant::now(),
            last_token: None,
        })
    }
}

impl Generation {
    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Tokens drawn so far, over all samples.
    pub fn completion_tokens(&self) -> usize {
        self.completion_tokens
    }

    /// The next delta, None after the last one.
    pub async fn next(&mut self) -> Option<Result<Delta, ServiceError>> {
        loop {
            if let Some(delta) = self.ready.pop_front() {
                return Some(Ok(delta));
            }
            if self.unfinished == 0 {
                return None;
            }
            match self.output.recv().await {
                Some(Output::Token {
                    sample,
                    token,
                    finish,
                    version,
                }) => self.take(sample, token, finish, version),
                Some(Output::Failed(error)) => return Some(Err(self.fail(error))),
                None => return Some(Err(self.fail(EngineError::Stopped))),
            }
        }
    }

    /// All samples, when the last one has ended.
    pub async fn collect(mut self) -> Result<(Vec<Sample>, usize), ServiceError> {
        let mut samples = vec![Sample::default(); self.samples.len()];
        while let Some(delta) = self.next().await {
            let delta = delta?;
            if let Some(sample) = samples.get_mut(delta.sample) {
                sample.text.push_str(&delta.text);
                sample.tokens.push(delta.token);
                sample.finish = delta.finish;
                sample.versions = delta.versions;
            }
        }
        Ok((samples, self.completion_tokens))
    }

    /// Ends the whole request. What the client asked for and cannot be is its own fault and no failure.
    fn fail(&mut self, error: EngineError) -> ServiceError {
        self.unfinished = 0;
        match error {
            EngineError::InvalidRequest(fault) => ServiceError::invalid("messages", fault),
            EngineError::Deadline => ServiceError::Deadline,
            EngineError::Aborted(_) => ServiceError::Aborted,
            error => {
                self.service.metrics.failed();
                match error {
                    EngineError::Stopped => ServiceError::Stopped,
                    error => ServiceError::Engine(error.to_string()),
                }
            }
        }
    }

    fn take(&mut self, index: usize, token: Token, finish: Option<FinishReason>, version: Arc<str>) {
        let Some(sample) = self.samples.get_mut(index).filter(|sample| !sample.finished) else {
            // A token drawn after a stop string was met.
            return;
        };
        self.completion_tokens += 1;
        sample.tokens += 1;
        sample.versions.push(version);
        // A stop token that ended the sample is no part of the text.
        let silent = finish == Some(FinishReason::Stop) && self.stop_ids.contains(&token.id);
        let mut fresh = String::new();
        if !silent {
            fresh = sample.detokenizer.push(token.id, self.service.processor.tokenizer());
        }
        if finish.is_some() {
            fresh.push_str(&sample.detokenizer.finish());
        }
        let by_engine = finish.is_some();
        let mut piece = if sample.tokens > self.min_tokens {
            sample.stops.push(&fresh)
        } else {
            Piece {
                text: fresh,
                stopped: false,
            }
        };
        let finish = if piece.stopped {
            Some(FinishReason::Stop)
        } else {
            finish
        };
        if finish.is_some() {
            if !piece.stopped {
                piece.text.push_str(&sample.stops.finish());
            }
            if piece.stopped && !by_engine {
                self.output.end(index);
            }
            sample.finished = true;
            self.unfinished -= 1;
        }
        let versions = sample.versions.clone();
        self.time(finish);
        self.ready.push_back(Delta {
            sample: index,
            text: piece.text,
            token,
            finish,
            versions,
        });
    }

    fn time(&mut self, finish: Option<FinishReason>) {
        let now = Instant::now();
        let metrics = &self.service.metrics;
        match self.last_token.replace(now) {
            None => metrics.first_token(now - self.begun),
            // Samples of one request draw their tokens in one step: a gap of nothing is no latency.
            Some(last) if now - last > Duration::from_micros(50) => metrics.next_token(now - last),
            Some(_) => {}
        }
        metrics.token();
        if let Some(finish) = finish {
            metrics.finished(finish, now - self.begun);
        }
    }
}

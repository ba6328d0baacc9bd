//! The critic that the engine is: pairs and candidates become prompts over one picture, prompts become opinions.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use flotilla_engine::{Constraint, FinishReason, Prompt, Request, Sampling};
use flotilla_model::{Content, Message, Part, Visual};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use super::{
    Critic,
    choice::Choice,
    pair::{Opinion, Pair},
    scale::{Distribution, Scale},
};
use crate::{
    prompt::{
        PromptError,
        critic::{Form, Shows},
    },
    service::{
        Service, ServiceError,
        critics::Asking,
        generation::{Generation, Sample},
        prompt::{CONTROL_TOKENS, refuse_control_tokens},
        verdict::{VERDICTS, Verdict, rationale},
    },
};

/// Prompts of one batch that are in the engine at once; each may hold pixels.
const IN_FLIGHT: usize = 64;
/// How long a prompt of a batch that has begun waits for a place in the queue.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at the queue.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// How a critic is asked.
#[derive(Clone, Debug)]
pub struct Manner {
    /// Let it write its thoughts and box its verdict. If not, the probabilities of the labels in a box that is opened for
    /// it decide: no text, and with labels of one token no step but the prompt's.
    pub think: bool,
    /// Of its text; 0 takes the most likely one.
    pub temperature: f32,
    /// Of its text.
    pub seed: u64,
    /// Longest text; what the context leaves if None.
    pub max_tokens: Option<usize>,
    /// Wait for a place in the queue rather than refuse: for batches that have begun.
    pub patient: bool,
}

/// What is judged: answers to one question about the same pictures.
#[derive(Clone, Debug)]
pub struct Case {
    /// The question.
    pub question: String,
    /// Its pictures, as the vision tower reads them.
    pub visuals: Arc<[Visual]>,
    /// The candidates.
    pub texts: Vec<String>,
}

/// A critic over the engine.
#[derive(Clone, Debug)]
pub struct Judge {
    service: Arc<Service>,
    asking: Arc<Asking>,
    manner: Manner,
    case: Arc<Case>,
}

/// A score.
#[derive(Clone, Debug)]
pub struct Scored {
    /// How likely each score is.
    pub distribution: Distribution,
    /// What the critic wrote before; empty unless it was to think.
    pub raw: String,
    /// Why, in its words.
    pub rationale: Option<String>,
    /// Why it stopped writing; None if it wrote nothing.
    pub finish: Option<FinishReason>,
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens that it wrote, or that were weighed.
    pub completion_tokens: usize,
}

impl From<PromptError> for ServiceError {
    fn from(error: PromptError) -> Self {
        Self::invalid("template", crate::error::chain(&error))
    }
}

impl Judge {
    /// A critic of this case. Refuses texts that steer the conversation.
    pub fn new(service: Arc<Service>, asking: Arc<Asking>, manner: Manner, case: Case) -> Result<Self, ServiceError> {
        for text in case.texts.iter().chain([&case.question]) {
            refuse_control_tokens(&Message::user(0, text))?;
        }
        Ok(Self {
            service,
            asking,
            manner,
            case: Arc::new(case),
        })
    }

    /// What the critic says about a pair in this order.
    pub async fn opinion(&self, pair: Pair) -> Result<Opinion, ServiceError> {
        let responses = [self.text(pair.first), self.text(pair.second)];
        let text = self.asking.template.pair(&self.case.question, responses)?;
        if self.manner.think {
            self.written_opinion(text).await
        } else {
            self.forced_opinion(text).await
        }
    }

    async fn written_opinion(&self, text: String) -> Result<Opinion, ServiceError> {
        let (prompt, room) = self.prompt(text, &[], self.manner.max_tokens).await?;
        let asking = &self.asking;
        let watched_ids = asking.tokens.watched_ids();
        let (prompt_tokens, sample) = self.write(prompt, room, watched_ids, &[]).await?;
        let tokenizer = self.service.processor().tokenizer();
        let decode = |ids: &[u32]| tokenizer.decode(ids).unwrap_or_default();
        let form = &asking.template.form;
        Ok(Opinion {
            verdict: Verdict::parse(&sample.text, form),
            margin: asking.tokens.margin(&sample.tokens, decode),
            rationale: rationale(&sample.text, form).map(str::to_owned),
            finish: sample.finish,
            prompt_tokens,
            completion_tokens: sample.tokens.len(),
            raw: sample.text,
        })
    }

    async fn forced_opinion(&self, text: String) -> Result<Opinion, ServiceError> {
        let form = &self.asking.template.form;
        let choice = self.choice("", form, &form.labels)?;
        let weighed = self.weigh(text, &choice).await?;
        let likely = weighed.log_probabilities.iter().copied().enumerate();
        let best = likely.reduce(|best, next| if next.1 > best.1 { next } else { best });
        let margin = match weighed.log_probabilities.as_slice() {
            [first, second, ..] => Some(first - second).filter(|margin| margin.is_finite()),
            _ => None,
        };
        Ok(Opinion {
            verdict: best.and_then(|(index, _)| VERDICTS.get(index).copied()),
            margin,
            prompt_tokens: weighed.prompt_tokens,
            completion_tokens: weighed.completion_tokens,
            ..Opinion::default()
        })
    }

    /// The scale of its template.
    pub fn scale(&self) -> Scale {
        self.asking.template.scale
    }

    /// How the critic scores a candidate. Where it is to think, it writes first, and the box is opened where its text
    /// opens one or ends.
    pub async fn score(&self, candidate: usize, scale: &Scale) -> Result<Scored, ServiceError> {
        let template = &self.asking.template;
        let text = template.one(&self.case.question, self.text(candidate), scale)?;
        let form = &template.form;
        let mut written = Sample::default();
        let mut prompt_tokens = 0;
        if self.manner.think {
            let choice = self.choice("", form, &scale.labels())?;
            let reserve = choice.lead.len() + longest(&choice);
            let wanted = self.manner.max_tokens.map(|most| most.saturating_add(reserve));
            let (prompt, room) = self.prompt(text.clone(), &[], wanted).await?;
            let room = room.saturating_sub(reserve).max(1);
            (prompt_tokens, written) = self
                .write(prompt, room, Vec::new(), std::slice::from_ref(&form.open))
                .await?;
        }
        let choice = self.choice(&written.text, form, &scale.labels())?;
        let weighed = self.weigh(text, &choice).await?;
        let distribution = Distribution::new(scale.scores(), &weighed.log_probabilities)
            .ok_or_else(|| ServiceError::Engine("every score of the scale has probability 0".to_owned()))?;
        Ok(Scored {
            distribution,
            rationale: rationale(&format!("{}{}", written.text, form.open), form).map(str::to_owned),
            finish: written.finish,
            prompt_tokens: prompt_tokens + weighed.prompt_tokens,
            completion_tokens: written.tokens.len() + weighed.completion_tokens,
            raw: written.text,
        })
    }

    /// Scores of several candidates, in their order, as one batch.
    pub async fn scores(&self, candidates: &[usize], scale: &Scale) -> Result<Vec<Scored>, ServiceError> {
        let scores = candidates
            .iter()
            .copied()
            .map(|candidate| self.score(candidate, scale).boxed());
        stream::iter(scores).buffered(IN_FLIGHT).try_collect().await
    }

    fn text(&self, candidate: usize) -> &str {
        self.case.texts.get(candidate).map_or("", String::as_str)
    }

    /// Labels as tokens after what was written and an open box.
    fn choice(&self, written: &str, form: &Form, labels: &[String]) -> Result<Choice, ServiceError> {
        let tokenizer = self.service.processor().tokenizer();
        let open = format!("{written}{}", form.open);
        let choice = Choice::new(&open, labels, &form.close, |text| tokenizer.encode(text));
        choice
            .map_err(|error| ServiceError::Engine(error.to_string()))?
            .ok_or_else(|| ServiceError::invalid("template", "two of its labels have the same tokens"))
    }

    /// The prompt of a pair that is judged without thoughts: what goes through the model for one opinion.
    pub async fn forced_prompt(&self, pair: Pair) -> Result<Arc<Prompt>, ServiceError> {
        let template = &self.asking.template;
        let responses = [self.text(pair.first), self.text(pair.second)];
        let text = template.pair(&self.case.question, responses)?;
        let choice = self.choice("", &template.form, &template.form.labels)?;
        Ok(self.prompt(text, &choice.lead, Some(longest(&choice))).await?.0)
    }

    async fn prompt(
        &self,
        text: String,
        lead: &[u32],
        wanted: Option<usize>,
    ) -> Result<(Arc<Prompt>, usize), ServiceError> {
        let (message, visuals) = (about(&self.case.visuals, &text), self.case.visuals.clone());
        self.service
            .prepare_again(message, visuals, lead.to_vec(), wanted)
            .await
    }

    /// What the critic writes: the tokens of its prompt, and the sample.
    async fn write(
        &self,
        prompt: Arc<Prompt>,
        max_tokens: usize,
        watched_ids: Vec<u32>,
        stops: &[String],
    ) -> Result<(usize, Sample), ServiceError> {
        let sampling = Sampling {
            temperature: self.manner.temperature,
            seed: self.manner.seed,
            max_tokens,
            stop_ids: self.service.processor().tokenizer().stop_ids().to_vec(),
            watched_ids,
            ..Sampling::default()
        };
        let generation = self.submit(&Request::new(prompt, 1, sampling), stops).await?;
        let prompt_tokens = generation.prompt_tokens();
        let (mut samples, _) = generation.collect().await?;
        Ok((prompt_tokens, samples.pop().unwrap_or_default()))
    }

    /// The log-probability of each answer of a choice after the user's text and the choice's lead.
    async fn weigh(&self, text: String, choice: &Choice) -> Result<Weighed, ServiceError> {
        let longest = longest(choice);
        let (prompt, _) = self.prompt(text, &choice.lead, Some(longest)).await?;
        let sampling = Sampling {
            max_tokens: longest,
            ..Sampling::default()
        };
        let mut request = Request::new(prompt, choice.answers.len(), sampling);
        request.constraint = Some(Constraint::Forced(choice.answers.clone()));
        let generation = self.submit(&request, &[]).await?;
        let prompt_tokens = generation.prompt_tokens();
        let (samples, completion_tokens) = generation.collect().await?;
        let log_probabilities = samples.iter().zip(choice.answers.iter()).map(|(sample, answer)| {
            let ids = sample.tokens.iter().map(|token| token.id);
            if !ids.eq(answer.iter().copied()) {
                return Err(ServiceError::Engine(
                    "the engine drew other tokens than it was given".to_owned(),
                ));
            }
            let tokens = sample.tokens.iter().map(|token| f64::from(token.model_log_probability));
            Ok(tokens.sum())
        });
        Ok(Weighed {
            log_probabilities: log_probabilities.collect::<Result<_, _>>()?,
            prompt_tokens,
            completion_tokens,
        })
    }

    async fn submit(&self, request: &Request<Prompt>, stops: &[String]) -> Result<Generation, ServiceError> {
        let begun = Instant::now();
        loop {
            match self.service.generate(request.clone(), stops) {
                Err(ServiceError::Overloaded(_)) if self.manner.patient && begun.elapsed() < PATIENCE => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                outcome => return outcome,
            }
        }
    }
}

impl Critic for Judge {
    type Error = ServiceError;

    async fn judge(&self, pairs: &[Pair]) -> Result<Vec<Opinion>, ServiceError> {
        let opinions = pairs.iter().copied().map(|pair| self.opinion(pair).boxed());
        stream::iter(opinions).buffered(IN_FLIGHT).try_collect().await
    }
}

/// What forced answers gave.
#[derive(Debug)]
struct Weighed {
    log_probabilities: Vec<f64>,
    prompt_tokens: usize,
    completion_tokens: usize,
}

/// Tokens of the longest answer.
fn longest(choice: &Choice) -> usize {
    choice.answers.iter().map(Vec::len).max().unwrap_or(1)
}

/// The user's turn: the visuals, then the text.
fn about(visuals: &[Visual], text: &str) -> Message {
    let media = visuals.iter().map(|visual| match visual.layout.is_video() {
        true => Part::Video,
        false => Part::Image,
    });
    let text = Part::Text { text: text.to_owned() };
    Message {
        role: "user".to_owned(),
        content: Content::Parts(media.chain([text]).collect()),
    }
}

/// Text of a model that does not steer the conversation: its control tokens have a blank in them.
pub fn harmless(text: &str) -> String {
    let steers = CONTROL_TOKENS.iter().any(|token| text.contains(token));
    if steers {
        text.replace("<|", "< |")
    } else {
        text.to_owned()
    }
}

/// Tokens that a template leaves for each candidate in the context of a model, with `reserve` for what the critic writes.
pub async fn room_for_candidates(
    service: &Arc<Service>,
    asking: &Asking,
    question: &str,
    visuals: &Arc<[Visual]>,
    reserve: usize,
) -> Result<usize, ServiceError> {
    let template = &asking.template;
    let (text, shown) = match template.shows() {
        Shows::Pair => (template.pair(question, ["", ""])?, 2),
        Shows::One => (template.one(question, "", &template.scale)?, 1),
    };
    let message = about(visuals, &text);
    let (_, room) = service
        .prepare_again(message, visuals.clone(), Vec::new(), None)
        .await?;
    Ok(room.saturating_sub(reserve) / shown)
}

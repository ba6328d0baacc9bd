//! The body of `POST /v1/critic/best-of-n`, and what it asks for.

use flotilla_engine::Sampling;
use flotilla_model::{Content, Message, Part};
use serde::Deserialize;
use utoipa::ToSchema;

use super::{Picture, best_of_n_answer::Told, check_writing, image_urls, not_empty};
use crate::{
    critic::{best_of_n::Plan, contest::Rules, judge::Manner, selector::Selector},
    http::{
        chat_request::{ChatMessage, ImageUrl, conversation},
        error::ApiError,
        sampling_fields::{MAX_N, Stop},
    },
    prompt::PromptTemplate,
    service::{prompt::Conversation, wanted::Wanted},
};

/// Candidates where the request does not say.
const DEFAULT_N: usize = 8;
/// Stop strings, and bytes of each.
const MAX_STOPS: usize = 4;
const MAX_STOP_BYTES: usize = 1024;

/// What a client may send: `messages`, or a `question` with pictures.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BestOfNRequest {
    /// Name of the served model; whatever is served if absent.
    pub model: Option<String>,
    /// The conversation, as of `/v1/chat/completions`.
    #[serde(default)]
    messages: Vec<ChatMessage>,
    /// What is asked about the pictures. Beside `messages`: what the critic is told was asked; if absent, the turns of user
    /// and assistant.
    question: Option<String>,
    /// One picture of the question.
    image: Option<ImageUrl>,
    /// Several pictures of the question.
    #[serde(default)]
    images: Vec<Picture>,
    /// How the question becomes the user's text: `plain` or `policy-think`. Not with `messages`.
    prompt_template: Option<String>,
    /// Candidates; 8 if absent.
    #[schema(minimum = 1, maximum = 128)]
    n: Option<usize>,
    /// Of the candidates; 1 if absent.
    #[schema(minimum = 0)]
    temperature: Option<f32>,
    /// Nucleus of the candidates; 1 if absent.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Most likely tokens to draw from.
    top_k: Option<usize>,
    /// Draws from tokens at least this share as likely as the most likely one.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// Longest candidate, in tokens; if absent, what the context and the critic's prompt leave.
    #[schema(minimum = 1)]
    max_tokens: Option<usize>,
    /// Strings that end a candidate.
    stop: Option<Stop>,
    /// The same seed gives the same candidates and the same contest. Drawn if absent, and told in the answer.
    seed: Option<u32>,
    /// How one is chosen.
    #[serde(default)]
    selector: Selector,
    /// Further selectors, reported on the same candidates.
    #[serde(default)]
    #[schema(max_items = 5)]
    selectors: Vec<Selector>,
    /// `all` reports every selector on the same candidates; those that these candidates are too many for are left out.
    report: Option<Reports>,
    /// Ask the critic about each pair in both orders.
    #[serde(default)]
    both_orders: bool,
    /// How the critic is asked.
    #[serde(default)]
    critic: CriticOptions,
    /// Whether all candidates are answered, or only the chosen one.
    #[serde(default = "super::yes")]
    candidates: bool,
    /// Whether candidates and rounds are sent as they come.
    #[serde(default)]
    pub stream: bool,
}

/// Which selectors are reported.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reports {
    /// All.
    All,
    /// Only the one that chooses.
    Chosen,
}

/// How the critic is asked.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CriticOptions {
    /// Let it write its thoughts before its verdict.
    think: bool,
    /// Name of a template that shows two responses; that of the server if absent.
    template: Option<String>,
    /// Name of a template that shows one response, for `pointwise`; `critic-score` if absent.
    score_template: Option<String>,
    /// Of what it writes; 0 takes the most likely verdict.
    #[schema(minimum = 0)]
    temperature: f32,
    /// Longest text, in tokens.
    #[schema(minimum = 1)]
    max_tokens: Option<usize>,
    /// Show it only what follows the candidates' `</think>`.
    strip_thoughts: bool,
}

impl Default for CriticOptions {
    fn default() -> Self {
        Self {
            think: true,
            template: None,
            score_template: None,
            temperature: 0.0,
            max_tokens: None,
            strip_thoughts: false,
        }
    }
}

impl BestOfNRequest {
    /// Checks every field and takes the request apart: what is to be done, and what the answer repeats.
    pub fn into_plan(mut self) -> Result<(Plan, Told), ApiError> {
        check_writing(self.critic.temperature, self.critic.max_tokens)?;
        let seed = self.seed.unwrap_or_else(rand::random);
        let wanted = self.wanted(seed)?;
        let (selectors, left_out) = selectors(&self, wanted.n)?;
        let told = Told {
            seed,
            candidates: self.candidates,
            left_out,
        };
        let rules = Rules {
            seed: u64::from(seed),
            both_orders: self.both_orders,
        };
        let critic = self.critic.clone();
        let (conversation, question) = self.conversation()?;
        let plan = Plan {
            conversation,
            question,
            wanted,
            selectors,
            rules,
            manner: Manner {
                think: critic.think,
                temperature: critic.temperature,
                seed: u64::from(seed),
                max_tokens: critic.max_tokens,
                patient: true,
            },
            template: critic.template,
            score_template: critic.score_template,
            strip_thoughts: critic.strip_thoughts,
        };
        Ok((plan, told))
    }

    /// What is drawn after the prompt.
    fn wanted(&mut self, seed: u32) -> Result<Wanted, ApiError> {
        let n = self.n.unwrap_or(DEFAULT_N);
        if !(1..=MAX_N).contains(&n) {
            return Err(ApiError::invalid("n", format!("n is {n}, not 1 to {MAX_N}")));
        }
        if self.max_tokens == Some(0) {
            return Err(ApiError::invalid("max_tokens", "max_tokens is 0, not at least 1"));
        }
        let stops = match self.stop.take() {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Several(stops)) => stops,
        };
        if stops.len() > MAX_STOPS || stops.iter().any(|stop| !(1..=MAX_STOP_BYTES).contains(&stop.len())) {
            let message = format!("stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes");
            return Err(ApiError::invalid("stop", message));
        }
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            min_p: self.min_p.unwrap_or(0.0),
            seed: u64::from(seed),
            ..Sampling::default()
        };
        if let Some((field, message)) = sampling.fault() {
            return Err(ApiError::invalid(field, message));
        }
        Ok(Wanted {
            n,
            sampling,
            max_tokens: self.max_tokens,
            stops,
            ignore_eos: false,
            form: None,
        })
    }

    /// What candidates answer, and the question as the critic is told it.
    fn conversation(self) -> Result<(Conversation, String), ApiError> {
        if let Some(question) = &self.question {
            not_empty("question", question)?;
        }
        let image_urls = image_urls(self.image, self.images)?;
        if !self.messages.is_empty() {
            if !image_urls.is_empty() || self.prompt_template.is_some() {
                let message =
                    "pictures and prompt_template go with question; with messages, put the pictures into them";
                return Err(ApiError::invalid("messages", message));
            }
            let conversation = conversation(self.messages)?;
            let question = self.question.unwrap_or_else(|| transcript(&conversation.messages));
            return Ok((conversation, question));
        }
        let Some(question) = self.question else {
            return Err(ApiError::invalid("messages", "give messages or a question"));
        };
        let template = PromptTemplate::builtin(self.prompt_template.as_deref().unwrap_or("plain"));
        let text = template.and_then(|template| template.render(&question, None));
        let text = text.map_err(|error| ApiError::invalid("prompt_template", crate::error::chain(&error)))?;
        let messages = vec![Message::user(image_urls.len(), &text)];
        Ok((Conversation { messages, image_urls }, question))
    }
}

/// A selector and why it does not report.
type LeftOut = (Selector, String);

/// The selectors in the order of their reports, each once, and which of `all` are left out.
fn selectors(request: &BestOfNRequest, n: usize) -> Result<(Vec<Selector>, Vec<LeftOut>), ApiError> {
    let mut selectors = vec![request.selector];
    selectors.extend(&request.selectors);
    if let Some(refusal) = selectors.iter().find_map(|selector| selector.refusal(n)) {
        return Err(ApiError::invalid("n", refusal));
    }
    let mut left_out = Vec::new();
    if request.report == Some(Reports::All) {
        for selector in Selector::ALL {
            match selector.refusal(n) {
                Some(refusal) => left_out.push((selector, refusal)),
                None => selectors.push(selector),
            }
        }
    }
    let mut seen = std::collections::HashSet::new();
    selectors.retain(|selector| seen.insert(*selector));
    Ok((selectors, left_out))
}

/// What user and assistant said: the text of a single turn alone, several turns with their speakers.
fn transcript(messages: &[Message]) -> String {
    let turns: Vec<&Message> = messages.iter().filter(|message| message.role != "system").collect();
    match turns.as_slice() {
        [one] => text(one),
        several => {
            let speaker = |message: &Message| if message.role == "user" { "User" } else { "Assistant" };
            let lines = several
                .iter()
                .map(|message| format!("{}: {}", speaker(message), text(message)));
            lines.collect::<Vec<_>>().join("\n")
        }
    }
}

fn text(message: &Message) -> String {
    match &message.content {
        Content::Text(text) => text.clone(),
        Content::Parts(parts) => {
            let texts = parts.iter().filter_map(|part| match part {
                Part::Text { text } => Some(text.as_str()),
                Part::Image | Part::Video => None,
            });
            texts.collect::<Vec<_>>().join("\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn plan(body: &Value) -> Result<(Plan, Told), String> {
        let request: BestOfNRequest = serde_json::from_value(body.clone()).map_err(|error| error.to_string())?;
        request
            .into_plan()
            .map_err(|error| error.json()["error"]["message"].to_string())
    }

    #[test]
    fn a_question_and_its_pictures_are_a_conversation() {
        let body = json!({"question": "What?", "image": "data:a", "images": ["data:b"], "seed": 7});
        let (plan, told) = plan(&body).expect("valid");
        assert_eq!(plan.conversation.image_urls, ["data:a", "data:b"]);
        assert_eq!(plan.conversation.messages, [Message::user(2, "What?")]);
        assert_eq!((plan.wanted.n, plan.question.as_str(), told.seed), (8, "What?", 7));
        assert_eq!(
            (plan.selectors.as_slice(), plan.manner.think),
            (&[Selector::Knockout][..], true)
        );
    }

    #[test]
    fn the_critic_is_told_the_turns_of_a_conversation() {
        let one = json!({"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image_url", "image_url": "data:a"}, {"type": "text", "text": "What?"}]},
        ]});
        assert_eq!(plan(&one).expect("valid").0.question, "What?");
        let several = json!({"messages": [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Which?"},
        ]});
        assert_eq!(
            plan(&several).expect("valid").0.question,
            "User: What?\nAssistant: A cat.\nUser: Which?"
        );
    }

    #[test]
    fn all_selectors_are_reported_and_what_is_too_much_is_left_out() {
        let (small, told) = plan(&json!({"question": "q", "report": "all", "selector": "majority"})).expect("valid");
        assert_eq!(small.selectors[0], Selector::Majority);
        assert_eq!((small.selectors.len(), told.left_out.len()), (5, 0));
        let (large, told) = plan(&json!({"question": "q", "report": "all", "n": 128})).expect("valid");
        assert_eq!((large.selectors.len(), told.left_out[0].0), (4, Selector::RoundRobin));
        let error = plan(&json!({"question": "q", "selector": "round_robin", "n": 128})).expect_err("too many");
        assert!(error.contains("8128 comparisons"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (body, reason) in [
            (json!({}), "give messages or a question"),
            (json!({"question": " "}), "must not be empty"),
            (json!({"question": "q", "n": 129}), "1 to 128"),
            (json!({"question": "q", "n": 0}), "1 to 128"),
            (
                json!({"question": "q", "prompt_template": "none"}),
                "no built-in template",
            ),
            (
                json!({"messages": [{"role": "user", "content": "a"}], "image": "data:a"}),
                "go with question",
            ),
            (
                json!({"question": "q", "critic": {"temperature": -1}}),
                "temperature -1",
            ),
            (json!({"question": "q", "selector": "best"}), "unknown variant `best`"),
            (json!({"question": "q", "best": 1}), "unknown field `best`"),
        ] {
            let error = plan(&body).expect_err(reason);
            assert!(error.contains(reason), "{reason} is not in {error}");
        }
    }
}

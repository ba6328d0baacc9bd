//! The body of `POST /v1/chat/completions`, and what it asks of the engine.

use flotilla_engine::Sampling;
use flotilla_model::{Content, Message, Part};
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::error::ApiError;
use crate::service::prompt::Conversation;

/// Completions of one request.
const MAX_N: usize = 128;
/// Stop strings of one request, as OpenAI has it.
const MAX_STOPS: usize = 4;

/// What a client may send. Fields that would change the answer and are not supported are refused; others are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ChatRequest {
    /// Name of the served model.
    pub model: Option<String>,
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// Completions.
    pub n: Option<usize>,
    /// 0 takes the most likely token; 1 if absent.
    pub temperature: Option<f32>,
    /// Nucleus; 1 if absent.
    pub top_p: Option<f32>,
    /// Most likely tokens to draw from; an extension of the API.
    pub top_k: Option<usize>,
    /// Longest completion; what the context leaves if absent.
    pub max_tokens: Option<usize>,
    /// The newer name of `max_tokens`.
    pub max_completion_tokens: Option<usize>,
    /// The same seed gives the same tokens.
    pub seed: Option<i64>,
    /// Strings that end the completion.
    pub stop: Option<Stop>,
    /// Whether pieces are sent as they come.
    pub stream: bool,
    /// With `include_usage` the last piece tells the token counts.
    pub stream_options: Option<StreamOptions>,
    /// Whether the log-probability of each token is told.
    pub logprobs: bool,
    /// Not supported.
    pub top_logprobs: Option<u32>,
    /// Not supported.
    pub presence_penalty: Option<f32>,
    /// Not supported.
    pub frequency_penalty: Option<f32>,
    /// Not supported.
    pub logit_bias: Option<Value>,
    /// Not supported.
    pub tools: Option<Value>,
    /// Only text.
    pub response_format: Option<Value>,
}

/// One string or several.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// Options of a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct StreamOptions {
    /// Tell the token counts in the end.
    pub include_usage: bool,
}

/// One turn.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatMessage {
    role: String,
    content: ChatContent,
}

impl ChatMessage {
    /// A turn of the user: the pictures, then the text.
    pub fn user(image_urls: &[String], text: &str) -> Self {
        let pictures = image_urls.iter().map(|url| ChatPart::ImageUrl {
            image_url: ImageUrl::Bare(url.clone()),
        });
        let text = ChatPart::Text { text: text.to_owned() };
        Self {
            role: "user".to_owned(),
            content: ChatContent::Parts(pictures.chain([text]).collect()),
        }
    }
}

/// Text or parts.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
enum ChatContent {
    Text(String),
    Parts(Vec<ChatPart>),
}

/// A part of a message.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ChatPart {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// A picture.
    ImageUrl {
        /// Where it is.
        image_url: ImageUrl,
    },
}

/// A URL, bare or in an object.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum ImageUrl {
    /// As OpenAI has it.
    Object {
        /// The URL.
        url: String,
    },
    /// Bare.
    Bare(String),
}

impl ImageUrl {
    /// The URL.
    pub fn into_url(self) -> String {
        match self {
            Self::Object { url } | Self::Bare(url) => url,
        }
    }
}

/// What a chat request asks of the service.
#[derive(Debug)]
pub struct Asked {
    /// The conversation.
    pub conversation: Conversation,
    /// Completions.
    pub n: usize,
    /// How tokens are drawn; `max_tokens` and `stop_ids` are set once the prompt is known.
    pub sampling: Sampling,
    /// Longest completion, if the client set one.
    pub max_tokens: Option<usize>,
    /// Strings that end a completion.
    pub stops: Vec<String>,
}

impl ChatRequest {
    /// Checks every field and takes the request apart.
    pub fn into_asked(self) -> Result<Asked, ApiError> {
        self.refuse_unsupported()?;
        let n = self.n.unwrap_or(1);
        if !(1..=MAX_N).contains(&n) {
            return Err(ApiError::invalid("n", format!("n is {n}, it must be 1 to {MAX_N}")));
        }
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        if max_tokens == Some(0) {
            return Err(ApiError::invalid("max_tokens", "max_tokens is 0"));
        }
        let stops = match self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Several(stops)) => stops,
        };
        if stops.len() > MAX_STOPS || stops.iter().any(String::is_empty) {
            let message = format!("stop takes at most {MAX_STOPS} strings, none of them empty");
            return Err(ApiError::invalid("stop", message));
        }
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            seed: self.seed.map_or_else(rand::random, i64::cast_unsigned),
            ..Sampling::default()
        };
        sampling
            .validate()
            .map_err(|error| ApiError::invalid("temperature", error.to_string()))?;
        Ok(Asked {
            conversation: conversation(self.messages)?,
            n,
            sampling,
            max_tokens,
            stops,
        })
    }

    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let plain = |format: &Value| format.get("type").and_then(Value::as_str) == Some("text");
        let unsupported = [
            ("top_logprobs", self.top_logprobs.is_some_and(|top| top > 0)),
            (
                "presence_penalty",
                self.presence_penalty.is_some_and(|penalty| penalty != 0.0),
            ),
            (
                "frequency_penalty",
                self.frequency_penalty.is_some_and(|penalty| penalty != 0.0),
            ),
            ("logit_bias", has_entries(self.logit_bias.as_ref())),
            ("tools", has_entries(self.tools.as_ref())),
            (
                "response_format",
                self.response_format.as_ref().is_some_and(|format| !plain(format)),
            ),
        ];
        match unsupported.iter().find(|(_, given)| *given) {
            Some((param, _)) => Err(ApiError::invalid(param, format!("{param} is not supported"))),
            None => Ok(()),
        }
    }
}

fn has_entries(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    }
}

fn conversation(messages: Vec<ChatMessage>) -> Result<Conversation, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty"));
    }
    let mut image_urls = Vec::new();
    let mut turns = Vec::with_capacity(messages.len());
    for message in messages {
        let role = match message.role.as_str() {
            "system" | "developer" => "system",
            "user" => "user",
            "assistant" => "assistant",
            other => {
                let message = format!("role {other:?} is not one of system, developer, user and assistant");
                return Err(ApiError::invalid("messages", message));
            }
        };
        let content = match message.content {
            ChatContent::Text(text) => Content::Text(text),
            ChatContent::Parts(parts) => {
                Content::Parts(parts.into_iter().map(|part| place(part, &mut image_urls)).collect())
            }
        };
        turns.push(Message {
            role: role.to_owned(),
            content,
        });
    }
    Ok(Conversation {
        messages: turns,
        image_urls,
    })
}

/// The part as the template sees it; its URL goes to the others.
fn place(part: ChatPart, image_urls: &mut Vec<String>) -> Part {
    match part {
        ChatPart::Text { text } => Part::Text { text },
        ChatPart::ImageUrl { image_url } => {
            image_urls.push(image_url.into_url());
            Part::Image
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &Value) -> Result<Asked, String> {
        let request: ChatRequest = serde_json::from_value(body.clone()).map_err(|error| error.to_string())?;
        request
            .into_asked()
            .map_err(|error| error.json()["error"]["message"].to_string())
    }

    #[test]
    fn parts_keep_their_order_and_urls_are_gathered() {
        let asked = parse(&serde_json::json!({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}},
            {"type": "text", "text": "and"},
            {"type": "image_url", "image_url": "data:b"},
        ]}]}))
        .expect("valid");
        assert_eq!(asked.conversation.image_urls, ["data:a", "data:b"]);
        let Content::Parts(parts) = &asked.conversation.messages[0].content else {
            panic!("parts");
        };
        assert_eq!(parts[0], Part::Image);
        assert_eq!(parts.len(), 3);
    }

    #[test]
    fn what_would_change_the_answer_and_is_not_supported_is_refused() {
        let messages = serde_json::json!([{"role": "user", "content": "a"}]);
        for (field, value) in [
            ("tools", serde_json::json!([{}])),
            ("logit_bias", serde_json::json!({"5": 1})),
            ("presence_penalty", serde_json::json!(0.5)),
            ("response_format", serde_json::json!({"type": "json_object"})),
            ("top_logprobs", serde_json::json!(3)),
            ("n", serde_json::json!(0)),
            ("temperature", serde_json::json!(-1)),
            ("top_p", serde_json::json!(0)),
            ("max_tokens", serde_json::json!(0)),
            ("stop", serde_json::json!([""])),
        ] {
            let message = parse(&serde_json::json!({"messages": messages, field: value})).expect_err(field);
            assert!(message.contains(field), "{field}: {message}");
        }
        let harmless = serde_json::json!({"messages": messages, "user": "u", "tools": [], "logit_bias": {},
            "presence_penalty": 0, "response_format": {"type": "text"}});
        assert!(parse(&harmless).is_ok());
    }

    #[test]
    fn unknown_parts_and_roles_are_refused() {
        let part = serde_json::json!({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]});
        assert!(parse(&part).is_err());
        let role = serde_json::json!({"messages": [{"role": "tool", "content": "a"}]});
        assert!(parse(&role).expect_err("refused").contains("tool"));
        assert!(parse(&serde_json::json!({})).expect_err("refused").contains("empty"));
    }
}

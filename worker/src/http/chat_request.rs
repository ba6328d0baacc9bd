//! The body of `POST /v1/chat/completions`, and what it asks of the engine.

use flotilla_model::{Content, Message, Part};
use serde::Deserialize;
use utoipa::ToSchema;

pub use super::sampling_fields::Stop;
use super::{error::ApiError, sampling_fields::SamplingFields};
use crate::service::{prompt::Conversation, wanted::Wanted};

/// Most likely tokens that are told at each place, as OpenAI has it.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// A conversation to be continued.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// Name of the served model; whatever is served if absent.
    pub model: Option<String>,
    /// The conversation.
    #[schema(min_items = 1)]
    pub messages: Vec<ChatMessage>,
    /// Longest completion, in tokens; what the context leaves if absent.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<usize>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = 1)]
    pub max_tokens: Option<usize>,
    /// Whether the log-probability of each token is told.
    pub logprobs: Option<bool>,
    /// Most likely tokens to tell at each place; needs `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<usize>,
    /// How tokens are drawn.
    #[serde(flatten)]
    pub sampling: SamplingFields,
}

/// One turn.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatMessage {
    /// `system`, `developer` (the same), `user` or `assistant`.
    #[schema(example = "user")]
    role: String,
    /// What was said.
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
pub enum ChatContent {
    /// Text.
    Text(String),
    /// Text and pictures in order.
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

impl ChatRequest {
    /// Whether log-probabilities are told.
    pub fn tells_logprobs(&self) -> bool {
        self.logprobs.unwrap_or(false)
    }

    /// Checks every field: the conversation, and what is to be drawn after it.
    pub fn into_asked(self) -> Result<(Conversation, Wanted), ApiError> {
        let top = self.top_logprobs.unwrap_or(0);
        let invalid = |message: String| Err(ApiError::invalid("top_logprobs", message));
        if top > MAX_TOP_LOGPROBS {
            return invalid(format!("top_logprobs is {top}, not 0 to {MAX_TOP_LOGPROBS}"));
        }
        if top > 0 && !self.tells_logprobs() {
            return invalid(format!("top_logprobs is {top}, which needs logprobs to be true"));
        }
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        let wanted = self.sampling.into_wanted(max_tokens, top)?;
        Ok((conversation(self.messages)?, wanted))
    }
}

/// The turns, and the pictures that they show.
pub fn conversation(messages: Vec<ChatMessage>) -> Result<Conversation, ApiError> {
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
    use serde_json::{Value, json};

    use super::*;

    fn parse(body: &Value) -> Result<(Conversation, Wanted), String> {
        let request: ChatRequest = serde_json::from_value(body.clone()).map_err(|error| error.to_string())?;
        request
            .into_asked()
            .map_err(|error| error.json()["error"]["message"].to_string())
    }

    #[test]
    fn parts_keep_their_order_and_urls_are_gathered() {
        let (conversation, _) = parse(&json!({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}},
            {"type": "text", "text": "and"},
            {"type": "image_url", "image_url": "data:b"},
        ]}]}))
        .expect("valid");
        assert_eq!(conversation.image_urls, ["data:a", "data:b"]);
        let Content::Parts(parts) = &conversation.messages[0].content else {
            panic!("parts");
        };
        assert_eq!(parts[0], Part::Image);
        assert_eq!(parts.len(), 3);
    }

    #[test]
    fn lengths_and_log_probabilities_are_checked() {
        let of = |fields: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "a"}]});
            body.as_object_mut()
                .expect("an object")
                .extend(fields.as_object().cloned().unwrap_or_default());
            parse(&body).map(|(_, wanted)| wanted)
        };
        let wanted = of(json!({"max_tokens": 3, "max_completion_tokens": 5, "logprobs": true, "top_logprobs": 20}));
        let wanted = wanted.expect("valid");
        assert_eq!(
            (wanted.max_tokens, wanted.sampling.top_log_probabilities),
            (Some(5), 20)
        );
        for (fields, reason) in [
            (json!({"max_tokens": 0}), "max_tokens is 0"),
            (json!({"logprobs": true, "top_logprobs": 21}), "21"),
            (json!({"top_logprobs": 1}), "needs logprobs"),
            (
                json!({"max_tokens": 3, "min_tokens": 4}),
                "min_tokens is 4, max_tokens only 3",
            ),
            (json!({"tools": [{}]}), "tools is not supported"),
        ] {
            let message = of(fields).expect_err(reason);
            assert!(message.contains(reason), "{message}");
        }
    }

    #[test]
    fn unknown_parts_and_roles_are_refused() {
        let part = json!({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]});
        assert!(parse(&part).is_err());
        let role = json!({"messages": [{"role": "tool", "content": "a"}]});
        assert!(parse(&role).expect_err("refused").contains("tool"));
        assert!(parse(&json!({"messages": []})).expect_err("refused").contains("empty"));
        assert!(parse(&json!({})).expect_err("refused").contains("messages"));
    }
}

//! Messages to prompts. Tokenizing and resizing block, so they run off the async threads, a few at a time.

use std::sync::Arc;

use flotilla_engine::Prompt;
use flotilla_model::{Content, Medium, Message, ModelError, Part};

use super::{Service, ServiceError, media::Encoded};

/// Tokens that steer the conversation; text of a client may not contain them, or a response under judgement could end
/// its own turn and speak for the critic.
pub(crate) const CONTROL_TOKENS: [&str; 8] = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
];

/// A conversation as a client sent it: images still as URLs, in the order of their parts.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
    /// URLs of the images, one for each image part.
    pub image_urls: Vec<String>,
}

impl Service {
    /// Decodes, tokenizes and checks a conversation that wants `max_tokens` more tokens. Gives the prompt and the number of
    /// tokens that may follow.
    pub async fn prepare(
        self: &Arc<Self>,
        conversation: Conversation,
        max_tokens: Option<usize>,
    ) -> Result<(Arc<Prompt>, usize), ServiceError> {
        let place = self.queue()?;
        conversation.messages.iter().try_for_each(refuse_control_tokens)?;
        // Before the permit: a slow host holds up its own request only.
        let pictures = self.media.collect(conversation.image_urls).await?;
        let messages = conversation.messages;
        let prepare = move |service: &Self| service.prepare_blocking(&messages, &pictures, max_tokens);
        self.apart("prepare the prompt", Some(place), prepare).await
    }

    fn prepare_blocking(
        &self,
        messages: &[Message],
        pictures: &[Encoded],
        max_tokens: Option<usize>,
    ) -> Result<(Arc<Prompt>, usize), ServiceError> {
        let pictures = pictures
            .iter()
            .map(|encoded| self.media.decode(encoded).map(Medium::Picture));
        let pictures = pictures.collect::<Result<Vec<_>, _>>()?;
        // One token at least must follow the prompt.
        let wanted = max_tokens.unwrap_or(1);
        let limit = self.max_model_len;
        let room = limit.saturating_sub(wanted);
        let prepared = self.processor.prepare(messages, &pictures, room);
        let prompt = prepared.map_err(|error| refusal(error, wanted, limit))?;
        let room = limit - prompt.ids.len();
        let prompt = Prompt::from(prompt);
        // Digests of the pixels, here rather than on the engine's thread.
        let identified = prompt.identity();
        identified.map_err(|error| ServiceError::Engine(format!("failed to identify the prompt: {error}")))?;
        Ok((Arc::new(prompt), max_tokens.unwrap_or(room)))
    }
}

/// Why a conversation is no prompt.
pub(crate) fn refusal(error: ModelError, wanted: usize, limit: usize) -> ServiceError {
    match error {
        ModelError::TooLong { tokens, .. } => ServiceError::TooLong {
            prompt: tokens,
            completion: wanted,
            limit,
        },
        other => ServiceError::invalid("messages", other.to_string()),
    }
}

/// Refuses text that steers the conversation.
pub(crate) fn refuse_control_tokens(message: &Message) -> Result<(), ServiceError> {
    let check = |text: &str| match CONTROL_TOKENS.iter().find(|token| text.contains(**token)) {
        Some(token) => Err(ServiceError::invalid(
            "messages",
            format!("the text contains {token}, which steers the conversation"),
        )),
        None => Ok(()),
    };
    match &message.content {
        Content::Text(text) => check(text),
        Content::Parts(parts) => parts.iter().try_for_each(|part| match part {
            Part::Text { text } => check(text),
            Part::Image | Part::Video => Ok(()),
        }),
    }
}

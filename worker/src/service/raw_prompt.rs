//! Prompts that are no conversation: a text or its tokens, as they are.

use std::sync::Arc;

use flotilla_engine::Prompt;

use super::{Service, ServiceError};

/// A prompt as a client sent it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RawPrompt {
    /// A text; special tokens written in it become their ids.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

impl Service {
    /// Tokenizes and checks a prompt that wants `max_tokens` more tokens.
    pub async fn prepare_raw(
        self: &Arc<Self>,
        prompt: RawPrompt,
        max_tokens: usize,
    ) -> Result<Arc<Prompt>, ServiceError> {
        let place = self.queue()?;
        let prepare = move |service: &Self| service.prepare_raw_blocking(prompt, max_tokens);
        self.apart("prepare the prompt", Some(place), prepare).await
    }

    fn prepare_raw_blocking(&self, prompt: RawPrompt, max_tokens: usize) -> Result<Arc<Prompt>, ServiceError> {
        let tokenizer = self.processor().tokenizer();
        let invalid = |message: String| ServiceError::invalid("prompt", message);
        let ids = match prompt {
            RawPrompt::Text(text) => {
                let least = tokenizer.least_tokens(&text);
                if least > self.max_model_len {
                    return Err(ServiceError::TooLong {
                        prompt: least,
                        completion: max_tokens,
                        limit: self.max_model_len,
                    });
                }
                tokenizer.encode(&text).map_err(|error| invalid(error.to_string()))?
            }
            RawPrompt::Ids(ids) => ids,
        };
        if ids.is_empty() {
            return Err(invalid("the prompt has no tokens".to_owned()));
        }
        let limit = tokenizer.id_limit();
        if let Some(id) = ids.iter().find(|id| **id >= limit) {
            return Err(invalid(format!(
                "there is no token {id}, the last of this model is {}",
                limit.saturating_sub(1)
            )));
        }
        if ids.len().saturating_add(max_tokens) > self.max_model_len {
            return Err(ServiceError::TooLong {
                prompt: ids.len(),
                completion: max_tokens,
                limit: self.max_model_len,
            });
        }
        let arranged = self.processor().arrange(ids, Vec::new());
        let prompt = arranged.map_err(|error| invalid(error.to_string()))?;
        Ok(Arc::new(prompt.into()))
    }
}

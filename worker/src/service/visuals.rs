//! Prompts over pictures that are prepared already: a critic is asked many times about the same ones.

use std::sync::Arc;

use flotilla_engine::Prompt;
use flotilla_model::{Message, Visual};

use super::{
    Service, ServiceError,
    prompt::{Conversation, refusal},
};

impl Service {
    /// The pictures of a request as the vision tower reads them, fetched, checked and resized once.
    pub async fn visuals(self: &Arc<Self>, image_urls: Vec<String>) -> Result<Arc<[Visual]>, ServiceError> {
        if image_urls.is_empty() {
            return Ok(Arc::new([]));
        }
        let conversation = Conversation {
            messages: vec![Message::user(image_urls.len(), "")],
            image_urls,
        };
        let (prompt, _) = self.prepare(conversation, None).await?;
        Ok(visuals_of(&prompt))
    }

    /// A prompt over visuals that are prepared already, followed by the tokens `lead`; and the number of tokens that may
    /// come after it.
    pub async fn prepare_again(
        self: &Arc<Self>,
        message: Message,
        visuals: Arc<[Visual]>,
        lead: Vec<u32>,
        wanted: Option<usize>,
    ) -> Result<(Arc<Prompt>, usize), ServiceError> {
        let prepare = move |service: &Self| {
            let limit = service.max_model_len;
            let reserve = wanted.unwrap_or(1).saturating_add(lead.len());
            let most = limit.saturating_sub(reserve);
            let prepared = service.processor().prepare_again(&[message], visuals.to_vec(), most);
            let prompt = Prompt::from(prepared.map_err(|error| refusal(error, reserve, limit))?);
            let prompt = Prompt::new(prompt.row.followed_by(&lead), prompt.visuals);
            // Digests of the pixels, here rather than on the engine's thread.
            let identified = prompt.identity();
            identified.map_err(|error| ServiceError::Engine(format!("failed to identify the prompt: {error}")))?;
            let room = limit - prompt.row.ids.len();
            Ok((Arc::new(prompt), wanted.unwrap_or(room)))
        };
        self.apart("prepare the prompt", None, prepare).await
    }
}

/// The visuals of a prompt.
pub fn visuals_of(prompt: &Prompt) -> Arc<[Visual]> {
    prompt.visuals.iter().map(|(_, visual)| visual.clone()).collect()
}

//! What one HTTP request has cost so far: the access log, its trace and the limits of its key are written from it.
//!
//! It travels with the task that answers the request, so that what counts tokens need not know about HTTP.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

tokio::task_local! {
    static CURRENT: Arc<Account>;
}

/// The cost of one request.
#[derive(Debug)]
pub struct Account {
    begun: Instant,
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    first_token: OnceLock<Duration>,
    key: OnceLock<String>,
}

impl Default for Account {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            prompt_tokens: AtomicU64::default(),
            completion_tokens: AtomicU64::default(),
            first_token: OnceLock::new(),
            key: OnceLock::new(),
        }
    }
}

impl Account {
    /// That of the request that this task answers, if it answers one.
    pub fn current() -> Option<Arc<Self>> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// Runs a future as a part of the request.
    pub async fn during<F: Future>(self: Arc<Self>, work: F) -> F::Output {
        CURRENT.scope(self, work).await
    }

    /// Runs a function as a part of the request.
    pub fn within<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self.clone(), work)
    }

    /// When the request came.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Tokens of its prompts.
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens.load(Ordering::Relaxed)
    }

    /// Tokens drawn for it.
    pub fn completion_tokens(&self) -> u64 {
        self.completion_tokens.load(Ordering::Relaxed)
    }

    /// From its coming to its first token.
    pub fn first_token(&self) -> Option<Duration> {
        self.first_token.get().copied()
    }

    /// Name of the API key that it came with.
    pub fn key(&self) -> Option<&str> {
        self.key.get().map(String::as_str)
    }

    /// Notes the name of its API key.
    pub fn came_with(&self, key: &str) {
        let _ = self.key.set(key.to_owned());
    }

    pub(super) fn accepted(&self, prompt_tokens: u64) {
        self.prompt_tokens.fetch_add(prompt_tokens, Ordering::Relaxed);
    }

    pub(super) fn token(&self) {
        let _ = self.first_token.get_or_init(|| self.begun.elapsed());
        self.completion_tokens.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_counted_within_a_request_is_its_own() {
        let (one, other) = (Arc::new(Account::default()), Arc::new(Account::default()));
        let count = |tokens| async move {
            let account = Account::current().expect("a request");
            account.accepted(tokens);
            tokio::task::yield_now().await;
            account.token();
        };
        tokio::join!(one.clone().during(count(3)), other.clone().during(count(5)));
        assert_eq!((one.prompt_tokens(), other.prompt_tokens()), (3, 5));
        assert_eq!(one.completion_tokens(), 1);
        assert!(one.first_token().is_some());
        assert!(Account::current().is_none());
    }
}

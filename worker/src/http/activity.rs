//! How many requests are being answered, which is what a drain waits for.

use tokio::sync::watch;

/// A shared count. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Activity(watch::Sender<usize>);

impl Default for Activity {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

/// A request that is being answered; dropping it ends it.
#[derive(Debug)]
pub struct Begun(watch::Sender<usize>);

impl Activity {
    /// Counts a request.
    pub fn begin(&self) -> Begun {
        self.0.send_modify(|running| *running += 1);
        Begun(self.0.clone())
    }

    /// Requests that are being answered.
    pub fn running(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until none is.
    pub async fn idle(&self) {
        // The sender is held by this very value.
        let _ = self.0.subscribe().wait_for(|running| *running == 0).await;
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.send_modify(|running| *running -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_waits_for_what_was_begun() {
        let activity = Activity::default();
        activity.idle().await;
        let (first, second) = (activity.begin(), activity.begin());
        drop(first);
        assert_eq!(activity.running(), 1);
        let waiting = tokio::spawn({
            let activity = activity.clone();
            async move { activity.idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(second);
        waiting.await.expect("ends");
    }
}

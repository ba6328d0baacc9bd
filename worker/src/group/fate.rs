//! Why a process can compute no longer: a rank or a GPU that is lost.

use tokio::sync::watch;

/// Told at most once. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Fate(watch::Sender<Option<String>>);

impl Default for Fate {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Fate {
    /// Tells why; what was told first stays.
    pub fn fall(&self, why: String) {
        self.0.send_if_modified(|told| {
            let first = told.is_none();
            if first {
                *told = Some(why);
            }
            first
        });
    }

    /// Waits until it is told.
    pub async fn fallen(&self) -> String {
        let mut told = self.0.subscribe();
        let why = told.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        match why {
            Some(why) => why,
            // Not seen: the sender lives as long as this.
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_reason_stays() {
        let fate = Fate::default();
        let other = fate.clone();
        other.fall("rank 1 ended".to_owned());
        fate.fall("a step failed".to_owned());
        assert_eq!(fate.fallen().await, "rank 1 ended");
    }
}

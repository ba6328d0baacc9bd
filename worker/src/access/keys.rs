//! The keys of now: who is let in, and how often.

use std::{
    collections::HashMap,
    fmt,
    path::Path,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter, clock::Clock as _};

use super::key_line::{self, KeyLine, Rate};

/// The keys of a file, which may change while requests are answered. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Keys(Arc<RwLock<HashMap<[u8; 32], Arc<Key>>>>);

/// A key and what its requests use of its limits.
pub struct Key {
    line: KeyLine,
    rate: Option<DefaultDirectRateLimiter>,
    running: AtomicU32,
}

/// A request of a key that is being answered; dropping it ends it.
#[derive(Debug)]
pub struct Place(Arc<Key>);

/// Why a request of a known key is not answered now.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Throttled {
    /// It came too soon.
    #[error("this key may send {requests} requests in {} s", period.as_secs())]
    Rate {
        /// Requests in a period.
        requests: u32,
        /// The period.
        period: Duration,
        /// When the next one is answered.
        wait: Duration,
    },
    /// Too many of the key's requests are being answered.
    #[error("this key may have {limit} requests answered at once")]
    Concurrency {
        /// How many may.
        limit: u32,
    },
}

impl Keys {
    /// The keys of a file's text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let keys = Self(Arc::default());
        keys.replace(text)?;
        Ok(keys)
    }

    /// The keys of a file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        Self::parse(&text)
    }

    /// Puts the keys of a text in the place of those of now, or leaves these if it is broken. A key whose line did not change
    /// keeps what it has used of its limits. Gives the number of keys.
    pub fn replace(&self, text: &str) -> Result<usize, String> {
        let lines = key_line::parse(text)?;
        let mut keys = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let next: HashMap<_, _> = lines
            .into_iter()
            .map(|line| match keys.get(&line.hash) {
                Some(key) if key.line == line => (line.hash, key.clone()),
                _ => (line.hash, Arc::new(Key::new(line))),
            })
            .collect();
        *keys = next;
        Ok(keys.len())
    }

    /// The key that a request presents, if it is one. What is compared are hashes: how long that takes tells nothing about
    /// the keys.
    pub fn find(&self, presented: &str) -> Option<Arc<Key>> {
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner);
        keys.get(&key_line::hash(presented)).cloned()
    }
}

impl Key {
    fn new(line: KeyLine) -> Self {
        // So many at once, and then one after each share of the period.
        let quota =
            |rate: Rate| Some(Quota::with_period(rate.period / rate.requests.get())?.allow_burst(rate.requests));
        Self {
            rate: line.rate.and_then(quota).map(RateLimiter::direct),
            running: AtomicU32::new(0),
            line,
        }
    }

    /// Its name, for logs.
    pub fn name(&self) -> &str {
        &self.line.name
    }

    /// Counts a request against the limits. One over the concurrency does not count against the rate.
    pub fn enter(self: &Arc<Self>) -> Result<Place, Throttled> {
        let limit = self.line.concurrency.map_or(u32::MAX, std::num::NonZeroU32::get);
        let take = |running| (running < limit).then_some(running + 1);
        if self
            .running
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .is_err()
        {
            return Err(Throttled::Concurrency { limit });
        }
        // Dropped, and so given back, if the rate refuses.
        let place = Place(self.clone());
        let (Some(limiter), Some(rate)) = (&self.rate, self.line.rate) else {
            return Ok(place);
        };
        match limiter.check() {
            Ok(()) => Ok(place),
            Err(early) => Err(Throttled::Rate {
                requests: rate.requests.get(),
                period: rate.period,
                wait: early.wait_time_from(limiter.clock().now()),
            }),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("name", &self.line.name)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, key: &str, limits: &str) -> String {
        format!("{} {limits}\n", KeyLine::of(name, key).expect("a name"))
    }

    fn keys(limits: &str) -> (Keys, Arc<Key>) {
        let keys = Keys::parse(&line("alice", "one", limits)).expect("parses");
        let key = keys.find("one").expect("known");
        (keys, key)
    }

    #[test]
    fn only_whole_keys_are_known() {
        let (keys, key) = keys("");
        assert_eq!(key.name(), "alice");
        for presented in ["", "on", "one ", "One", &hex::encode(key_line::hash("one"))] {
            assert!(keys.find(presented).is_none(), "{presented}");
        }
    }

    #[test]
    fn a_request_over_the_concurrency_waits_for_another_to_end() {
        let (_, key) = keys("concurrency=2");
        let places = [key.enter().expect("first"), key.enter().expect("second")];
        assert_eq!(key.enter().expect_err("third"), Throttled::Concurrency { limit: 2 });
        drop(places);
        assert!(key.enter().is_ok());
    }

    #[test]
    fn a_request_over_the_rate_is_told_when_to_come_again() {
        let (_, key) = keys("rate=2/h concurrency=1");
        assert!(key.enter().is_ok() && key.enter().is_ok());
        let Throttled::Rate { wait, .. } = key.enter().expect_err("too soon") else {
            panic!("refused by the rate");
        };
        assert!(
            wait > Duration::from_secs(1700) && wait <= Duration::from_secs(1800),
            "{wait:?}"
        );
        assert!(
            matches!(key.enter(), Err(Throttled::Rate { .. })),
            "a refusal gives its place back"
        );
    }

    #[test]
    fn new_keys_replace_old_ones_and_leave_the_others_what_they_used() {
        let (keys, key) = keys("rate=1/h");
        assert!(key.enter().is_ok());
        let text = line("alice", "one", "rate=1/h") + &line("bob", "two", "");
        assert_eq!(keys.replace(&text), Ok(2));
        assert!(
            keys.find("one").expect("known").enter().is_err(),
            "its hour is not over"
        );
        assert!(keys.find("two").is_some());
        assert_eq!(keys.replace(&line("bob", "three", "")), Ok(1));
        assert!(keys.find("one").is_none() && keys.find("two").is_none());
    }

    #[test]
    fn a_broken_file_leaves_the_keys_as_they_are() {
        let (keys, _) = keys("");
        assert!(keys.replace("alice sk-secret").is_err() && keys.replace("").is_err());
        assert!(keys.find("one").is_some());
    }

    #[test]
    fn a_key_shows_nothing_but_its_name() {
        let (_, key) = keys("");
        assert_eq!(format!("{key:?}"), "Key { name: \"alice\", .. }");
    }
}

//! Features of pictures and videos that were encoded before, within a number of bytes.

use std::collections::{BTreeMap, HashMap};

use crate::prompt::Digest;

/// Features by what they were made of, as handles: a clone is the same memory. Those that were used longest ago go first.
#[derive(Debug)]
pub struct FeatureCache<F> {
    budget: usize,
    bytes: usize,
    entries: HashMap<Digest, Entry<F>>,
    /// Digests by the time of their last use.
    uses: BTreeMap<u64, Digest>,
    clock: u64,
}

#[derive(Debug)]
struct Entry<F> {
    features: F,
    bytes: usize,
    used: u64,
}

impl<F: Clone> FeatureCache<F> {
    /// Empty; it holds `budget` bytes, but always the features used last, so that a picture is not encoded again for each
    /// chunk of its prompt.
    pub fn new(budget: usize) -> Self {
        Self {
            budget,
            bytes: 0,
            entries: HashMap::new(),
            uses: BTreeMap::new(),
            clock: 0,
        }
    }

    /// The features with this digest, `[tokens, hidden]`.
    pub fn get(&mut self, digest: &Digest) -> Option<F> {
        self.clock += 1;
        let entry = self.entries.get_mut(digest)?;
        self.uses.remove(&entry.used);
        entry.used = self.clock;
        self.uses.insert(self.clock, *digest);
        Some(entry.features.clone())
    }

    /// Keeps features of so many bytes that nothing else may change.
    pub fn insert(&mut self, digest: Digest, features: F, bytes: usize) {
        if self.entries.contains_key(&digest) {
            return;
        }
        self.clock += 1;
        self.bytes += bytes;
        self.uses.insert(self.clock, digest);
        let used = self.clock;
        self.entries.insert(digest, Entry { features, bytes, used });
        while self.bytes > self.budget && self.entries.len() > 1 {
            let Some((_, oldest)) = self.uses.pop_first() else {
                break;
            };
            if let Some(entry) = self.entries.remove(&oldest) {
                self.bytes -= entry.bytes;
            }
        }
    }

    /// Bytes that are held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.uses.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let mut cache = FeatureCache::new(2 * 16);
        cache.insert([1; 32], (), 16);
        cache.insert([2; 32], (), 16);
        assert!(cache.get(&[1; 32]).is_some());
        cache.insert([3; 32], (), 16);
        let held = [1, 2, 3].map(|digest| cache.get(&[digest; 32]).is_some());
        assert_eq!(held, [true, false, true]);
        assert_eq!(cache.bytes(), 32);
    }

    #[test]
    fn the_newest_features_stay_however_large_they_are() {
        let mut cache = FeatureCache::new(16);
        cache.insert([1; 32], (), 16);
        cache.insert([2; 32], (), 144);
        assert!(cache.get(&[1; 32]).is_none());
        assert!(cache.get(&[2; 32]).is_some());
        cache.clear();
        assert_eq!((cache.bytes(), cache.get(&[2; 32]).is_none()), (0, true));
    }
}

//! Features of pictures and videos that were encoded before, within a number of bytes.

use std::collections::{BTreeMap, HashMap};

use candle_core::Tensor;

use crate::prompt::Digest;

/// Features by what they were made of. Those that were used longest ago go first.
#[derive(Debug)]
pub struct FeatureCache {
    budget: usize,
    bytes: usize,
    entries: HashMap<Digest, Entry>,
    /// Digests by the time of their last use.
    uses: BTreeMap<u64, Digest>,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    features: Tensor,
    bytes: usize,
    used: u64,
}

impl FeatureCache {
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
    pub fn get(&mut self, digest: &Digest) -> Option<Tensor> {
        self.clock += 1;
        let entry = self.entries.get_mut(digest)?;
        self.uses.remove(&entry.used);
        entry.used = self.clock;
        self.uses.insert(self.clock, *digest);
        Some(entry.features.clone())
    }

    /// Keeps features that nothing else may change.
    pub fn insert(&mut self, digest: Digest, features: Tensor) {
        if self.entries.contains_key(&digest) {
            return;
        }
        self.clock += 1;
        let bytes = features.elem_count() * features.dtype().size_in_bytes();
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
    use candle_core::Device;

    use super::*;

    fn features(tokens: usize) -> Tensor {
        Tensor::zeros((tokens, 4), candle_core::DType::F32, &Device::Cpu).expect("a tensor")
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let mut cache = FeatureCache::new(2 * 16);
        cache.insert([1; 32], features(1));
        cache.insert([2; 32], features(1));
        assert!(cache.get(&[1; 32]).is_some());
        cache.insert([3; 32], features(1));
        let held = [1, 2, 3].map(|digest| cache.get(&[digest; 32]).is_some());
        assert_eq!(held, [true, false, true]);
        assert_eq!(cache.bytes(), 32);
    }

    #[test]
    fn the_newest_features_stay_however_large_they_are() {
        let mut cache = FeatureCache::new(16);
        cache.insert([1; 32], features(1));
        cache.insert([2; 32], features(9));
        assert!(cache.get(&[1; 32]).is_none());
        assert!(cache.get(&[2; 32]).is_some());
        cache.clear();
        assert_eq!((cache.bytes(), cache.get(&[2; 32]).is_none()), (0, true));
    }
}

//! What an engine holds and has done, for metrics, draining and benchmarks.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread sets or adds to and others read.
#[derive(Debug, Default)]
pub struct Figure(AtomicU64);

impl Figure {
    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, value: usize) {
        self.0.store(value as u64, Ordering::Relaxed);
    }

    pub(crate) fn add(&self, value: usize) {
        self.0.fetch_add(value as u64, Ordering::Relaxed);
    }
}

/// Gauges (`waiting` to `kv_blocks_used`) and counters (the rest).
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests of which not all samples have started.
    pub waiting: Figure,
    /// Samples whose prompt is being computed or that are being decoded.
    pub running: Figure,
    /// Blocks of the key-value cache.
    pub kv_blocks: Figure,
    /// Those that hold keys and values of running samples.
    pub kv_blocks_used: Figure,
    /// Steps.
    pub steps: Figure,
    /// Prompt tokens that went through the model.
    pub prefill_tokens: Figure,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: Figure,
    /// Those that were found there.
    pub prefix_hits: Figure,
    /// Samples whose blocks were taken away to be computed again later.
    pub preemptions: Figure,
    /// Visuals that requests needed the features of.
    pub visual_queries: Figure,
    /// Those whose features were cached.
    pub visual_hits: Figure,
}

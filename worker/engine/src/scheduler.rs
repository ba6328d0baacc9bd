//! Who may start: rows and tokens, first come first served.

use std::{collections::VecDeque, ops::Range};

use serde::{Deserialize, Serialize};

use crate::sequence::RequestId;

/// What may be in memory at once, and how much one step computes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Samples that are computed at once.
    pub max_rows: usize,
    /// Tokens that one step computes: one for each sample that is decoded, the rest prompts, in chunks.
    pub max_step_tokens: usize,
    /// Blocks of the key-value cache.
    pub kv_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Bytes of pictures' features that are kept for other requests.
    pub feature_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_rows: 256,
            max_step_tokens: 2048,
            kv_blocks: 1 << 16,
            block_size: 16,
            feature_bytes: 256 << 20,
        }
    }
}

impl Limits {
    /// Tokens that the blocks hold.
    pub fn kv_tokens(&self) -> usize {
        self.kv_blocks.saturating_mul(self.block_size)
    }
}

/// Samples of one request that start together and share its prefill.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Admission {
    /// The request.
    pub request: RequestId,
    /// Indices of its samples.
    pub samples: Range<usize>,
}

/// A request of which not all samples have started.
#[derive(Clone, Debug)]
struct Waiting {
    request: RequestId,
    samples: Range<usize>,
    prompt_tokens: usize,
    /// Prompt and completion of one sample.
    row_tokens: usize,
}

/// Holds what waits and counts what runs. Nobody is overtaken, so nobody starves.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Waiting>,
    rows: usize,
    cache_tokens: usize,
}

impl Scheduler {
    /// With nothing waiting or running.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: VecDeque::new(),
            rows: 0,
            cache_tokens: 0,
        }
    }

    /// What may be in memory at once.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Puts a request at the end of the queue.
    pub fn enqueue(&mut self, request: RequestId, n: usize, prompt_tokens: usize, max_tokens: usize) {
        self.waiting.push_back(Waiting {
            request,
            samples: 0..n,
            prompt_tokens,
            row_tokens: prompt_tokens + max_tokens,
        });
    }

    /// Takes what starts now and counts it as running.
    pub fn admit(&mut self) -> Vec<Admission> {
        let mut admissions = Vec::new();
        let mut longest = 0;
        while let Some(next) = self.waiting.front_mut() {
            let idle = self.rows == 0;
            let padded = longest.max(next.prompt_tokens) * (admissions.len() + 1);
            if !admissions.is_empty() && padded > self.limits.max_step_tokens {
                break;
            }
            let by_rows = self.limits.max_rows.saturating_sub(self.rows);
            let by_cache = self.limits.kv_tokens().saturating_sub(self.cache_tokens) / next.row_tokens.max(1);
            // What does not fit into an empty engine runs alone rather than never.
            let fits = by_rows.min(by_cache).max(usize::from(idle));
            let wanted = next.samples.len();
            // The prompt is computed again for samples that start later: a few free rows are not worth that.
            if fits == 0 || (fits < wanted && !idle && fits * 4 < self.limits.max_rows) {
                break;
            }
            let count = fits.min(wanted);
            let end = next.samples.start + count;
            admissions.push(Admission {
                request: next.request,
                samples: next.samples.start..end,
            });
            self.rows += count;
            self.cache_tokens += count * next.row_tokens;
            longest = longest.max(next.prompt_tokens);
            next.samples.start = end;
            if next.samples.is_empty() {
                self.waiting.pop_front();
            }
        }
        admissions
    }

    /// Frees the place of one sample.
    pub fn release(&mut self, row_tokens: usize) {
        self.rows = self.rows.saturating_sub(1);
        self.cache_tokens = self.cache_tokens.saturating_sub(row_tokens);
    }

    /// Forgets the samples of a request that have not started.
    pub fn cancel(&mut self, request: RequestId) {
        self.waiting.retain(|waiting| waiting.request != request);
    }

    /// Requests of which not all samples have started.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Samples that are being decoded.
    pub fn running(&self) -> usize {
        self.rows
    }

    /// Whether nothing waits or runs.
    pub fn is_idle(&self) -> bool {
        self.rows == 0 && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(max_rows: usize, max_step_tokens: usize, max_cache_tokens: usize) -> Limits {
        Limits {
            max_rows,
            max_step_tokens,
            kv_blocks: max_cache_tokens,
            block_size: 1,
            ..Limits::default()
        }
    }

    #[test]
    fn a_prefill_counts_its_padding() {
        let mut scheduler = Scheduler::new(limits(8, 20, 1000));
        scheduler.enqueue(1, 1, 4, 4);
        scheduler.enqueue(2, 1, 10, 4);
        scheduler.enqueue(3, 1, 4, 4);
        let admitted: Vec<_> = scheduler.admit().iter().map(|admission| admission.request).collect();
        assert_eq!(admitted, [1, 2]);
        assert_eq!(scheduler.waiting(), 1);
    }

    #[test]
    fn a_group_larger_than_the_engine_is_run_in_parts() {
        let mut scheduler = Scheduler::new(limits(4, 100, 1000));
        scheduler.enqueue(1, 6, 4, 4);
        assert_eq!(scheduler.admit()[0].samples, 0..4);
        assert!(scheduler.admit().is_empty());
        for _ in 0..4 {
            scheduler.release(8);
        }
        assert_eq!(scheduler.admit()[0].samples, 4..6);
    }

    #[test]
    fn a_row_that_exceeds_the_cache_runs_alone() {
        let mut scheduler = Scheduler::new(limits(4, 100, 10));
        scheduler.enqueue(1, 1, 400, 4);
        scheduler.enqueue(2, 1, 4, 4);
        assert_eq!(scheduler.admit().len(), 1);
        scheduler.release(404);
        assert_eq!(scheduler.admit()[0].request, 2);
    }

    proptest! {
        #[test]
        fn every_sample_starts_once_and_in_order_and_limits_hold(
            requests in prop::collection::vec((1usize..20, 1usize..30, 1usize..10), 1..20),
            max_rows in 1usize..12,
            max_prefill in 1usize..100,
            max_cache in 1usize..200,
        ) {
            let mut scheduler = Scheduler::new(limits(max_rows, max_prefill, max_cache));
            for (id, (n, prompt, new)) in requests.iter().enumerate() {
                scheduler.enqueue(id as RequestId, *n, *prompt, *new);
            }
            let mut started: Vec<(RequestId, usize)> = Vec::new();
            let mut running: VecDeque<usize> = VecDeque::new();
            while !scheduler.is_idle() {
                for admission in scheduler.admit() {
                    let (_, prompt, new) = requests[usize::try_from(admission.request).expect("small")];
                    for sample in admission.samples {
                        started.push((admission.request, sample));
                        running.push_back(prompt + new);
                    }
                }
                prop_assert_eq!(running.len(), scheduler.running());
                prop_assert!(!running.is_empty(), "an engine with waiting requests never idles");
                prop_assert!(running.len() <= max_rows);
                prop_assert!(running.len() == 1 || running.iter().sum::<usize>() <= max_cache);
                scheduler.release(running.pop_front().expect("not empty"));
            }
            let expected: Vec<_> = requests
                .iter()
                .enumerate()
                .flat_map(|(id, (n, _, _))| (0..*n).map(move |sample| (id as RequestId, sample)))
                .collect();
            prop_assert_eq!(started, expected);
        }
    }
}

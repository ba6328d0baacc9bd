//! What may be in memory at once, and how much one step computes.

use serde::{Deserialize, Serialize};

use crate::error::EngineError;

/// Bounds of an engine.
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

    /// Refuses limits with which nothing could run.
    pub fn validate(&self) -> Result<(), EngineError> {
        let zero = [self.max_rows, self.max_step_tokens, self.kv_blocks, self.block_size].contains(&0);
        if zero {
            let fault = format!("max_rows, max_step_tokens, kv_blocks and block_size must be at least 1: {self:?}");
            return Err(EngineError::InvalidRequest(fault));
        }
        Ok(())
    }

    /// Blocks of one sample at its end. The keys and values of its last token are never stored.
    pub fn blocks_of(&self, prompt_tokens: usize, max_tokens: usize) -> usize {
        let tokens = prompt_tokens.saturating_add(max_tokens).saturating_sub(1);
        tokens.div_ceil(self.block_size.max(1))
    }

    /// No more blocks than samples of these sizes `(samples, prompt tokens, completion tokens)` can use at once.
    #[must_use]
    pub fn fit(self, requests: impl Iterator<Item = (usize, usize, usize)>) -> Self {
        let mut needs = requests
            .flat_map(|(n, prompt, new)| {
                // One more for a prompt that is kept while its samples go on.
                let need = self.blocks_of(prompt, new).saturating_add(1);
                std::iter::repeat_n(need, n.min(self.max_rows))
            })
            .collect::<Vec<_>>();
        needs.sort_unstable_by(|a, b| b.cmp(a));
        let needed = needs
            .iter()
            .take(self.max_rows)
            .fold(0, |sum: usize, need| sum.saturating_add(*need));
        Self {
            kv_blocks: self.kv_blocks.min(needed.max(1)),
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_no_larger_than_what_can_run_at_once() {
        let limits = Limits {
            max_rows: 3,
            ..Limits::default()
        };
        // 33 stored tokens take 3 blocks, 16 take 1; each sample has one more.
        let fitted = limits.fit([(2, 30, 4), (5, 16, 1)].into_iter());
        assert_eq!(fitted.kv_blocks, 4 + 4 + 2);
        assert_eq!(limits.fit(std::iter::empty()).kv_blocks, 1);
    }
}

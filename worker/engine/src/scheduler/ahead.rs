//! The step after one whose tokens are not known yet.

use super::{Part, Plan, Scheduler};
use crate::row::Row;

impl Scheduler {
    /// The step after `plan`, which is the last one and not [counted](Self::advance) yet: a token for each sample that `plan` does not end
    /// by its length. None unless [`Self::schedule`] would give the same if no token ended its sample: all that runs is decoded and
    /// drawn by the runner, nothing that waits could start, and nobody has to leave. Samples that turn out to have ended are computed
    /// in vain.
    pub fn schedule_after(&mut self, plan: &Plan) -> Option<Plan> {
        if !plan.forks.is_empty() || self.may_start(self.running.len()) {
            return None;
        }
        let (mut parts, mut growing, mut ended) = (Vec::with_capacity(plan.parts.len()), Vec::new(), 0);
        for (index, part) in plan.parts.iter().enumerate() {
            let Some(row) = self.running.get(&part.ticket) else {
                continue;
            };
            if !part.wanted || part.tokens > 1 || row.drawn.is_empty() || !row.sequence.is_plain() {
                return None;
            }
            if row.sequence.ends_next() {
                ended += 1;
                continue;
            }
            if self.grows(row)? {
                growing.push(part.ticket);
            }
            parts.push(Part {
                after: Some(index),
                ..*part
            });
        }
        let covers_all = parts.len() + ended == self.running.len();
        if parts.is_empty() || !covers_all || self.may_start(parts.len()) || growing.len() > self.blocks.free() {
            return None;
        }
        for ticket in growing {
            let row = self.running.get_mut(&ticket)?;
            row.blocks.push(self.blocks.take()?);
        }
        Some(Plan {
            parts,
            ..Plan::default()
        })
    }

    /// Whether a waiting sample could start beside so many.
    fn may_start(&self, rows: usize) -> bool {
        !self.waiting.is_empty() && rows < self.limits.max_rows
    }

    /// Whether the token after the next one needs a block that the sample does not have; None if it needs a copy of one.
    fn grows(&self, row: &Row) -> Option<bool> {
        match row.blocks.get((row.stored + 1) / self.limits.block_size) {
            Some(block) => (!self.blocks.is_shared(*block)).then_some(false),
            None => Some(true),
        }
    }
}

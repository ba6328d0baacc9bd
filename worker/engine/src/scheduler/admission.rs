//! Which waiting samples start: from the prefix cache, from the computed prompt of their group, or not yet.

use std::{collections::HashSet, ops::Bound, sync::Arc};

use super::{Plan, Scheduler, part};
use crate::{
    blocks::Block,
    group::{Group, Kept, PromptState},
    prefix::Key,
    row::{Row, Ticket},
    shared::SharedLogits,
};

/// Waiting samples that are looked at in one step, where those before them wait for a prompt that is being computed.
const LOOK_AHEAD: usize = 1024;

/// What became of a waiting sample.
enum Admission {
    Started,
    /// Another sample is computing what it needs.
    Later,
    /// Tokens or blocks are used up.
    NoRoom,
}

/// Blocks of a sample that starts.
struct Allotted {
    all: Vec<Block>,
    /// How many of them hold their tokens already.
    found: usize,
}

impl Scheduler {
    /// Lets waiting samples start, in the order of their tickets.
    pub(super) fn admit(&mut self, plan: &mut Plan, budget: &mut usize) {
        if self.waiting.is_empty() || self.running.len() >= self.limits.max_rows {
            return;
        }
        let mut pending = self.pending();
        let mut after = Bound::Unbounded;
        // While requests drain, those that have not started are passed over, however many they are.
        let look_ahead = if self.draining { usize::MAX } else { LOOK_AHEAD };
        for _ in 0..look_ahead {
            let next = self.waiting.range((after, Bound::Unbounded)).next();
            let Some(ticket) = next.map(|(ticket, _)| *ticket) else {
                break;
            };
            if self.running.len() >= self.limits.max_rows {
                break;
            }
            match self.try_start(ticket, &mut pending, plan, budget) {
                Admission::Started => self.virtual_time = self.virtual_time.max(ticket.tag),
                Admission::Later => {}
                Admission::NoRoom => break,
            }
            after = Bound::Excluded(ticket);
        }
    }

    /// Keys of the blocks that running samples are going to fill.
    fn pending(&self) -> HashSet<Key> {
        let rows = self.running.values();
        rows.flat_map(|row| row.keys.iter().skip(row.remembered).copied())
            .collect()
    }

    fn try_start(
        &mut self,
        ticket: Ticket,
        pending: &mut HashSet<Key>,
        plan: &mut Plan,
        budget: &mut usize,
    ) -> Admission {
        let Some(group) = self.groups.get(&ticket.request) else {
            self.waiting.remove(&ticket);
            return Admission::Later;
        };
        let preempted = self.waiting.get(&ticket).and_then(Option::as_ref);
        if preempted.is_none() {
            match group.prompt {
                PromptState::Kept(_) => {
                    self.fork(ticket);
                    plan.forks.push(ticket);
                    return Admission::Started;
                }
                PromptState::Computing(_) => return Admission::Later,
                PromptState::Open if self.draining && !group.started => return Admission::Later,
                PromptState::Open => {}
            }
        }
        if *budget == 0 {
            return Admission::NoRoom;
        }
        let keys = preempted.map_or(&group.keys, |row| &row.keys);
        let tokens = preempted.map_or(group.prompt_tokens, Row::tokens);
        let found = keys.iter().map_while(|key| self.blocks.find(key)).collect::<Vec<_>>();
        if keys.get(found.len()).is_some_and(|key| pending.contains(key)) {
            return Admission::Later;
        }
        pending.extend(keys.iter().skip(found.len()));
        let Some(blocks) = self.allot(found, tokens, &mut plan.copies) else {
            return Admission::NoRoom;
        };
        let preempted = self.waiting.remove(&ticket).flatten();
        let Some(group) = self.groups.get_mut(&ticket.request) else {
            return Admission::Later;
        };
        let mut row = preempted.unwrap_or_else(|| {
            group.unstarted -= 1;
            group.prompt = PromptState::Computing(ticket.sample);
            group.row(ticket.sample)
        });
        group.started = true;
        row.remembered = blocks.found;
        // The last token always goes through the model: the next one is drawn from its logits.
        row.stored = (blocks.found * self.limits.block_size).min(tokens - 1);
        row.blocks = blocks.all;
        self.counts.prefix_queries += row.prompt_tokens;
        self.counts.prefix_hits += row.stored.min(row.prompt_tokens);
        plan.parts.push(part(ticket, row.remaining(), budget));
        self.running.insert(ticket, row);
        Admission::Started
    }

    /// Blocks for a sample of `tokens` tokens of which the first ones are found, if there are enough: every running sample
    /// must be able to take another one.
    fn allot(&mut self, mut found: Vec<Block>, tokens: usize, copies: &mut Vec<(Block, Block)>) -> Option<Allotted> {
        let count = tokens.div_ceil(self.limits.block_size);
        // Where everything is found the last block is written into once more, in a copy.
        let mut copied = found.len() * self.limits.block_size >= tokens;
        loop {
            let new = count - found.len() + usize::from(copied);
            let idle = found.iter().filter(|block| self.blocks.is_free(**block)).count();
            let needed = new + idle + self.running.len();
            if self.blocks.free() >= needed {
                break;
            }
            // Computed prompts are not given up for nothing; where nothing runs, nothing else can be.
            let helps = self.running.is_empty() || self.blocks.free() + self.held_by_kept() >= needed;
            if helps && self.drop_kept() {
                continue;
            }
            if !copied {
                return None;
            }
            // There is no room beside what is found: the last block is computed anew.
            found.pop();
            copied = false;
        }
        found.iter().for_each(|block| self.blocks.share(*block));
        let hits = found.len();
        let mut all = found;
        if copied && let Some(old) = all.pop() {
            let block = self.blocks.take()?;
            copies.push((old, block));
            all.push(block);
            self.blocks.release(old);
        }
        while all.len() < count {
            all.push(self.blocks.take()?);
        }
        Some(Allotted { all, found: hits })
    }

    /// Blocks that only computed prompts refer to.
    fn held_by_kept(&self) -> usize {
        let blocks = self
            .groups
            .values()
            .filter_map(Group::kept)
            .flat_map(|kept| &kept.blocks);
        blocks.filter(|block| self.blocks.references(**block) == 1).count()
    }

    /// Starts a sample from the computed prompt of its group.
    fn fork(&mut self, ticket: Ticket) {
        let Some(group) = self.groups.get_mut(&ticket.request) else {
            return;
        };
        let PromptState::Kept(kept) = &group.prompt else {
            return;
        };
        let mut row = group.row(ticket.sample);
        row.first = Some(kept.logits.clone());
        row.blocks = kept.blocks.clone();
        row.stored = row.prompt_tokens;
        row.remembered = row.keys.len();
        row.blocks.iter().for_each(|block| self.blocks.share(*block));
        self.waiting.remove(&ticket);
        self.running.insert(ticket, row);
        group.unstarted -= 1;
        if group.unstarted == 0 {
            self.forget_kept(ticket.request);
        }
    }

    /// Starts the samples that are first in the queue and whose prompt is computed, as far as there are rows.
    pub fn start_forks(&mut self) -> Vec<Ticket> {
        let mut started = Vec::new();
        while self.running.len() < self.limits.max_rows
            && let Some((ticket, None)) = self.waiting.first_key_value()
            && let Some(group) = self.groups.get(&ticket.request)
            && matches!(group.prompt, PromptState::Kept(_))
        {
            let ticket = *ticket;
            self.fork(ticket);
            self.virtual_time = self.virtual_time.max(ticket.tag);
            started.push(ticket);
        }
        started
    }

    /// Keeps the prompt that a sample has computed for the samples of its group that have not started, if there are any; gives
    /// the logits after it as they share them.
    pub fn keep_prompt(&mut self, ticket: Ticket, logits: &[f32]) -> Option<Arc<SharedLogits>> {
        let row = self.running.get(&ticket)?;
        let group = self.groups.get_mut(&ticket.request)?;
        if !group.leave_prompt(ticket.sample) || group.unstarted == 0 {
            return None;
        }
        row.blocks.iter().for_each(|block| self.blocks.share(*block));
        let logits = Arc::new(SharedLogits::new(logits));
        group.prompt = PromptState::Kept(Kept {
            blocks: row.blocks.clone(),
            logits: logits.clone(),
        });
        Some(logits)
    }
}

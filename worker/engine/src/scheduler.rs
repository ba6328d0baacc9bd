//! Who runs in a step: tokens, rows and blocks, in a fair order.
//!
//! Samples are served in the order of their tickets. Sample `k` of a request has the tag `virtual time at its arrival + k`,
//! and the virtual time is the tag of the sample admitted last: a request of many samples does not keep the first sample of
//! a later one waiting, and nobody waits for requests that came after it. A sample with a smaller ticket never loses its
//! blocks to one with a larger one, so the smallest always goes on.

mod admission;
mod ahead;

use std::collections::BTreeMap;

use crate::{
    blocks::{Block, Blocks},
    group::Group,
    limits::Limits,
    prefix::Key,
    row::{Row, Ticket},
    sequence::RequestId,
};

/// What one step does.
#[derive(Debug, Default)]
pub struct Plan {
    /// Blocks that are copied first, from and to.
    pub copies: Vec<(Block, Block)>,
    /// Tokens that go through the model.
    pub parts: Vec<Part>,
    /// Samples that draw their first token from the logits of a prompt that is computed already.
    pub forks: Vec<Ticket>,
}

/// The next tokens of one sample.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Part {
    /// The sample.
    pub ticket: Ticket,
    /// Tokens.
    pub tokens: usize,
    /// Whether it draws a token afterwards.
    pub wanted: bool,
    /// The part of the step before whose token is this one's, where that is not known yet.
    pub after: Option<usize>,
}

/// Counts since the beginning.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counts {
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: usize,
    /// Those found there.
    pub prefix_hits: usize,
    /// Samples whose blocks were taken away.
    pub preemptions: usize,
    /// Prompt tokens that went through the model.
    pub prefill_tokens: usize,
}

/// What waits, what runs, and whose blocks are whose.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    groups: BTreeMap<RequestId, Group>,
    /// Samples without blocks; those that have drawn tokens already come with what they are.
    waiting: BTreeMap<Ticket, Option<Row>>,
    running: BTreeMap<Ticket, Row>,
    virtual_time: u64,
    /// Requests of which nothing has started stay where they are.
    draining: bool,
    counts: Counts,
}

impl Scheduler {
    /// With nothing waiting or running.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: Blocks::new(limits.kv_blocks),
            groups: BTreeMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            virtual_time: 0,
            draining: false,
            counts: Counts::default(),
        }
    }

    /// Puts a request in the queue.
    pub fn enqueue(&mut self, mut group: Group) {
        group.tag = self.virtual_time;
        let tickets = (0..group.n).map(|sample| (group.ticket(sample), None));
        self.waiting.extend(tickets);
        self.groups.insert(group.request, group);
    }

    /// Chooses what the next step does, and gives blocks to it.
    pub fn schedule(&mut self) -> Plan {
        let mut plan = Plan::default();
        let mut budget = self.limits.max_step_tokens;
        self.decode(&mut plan, &mut budget);
        self.go_on(&mut plan, &mut budget);
        self.admit(&mut plan, &mut budget);
        plan
    }

    /// One token for each sample whose tokens but the last are stored.
    fn decode(&mut self, plan: &mut Plan, budget: &mut usize) {
        let is_next = |row: &Row| row.remaining() == 1 && !row.drawn.is_empty();
        let ready = self
            .running
            .iter()
            .filter(|(_, row)| is_next(row))
            .map(|(ticket, _)| *ticket);
        for ticket in ready.collect::<Vec<_>>() {
            if *budget == 0 {
                break;
            }
            if self.make_room(ticket, &mut plan.copies) {
                *budget -= 1;
                plan.parts.push(Part {
                    ticket,
                    tokens: 1,
                    wanted: true,
                    after: None,
                });
            }
        }
    }

    /// Gives a sample a slot for its next token that nobody else has. False if it had to leave.
    fn make_room(&mut self, ticket: Ticket, copies: &mut Vec<(Block, Block)>) -> bool {
        loop {
            let Some(row) = self.running.get_mut(&ticket) else {
                return false;
            };
            let index = row.stored / self.limits.block_size;
            let old = row.blocks.get(index).copied();
            if old.is_some_and(|block| !self.blocks.is_shared(block)) {
                return true;
            }
            match (self.blocks.take(), old) {
                (Some(block), Some(old)) => {
                    copies.push((old, block));
                    row.blocks[index] = block;
                    self.blocks.release(old);
                    return true;
                }
                (Some(block), None) => {
                    row.blocks.push(block);
                    return true;
                }
                (None, _) => {}
            }
            if !self.drop_kept() {
                let last = self.running.last_key_value().map(|(last, _)| *last);
                last.inspect(|last| self.preempt(*last));
            }
        }
    }

    /// Gives up the computed prompt of the last request that has one.
    fn drop_kept(&mut self) -> bool {
        let dropped = self.groups.values_mut().rev().find_map(Group::drop_kept);
        if let Some(blocks) = &dropped {
            self.blocks.release_all(blocks);
        }
        dropped.is_some()
    }

    /// Takes the blocks of a running sample, which waits until it can be computed again.
    fn preempt(&mut self, ticket: Ticket) {
        let Some(mut row) = self.running.remove(&ticket) else {
            return;
        };
        self.blocks.release_all(&row.blocks);
        self.counts.preemptions += 1;
        if row.drawn.is_empty() {
            if let Some(group) = self.groups.get_mut(&ticket.request) {
                group.unstarted += 1;
            }
            self.leave_prompt(ticket);
            self.waiting.insert(ticket, None);
        } else {
            row.blocks.clear();
            (row.stored, row.remembered) = (0, 0);
            self.waiting.insert(ticket, Some(row));
        }
    }

    /// Gives up the computed prompt of a request.
    fn forget_kept(&mut self, request: RequestId) {
        if let Some(blocks) = self.groups.get_mut(&request).and_then(Group::drop_kept) {
            self.blocks.release_all(&blocks);
        }
    }

    /// A sample that was computing the prompt of its group does so no more.
    pub fn leave_prompt(&mut self, ticket: Ticket) {
        if let Some(group) = self.groups.get_mut(&ticket.request) {
            group.leave_prompt(ticket.sample);
        }
    }

    /// The next chunk of each sample whose prompt is computed in part.
    fn go_on(&mut self, plan: &mut Plan, budget: &mut usize) {
        for (ticket, row) in &self.running {
            let remaining = row.remaining();
            if *budget == 0 {
                break;
            }
            if remaining > 1 || (remaining == 1 && row.drawn.is_empty()) {
                plan.parts.push(part(*ticket, remaining, budget));
            }
        }
    }

    /// Counts tokens of a sample as stored; `key` gives the key of a full block from the row and the key's index. False if the
    /// sample has left.
    pub fn advance<E>(&mut self, part: &Part, mut key: impl FnMut(&Row, usize) -> Result<Key, E>) -> Result<bool, E> {
        let Some(row) = self.running.get_mut(&part.ticket) else {
            return Ok(false);
        };
        let prompt_tokens = row.prompt_tokens.saturating_sub(row.stored).min(part.tokens);
        self.counts.prefill_tokens += prompt_tokens;
        row.stored += part.tokens;
        while row.remembered < row.stored / self.limits.block_size {
            let index = row.remembered;
            if index == row.keys.len() {
                let key = key(row, index)?;
                row.keys.push(key);
            }
            self.blocks.remember(row.blocks[index], row.keys[index]);
            row.remembered += 1;
        }
        Ok(true)
    }

    /// A running sample.
    pub fn row(&self, ticket: Ticket) -> Option<&Row> {
        self.running.get(&ticket)
    }

    /// A running sample.
    pub fn row_mut(&mut self, ticket: Ticket) -> Option<&mut Row> {
        self.running.get_mut(&ticket)
    }

    /// Ends a sample wherever it is, and frees its blocks. False if it has ended before. The group goes with its last sample.
    pub fn end(&mut self, request: RequestId, sample: usize) -> bool {
        let Some(group) = self.groups.get_mut(&request) else {
            return false;
        };
        let ticket = group.ticket(sample);
        if let Some(row) = self.running.remove(&ticket) {
            group.unfinished -= 1;
            self.blocks.release_all(&row.blocks);
            self.leave_prompt(ticket);
        } else if let Some(row) = self.waiting.remove(&ticket) {
            group.unfinished -= 1;
            group.unstarted -= usize::from(row.is_none());
            if group.unstarted == 0 {
                self.forget_kept(request);
            }
        } else {
            return false;
        }
        if self.groups.get(&request).is_some_and(|group| group.unfinished == 0) {
            self.forget_kept(request);
            self.groups.remove(&request);
        }
        true
    }

    /// Ends all samples of a request.
    pub fn cancel(&mut self, request: RequestId) {
        let samples = self.groups.get(&request).map_or(0, |group| group.n);
        for sample in 0..samples {
            self.end(request, sample);
        }
    }

    /// Whether a request has one sample.
    pub fn is_alone(&self, request: RequestId) -> bool {
        self.groups.get(&request).is_some_and(|group| group.n == 1)
    }

    /// Whether a request has not ended.
    pub fn has(&self, request: RequestId) -> bool {
        self.groups.contains_key(&request)
    }

    /// Takes all blocks away and forgets what they held: the weights have changed.
    pub fn flush(&mut self) {
        let running = self.running.keys().copied().collect::<Vec<_>>();
        running.into_iter().rev().for_each(|ticket| self.preempt(ticket));
        while self.drop_kept() {}
        self.blocks.forget();
    }

    /// Gives every group new keys of its prompt.
    pub fn rekey<E>(&mut self, mut keys: impl FnMut(RequestId) -> Result<Vec<Key>, E>) -> Result<(), E> {
        for group in self.groups.values_mut() {
            group.keys = keys(group.request)?;
        }
        for (ticket, row) in &mut self.waiting {
            if let (Some(row), Some(group)) = (row, self.groups.get(&ticket.request)) {
                row.keys.clone_from(&group.keys);
            }
        }
        Ok(())
    }

    /// From now on requests of which nothing has started wait (or no more).
    pub fn drain(&mut self, draining: bool) {
        self.draining = draining;
    }

    /// Requests of which something has started.
    pub fn started(&self) -> usize {
        self.groups.values().filter(|group| group.started).count()
    }

    /// Requests of which not all samples have started.
    pub fn waiting(&self) -> usize {
        self.groups.values().filter(|group| group.unstarted > 0).count()
    }

    /// Samples that have blocks.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether nothing waits or runs.
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    /// The blocks.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Bounds.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Counts since the beginning.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

/// As many of the remaining tokens as the budget allows.
fn part(ticket: Ticket, remaining: usize, budget: &mut usize) -> Part {
    let tokens = remaining.min(*budget);
    *budget -= tokens;
    Part {
        ticket,
        tokens,
        wanted: tokens == remaining,
        after: None,
    }
}

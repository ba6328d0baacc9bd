//! Which blocks of keys and values are free, shared or remembered. Bookkeeping alone: the values lie in the runner's pool.

use std::collections::{BTreeMap, HashMap};

use crate::prefix::Key;

/// Number of a block.
pub type Block = u32;

/// Blocks with reference counts. A block that nobody refers to any more but that has a key keeps its content until its place
/// is needed: the one that has been idle longest goes first.
#[derive(Debug)]
pub struct Blocks {
    states: Vec<State>,
    /// Free blocks that hold nothing; the last one is taken first.
    empty: Vec<Block>,
    /// Free blocks that hold something, by the time at which they became free.
    idle: BTreeMap<u64, Block>,
    found: HashMap<Key, Block>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct State {
    references: u32,
    key: Option<Key>,
    /// When it became free, where it is idle.
    idle_since: u64,
}

impl Blocks {
    /// All free.
    pub fn new(count: usize) -> Self {
        // Low numbers are taken first, so that memory that is never needed is never touched.
        let empty = (0..count).rev().filter_map(|block| Block::try_from(block).ok());
        Self {
            states: vec![State::default(); count],
            empty: empty.collect(),
            idle: BTreeMap::new(),
            found: HashMap::new(),
            clock: 0,
        }
    }

    /// Blocks in all.
    pub fn count(&self) -> usize {
        self.states.len()
    }

    /// Blocks that [`Self::take`] can give.
    pub fn free(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    /// Blocks that somebody refers to.
    pub fn used(&self) -> usize {
        self.count() - self.free()
    }

    /// A block for new content, with one reference; None if all are in use.
    pub fn take(&mut self) -> Option<Block> {
        let block = match self.empty.pop() {
            Some(block) => block,
            None => self.evict()?,
        };
        self.states[block as usize].references = 1;
        Some(block)
    }

    /// Forgets what the longest idle block holds.
    fn evict(&mut self) -> Option<Block> {
        let (_, block) = self.idle.pop_first()?;
        if let Some(key) = self.states[block as usize].key.take() {
            self.found.remove(&key);
        }
        Some(block)
    }

    /// The block with this key.
    pub fn find(&self, key: &Key) -> Option<Block> {
        self.found.get(key).copied()
    }

    /// How many refer to a block.
    pub fn references(&self, block: Block) -> u32 {
        self.states[block as usize].references
    }

    /// Whether nobody refers to a block.
    pub fn is_free(&self, block: Block) -> bool {
        self.states[block as usize].references == 0
    }

    /// Whether a block may not be written into: others refer to it, or its key says what it holds.
    pub fn is_shared(&self, block: Block) -> bool {
        let state = &self.states[block as usize];
        state.references > 1 || state.key.is_some()
    }

    /// One reference more to a block that is in use or that was just [found](Self::find).
    pub fn share(&mut self, block: Block) {
        let state = &mut self.states[block as usize];
        if state.references == 0 {
            self.idle.remove(&state.idle_since);
        }
        state.references += 1;
    }

    /// One reference less.
    pub fn release(&mut self, block: Block) {
        let state = &mut self.states[block as usize];
        debug_assert!(state.references > 0, "block {block} is free already");
        state.references = state.references.saturating_sub(1);
        if state.references > 0 {
            return;
        }
        if state.key.is_some() {
            self.clock += 1;
            state.idle_since = self.clock;
            self.idle.insert(self.clock, block);
        } else {
            self.empty.push(block);
        }
    }

    /// Releases the blocks of one sequence. Its last block is the first to be forgotten: without the ones before it no key
    /// leads to it.
    pub fn release_all(&mut self, blocks: &[Block]) {
        for block in blocks.iter().rev() {
            self.release(*block);
        }
    }

    /// Says what a full block in use holds. Of two blocks that hold the same, the first one keeps the key.
    pub fn remember(&mut self, block: Block, key: Key) {
        let state = &mut self.states[block as usize];
        if state.key.is_none() && !self.found.contains_key(&key) {
            state.key = Some(key);
            self.found.insert(key, block);
        }
    }

    /// Forgets all keys. Free blocks are taken in the order of their numbers from now on, whatever happened before.
    pub fn forget(&mut self) {
        self.found.clear();
        for state in &mut self.states {
            state.key = None;
        }
        let idle = std::mem::take(&mut self.idle);
        self.empty.extend(idle.into_values());
        self.empty.sort_unstable_by(|a, b| b.cmp(a));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn key(content: u8) -> Key {
        [content; 32]
    }

    /// What the blocks must do, written as plainly as possible: a list of references, and keys in the order of idleness.
    #[derive(Debug, Default)]
    struct Model {
        /// Blocks in use: block to references.
        used: BTreeMap<Block, usize>,
        /// Keys of blocks in use.
        keys: BTreeMap<Block, Key>,
        /// Idle blocks, longest idle first.
        idle: Vec<(Block, Key)>,
        count: usize,
    }

    impl Model {
        fn empty(&self) -> usize {
            self.count - self.used.len() - self.idle.len()
        }

        fn release(&mut self, block: Block) {
            let references = self.used.get_mut(&block).expect("in use");
            *references -= 1;
            if *references == 0 {
                self.used.remove(&block);
                if let Some(key) = self.keys.remove(&block) {
                    self.idle.push((block, key));
                }
            }
        }

        fn find(&self, key: &Key) -> Option<Block> {
            let in_use = self.keys.iter().find(|(_, own)| *own == key).map(|(block, _)| *block);
            in_use.or_else(|| self.idle.iter().find(|(_, own)| own == key).map(|(block, _)| *block))
        }
    }

    #[derive(Clone, Debug)]
    enum Action {
        Take,
        Release(usize),
        Share(usize),
        Remember(usize, u8),
        Find(u8),
        Forget,
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            6 => Just(Action::Take),
            6 => (0usize..64).prop_map(Action::Release),
            3 => (0usize..64).prop_map(Action::Share),
            4 => (0usize..64, 0u8..6).prop_map(|(at, content)| Action::Remember(at, content)),
            3 => (0u8..6).prop_map(Action::Find),
            1 => Just(Action::Forget),
        ]
    }

    proptest! {
        #[test]
        fn blocks_are_those_of_a_naive_model(count in 1usize..9, actions in prop::collection::vec(action(), 0..80)) {
            let mut blocks = Blocks::new(count);
            let mut model = Model { count, ..Model::default() };
            // One entry for each reference.
            let mut held: Vec<Block> = Vec::new();
            for action in actions {
                match action {
                    Action::Take => {
                        let expected = if model.empty() > 0 {
                            None
                        } else if model.idle.is_empty() {
                            prop_assert_eq!(blocks.take(), None);
                            continue;
                        } else {
                            Some(model.idle.remove(0).0)
                        };
                        let taken = blocks.take().expect("one is free");
                        prop_assert!(expected.is_none_or(|block| block == taken), "the longest idle one is evicted");
                        prop_assert!(!model.used.contains_key(&taken), "a block in use is never given away");
                        prop_assert!(!model.idle.iter().any(|(block, _)| *block == taken));
                        model.used.insert(taken, 1);
                        held.push(taken);
                    }
                    Action::Release(at) if !held.is_empty() => {
                        let block = held.swap_remove(at % held.len());
                        blocks.release(block);
                        model.release(block);
                    }
                    Action::Share(at) if !held.is_empty() => {
                        let block = held[at % held.len()];
                        blocks.share(block);
                        *model.used.get_mut(&block).expect("in use") += 1;
                        held.push(block);
                    }
                    Action::Remember(at, content) if !held.is_empty() => {
                        let block = held[at % held.len()];
                        blocks.remember(block, key(content));
                        if model.find(&key(content)).is_none() && !model.keys.contains_key(&block) {
                            model.keys.insert(block, key(content));
                        }
                    }
                    Action::Find(content) => {
                        let found = blocks.find(&key(content));
                        prop_assert_eq!(found, model.find(&key(content)));
                        if let Some(block) = found {
                            prop_assert_eq!(blocks.is_free(block), !model.used.contains_key(&block));
                            blocks.share(block);
                            if let Some(at) = model.idle.iter().position(|(idle, _)| *idle == block) {
                                let (_, key) = model.idle.remove(at);
                                model.keys.insert(block, key);
                            }
                            *model.used.entry(block).or_default() += 1;
                            held.push(block);
                        }
                    }
                    Action::Forget => {
                        blocks.forget();
                        model.keys.clear();
                        model.idle.clear();
                    }
                    _ => {}
                }
                prop_assert_eq!(blocks.used(), model.used.len());
                prop_assert_eq!(blocks.free(), count - model.used.len());
                for (block, references) in &model.used {
                    let shared = *references > 1 || model.keys.contains_key(block);
                    prop_assert_eq!(blocks.is_shared(*block), shared);
                }
            }
            blocks.release_all(&held);
            prop_assert_eq!(blocks.free(), count, "nothing leaks");
            let all: BTreeSet<_> = std::iter::from_fn(|| blocks.take()).collect();
            prop_assert_eq!(all.len(), count, "every block is given once");
        }
    }

    #[test]
    fn what_a_sequence_had_is_forgotten_from_its_end() {
        let mut blocks = Blocks::new(3);
        let own: Vec<_> = (0..3).map(|_| blocks.take().expect("free")).collect();
        for (content, block) in own.iter().enumerate() {
            blocks.remember(*block, key(content as u8));
        }
        blocks.release_all(&own);
        blocks.take().expect("evicts");
        let found = [0, 1, 2].map(|content| blocks.find(&key(content)).is_some());
        assert_eq!(found, [true, true, false]);
    }

    #[test]
    fn nothing_is_forgotten_while_an_empty_block_is_left() {
        let mut blocks = Blocks::new(2);
        let first = blocks.take().expect("free");
        blocks.remember(first, key(1));
        blocks.release(first);
        assert_ne!(blocks.take(), Some(first));
        assert_eq!(blocks.find(&key(1)), Some(first));
    }
}

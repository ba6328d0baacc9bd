//! A model without arithmetic: its blocks hold the tokens themselves, and its logits are a hash of what is read back.

use std::{cell::RefCell, collections::VecDeque, ops::Range, time::Duration};

use flotilla_engine::{
    Runner,
    blocks::Block,
    runner::{Answer, Answers, Cause, Chunk, Logits},
};

const VOCABULARY: u32 = 11;

/// Logits after these tokens with weights of this salt.
pub fn logits(row: &[u32], salt: u64) -> Vec<f32> {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ (salt * 0x9e37_79b9);
    for id in row {
        hash = (hash ^ u64::from(*id)).wrapping_mul(0x0100_0000_01b3);
    }
    (0..VOCABULARY)
        .map(|id| ((hash >> (id * 5)) % 32) as f32 / 8.0)
        .collect()
}

/// What a slot holds: the token, its index in its sequence, and the salt of the weights.
type Slot = Option<(u32, usize, u64)>;

/// What was computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// Steps.
    pub steps: usize,
    /// Tokens of all steps.
    pub computed: usize,
    /// Tokens of the largest step.
    pub widest_step: usize,
    /// Sequences of the largest step.
    pub most_rows: usize,
    /// Tokens that the runner has drawn itself.
    pub drawn: usize,
    /// Steps that were begun before the tokens of the one before were read.
    pub ahead: usize,
    /// Times that the runner was told of other weights.
    pub flushes: usize,
}

/// Counts what it computes; fails where it is told to.
#[derive(Debug, Default)]
pub struct Toy {
    /// What the weights are.
    pub salt: u64,
    /// A token at which a step fails.
    pub fail_at: Option<u32>,
    /// After a failure: whether there is nothing left to compute with.
    pub lost: bool,
    /// A token after which logits are no numbers.
    pub broken_after: Option<u32>,
    /// Whether it draws tokens itself where it may.
    pub draws: bool,
    /// Begins steps where it may, but refuses every time of this number; 0 never begins any.
    pub begins: usize,
    /// How long a step takes.
    pub pause: Duration,
    /// What was computed so far.
    pub recorded: RefCell<Record>,
    /// Steps that were begun.
    pub begun: Begun,
    /// What it was asked to do, in words.
    pub asked: Vec<String>,
}

/// Steps that were begun, and what is known of them.
#[derive(Debug, Default)]
pub struct Begun {
    /// How often one was to be.
    asked: usize,
    answers: VecDeque<Result<Answers, &'static str>>,
    /// Tokens of the chunks of the last one.
    tokens: Vec<u32>,
}

impl Toy {
    /// What was computed.
    pub fn record(&self) -> Record {
        *self.recorded.borrow()
    }

    /// The tokens of a chunk's sequence up to its end.
    fn sequence(&self, chunk: &Chunk<'_, Vec<u32>>) -> Vec<u32> {
        let ids = chunk.prompt.iter().chain(chunk.drawn);
        let after = chunk.after.map(|index| &self.begun.tokens[index]);
        let ids = ids.chain(after).take(chunk.range().end).copied().collect::<Vec<_>>();
        assert_eq!(ids.len(), chunk.range().end, "every token is known");
        ids
    }

    /// Reads what is stored of a sequence and stores its new tokens.
    fn store(&self, pool: &mut [Vec<Slot>], chunk: &Chunk<'_, Vec<u32>>) -> Vec<u32> {
        let ids = self.sequence(chunk);
        let size = pool[0].len();
        for (index, id) in ids.iter().enumerate() {
            let slot = &mut pool[chunk.blocks[index / size] as usize][index % size];
            let own = Some((*id, index, self.salt));
            if index < chunk.stored {
                assert_eq!(*slot, own, "token {index} of {ids:?} in {:?}", chunk.blocks);
            } else {
                *slot = own;
            }
        }
        ids
    }

    /// Computes chunks as they come.
    fn compute(&self, pool: &mut [Vec<Slot>], chunks: &[Chunk<'_, Vec<u32>>]) -> Result<Answers, &'static str> {
        let size = pool[0].len();
        for (index, chunk) in chunks.iter().enumerate() {
            assert!(chunk.tokens > 0, "a chunk has tokens");
            for block in &chunk.blocks[written(chunk, size)] {
                let others = chunks.iter().enumerate().filter(|(other, _)| *other != index);
                let shared = others.filter(|(_, other)| other.blocks.contains(block)).count();
                assert_eq!(shared, 0, "block {block} is written while another sequence has it");
            }
        }
        let mut record = self.recorded.borrow_mut();
        let tokens = chunks.iter().map(|chunk| chunk.tokens).sum();
        record.steps += 1;
        record.computed += tokens;
        record.widest_step = record.widest_step.max(tokens);
        record.most_rows = record.most_rows.max(chunks.len());
        let mut values = Vec::new();
        let mut drawn = Vec::new();
        for chunk in chunks {
            let row = self.store(pool, chunk);
            if self.fail_at.is_some_and(|id| row.contains(&id)) {
                return Err("told to fail");
            }
            if chunk.wanted {
                let mut logits = logits(&row, self.salt);
                if self.broken_after.is_some_and(|id| row.contains(&id)) {
                    logits.fill(f32::NAN);
                }
                let own = chunk.draw.filter(|_| self.draws);
                let own = own.map(|draw| draw.from_logits(&logits, chunk.watched));
                if own.is_none() {
                    values.extend(logits);
                }
                record.drawn += usize::from(own.is_some());
                drawn.push(own);
            }
        }
        let logits = Logits {
            values,
            vocabulary: VOCABULARY as usize,
        };
        Ok(Answers::new(drawn, logits))
    }
}

/// Blocks that a chunk writes into.
fn written(chunk: &Chunk<'_, Vec<u32>>, size: usize) -> Range<usize> {
    chunk.range().start / size..chunk.range().end.div_ceil(size)
}

impl Runner for Toy {
    type Prompt = Vec<u32>;
    type Pool = Vec<Vec<Slot>>;

    fn prompt_ids<'a>(&self, prompt: &'a Vec<u32>) -> &'a [u32] {
        prompt
    }

    fn content(&self, prompt: &Vec<u32>, drawn: &[u32], range: Range<usize>, out: &mut Vec<u8>) -> Result<(), Cause> {
        let ids = prompt.iter().chain(drawn).skip(range.start).take(range.len());
        out.extend(ids.flat_map(|id| id.to_le_bytes()));
        Ok(())
    }

    fn pool(&self, blocks: usize, block_size: usize) -> Result<Self::Pool, Cause> {
        Ok(vec![vec![None; block_size]; blocks])
    }

    fn copy(&mut self, pool: &mut Self::Pool, pairs: &[(Block, Block)]) -> Result<(), Cause> {
        self.asked.push(format!("copy {pairs:?}"));
        for (from, to) in pairs {
            pool[*to as usize] = pool[*from as usize].clone();
        }
        Ok(())
    }

    fn step(&mut self, pool: &mut Self::Pool, chunks: &[Chunk<'_, Vec<u32>>]) -> Result<Answers, Cause> {
        assert!(self.begun.answers.is_empty(), "steps that were begun come first");
        assert!(chunks.iter().all(|chunk| chunk.after.is_none()));
        self.asked.push(format!("step {chunks:?}"));
        std::thread::sleep(self.pause);
        Ok(self.compute(pool, chunks)?)
    }

    fn begin(&mut self, pool: &mut Self::Pool, chunks: &[Chunk<'_, Vec<u32>>]) -> Result<bool, Cause> {
        assert!(self.begun.answers.len() < 2, "two steps at most");
        let is_ahead = !self.begun.answers.is_empty();
        assert!(chunks.iter().all(|chunk| chunk.after.is_some() == is_ahead));
        self.begun.asked += 1;
        self.asked.push(format!("begin {chunks:?}"));
        let draws = self.draws && chunks.iter().all(|chunk| chunk.wanted && chunk.draw.is_some());
        if !draws || self.begins == 0 || (self.begins > 1 && self.begun.asked.is_multiple_of(self.begins)) {
            return Ok(false);
        }
        let answers = self.compute(pool, chunks);
        let answers_or_none = answers.as_ref().ok();
        let token = |index: usize| match answers_or_none.map(|answers| answers.row(index)) {
            Some(Answer::Drawn(Some(drawn))) => drawn.id,
            _ => u32::MAX,
        };
        self.begun.tokens = (0..chunks.len()).map(token).collect();
        self.begun.answers.push_back(answers);
        self.recorded.borrow_mut().ahead += usize::from(is_ahead);
        Ok(true)
    }

    fn finish(&mut self) -> Result<Answers, Cause> {
        std::thread::sleep(self.pause);
        Ok(self.begun.answers.pop_front().expect("a step was begun")?)
    }

    fn abandon(&mut self) {
        self.begun.answers.clear();
    }

    fn flush(&mut self) {
        self.recorded.borrow_mut().flushes += 1;
    }

    fn lost(&mut self) -> Option<String> {
        self.lost.then(|| "unplugged".to_owned())
    }
}

//! What a model must offer to be run by the engine, on whatever device.

use std::ops::Range;

use crate::{
    blocks::Block,
    distribution::Distribution,
    request::{Request, Sampling},
};

/// Why a model call failed.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A step was to be finished, and none was [begun](Runner::begin).
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("no step was begun")]
pub struct NotBegun;

/// Logits of several rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logits {
    /// Row after row, `[rows * vocabulary]`.
    pub values: Vec<f32>,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

impl Logits {
    /// The logits of one row, `[vocabulary]`; empty if there is no such row.
    pub fn row(&self, row: usize) -> &[f32] {
        let start = row * self.vocabulary;
        self.values.get(start..start + self.vocabulary).unwrap_or_default()
    }
}

/// How the next token of a row is drawn, for a runner that draws on its own device: no penalty, bias or constraint changes
/// the logits, and nothing but log-probabilities of the token and of [`Chunk::watched`] is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// As in [`Sampling`](crate::Sampling).
    pub top_k: usize,
    /// As in [`Sampling`](crate::Sampling).
    pub top_p: f32,
    /// As in [`Sampling`](crate::Sampling).
    pub min_p: f32,
    /// The sample's next random number in [0, 1): the token does not depend on what else is computed.
    pub uniform: f64,
}

impl Draw {
    /// What a runner draws from logits `[vocabulary]` beside these watched tokens: the same as on the host. A runner that walks what `top_k`, `top_p`
    /// and `min_p` leave in another order may take another one for the same random number; None as for the host.
    pub fn from_logits(&self, logits: &[f32], watched: &[u32]) -> Option<Drawn> {
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            ..Sampling::default()
        };
        let model = Distribution::new(logits, 1.0)?;
        let of = |id: &u32| model.log_probability(*id as usize);
        let watched = watched.iter().map(of).collect();
        let (id, tempered) = if self.temperature == 0.0 {
            (model.most_likely(), model)
        } else {
            let tempered = Distribution::new(logits, self.temperature)?;
            (tempered.at(self.uniform, &sampling), tempered)
        };
        Some(Drawn {
            id: u32::try_from(id).ok()?,
            log_probability: tempered.log_probability(id),
            model_log_probability: model.log_probability(id),
            watched,
        })
    }
}

/// A token that the runner has drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub id: u32,
    /// Its log-probability in the tempered distribution.
    pub log_probability: f32,
    /// Its log-probability at temperature 1.
    pub model_log_probability: f32,
    /// Log-probabilities of [`Chunk::watched`] at temperature 1, in their order.
    pub watched: Vec<f32>,
}

/// What a step says of one chunk that wants a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Answer<'a> {
    /// Logits `[vocabulary]` after its last token.
    Logits(&'a [f32]),
    /// The runner has drawn, as [`Chunk::draw`] says; None if the logits give no distribution.
    Drawn(Option<&'a Drawn>),
}

/// What a step says of the chunks that want a token, in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answers {
    rows: Vec<AnswerRow>,
    logits: Logits,
}

#[derive(Clone, Debug, PartialEq)]
enum AnswerRow {
    /// Of this row of the logits.
    Logits(usize),
    Drawn(Option<Drawn>),
}

impl Answers {
    /// With logits for the rows that are not drawn, in their order.
    pub fn new(drawn: impl IntoIterator<Item = Option<Option<Drawn>>>, logits: Logits) -> Self {
        let mut next = 0;
        let rows = drawn.into_iter().map(|drawn| match drawn {
            Some(drawn) => AnswerRow::Drawn(drawn),
            None => {
                next += 1;
                AnswerRow::Logits(next - 1)
            }
        });
        Self {
            rows: rows.collect(),
            logits,
        }
    }

    /// The answer of one row; empty logits if there is no such row.
    pub fn row(&self, row: usize) -> Answer<'_> {
        match self.rows.get(row) {
            Some(AnswerRow::Drawn(drawn)) => Answer::Drawn(drawn.as_ref()),
            Some(AnswerRow::Logits(row)) => Answer::Logits(self.logits.row(*row)),
            None => Answer::Logits(&[]),
        }
    }
}

/// Logits of every row.
impl From<Logits> for Answers {
    fn from(logits: Logits) -> Self {
        let rows = logits.values.len() / logits.vocabulary.max(1);
        Self {
            rows: (0..rows).map(AnswerRow::Logits).collect(),
            logits,
        }
    }
}

/// The next tokens of one sequence: a part of its prompt, a token that was drawn, or both where it is computed again.
#[derive(Debug)]
pub struct Chunk<'a, P> {
    /// The prompt of the sequence.
    pub prompt: &'a P,
    /// Tokens that follow the prompt.
    pub drawn: &'a [u32],
    /// Tokens of prompt and drawn tokens whose keys and values are stored.
    pub stored: usize,
    /// Tokens to compute after them.
    pub tokens: usize,
    /// Blocks of the sequence in its order; they have room for the tokens.
    pub blocks: &'a [Block],
    /// Whether a token is wanted after the last one.
    pub wanted: bool,
    /// How it is drawn, where the runner may do it; a runner that does not gives logits.
    pub draw: Option<Draw>,
    /// Tokens whose log-probabilities are wanted beside that of a token that the runner draws.
    pub watched: &'a [u32],
    /// The chunk of the step [begun](Runner::begin) before that draws this one's token, where that is not known yet: `drawn` lacks it.
    pub after: Option<usize>,
}

impl<P> Chunk<'_, P> {
    /// Indices of the tokens to compute.
    pub fn range(&self) -> Range<usize> {
        self.stored..self.stored + self.tokens
    }
}

/// How often features of pictures and videos were needed, and how often they were there.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct VisualCounts {
    /// Visuals that prompts needed the features of.
    pub queries: usize,
    /// Those whose features were cached.
    pub hits: usize,
}

/// A model with a pool of blocks for keys and values.
pub trait Runner {
    /// A prompt, ready to be computed.
    type Prompt;
    /// Blocks of keys and values.
    type Pool;

    /// Ids of a prompt's tokens, placeholders of visuals included.
    fn prompt_ids<'a>(&self, prompt: &'a Self::Prompt) -> &'a [u32];

    /// Tokens of a prompt.
    fn prompt_tokens(&self, prompt: &Self::Prompt) -> usize {
        self.prompt_ids(prompt).len()
    }

    /// Appends to `out` what the tokens in `range` of the prompt followed by `drawn` are: equal bytes after equal bytes must
    /// mean equal keys and values.
    fn content(
        &self,
        prompt: &Self::Prompt,
        drawn: &[u32],
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), Cause>;

    /// A pool of `blocks` blocks of `block_size` tokens.
    fn pool(&self, blocks: usize, block_size: usize) -> Result<Self::Pool, Cause>;

    /// Copies whole blocks, from the first of each pair to the second, as if one after the other: the second of a pair may be
    /// the first of a later one, and the other way round.
    fn copy(&mut self, pool: &mut Self::Pool, pairs: &[(Block, Block)]) -> Result<(), Cause>;

    /// Computes chunks of different sequences together and stores their keys and values. Gives an answer for each chunk that
    /// wants one, in their order.
    fn step(&mut self, pool: &mut Self::Pool, chunks: &[Chunk<'_, Self::Prompt>]) -> Result<Answers, Cause>;

    /// Begins what [`Self::step`] does and does not wait for it: [`Self::finish`] gives the answers of begun steps in their
    /// order. At most two are begun at a time, and no other step is computed before they are finished or
    /// [abandoned](Self::abandon). False, and nothing is begun, if the runner has to wait for these chunks; one that can only
    /// wait never begins any. Chunks with [`Chunk::after`] come while a step is begun, and only then.
    fn begin(&mut self, pool: &mut Self::Pool, chunks: &[Chunk<'_, Self::Prompt>]) -> Result<bool, Cause>;

    /// Waits for the first of the begun steps.
    fn finish(&mut self) -> Result<Answers, Cause>;

    /// Forgets the begun steps: nobody wants to know what they gave.
    fn abandon(&mut self);

    /// Forgets what was computed from the weights: they have changed.
    fn flush(&mut self);

    /// After a failure: why nothing can be computed any more, whatever is asked, as when the device is gone. None where what
    /// was asked was the fault.
    fn lost(&mut self) -> Option<String>;

    /// Counts since the beginning.
    fn visual_counts(&self) -> VisualCounts {
        VisualCounts::default()
    }
}

impl<R: Runner> Runner for &mut R {
    type Prompt = R::Prompt;
    type Pool = R::Pool;

    fn prompt_ids<'a>(&self, prompt: &'a Self::Prompt) -> &'a [u32] {
        (**self).prompt_ids(prompt)
    }

    fn prompt_tokens(&self, prompt: &Self::Prompt) -> usize {
        (**self).prompt_tokens(prompt)
    }

    fn content(
        &self,
        prompt: &Self::Prompt,
        drawn: &[u32],
        range: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<(), Cause> {
        (**self).content(prompt, drawn, range, out)
    }

    fn pool(&self, blocks: usize, block_size: usize) -> Result<Self::Pool, Cause> {
        (**self).pool(blocks, block_size)
    }

    fn copy(&mut self, pool: &mut Self::Pool, pairs: &[(Block, Block)]) -> Result<(), Cause> {
        (**self).copy(pool, pairs)
    }

    fn step(&mut self, pool: &mut Self::Pool, chunks: &[Chunk<'_, Self::Prompt>]) -> Result<Answers, Cause> {
        (**self).step(pool, chunks)
    }

    fn begin(&mut self, pool: &mut Self::Pool, chunks: &[Chunk<'_, Self::Prompt>]) -> Result<bool, Cause> {
        (**self).begin(pool, chunks)
    }

    fn finish(&mut self) -> Result<Answers, Cause> {
        (**self).finish()
    }

    fn abandon(&mut self) {
        (**self).abandon();
    }

    fn flush(&mut self) {
        (**self).flush();
    }

    fn lost(&mut self) -> Option<String> {
        (**self).lost()
    }

    fn visual_counts(&self) -> VisualCounts {
        (**self).visual_counts()
    }
}

/// A request for runner `R`.
pub type RequestFor<R> = Request<<R as Runner>::Prompt>;

//! The model as the engine runs it.

#[cfg(feature = "nccl")]
mod group;

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    time::{Duration, Instant},
};

use flotilla_engine::{
    Limits, Prompt, Runner,
    features::FeatureCache,
    prompt::Digest,
    runner::{Answers, Cause, Chunk, Drawn, Logits, NotBegun, VisualCounts},
};
use flotilla_kernels::{Buffer, Float, Gpu, GpuError, rows};
use flotilla_model::{Config, Visual, Vlm, weights::TensorSource};

use crate::{
    arena::Capacity,
    error::DeviceError,
    pieces::Tokens,
    pool::DevicePool,
    post::{Begun, Post},
    readers,
    step::{Piece, Step},
    text::TextModel,
    tower::Vision,
    weights::TextWeights,
};

#[cfg(feature = "nccl")]
pub use group::follow;

/// A vision-language model on the card.
#[derive(Debug)]
pub struct DeviceRunner<T> {
    text: TextModel<T>,
    vision: Vision<T>,
    features: FeatureCache<Buffer<T>>,
    features_stay: bool,
    /// Whether pictures are encoded one by one: what comes of one then does not depend on which others are missing.
    one_by_one: bool,
    counts: VisualCounts,
    /// Bytes of the card's level 2 cache; None where prefixes are never read once for several sequences.
    cache: Option<usize>,
    /// Bytes that were free on the fullest GPU of a group once every rank had loaded; no limit for one GPU.
    least_free: usize,
    post: Post,
    /// Steps that were begun, the first one first.
    begun: VecDeque<Begun>,
    /// Time in which the card had something to do, but for what it has to do now.
    on_card: Duration,
    /// Since when it has.
    busy: Option<Instant>,
}

/// When prefixes that sequences share are read once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sharing {
    /// Each sequence reads its own, as if it shared nothing.
    Never,
    /// Wherever there is one.
    Always,
    /// Where that is the faster way.
    WhereItPays,
}

impl Sharing {
    /// In a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Never => "each reads its prompt",
            Self::Always => "prompt read once",
            Self::WhereItPays => "as served",
        }
    }
}

/// Features that stand in the place of placeholder tokens of a chunk, with the index of the first one there.
type Placed<T> = Vec<(usize, Buffer<T>)>;

impl<T: Float> DeviceRunner<T> {
    /// Copies the weights of a model of the host to the card, rounded to `T`. `max_tokens` is the longest sequence.
    pub fn load(gpu: &Gpu, model: &Vlm, limits: &Limits, max_tokens: usize) -> Result<Self, DeviceError> {
        Self::read(gpu, model.config(), model.weights(), limits, max_tokens)
    }

    /// As [`Self::load`], with weights from a source: from files they come tensor by tensor, so that the host never has them
    /// all.
    pub fn read(
        gpu: &Gpu,
        config: &Config,
        source: &dyn TensorSource,
        limits: &Limits,
        max_tokens: usize,
    ) -> Result<Self, DeviceError> {
        let (vision, weights) = readers::beside(
            || Vision::read(gpu, config, source),
            || TextWeights::load(gpu, &config.text, source),
        );
        let text = TextModel::new(gpu, weights?, capacity(limits, max_tokens))?;
        Self::assemble(text, vision?, limits)
    }

    /// Over weights and a tower that a learner shares: what is computed does not depend on what was before. `features_stay`
    /// where no update changes the tower: then what it has made of pictures outlives a change of the weights.
    pub fn shared(
        gpu: &Gpu,
        weights: TextWeights<T>,
        vision: Vision<T>,
        limits: &Limits,
        max_tokens: usize,
        features_stay: bool,
    ) -> Result<Self, DeviceError> {
        let text = TextModel::new(gpu, weights, capacity(limits, max_tokens))?;
        let mut runner = Self::assemble(text, vision, limits)?;
        runner.features_stay = features_stay;
        runner.one_by_one = true;
        Ok(runner)
    }

    /// Text alone, over weights that a learner may share.
    pub fn of_text(
        gpu: &Gpu,
        weights: TextWeights<T>,
        limits: &Limits,
        max_tokens: usize,
    ) -> Result<Self, DeviceError> {
        let text = TextModel::new(gpu, weights, capacity(limits, max_tokens))?;
        Self::assemble(text, Vision::None, limits)
    }

    fn assemble(text: TextModel<T>, vision: Vision<T>, limits: &Limits) -> Result<Self, DeviceError> {
        Ok(Self {
            cache: Some(text.gpu().card()?.cache),
            post: Post::new(text.gpu(), text.drawn().len())?,
            begun: VecDeque::new(),
            busy: None,
            text,
            vision,
            features: FeatureCache::new(limits.feature_bytes),
            features_stay: false,
            one_by_one: false,
            counts: VisualCounts::default(),
            least_free: usize::MAX,
            on_card: Duration::ZERO,
        })
    }

    /// Time in which the card had a step to do, since the beginning: from the launch of one until its answers were there, or
    /// those of the last that was launched before that. In the rest it waits for the host.
    pub fn on_card(&self) -> Duration {
        self.on_card + self.busy.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The card has nothing to do.
    fn rest(&mut self) {
        self.on_card = self.on_card();
        self.busy = None;
    }

    /// When prefixes that decoded sequences share are read once for all of them: at first where that is the faster way.
    /// Results are the same up to rounding: this is for measuring.
    pub fn set_sharing(&mut self, sharing: Sharing) -> Result<(), DeviceError> {
        self.cache = match sharing {
            Sharing::Never => None,
            Sharing::Always => Some(0),
            Sharing::WhereItPays => Some(self.text.gpu().card()?.cache),
        };
        Ok(())
    }

    /// Features of a visual that were encoded before, as by a trainer whose tower is frozen: prompts with this visual take
    /// them, as long as the cache of features has room.
    pub fn remember(&mut self, digest: Digest, features: Buffer<T>) {
        let bytes = features.len() * T::DTYPE.bytes();
        self.features.insert(digest, features, bytes);
    }

    /// The language model.
    pub fn text(&self) -> &TextModel<T> {
        &self.text
    }

    /// What was done by all ranks of a group: where it failed here, the others no longer have what this one has, and the
    /// group is given up.
    fn together(&mut self, done: Result<(), GpuError>) -> Result<(), GpuError> {
        #[cfg(feature = "nccl")]
        if let (Err(error), Some(nccl)) = (&done, self.text.group()) {
            nccl.control().give_up(&error.to_string());
            // The group's operations that they hold keep the library from letting go of it.
            self.text.forget_graphs();
        }
        done
    }

    /// Blocks of keys and values that fit into `share` of the memory that is free; in a group, on the GPU that had the least
    /// when all were loaded.
    pub fn blocks_that_fit(&self, share: f64, block_size: usize) -> Result<usize, DeviceError> {
        let (free, _) = self.text.gpu().memory()?;
        let free = free.min(self.least_free);
        let block = block_size * self.text.shape().kv_values() * T::DTYPE.bytes();
        Ok((free as f64 * share / block as f64) as usize)
    }

    /// Takes over the weights of a model of the host, of the same architecture. What was computed from those before must be
    /// forgotten: the engine's `load_weights` calls for this.
    ///
    /// # Errors
    /// Other weights, or a model that several GPUs share: their ranks are not told of new weights.
    pub fn reload(&mut self, model: &Vlm) -> Result<(), DeviceError> {
        #[cfg(feature = "nccl")]
        if self.text.group().is_some() {
            return Err(DeviceError::Input(
                "the weights of a model that several GPUs share stay as they are: start it anew with the others"
                    .to_owned(),
            ));
        }
        let gpu = self.text.gpu().clone();
        self.text
            .weights()
            .assign(&gpu, &model.config().text, model.weights())?;
        self.vision = Vision::load(&gpu, model)?;
        Ok(())
    }

    /// Features `[tokens, hidden]` of a visual that prompts show: those that are kept, else they are made and kept.
    pub fn features_of(&mut self, digest: &Digest, visual: &Visual) -> Result<Buffer<T>, DeviceError> {
        if let Some(features) = self.features.get(digest) {
            return Ok(features);
        }
        let made = self.vision.encode(&[visual])?;
        let features = made.into_iter().next();
        let features = features.ok_or_else(|| DeviceError::Input("a picture without features".to_owned()))?;
        let bytes = features.len() * T::DTYPE.bytes();
        self.features.insert(*digest, features.clone(), bytes);
        Ok(features)
    }

    /// Features of the visuals that the chunks reach, by digest.
    fn features(&mut self, chunks: &[Chunk<'_, Prompt>]) -> Result<BTreeMap<Digest, Buffer<T>>, Cause> {
        let mut found = BTreeMap::new();
        let mut missing: BTreeMap<Digest, &Visual> = BTreeMap::new();
        for chunk in chunks {
            let reached = chunk.prompt.identity()?.visuals.iter().zip(&chunk.prompt.visuals);
            for ((tokens, digest), (_, visual)) in reached {
                if overlap(tokens, &chunk.range()).is_none() {
                    continue;
                }
                let asks = usize::from(chunk.range().contains(&tokens.start));
                self.counts.queries += asks;
                if found.contains_key(digest) || missing.contains_key(digest) {
                    self.counts.hits += asks;
                } else if let Some(features) = self.features.get(digest) {
                    found.insert(*digest, features);
                    self.counts.hits += asks;
                } else {
                    missing.insert(*digest, visual);
                }
            }
        }
        let visuals = missing.values().copied().collect::<Vec<_>>();
        let together = if self.one_by_one { 1 } else { visuals.len().max(1) };
        let encoded = visuals.chunks(together).map(|visuals| self.vision.encode(visuals));
        let encoded = encoded.collect::<Result<Vec<_>, _>>()?;
        for (digest, features) in missing.keys().zip(encoded.into_iter().flatten()) {
            let bytes = features.len() * T::DTYPE.bytes();
            self.features.insert(*digest, features.clone(), bytes);
            found.insert(*digest, features);
        }
        Ok(found)
    }

    /// What stands in the place of a chunk's placeholder tokens.
    fn placed(
        &self,
        chunk: &Chunk<'_, Prompt>,
        encoded: &BTreeMap<Digest, Buffer<T>>,
    ) -> Result<Placed<T>, DeviceError> {
        let hidden = self.text.shape().hidden;
        let mut placed = Vec::new();
        let mut place = |start: usize, features: &Buffer<T>| {
            let Some(range) = overlap(&(start..start + features.len() / hidden), &chunk.range()) else {
                return Ok(());
            };
            let part = (range.start - start) * hidden..(range.end - start) * hidden;
            placed.push((range.start - chunk.stored, features.slice(part)?));
            Ok::<_, DeviceError>(())
        };
        for (start, given) in &chunk.prompt.row.features {
            let tokens = *start..*start + given.dim(0)?;
            if overlap(&tokens, &chunk.range()).is_some() {
                place(*start, &upload(self.text.gpu(), given)?)?;
            }
        }
        let identity = chunk
            .prompt
            .identity()
            .map_err(|cause| DeviceError::Input(cause.to_string()))?;
        for (tokens, digest) in &identity.visuals {
            if let Some(made) = encoded.get(digest) {
                place(tokens.start, made)?;
            }
        }
        Ok(placed)
    }

    /// Whether chunks need not be waited for: each has one token, draws the next, and the card can put it where it is needed. That
    /// says nothing of what was computed before: which rows stand beside each other must not depend on it.
    fn can_begin(&self, chunks: &[Chunk<'_, Prompt>]) -> bool {
        let follows = !self.begun.is_empty();
        let fits = |chunk: &Chunk<'_, Prompt>| {
            let is_decoded = chunk.tokens == 1 && chunk.stored > 0 && !chunk.drawn.is_empty();
            let is_drawn = chunk.wanted && chunk.draw.is_some() && chunk.watched.is_empty();
            is_decoded && is_drawn && chunk.after.is_some() == follows
        };
        self.text.is_whole() && self.begun.len() < 2 && chunks.iter().all(fits)
    }

    /// The step of chunks that [can begin](Self::can_begin).
    fn ahead(&self, chunks: &[Chunk<'_, Prompt>], pieces: &[Piece<'_>], block_size: usize) -> Step {
        let in_order = || chunks.iter().enumerate().all(|(at, chunk)| chunk.after == Some(at));
        match self.begun.back() {
            Some(before) if before.step.rows.len() == chunks.len() && in_order() => before.step.again(pieces),
            _ => Step::new(pieces, self.cached(block_size)),
        }
    }

    /// Blocks of a layer that the card's cache holds.
    fn cached(&self, block_size: usize) -> Option<usize> {
        let layer = 2 * block_size * self.text.shape().key_width() * T::DTYPE.bytes();
        self.cache.map(|bytes| bytes / layer)
    }

    /// What the card says of the pieces that want a token, in their order. `watched` has the tokens that are watched beside
    /// each piece's.
    fn answers(
        &mut self,
        step: &Step,
        place: usize,
        pieces: &[Piece<'_>],
        watched: &[&[u32]],
    ) -> Result<Answers, DeviceError> {
        let (gpu, places) = (self.text.gpu(), step.places());
        let words = self.post.read(place)?;
        let vocabulary = self.text.vocabulary();
        let can_watch = vocabulary.is_multiple_of(QUAD);
        let (mut drawn, mut values, mut watching) = (Vec::new(), Vec::new(), Vec::new());
        let wanted = pieces.iter().zip(places).zip(watched);
        for ((piece, place), watched) in wanted.filter(|((piece, _), _)| piece.wanted) {
            if piece.draw.is_some() && (watched.is_empty() || can_watch) {
                let token = words.token(place);
                if token.is_some() && !watched.is_empty() {
                    watching.push((drawn.len(), place, *watched));
                }
                drawn.push(Some(token));
            } else {
                drawn.push(None);
                let start = values.len();
                values.resize(start + vocabulary, 0.0);
                let row = self.text.logits().slice(place * vocabulary..(place + 1) * vocabulary)?;
                gpu.read(&row, &mut values[start..])?;
            }
        }
        self.watch(&mut drawn, &watching)?;
        Ok(Answers::new(drawn, Logits { values, vocabulary }))
    }

    /// Log-probabilities of tokens beside drawn ones: the index among `drawn`, the row of the logits, and the tokens. Few
    /// numbers leave the card, and not the row.
    fn watch(
        &self,
        drawn: &mut [Option<Option<Drawn>>],
        watching: &[(usize, usize, &[u32])],
    ) -> Result<(), DeviceError> {
        if watching.is_empty() {
            return Ok(());
        }
        let (gpu, vocabulary) = (self.text.gpu(), self.text.vocabulary());
        let ids = |index: usize, watched: &[u32]| {
            let own = drawn[index].iter().flatten().map(|token| token.id);
            own.chain(watched.iter().copied()).collect::<Vec<_>>()
        };
        // Rows of the least width that is moved at once.
        let quads = watching.iter().flat_map(|(index, place, watched)| {
            let quad = |id: u32| match id as usize {
                id if id < vocabulary => i32::try_from((place * vocabulary + id) / QUAD).unwrap_or(-1),
                _ => -1,
            };
            ids(*index, watched).into_iter().map(quad).collect::<Vec<_>>()
        });
        let quads = quads.collect::<Vec<_>>();
        let found = gpu.alloc::<f32>(QUAD * quads.len())?;
        rows::gather_rows(gpu, QUAD, self.text.logits(), &gpu.upload(&quads)?, &found)?;
        let found = gpu.download(&found)?;
        let mut logits = found.chunks_exact(QUAD);
        for (index, _, watched) in watching {
            let Some(Some(token)) = &mut drawn[*index] else {
                continue;
            };
            let mut logit = |id: u32| match logits.next() {
                Some(quad) if (id as usize) < vocabulary => quad[id as usize % QUAD],
                _ => f32::NEG_INFINITY,
            };
            // What the drawn token's logit lacks, every logit of the row lacks.
            let lacking = token.model_log_probability - logit(token.id);
            token.watched = watched.iter().map(|id| logit(*id) + lacking).collect();
        }
        Ok(())
    }
}

/// Numbers of f32 in 16 bytes.
const QUAD: usize = 4;

/// The largest step that an engine with these limits makes.
fn capacity(limits: &Limits, max_tokens: usize) -> Capacity {
    Capacity {
        tokens: limits.max_step_tokens,
        sequences: limits.max_rows,
        blocks: max_tokens.div_ceil(limits.block_size),
        block_size: limits.block_size,
    }
}

/// A tensor of the host, on the card.
fn upload<T: Float>(gpu: &Gpu, features: &candle_core::Tensor) -> Result<Buffer<T>, DeviceError> {
    let values = features
        .to_dtype(candle_core::DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    Ok(gpu.upload(&values.into_iter().map(T::from_f32).collect::<Vec<_>>())?)
}

/// What two ranges have in common.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> Option<Range<usize>> {
    let range = a.start.max(b.start)..a.end.min(b.end);
    (!range.is_empty()).then_some(range)
}

impl<T: Float> Runner for DeviceRunner<T> {
    type Prompt = Prompt;
    type Pool = DevicePool<T>;

    fn prompt_ids<'a>(&self, prompt: &'a Prompt) -> &'a [u32] {
        &prompt.row.ids
    }

    fn content(&self, prompt: &Prompt, drawn: &[u32], range: Range<usize>, out: &mut Vec<u8>) -> Result<(), Cause> {
        prompt.content(drawn, range, out)
    }

    fn pool(&self, blocks: usize, block_size: usize) -> Result<DevicePool<T>, Cause> {
        Ok(DevicePool::new(self.text.gpu(), self.text.shape(), blocks, block_size)?)
    }

    fn copy(&mut self, pool: &mut DevicePool<T>, pairs: &[(u32, u32)]) -> Result<(), Cause> {
        let copied = self.text.copy(pool, pairs);
        Ok(self.together(copied)?)
    }

    fn step(&mut self, pool: &mut DevicePool<T>, chunks: &[Chunk<'_, Prompt>]) -> Result<Answers, Cause> {
        self.abandon();
        let encoded = self.features(chunks)?;
        let tokens = Tokens::new(chunks)?;
        let pieces = tokens.pieces(chunks, &[]);
        let step = Step::new(&pieces, self.cached(pool.block_size));
        self.text.fits(step.size)?;
        let mut features = Vec::new();
        for (chunk, row) in chunks.iter().zip(&step.rows) {
            for (start, placed) in self.placed(chunk, &encoded)? {
                let rows = placed.len() / self.text.shape().hidden;
                let first = row + start;
                let at = (first..first + rows).map(|row| i32::try_from(row).unwrap_or(-1));
                features.push((at.collect(), placed));
            }
        }
        let words = self.post.fill(&step, &pieces, pool.block_size)?;
        self.busy = Some(Instant::now());
        let posted = self.text.post(pool, step.size, words, &features);
        self.together(posted)?;
        let place = self.post.receive(&step, self.text.drawn())?;
        let settled = self.text.settle();
        self.together(settled)?;
        let watched = chunks.iter().map(|chunk| chunk.watched).collect::<Vec<_>>();
        let answers = self.answers(&step, place, &pieces, &watched)?;
        self.rest();
        Ok(answers)
    }

    fn begin(&mut self, pool: &mut DevicePool<T>, chunks: &[Chunk<'_, Prompt>]) -> Result<bool, Cause> {
        if !self.can_begin(chunks) {
            return Ok(false);
        }
        let tokens = Tokens::new(chunks)?;
        let places = self.begun.back().map(|before| before.step.places());
        let pieces = tokens.pieces(chunks, &places.unwrap_or_default());
        let step = self.ahead(chunks, &pieces, pool.block_size);
        self.text.fits(step.size)?;
        let words = self.post.fill(&step, &pieces, pool.block_size)?;
        if self.begun.is_empty() {
            self.busy = Some(Instant::now());
            self.text.post(pool, step.size, words, &[])?;
        } else {
            self.text.post_after(pool, step.size, words)?;
        }
        let place = self.post.receive(&step, self.text.drawn())?;
        self.begun.push_back(Begun { step, place });
        Ok(true)
    }

    fn finish(&mut self) -> Result<Answers, Cause> {
        let Begun { step, place } = self.begun.pop_front().ok_or(NotBegun)?;
        let words = self.post.read(place)?;
        let drawn = step.places().into_iter().map(|place| Some(words.token(place)));
        let answers = Answers::new(drawn, Logits::default());
        if self.begun.is_empty() {
            self.rest();
        }
        Ok(answers)
    }

    fn abandon(&mut self) {
        self.begun.clear();
        self.rest();
    }

    fn flush(&mut self) {
        if !self.features_stay {
            self.features.clear();
        }
    }

    fn lost(&mut self) -> Option<String> {
        self.text.gpu().fault().map(|error| error.to_string())
    }

    fn visual_counts(&self) -> VisualCounts {
        self.counts
    }
}

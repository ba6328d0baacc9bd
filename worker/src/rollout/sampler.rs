//! A model whose weights change between two pieces, never within one.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use candle_core::{DType, Tensor};
use flotilla_engine::{
    Engine, EngineError, Group, Limits, Prompt, Request, Runner, Sampling, VlmRunner, generate_each, run_each,
};
use flotilla_model::{ImageLimits, Layout, Medium, MediumSize, ModelError, Pass, Picture, Processor, Visual, Vlm};
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use super::{
    IMAGES_PER_PASS, ROWS_PER_PIECE,
    wire::{Piece, PieceFeatures, PieceImage, PiecePrompt},
};
use crate::{
    device::Opened,
    error::WorkerError,
    group::Fate,
    runner::{CACHE_SHARE, ModelRunner, is_packed, load_options, read_model},
};

/// Most completions that one piece may ask for.
const MAX_COMPLETIONS: usize = 65_536;

/// A model and its processor. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Sampler {
    shared: Arc<Shared>,
    /// The version of the weights; None before the first ones came. Read by pieces, written by new weights: a piece keeps
    /// the weights that it began with, and new ones wait for the pieces that run.
    version: Arc<RwLock<Option<String>>>,
}

#[derive(Debug)]
struct Shared {
    /// On the host where the weights are packed on a card.
    model: Vlm,
    processor: Processor,
    /// The engine of a GPU, which stays: its memory and its recorded steps serve every piece. None where each piece has an
    /// engine of its own, over the one model.
    card: Option<Mutex<Engine<ModelRunner>>>,
    /// Told when the card can compute nothing any more.
    fate: Fate,
}

/// Layouts and features of each picture of a piece.
#[derive(Debug, Default)]
struct Pictures<'a>(BTreeMap<&'a str, Vec<(Layout, Tensor)>>);

/// Why a piece is not sampled.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The piece itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The model cannot prepare it.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The engine failed on it.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Why weights are not taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// They are not those of this model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The GPU did not take them.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl SampleError {
    /// Whether another pod would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Invalid(_) => true,
            Self::Model(error) => !matches!(error, ModelError::Tensor(_)),
            Self::Engine(error) => matches!(error, EngineError::NotFinite { .. } | EngineError::InvalidRequest(_)),
        }
    }
}

/// The weights of one version, held while a piece is sampled.
#[derive(Debug)]
pub struct Held {
    shared: Arc<Shared>,
    version: OwnedRwLockReadGuard<Option<String>>,
}

impl Sampler {
    /// Reads config and processor files. The weights are those of the directory (or the seed) until a learner sends its own,
    /// and nothing is sampled with them.
    pub fn load(
        directory: &Path,
        random_seed: Option<u64>,
        opened: &Opened,
        dtype: DType,
    ) -> Result<Self, WorkerError> {
        let failed = |error: ModelError| {
            WorkerError::permanent(format!("failed to load the model in {}", directory.display()), error)
        };
        let model = read_model(directory, random_seed, &load_options(opened, dtype)).map_err(failed)?;
        let card = match is_packed(opened.place, dtype) {
            true => Some(Mutex::new(engine(&model, opened)?)),
            false => None,
        };
        let shared = Shared {
            model,
            processor: Processor::load(directory).map_err(failed)?,
            card,
            fate: Fate::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            version: Arc::default(),
        })
    }

    /// Waits until the GPU is lost, and says why: every later piece would fail.
    pub async fn lost(&self) -> String {
        self.shared.fate.fallen().await
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        self.shared.model.weights().size_in_bytes()
    }

    /// The weights as they are now; new ones wait until they are let go.
    pub async fn hold(&self) -> Held {
        Held {
            shared: Arc::clone(&self.shared),
            version: Arc::clone(&self.version).read_owned().await,
        }
    }

    /// Reads the safetensors in `directory`, waits until no piece is being sampled, and goes on with them as `version`. Those
    /// of another architecture are refused and change nothing.
    pub async fn take_over(&self, directory: tempfile::TempDir, version: String) -> Result<(), TakeOverError> {
        let shared = Arc::clone(&self.shared);
        let weights = blocking(move || Ok(shared.model.read_weights(directory.path())?)).await?;
        let mut guard = Arc::clone(&self.version).write_owned().await;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            // Should it fail half-way, nothing is sampled with what is left.
            *guard = None;
            shared.model.weights().assign(&weights)?;
            if let Some(card) = &shared.card {
                let mut engine = card.lock().unwrap_or_else(PoisonError::into_inner);
                let loaded = engine.load_weights(&version, |runner| runner.reload(&shared.model));
                shared.looked(&mut engine, loaded)?;
            }
            *guard = Some(version);
            Ok(())
        })
        .await
    }
}

impl Shared {
    /// After a failure: whether it was the last, because the GPU is lost.
    fn looked<T>(&self, engine: &mut Engine<ModelRunner>, done: Result<T, EngineError>) -> Result<T, EngineError> {
        if done.is_err()
            && let Some(why) = engine.runner_mut().lost()
        {
            self.fate.fall(why);
        }
        done
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TakeOverError> + Send + 'static,
) -> Result<T, TakeOverError> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.unwrap_or_else(|error| Err(ModelError::Input(format!("reading the weights panicked: {error}")).into()))
}

/// The engine of a GPU, with all the memory for keys and values that it can have.
fn engine(model: &Vlm, opened: &Opened) -> Result<Engine<ModelRunner>, WorkerError> {
    let limits = Limits::default();
    let longest = model.config().text.max_position_embeddings;
    let runner = ModelRunner::new(model.clone(), opened, &limits, longest)?;
    let limits = Limits {
        kv_blocks: runner.room(CACHE_SHARE, limits.block_size).unwrap_or(limits.kv_blocks),
        ..limits
    };
    Engine::new(runner, "", limits).map_err(|error| WorkerError::retryable("failed to start the engine", error))
}

impl Held {
    /// The version of the weights.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Samples a piece; `finished` is given each group with the index of its prompt. For a thread that may block.
    pub fn sample(
        &self,
        piece: &Piece,
        cancelled: &dyn Fn() -> bool,
        finished: &mut dyn FnMut(usize, Group),
    ) -> Result<(), SampleError> {
        check(piece)?;
        let images = self.encode(piece)?;
        let mut requests = Vec::with_capacity(piece.prompts.len());
        for (index, prompt) in piece.prompts.iter().enumerate() {
            let prompt = self.prompt(piece, index, prompt, &images)?;
            let sampling = Sampling {
                temperature: piece.temperature as f32,
                top_p: piece.top_p as f32,
                max_tokens: piece.max_tokens,
                seed: piece.prompts[index].seed,
                stop_ids: self.shared.processor.tokenizer().stop_ids().to_vec(),
                ..Sampling::default()
            };
            requests.push(Request::new(prompt, piece.n, sampling));
        }
        if let Some(card) = &self.shared.card {
            let mut engine = card.lock().unwrap_or_else(PoisonError::into_inner);
            let run = run_each(&mut engine, &requests, cancelled, finished);
            return Ok(self.shared.looked(&mut engine, run)?);
        }
        let limits = Limits {
            max_rows: ROWS_PER_PIECE,
            ..Limits::default()
        };
        Ok(generate_each(
            VlmRunner::new(&self.shared.model, &limits),
            &requests,
            limits,
            cancelled,
            finished,
        )?)
    }

    /// What the piece's pictures are to its prompts, with their features. Encoded ones go through the vision tower in the
    /// order of their names.
    fn encode<'a>(&self, piece: &'a Piece) -> Result<Pictures<'a>, SampleError> {
        let (mut known, mut made) = (Pictures::default(), Vec::new());
        let mut encoded = BTreeMap::new();
        for (name, image) in &piece.images {
            match image {
                PieceImage::Encoded(text) => {
                    let picture = Picture::decode(&base64(name, text)?, ImageLimits::default())?;
                    encoded.insert(name.as_str(), Medium::Picture(picture));
                }
                PieceImage::Features(given) => {
                    let features = self.features(name, given)?;
                    known.0.entry(name).or_default().push((given.layout, features));
                }
            }
        }
        for (name, medium) in &encoded {
            for layout in self.layouts(piece, name, &encoded)? {
                made.push((*name, self.shared.processor.visuals().make(medium, &layout)?));
            }
        }
        let mut features = Vec::with_capacity(made.len());
        for part in made.chunks(IMAGES_PER_PASS) {
            let part: Vec<&Visual> = part.iter().map(|(_, visual)| visual).collect();
            features.extend(self.shared.model.encode(&part, Pass::Infer)?);
        }
        for ((name, visual), features) in made.into_iter().zip(features) {
            known.0.entry(name).or_default().push((visual.layout, features));
        }
        Ok(known)
    }

    /// The different layouts that the prompts give to an encoded picture: a family may cut one of several pictures otherwise
    /// than one alone.
    fn layouts(&self, piece: &Piece, name: &str, encoded: &BTreeMap<&str, Medium>) -> Result<Vec<Layout>, SampleError> {
        let mut layouts = Vec::new();
        for prompt in piece
            .prompts
            .iter()
            .filter(|prompt| prompt.images.iter().any(|other| other == name))
        {
            // Pictures of which only features are known count as well; their size decides nothing here.
            let unknown = MediumSize::Picture { width: 1, height: 1 };
            let size = |name: &String| encoded.get(name.as_str()).map_or(unknown, Medium::size);
            let sizes = prompt.images.iter().map(size).collect::<Vec<_>>();
            let planned = self.shared.processor.visuals().plan(&sizes)?;
            for (layout, _) in planned
                .into_iter()
                .zip(&prompt.images)
                .filter(|(_, other)| *other == name)
            {
                if !layouts.contains(&layout) {
                    layouts.push(layout);
                }
            }
        }
        Ok(layouts)
    }

    fn features(&self, name: &str, given: &PieceFeatures) -> Result<Tensor, SampleError> {
        let width = self.shared.model.config().text.hidden_size;
        let tokens = if is_bounded(&given.layout) {
            self.shared.processor.visuals().tokens(&given.layout)
        } else {
            0
        };
        let bytes = base64(name, &given.values)?;
        let (values, rest) = bytes.as_chunks::<4>();
        if tokens == 0 || !rest.is_empty() || Some(values.len()) != tokens.checked_mul(width) {
            return Err(SampleError::Invalid(format!(
                "image {name}: {} bytes are not the features of {tokens} tokens",
                bytes.len()
            )));
        }
        let values: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
        let features = Tensor::from_vec(values, (tokens, width), self.shared.model.device());
        Ok(features.map_err(ModelError::from)?)
    }

    fn prompt(
        &self,
        piece: &Piece,
        index: usize,
        prompt: &PiecePrompt,
        pictures: &Pictures<'_>,
    ) -> Result<Prompt, SampleError> {
        let invalid = |what: String| SampleError::Invalid(format!("prompts[{index}]: {what}"));
        let config = self.shared.model.config();
        let longest = config.text.max_position_embeddings;
        if prompt.token_ids.is_empty() || prompt.token_ids.len() + piece.max_tokens > longest {
            let tokens = prompt.token_ids.len();
            return Err(invalid(format!(
                "{tokens} tokens and max_tokens {} are not in 1 to {longest}, the model's context",
                piece.max_tokens
            )));
        }
        if let Some(id) = prompt
            .token_ids
            .iter()
            .find(|id| **id as usize >= config.text.vocab_size)
        {
            return Err(invalid(format!("token {id} is not in the vocabulary")));
        }
        let mut own = Vec::with_capacity(prompt.images.len());
        for name in &prompt.images {
            let known = pictures.0.get(name.as_str());
            let known = known.ok_or_else(|| invalid(format!("image {name} was not sent")))?;
            let several = prompt.images.len() > 1;
            let fits = |(layout, _): &&(Layout, Tensor)| several == matches!(layout, Layout::Square);
            own.extend(known.iter().find(fits).or(known.first()));
        }
        let visuals = own.iter().map(|(layout, _)| Visual {
            values: Vec::new(),
            layout: *layout,
        });
        let arranged = self
            .shared
            .processor
            .arrange(prompt.token_ids.clone(), visuals.collect())?;
        let features: Vec<Tensor> = own.iter().map(|(_, features)| features.clone()).collect();
        Ok(Prompt::from(arranged.row(&features)?))
    }
}

/// Whether no product of the layout's numbers overflows.
fn is_bounded(layout: &Layout) -> bool {
    const LARGEST: usize = 1 << 16;
    match *layout {
        Layout::Patches { grid, .. } => grid.iter().all(|side| *side <= LARGEST),
        Layout::Anyres { tiles, height, width } => [tiles, height, width].iter().all(|side| *side <= LARGEST),
        Layout::Square => true,
        Layout::Frames { frames } => frames <= LARGEST,
    }
}

fn base64(name: &str, text: &str) -> Result<Vec<u8>, SampleError> {
    let bytes = STANDARD.decode(text);
    bytes.map_err(|error| SampleError::Invalid(format!("image {name} is not base64: {error}")))
}

fn check(piece: &Piece) -> Result<(), SampleError> {
    let count = piece.prompts.len().checked_mul(piece.n);
    match count {
        Some(1..=MAX_COMPLETIONS) => Ok(()),
        _ => Err(SampleError::Invalid(format!(
            "{} prompts with n = {} are not 1 to {MAX_COMPLETIONS} completions",
            piece.prompts.len(),
            piece.n
        ))),
    }
}

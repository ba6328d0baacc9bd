//! A model whose weights change between two pieces, never within one.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use candle_core::Tensor;
use flotilla_engine::{EngineError, Group, Limits, Prompt, Request, Sampling, generate_each};
use flotilla_model::{
    Config, ImageLimits, LoadOptions, ModelError, Pass, Picture, ProcessedImage, Processor, Qwen25Vl,
};
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use super::{
    IMAGES_PER_PASS, ROWS_PER_PIECE,
    wire::{Piece, PieceFeatures, PieceImage, PiecePrompt},
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
    model: Qwen25Vl,
    processor: Processor,
}

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
    pub fn load(directory: &Path, random_seed: Option<u64>) -> Result<Self, ModelError> {
        let options = LoadOptions::default();
        let model = match random_seed {
            Some(seed) => Qwen25Vl::random(Config::load(directory)?, seed, &options)?,
            None => Qwen25Vl::load(directory, &options)?,
        };
        let shared = Shared {
            model,
            processor: Processor::load(directory)?,
        };
        Ok(Self {
            shared: Arc::new(shared),
            version: Arc::default(),
        })
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
    pub async fn take_over(&self, directory: tempfile::TempDir, version: String) -> Result<(), ModelError> {
        let shared = Arc::clone(&self.shared);
        let weights = blocking(move || shared.model.read_weights(directory.path())).await?;
        let mut guard = Arc::clone(&self.version).write_owned().await;
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            // Should it fail half-way, nothing is sampled with what is left.
            *guard = None;
            shared.model.weights().assign(&weights)?;
            *guard = Some(version);
            Ok(())
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ModelError> + Send + 'static,
) -> Result<T, ModelError> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.unwrap_or_else(|error| Err(ModelError::Input(format!("reading the weights panicked: {error}"))))
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
            requests.push(Request {
                prompt: Arc::new(prompt),
                n: piece.n,
                sampling: Sampling {
                    temperature: piece.temperature as f32,
                    top_p: piece.top_p as f32,
                    max_tokens: piece.max_tokens,
                    seed: piece.prompts[index].seed,
                    stop_ids: self.shared.processor.tokenizer().stop_ids().to_vec(),
                    ..Sampling::default()
                },
            });
        }
        let limits = Limits {
            max_rows: ROWS_PER_PIECE,
            ..Limits::default()
        };
        Ok(generate_each(
            &self.shared.model,
            &requests,
            limits,
            cancelled,
            finished,
        )?)
    }

    /// Grids and features of the piece's pictures. Encoded ones go through the vision tower in the order of their names.
    fn encode<'a>(&self, piece: &'a Piece) -> Result<BTreeMap<&'a str, (ProcessedImage, Tensor)>, SampleError> {
        let (mut known, mut processed) = (BTreeMap::new(), Vec::new());
        for (name, image) in &piece.images {
            match image {
                PieceImage::Encoded(text) => {
                    let picture = Picture::decode(&base64(name, text)?, ImageLimits::default())?;
                    processed.push((name.as_str(), self.shared.processor.images().process(&picture)?));
                }
                PieceImage::Features(given) => {
                    let image = ProcessedImage {
                        patches: Vec::new(),
                        grid: given.grid,
                    };
                    known.insert(name.as_str(), (image, self.features(name, given)?));
                }
            }
        }
        let mut features = Vec::with_capacity(processed.len());
        for part in processed.chunks(IMAGES_PER_PASS) {
            let part: Vec<&ProcessedImage> = part.iter().map(|(_, image)| image).collect();
            features.extend(self.shared.model.encode_images(&part, Pass::Infer)?);
        }
        let named = processed.into_iter().zip(features);
        known.extend(named.map(|((name, image), features)| (name, (image, features))));
        Ok(known)
    }

    fn features(&self, name: &str, given: &PieceFeatures) -> Result<Tensor, SampleError> {
        let config = self.shared.model.config();
        let patches = given
            .grid
            .iter()
            .try_fold(1_usize, |product, side| product.checked_mul(*side));
        let tokens = patches.unwrap_or(0) / config.vision.spatial_merge_size.pow(2);
        let bytes = base64(name, &given.values)?;
        let (values, rest) = bytes.as_chunks::<4>();
        if tokens == 0 || !rest.is_empty() || Some(values.len()) != tokens.checked_mul(config.text.hidden_size) {
            return Err(SampleError::Invalid(format!(
                "image {name}: {} bytes are not the features of {tokens} tokens",
                bytes.len()
            )));
        }
        let values: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
        let shape = (tokens, config.text.hidden_size);
        let features = Tensor::from_vec(values, shape, self.shared.model.device()).map_err(ModelError::from)?;
        Ok(features)
    }

    fn prompt(
        &self,
        piece: &Piece,
        index: usize,
        prompt: &PiecePrompt,
        images: &BTreeMap<&str, (ProcessedImage, Tensor)>,
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
            let image = images.get(name.as_str());
            own.push(image.ok_or_else(|| invalid(format!("image {name} was not sent")))?);
        }
        let patches = own.iter().map(|(image, _)| image.clone()).collect();
        let arranged = self.shared.processor.arrange(prompt.token_ids.clone(), patches)?;
        let features: Vec<Tensor> = own.iter().map(|(_, features)| features.clone()).collect();
        Ok(Prompt::from(arranged.row(&features)?))
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

//! The whole model: log-probabilities, gradients, the update.

use std::ops::Range;

use flotilla_kernels::{
    Buffer, Float, Gpu, GpuError,
    norm::{Norm, RmsNormBackward, rms_norm, rms_norm_backward},
    optimizer::{AdamW, GradientNorm, Pace, States},
    rows,
    vocabulary::{self, Losses, Scores},
};

use flotilla_model::Visual;

use super::{
    batch::Batch,
    buffers::{self, Activations, Inputs, OnCard, Rotation, Shared},
    gradients::{Gradient, Gradients},
    layer::Pass,
    plan::Settings,
    tensor::Tensor,
    vision::TowerLearner,
};
use crate::{error::DeviceError, vision::QwenTower, weights::TextWeights};

/// Moments of weights by their names.
pub type NamedStates<'a> = Vec<(&'a str, &'a States)>;

/// What is known of the scored tokens of a batch, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scored {
    /// Log-probability of each target at the temperature.
    pub log_probs: Vec<f32>,
    /// Entropy of each distribution, in nats.
    pub entropies: Vec<f32>,
}

/// What an update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Updated {
    /// Norm of all gradients together, before it was clipped.
    pub grad_norm: f32,
    /// False where the norm was not finite: then nothing was changed.
    pub applied: bool,
}

/// A batch whose gradients have not been computed.
#[derive(Debug)]
struct Pending {
    batch: OnCard,
    temperature: f32,
}

/// Trains weights of `T` in place, with gradients summed in `G`: `T` itself or f32.
#[derive(Debug)]
pub struct Learner<T, G> {
    gpu: Gpu,
    weights: TextWeights<T>,
    settings: Settings,
    rotation: Rotation,
    inputs: Inputs,
    activations: Activations<T>,
    gradients: Gradients<G>,
    /// Those of the language model, then those of the tower.
    tensors: Vec<Tensor<T, G>>,
    norm: GradientNorm,
    clip: Option<Buffer<f32>>,
    pace: Pace,
    /// Micro-batches since the last update.
    summed: usize,
    pub(super) vision: Option<TowerLearner<T, G>>,
    pending: Option<Pending>,
    /// Room for features of a batch, as large as any batch has needed.
    features: Option<Buffer<T>>,
}

impl<T: Float, G: Float> Learner<T, G> {
    /// Allocates everything that `settings` need, with moments of zero. The weights are shared with whoever has them.
    pub fn new(gpu: &Gpu, weights: TextWeights<T>, settings: Settings) -> Result<Self, DeviceError> {
        if G::DTYPE != settings.gradients {
            return Err(DeviceError::Input(format!(
                "gradients in {} of settings with {}",
                G::DTYPE.name(),
                settings.gradients.name()
            )));
        }
        let shape = &weights.shape;
        let gradients = Gradients::new(gpu, shape, settings.tables)?;
        let named = weights.named().into_iter().zip(gradients.ordered());
        let trained = named.filter_map(|((name, weight), gradient)| Some((name, weight, gradient?)));
        let tensors = trained.map(|(name, weight, gradient)| Tensor::new(gpu, settings.states, name, weight, gradient));
        let tensors = tensors.collect::<Result<Vec<_>, GpuError>>()?;
        Ok(Self {
            rotation: Rotation::new(gpu, shape)?,
            inputs: Inputs::new(gpu, &settings)?,
            activations: Activations::new(gpu, shape, &settings)?,
            norm: GradientNorm::new(gpu, tensors.iter().map(|tensor| tensor.weight.len()))?,
            pace: Pace::new(gpu, 0)?,
            gpu: gpu.clone(),
            gradients,
            tensors,
            weights,
            settings,
            clip: None,
            summed: 0,
            vision: None,
            pending: None,
            features: None,
        })
    }

    /// From now on trains a vision tower too: allocates its gradients, moments of zero, and activations of so many patches as
    /// the settings say. The tower's weights are shared with whoever encodes with them; after an update its features are others.
    pub fn train_vision(&mut self, tower: QwenTower<T>) -> Result<(), DeviceError> {
        let (output, hidden) = (tower.shape().output, self.weights.shape.hidden);
        if output != hidden || self.vision.is_some() {
            return Err(DeviceError::Input(format!(
                "a tower with features of {output} for a model of {hidden}, or a second tower"
            )));
        }
        let gpu = &self.gpu;
        let vision = TowerLearner::new(gpu, tower, &self.settings)?;
        for (name, weight, gradient) in vision.weights() {
            let tensor = Tensor::new(gpu, self.settings.states, name, weight, gradient)?;
            self.tensors.push(tensor);
        }
        self.norm = GradientNorm::new(gpu, self.tensors.iter().map(|tensor| tensor.weight.len()))?;
        self.vision = Some(vision);
        Ok(())
    }

    /// The tower that is trained.
    pub fn tower(&self) -> Option<&QwenTower<T>> {
        self.vision.as_ref().map(TowerLearner::tower)
    }

    /// Room for so many rows of features.
    pub(super) fn room_for_features(&mut self, rows: usize) -> Result<Buffer<T>, GpuError> {
        let numbers = rows * self.weights.shape.hidden;
        let room = match self.features.take() {
            Some(room) if room.len() >= numbers => room,
            _ => self.gpu.alloc(numbers)?,
        };
        let part = room.slice(0..numbers);
        self.features = Some(room);
        part
    }

    /// Room for the gradient by so many rows of features, among the buffers of layers: until the next forward pass.
    pub(super) fn feature_slopes(&self, rows: usize) -> Result<Buffer<T>, GpuError> {
        let shape = &self.weights.shape;
        self.activations
            .shared(shape, self.settings.rows())?
            .d_normed
            .slice(0..rows * shape.hidden)
    }

    /// The card.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The weights.
    pub fn weights(&self) -> &TextWeights<T> {
        &self.weights
    }

    /// Sizes and formats.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes other sizes of micro-batches and keeps other activations; gradients and moments stay. A learner of the smallest
    /// sizes leaves the card to an engine until there is something to learn from.
    pub fn resize(&mut self, settings: Settings) -> Result<(), DeviceError> {
        let lasting = |settings: &Settings| (settings.gradients, settings.states, settings.tables);
        if lasting(&settings) != lasting(&self.settings) {
            return Err(DeviceError::Input(format!(
                "gradients and moments of {:?} for {settings:?}",
                self.settings
            )));
        }
        self.pending = None;
        self.features = None;
        self.inputs = Inputs::new(&self.gpu, &settings)?;
        self.activations = Activations::new(&self.gpu, &self.weights.shape, &settings)?;
        self.settings = settings;
        Ok(())
    }

    /// Log-probabilities under the weights as they are. [`Self::backward`] of the same batch may follow. `features`
    /// `[placeholders, hidden]` are put in the place of placeholders.
    pub fn score(
        &mut self,
        batch: &Batch,
        features: Option<&Buffer<T>>,
        temperature: f32,
    ) -> Result<Scored, DeviceError> {
        let weights = self.weights.clone();
        let batch = self.forward(&weights, batch, features, temperature)?;
        let scored = self.read_scores(&batch)?;
        self.pending = Some(Pending { batch, temperature });
        Ok(scored)
    }

    /// Log-probabilities under other weights of the same shape, such as a frozen reference.
    pub fn score_by(
        &mut self,
        weights: &TextWeights<T>,
        batch: &Batch,
        features: Option<&Buffer<T>>,
        temperature: f32,
    ) -> Result<Scored, DeviceError> {
        if weights.shape != self.weights.shape {
            return Err(DeviceError::Input("the other weights are of another shape".to_owned()));
        }
        let batch = self.forward(weights, batch, features, temperature)?;
        self.read_scores(&batch)
    }

    fn read_scores(&self, batch: &OnCard) -> Result<Scored, DeviceError> {
        let head = &self.activations.head;
        let mut scored = Scored {
            log_probs: vec![0.0; batch.scored_tokens],
            entropies: vec![0.0; batch.scored_tokens],
        };
        self.gpu.read(&head.log_prob, &mut scored.log_probs)?;
        self.gpu.read(&head.entropy, &mut scored.entropies)?;
        Ok(scored)
    }

    fn pass<'a>(&'a self, batch: &'a OnCard) -> Result<Pass<'a, T>, GpuError> {
        Ok(Pass {
            gpu: &self.gpu,
            shape: &self.weights.shape,
            shared: self.activations.shared(&self.weights.shape, batch.rows)?,
            batch,
            rotation: &self.rotation,
            sums: &self.activations.sums,
        })
    }

    fn forward(
        &mut self,
        weights: &TextWeights<T>,
        batch: &Batch,
        features: Option<&Buffer<T>>,
        temperature: f32,
    ) -> Result<OnCard, DeviceError> {
        self.pending = None;
        let (gpu, shape) = (&self.gpu, &self.weights.shape);
        let given = features.map_or(0, Buffer::len);
        if given != batch.placeholders.len() * shape.hidden {
            return Err(DeviceError::Input(format!(
                "{given} numbers of features for {} placeholders of {}",
                batch.placeholders.len(),
                shape.hidden
            )));
        }
        let batch = self.inputs.write(gpu, batch, shape.vocabulary)?;
        let stream = self.activations.stream(shape, batch.rows, 0)?;
        rows::embed(gpu, shape.hidden, &weights.embedding, &batch.ids, &stream)?;
        if let Some(features) = features {
            rows::place(gpu, shape.hidden, features, &batch.placeholders, &stream)?;
        }
        let pass = self.pass(&batch)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            pass.forward(layer, &self.activations.layer(shape, batch.rows, index)?)?;
        }
        let hidden = self.head_input(weights, &batch, &pass.shared)?;
        let (head, rows) = (&self.activations.head, 0..batch.scored_rows);
        let scores = Scores {
            log_prob: &head.log_prob.slice(rows.clone())?,
            entropy: Some(&head.entropy.slice(rows.clone())?),
            lse: &head.lse.slice(rows)?,
        };
        let vocabulary = buffers::vocabulary(shape, &self.settings, batch.scored_rows, temperature);
        vocabulary::forward(
            gpu,
            &vocabulary,
            &hidden.normed,
            &weights.head,
            &batch.targets,
            &scores,
            &head.scratch,
        )?;
        Ok(batch)
    }

    /// The scored rows of the residual stream after the last layer, and their norms.
    fn head_input(
        &self,
        weights: &TextWeights<T>,
        batch: &OnCard,
        shared: &Shared<T>,
    ) -> Result<HeadInput<T>, GpuError> {
        let (gpu, shape) = (&self.gpu, &self.weights.shape);
        let numbers = 0..batch.scored_rows * shape.hidden;
        // Buffers of layers, none of which is being computed.
        let input = HeadInput {
            stream: shared.d_normed.slice(numbers.clone())?,
            normed: shared.normed.slice(numbers)?,
            inverse_rms: shared.inverse_rms[0].slice(0..batch.scored_rows)?,
            norm: Norm {
                rows: batch.scored_rows,
                width: shape.hidden,
                eps: shape.eps,
            },
        };
        let last = self.activations.stream(shape, batch.rows, shape.layers)?;
        rows::gather_rows(gpu, shape.hidden, &last, &batch.scored, &input.stream)?;
        let inverse_rms = Some(&input.inverse_rms);
        rms_norm(
            gpu,
            input.norm,
            &input.stream,
            None,
            &weights.norm,
            &input.normed,
            inverse_rms,
        )?;
        Ok(input)
    }

    /// Adds the gradients of a loss with these slopes at the log-probabilities that the last [`Self::score`] returned.
    /// `features` `[placeholders, hidden]` receives the gradient by the features.
    pub fn backward(&mut self, slopes: &[f32], features: Option<&Buffer<T>>) -> Result<(), DeviceError> {
        let Some(Pending { batch, temperature }) = self.pending.take() else {
            return Err(DeviceError::Input(
                "gradients of a batch that was not scored".to_owned(),
            ));
        };
        if slopes.len() != batch.scored_tokens {
            return Err(DeviceError::Input(format!(
                "{} slopes of {} log-probabilities",
                slopes.len(),
                batch.scored_tokens
            )));
        }
        let (gpu, shape) = (&self.gpu, &self.weights.shape);
        let adds = self.summed > 0;
        if !adds {
            self.gradients.begin(gpu)?;
        }
        let pass = self.pass(&batch)?;
        self.head_backward(&batch, &pass.shared, slopes, temperature)?;
        for (index, layer) in self.weights.layers.iter().enumerate().rev() {
            let buffers = self.activations.layer(shape, batch.rows, index)?;
            pass.backward(layer, &buffers, &self.gradients.layers[index], adds)?;
        }
        let dx = &pass.shared.dx;
        if let Some(features) = features {
            rows::gather_rows(gpu, shape.hidden, dx, &batch.placeholders, features)?;
        }
        if let Some(tables) = &self.gradients.tables {
            rows::embedding_gradient(gpu, shape.hidden, &batch.groups, dx, &tables.embedding)?;
        }
        self.summed += 1;
        Ok(())
    }

    /// The gradient of the residual stream after the last layer, to `dx`, and those of head and last norm.
    fn head_backward(
        &self,
        batch: &OnCard,
        shared: &Shared<T>,
        slopes: &[f32],
        temperature: f32,
    ) -> Result<(), GpuError> {
        let (gpu, shape, head) = (&self.gpu, &self.weights.shape, &self.activations.head);
        let rows = 0..batch.scored_rows;
        gpu.write(&head.d_log_prob, slopes)?;
        let input = self.head_input(&self.weights, batch, shared)?;
        let d_hidden = head.d_hidden.slice(0..batch.scored_rows * shape.hidden)?;
        let vocabulary = buffers::vocabulary(shape, &self.settings, batch.scored_rows, temperature);
        vocabulary::backward(
            gpu,
            &vocabulary,
            (&input.normed, &self.weights.head, &batch.targets),
            &Losses {
                lse: &head.lse.slice(rows.clone())?,
                d_log_prob: &head.d_log_prob.slice(rows)?,
                entropy: None,
            },
            &d_hidden,
            self.gradients.tables.as_ref().map(|tables| &tables.head),
            &head.scratch,
        )?;
        rms_norm_backward(
            gpu,
            input.norm,
            RmsNormBackward {
                dy: &d_hidden,
                x: &input.stream,
                weight: &self.weights.norm,
                inverse_rms: &input.inverse_rms,
                dx: &d_hidden,
                accumulate: false,
                dweight: Some((&self.gradients.norm, &self.activations.sums)),
            },
        )?;
        gpu.clear(&shared.dx)?;
        rows::place(gpu, shape.hidden, &d_hidden, &batch.scored, &shared.dx)
    }

    /// Adds the tower's gradients of a loss whose gradients by the features of pictures are `gradients`, `[tokens, hidden]` each,
    /// in one pass over each picture. May be called several times before an update: gradients of all calls are summed.
    pub fn vision_backward(&mut self, visuals: &[&Visual], gradients: &[Buffer<f32>]) -> Result<(), DeviceError> {
        let Some(vision) = &mut self.vision else {
            return Err(DeviceError::Input(
                "gradients of a tower that is not trained".to_owned(),
            ));
        };
        vision.backward(&self.gpu, visuals, gradients)
    }

    /// Those for which gradients have been summed.
    #[cfg(feature = "nccl")]
    pub(super) fn summed(&self) -> &[Tensor<T, G>] {
        &self.tensors[self.summed_tensors()]
    }

    /// How many tensors are those of the language model, which come first.
    fn text_tensors(&self) -> usize {
        let of_vision = self.vision.as_ref().map_or(0, TowerLearner::tensors);
        self.tensors.len() - of_vision
    }

    /// The tensors for which gradients have been summed.
    fn summed_tensors(&self) -> Range<usize> {
        let of_text = self.text_tensors();
        let of_vision = self.vision.as_ref().is_some_and(|vision| vision.summed);
        let begin = if self.summed > 0 { 0 } else { of_text };
        let end = if of_vision { self.tensors.len() } else { of_text };
        begin..end
    }

    /// Clips the summed gradients to `max_norm` by the norm of all of them together and updates every weight in place. Nothing
    /// waits for the card: what it did is asked for by [`Self::updated`]. `adamw.step` counts for nothing, the card counts updates
    /// that were applied.
    ///
    /// A tower to whose gradients nothing was added is left as it is, weights and moments, and its updates are counted by
    /// themselves: as PyTorch passes over parameters without a gradient. Gradients of zero, of pictures whose tokens have no
    /// slope, are gradients: moments and weights decay.
    pub fn update(&mut self, adamw: &AdamW, max_norm: f32) -> Result<(), DeviceError> {
        let range = self.summed_tensors();
        if range.is_empty() {
            return Err(DeviceError::Input("an update without gradients".to_owned()));
        }
        let gpu = &self.gpu;
        let of_text = self.summed > 0;
        let vision = self.vision.as_ref().filter(|vision| vision.summed);
        self.norm.begin();
        for tensor in &self.tensors[range.clone()] {
            tensor.measure(gpu, &mut self.norm)?;
        }
        let clip = self.norm.clip(gpu, 1.0, max_norm)?.clone();
        for pace in vision
            .map(|vision| &vision.pace)
            .into_iter()
            .chain(of_text.then_some(&self.pace))
        {
            #[allow(clippy::cast_possible_truncation, reason = "the card computes in f32")]
            pace.set_learning_rate(gpu, adamw.learning_rate as f32)?;
            pace.advance(gpu, adamw, &clip)?;
        }
        let first = self.text_tensors();
        for (number, tensor) in (0u32..).zip(&self.tensors).skip(range.start).take(range.len()) {
            let pace = match vision {
                Some(vision) if number as usize >= first => &vision.pace,
                _ => &self.pace,
            };
            tensor.update(gpu, adamw, number, &clip, pace)?;
        }
        self.clip = Some(clip);
        self.discard();
        Ok(())
    }

    /// What the last update did, after waiting for it. None before the first.
    pub fn updated(&self) -> Result<Option<Updated>, DeviceError> {
        let Some(clip) = &self.clip else { return Ok(None) };
        let mut read = [0.0; 2];
        self.gpu.read(clip, &mut read)?;
        Ok(Some(Updated {
            grad_norm: read[0],
            applied: read[1] != 0.0,
        }))
    }

    /// Forgets gradients that were summed and not used.
    pub fn discard(&mut self) {
        self.summed = 0;
        self.pending = None;
        if let Some(vision) = &mut self.vision {
            vision.summed = false;
        }
    }

    /// Zeros in the place of gradients where none have been summed, as if a micro-batch with slopes of zero had been; of the
    /// tower where another member has a picture.
    #[cfg(feature = "nccl")]
    pub(super) fn clear_unless_summed(&mut self, pictures: bool) -> Result<(), GpuError> {
        let summed = self.summed_tensors();
        let of_text = self.text_tensors();
        let wanted = if pictures { self.tensors.len() } else { of_text };
        for (_, tensor) in self.tensors[..wanted]
            .iter()
            .enumerate()
            .filter(|(index, _)| !summed.contains(index))
        {
            tensor.clear(&self.gpu)?;
        }
        self.summed = self.summed.max(1);
        if let Some(vision) = &mut self.vision {
            vision.summed = pictures;
        }
        Ok(())
    }

    /// Every weight's gradient by name.
    pub fn gradients(&self) -> impl Iterator<Item = (&str, &Gradient<G>)> {
        self.tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), &tensor.gradient))
    }

    /// Every weight's moments by name, and the number of updates that were applied: what a checkpoint holds besides weights.
    pub fn states(&self) -> Result<(NamedStates<'_>, u32), DeviceError> {
        let states = self.tensors.iter().map(|tensor| (tensor.name.as_str(), &tensor.states));
        Ok((states.collect(), self.pace.updates(&self.gpu)?))
    }

    /// Updates that the tower took part in; None without a tower.
    pub fn vision_updates(&self) -> Result<Option<u32>, DeviceError> {
        let updates = self.vision.as_ref().map(|vision| vision.pace.updates(&self.gpu));
        Ok(updates.transpose()?)
    }

    /// Goes on counting updates from `pace`, and those of the tower from the other one.
    pub(super) fn resume(&mut self, pace: Pace, of_vision: Option<Pace>) {
        self.pace = pace;
        if let (Some(vision), Some(pace)) = (&mut self.vision, of_vision) {
            vision.pace = pace;
        }
        self.discard();
    }
}

/// What the output head works on.
struct HeadInput<T> {
    stream: Buffer<T>,
    normed: Buffer<T>,
    inverse_rms: Buffer<f32>,
    norm: Norm,
}

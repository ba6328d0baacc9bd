//! Samples of one update, distributed over micro-batches.

use flotilla_kernels::{Buffer, Float, rows};

use super::{Batch, BatchError, Learner, Sequence, micro_batches};
use crate::{error::DeviceError, weights::TextWeights};

/// A picture in a sample.
#[derive(Clone, Debug)]
pub struct Picture<T> {
    /// The index of the first token in whose place its features go.
    pub start: usize,
    /// Features on the card, `[tokens, hidden]`: those of [`crate::vision::QwenTower::encode`], computed anew after each update
    /// of the tower. Samples of one prompt share them.
    pub features: Buffer<T>,
    /// The gradient by the features, `[tokens, hidden]`, to which [`Learner::learn`] adds: zeros at first, shared by all samples
    /// that show the picture, for [`Learner::vision_backward`]. None where the tower is not trained.
    pub gradient: Option<Buffer<f32>>,
}

/// A prompt with a completion.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a, T> {
    /// Tokens of both.
    pub ids: &'a [u32],
    /// Position of each token on the axes time, height and width.
    pub positions: &'a [[u32; 3]],
    /// Tokens of the prompt. All that follow are scored.
    pub prompt: usize,
    /// Pictures, in the order of their tokens.
    pub pictures: &'a [Picture<T>],
}

impl From<BatchError> for DeviceError {
    fn from(error: BatchError) -> Self {
        Self::Input(error.to_string())
    }
}

impl<T: Float, G: Float> Learner<T, G> {
    /// Log-probabilities of the completions' tokens, under other weights than those that are trained if they are given.
    pub fn log_probs(
        &mut self,
        weights: Option<&TextWeights<T>>,
        samples: &[Sample<'_, T>],
        temperature: f32,
    ) -> Result<Vec<Vec<f32>>, DeviceError> {
        let mut found = vec![Vec::new(); samples.len()];
        for bin in self.bins(samples)? {
            let (batch, features) = self.batch(samples, &bin)?;
            let scored = match weights {
                Some(weights) => self.score_by(weights, &batch, features.as_ref(), temperature)?,
                None => self.score(&batch, features.as_ref(), temperature)?,
            };
            for (index, own) in of_samples(samples, &bin, &scored.log_probs) {
                found[index] = own.to_vec();
            }
        }
        Ok(found)
    }

    /// Adds the gradients of a loss to those that are summed. `slopes` gives the slopes of the loss at the log-probabilities of
    /// a sample's completion; [`Self::update`] follows, after [`Self::vision_backward`] with the pictures' gradients where the
    /// tower is trained.
    pub fn learn(
        &mut self,
        samples: &[Sample<'_, T>],
        temperature: f32,
        mut slopes: impl FnMut(usize, &[f32]) -> Vec<f32>,
    ) -> Result<(), DeviceError> {
        for bin in self.bins(samples)? {
            let (batch, features) = self.batch(samples, &bin)?;
            let scored = self.score(&batch, features.as_ref(), temperature)?;
            let own = of_samples(samples, &bin, &scored.log_probs);
            let slopes = own.flat_map(|(index, log_probs)| slopes(index, log_probs));
            let slopes = slopes.collect::<Vec<_>>();
            let pictures = || bin.iter().flat_map(|index| samples[*index].pictures);
            if pictures().all(|picture| picture.gradient.is_none()) {
                self.backward(&slopes, None)?;
                continue;
            }
            let by_features = self.feature_slopes(batch.placeholders.len())?;
            self.backward(&slopes, Some(&by_features))?;
            let mut used = 0;
            for picture in pictures() {
                let own = by_features.slice(used..used + picture.features.len())?;
                used += own.len();
                if let Some(gradient) = &picture.gradient {
                    rows::add(self.gpu(), gradient, &own)?;
                }
            }
        }
        Ok(())
    }

    /// Samples by micro-batches. Those without a completion are in none.
    fn bins(&self, samples: &[Sample<'_, T>]) -> Result<Vec<Vec<usize>>, DeviceError> {
        if let Some(sample) = samples.iter().find(|sample| sample.prompt > sample.ids.len()) {
            let (prompt, tokens) = (sample.prompt, sample.ids.len());
            return Err(DeviceError::Input(format!("a prompt of {prompt} of {tokens} tokens")));
        }
        let scored = (0..samples.len()).filter(|index| samples[*index].ids.len() > samples[*index].prompt);
        let scored = scored.collect::<Vec<_>>();
        let lengths = scored.iter().map(|index| samples[*index].ids.len()).collect::<Vec<_>>();
        let settings = self.settings();
        let bins = micro_batches(&lengths, settings.tokens, settings.sequences)?;
        let named = bins.iter().map(|bin| bin.iter().map(|place| scored[*place]).collect());
        Ok(named.collect())
    }

    /// The micro-batch of some samples, and the features of all of their placeholders.
    fn batch(&mut self, samples: &[Sample<'_, T>], bin: &[usize]) -> Result<(Batch, Option<Buffer<T>>), DeviceError> {
        let hidden = self.weights().shape.hidden;
        let parts = bin.iter().map(|index| {
            let sample = &samples[*index];
            let rows = sample.pictures.iter().flat_map(|picture| {
                let rows = picture.start..picture.start + picture.features.len() / hidden;
                rows.map(|row| u32::try_from(row).unwrap_or(u32::MAX))
            });
            (sample, sample.prompt..sample.ids.len(), rows.collect::<Vec<_>>())
        });
        let parts = parts.collect::<Vec<_>>();
        let batch = Batch::pack(parts.iter().map(|(sample, scored, placeholders)| Sequence {
            ids: sample.ids,
            positions: sample.positions,
            scored,
            placeholders,
        }))?;
        if batch.placeholders.is_empty() {
            return Ok((batch, None));
        }
        let room = self.room_for_features(batch.placeholders.len())?;
        let mut used = 0;
        for picture in parts.iter().flat_map(|(sample, ..)| sample.pictures) {
            let features = &picture.features;
            self.gpu().copy(features, &room.slice(used..used + features.len())?)?;
            used += features.len();
        }
        Ok((batch, Some(room)))
    }
}

/// Each sample of a micro-batch with its part of the log-probabilities.
fn of_samples<'a, T>(
    samples: &'a [Sample<'_, T>],
    bin: &'a [usize],
    log_probs: &'a [f32],
) -> impl Iterator<Item = (usize, &'a [f32])> {
    let mut rest = log_probs;
    bin.iter().map(move |index| {
        let sample = &samples[*index];
        let (own, others) = rest.split_at(sample.ids.len() - sample.prompt);
        rest = others;
        (*index, own)
    })
}

//! Variables and their optimiser: one update from the shards of a mini-batch.

use candle_core::{Tensor, Var};
use flotilla_api::algorithm::{Module, Optimizer};
use flotilla_grpo::{
    adamw::{AdamW, Parameters, Update},
    gradient::Gradients,
};
use flotilla_model::{Pass, Vlm};

use super::scoring::{Scorer, head};
use crate::train::{error::TrainError, modules::is_trained, parallel::map_parts};

/// Rows of one shard: enough for efficient matrix products, few enough that the shards of a mini-batch keep every thread
/// busy. A constant, so that sums do not depend on the number of threads.
pub const ROWS_PER_SHARD: usize = 16;

/// What is being trained.
#[derive(Debug)]
pub struct Learner {
    /// The model, whose variables change in place.
    pub model: Vlm,
    optimizer: AdamW,
    names: Vec<String>,
    head: Tensor,
    /// Threads that share a mini-batch.
    pub threads: usize,
}

impl Learner {
    /// A learner whose optimiser has seen nothing.
    pub fn new(mut model: Vlm, freeze: &[Module], optimizer: &Optimizer, threads: usize) -> Result<Self, TrainError> {
        let config = model.config().clone();
        let trainable = |name: &str| is_trained(&config, name, freeze);
        model.set_trainable(trainable)?;
        let (names, variables): (Vec<String>, Vec<Var>) = model
            .named_vars()
            .into_iter()
            .filter(|(name, _)| trainable(name))
            .unzip();
        if names.is_empty() {
            return Err(TrainError::Invalid("every module of the model is frozen".into()));
        }
        let parameters = Parameters {
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            epsilon: optimizer.epsilon,
            weight_decay: optimizer.weight_decay,
            max_grad_norm: optimizer.max_grad_norm,
        };
        Ok(Self {
            optimizer: AdamW::new(variables, parameters)?,
            names,
            head: head(&model, !freeze.contains(&Module::Embeddings))?,
            model,
            threads,
        })
    }

    /// One update: every shard's loss is differentiated on some thread, gradients are added in the order of the shards. As many
    /// shards as threads have gradients at a time.
    /// `loss` gives the shard's part of the loss and what else is wanted of it.
    pub fn update<P: Sync, S: Send>(
        &mut self,
        shards: &[P],
        rate: f64,
        loss: impl Fn(Scorer<'_>, &P) -> Result<(Tensor, S), TrainError> + Sync,
    ) -> Result<(Update, Vec<S>), TrainError> {
        let variables = self.optimizer.variables();
        let scorer = Scorer {
            model: &self.model,
            head: &self.head,
            pass: Pass::Train,
        };
        let (mut gradients, mut all) = (Vec::new(), Vec::with_capacity(shards.len()));
        for wave in shards.chunks(self.threads.max(1)) {
            let parts = map_parts(self.threads, wave, |shard| {
                let (loss, told) = loss(scorer, shard)?;
                let gradients = Gradients::collect(&loss.backward()?, variables);
                Ok::<_, TrainError>((gradients, told))
            })?;
            for (part, told) in parts {
                gradients.push(part);
                all.push(told);
            }
            gradients = Gradients::sum(&gradients)?.into_iter().collect();
        }
        let Some(sum) = gradients.first() else {
            return Err(TrainError::Invalid("a mini-batch is empty".into()));
        };
        Ok((self.optimizer.update(sum, rate)?, all))
    }

    /// Moments by variable name, and the number of updates.
    pub fn optimizer_state(&self) -> (Vec<(String, Tensor)>, u64) {
        let (moments, updates) = self.optimizer.state();
        (
            self.names.iter().cloned().zip(moments.iter().cloned()).collect(),
            updates,
        )
    }

    /// Goes on from saved moments; `find` gives those of a variable.
    pub fn restore_optimizer(&mut self, updates: u64, find: impl Fn(&str) -> Option<Tensor>) -> Result<(), TrainError> {
        let moments = self
            .names
            .iter()
            .map(|name| {
                find(name).ok_or_else(|| TrainError::Invalid(format!("the checkpoint has no moments of {name}")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(self.optimizer.restore(&moments, updates)?)
    }
}

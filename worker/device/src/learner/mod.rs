//! Learning on the card: forward and backward passes of the language model written out, an optimiser, and a plan of memory.
//!
//! | file | what it is |
//! |---|---|
//! | `batch.rs` | sequences behind one another, without padding |
//! | `plan.rs` | bytes of everything, before anything is allocated; what is kept for the backward pass |
//! | `buffers.rs`, `gradients.rs` | memory, allocated once |
//! | `products.rs` | linear layers and their gradients |
//! | `layer.rs` | one layer, forward and backward |
//! | `passes.rs` | the whole model: log-probabilities, gradients, the update |
//! | `tensor.rs` | one weight, its moments, its update |
//! | `vision/` | the tower of Qwen2.5-VL |
//! | `step.rs` | samples of an update, distributed over micro-batches |
//! | `parallel.rs` | sums of gradients over several GPUs that hold the same weights |
//! | `state.rs` | moments as bytes, weights back to the host |
//! | `reference.rs` | the same model in f64 on the host |
//! | `specimen.rs` | random models and batches of the checks |
//! | `check.rs` | parity with it, determinism, a loss that falls |
//! | `agreement.rs` | parity with the model of the host and its autograd, and with what the engine draws |
//! | `measure.rs`, `parts.rs` | seconds of a training step beside the floor, and of each of its operations |
//!
//! An update is: for each micro-batch `Learner::score` (log-probabilities under the weights as they are), slopes from
//! [`flotilla_grpo::policy`] on the host, `Learner::backward`; then `Learner::update`. `Learner::learn` does all but the last for
//! samples of any number; with [`Learner::train_vision`] it adds the gradients by the features of pictures too, and
//! `Learner::vision_backward` makes those of the tower of them before the update. The weights are those buffers that the engine reads, changed in place.

#[cfg(feature = "cuda")]
mod agreement;
mod batch;
mod plan;

#[cfg(feature = "cuda")]
mod buffers;
#[cfg(feature = "cuda")]
pub mod check;
#[cfg(feature = "cuda")]
mod gradients;
#[cfg(feature = "cuda")]
mod layer;
#[cfg(feature = "cuda")]
pub mod measure;
#[cfg(feature = "nccl")]
mod parallel;
#[cfg(feature = "cuda")]
pub mod parts;
#[cfg(feature = "cuda")]
mod passes;
#[cfg(feature = "cuda")]
mod products;
pub mod reference;
#[cfg(feature = "cuda")]
mod specimen;
#[cfg(feature = "cuda")]
mod state;
#[cfg(feature = "cuda")]
mod step;
#[cfg(feature = "cuda")]
mod tensor;
mod vision;

pub use batch::{Batch, BatchError, Sequence, micro_batches};
#[cfg(feature = "cuda")]
pub use gradients::Gradient;
#[cfg(feature = "cuda")]
pub use passes::{Learner, Scored, Updated};
pub use plan::{Keep, Part, Plan, Settings, Shapes};
#[cfg(feature = "cuda")]
pub use step::{Picture, Sample};
pub use vision::encoding_bytes;

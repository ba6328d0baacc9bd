//! The model on a GPU: packed weights, decode graphs, the runner of the engine, the learner.
//!
//! | file | what it is |
//! |---|---|
//! | `shape.rs` | sizes of language models and vision towers, the released ones by name |
//! | `shared.rs` | which sequences of a step begin alike |
//! | `step.rs` | what a step computes, laid out for the card |
//! | `parallel/` | one model over several processes: collective operations, what each rank holds |
//! | `plan.rs` | how much memory serving takes on each card |
//! | `weights.rs`, `readers.rs` | packed weights, one copy for engine and learner; read by several threads |
//! | `pool.rs`, `copies.rs` | keys and values in blocks; which copies of blocks can be done at once |
//! | `peers.rs` | what a step exchanges with the GPUs that hold the rest of the model |
//! | `text.rs`, `arena.rs` | the language model, computed; its activations |
//! | `vision/` | the vision tower of Qwen2.5-VL |
//! | `siglip/` | that of LLaVA-OneVision: squares, projector, tokens arranged |
//! | `tower.rs` | the tower of either |
//! | `runner.rs`, `runner/` | the model as the engine runs it, on one GPU and on several |
//! | `pieces.rs`, `post.rs` | its chunks as pieces of a step; what travels between host and card |
//! | `check.rs` | beside the model of the host |
//! | `measure/` | beside the floor of the card, and beside transformers |
//! | `learner/` | training in place: passes written out, optimiser, plan of memory |

#[cfg(feature = "cuda")]
mod arena;
#[cfg(feature = "cuda")]
pub mod check;
pub mod copies;
#[cfg(feature = "cuda")]
pub mod error;
pub mod learner;
pub mod measure;
pub mod parallel;
#[cfg(feature = "cuda")]
mod peers;
#[cfg(feature = "cuda")]
mod pieces;
pub mod plan;
#[cfg(feature = "cuda")]
pub mod pool;
#[cfg(feature = "cuda")]
mod post;
#[cfg(any(feature = "cuda", test))]
mod readers;
#[cfg(feature = "cuda")]
pub mod runner;
pub mod shape;
pub mod shared;
pub mod siglip;
pub mod step;
#[cfg(feature = "cuda")]
pub mod text;
#[cfg(feature = "cuda")]
mod tower;
pub mod vision;
#[cfg(feature = "cuda")]
pub mod weights;

#[cfg(feature = "cuda")]
pub use arena::Capacity;
#[cfg(feature = "cuda")]
pub use error::DeviceError;
#[cfg(feature = "cuda")]
pub use pool::DevicePool;
#[cfg(feature = "cuda")]
pub use runner::{DeviceRunner, Sharing};
pub use shape::{TextShape, VisionShape};
#[cfg(feature = "cuda")]
pub use text::TextModel;
#[cfg(feature = "cuda")]
pub use tower::Vision;
#[cfg(feature = "cuda")]
pub use weights::{Layer, TextWeights};

//! The model on a GPU: packed weights, decode graphs, the runner of the engine, the learner.
//!
//! | file | what it is |
//! |---|---|
//! | `shape.rs` | sizes of language models and vision towers, the released ones by name |
//! | `parallel/` | one model over several processes: collective operations, what each rank holds |
//! | `plan.rs` | how much memory serving takes on each card |
//! | `weights.rs` | packed weights, one copy for engine and learner |

#[cfg(feature = "cuda")]
pub mod error;
pub mod parallel;
pub mod plan;
pub mod shape;
#[cfg(feature = "cuda")]
pub mod weights;

#[cfg(feature = "cuda")]
pub use error::DeviceError;
pub use shape::{TextShape, VisionShape};
#[cfg(feature = "cuda")]
pub use weights::{Layer, TextWeights};

//! The model on a GPU: packed weights, decode graphs, the runner of the engine, the learner.
//!
//! | file | what it is |
//! |---|---|
//! | `shape.rs` | sizes of a language model, the real ones by name, and how much memory they take |
//! | `weights.rs` | packed weights, one copy for engine and learner |
//! | `learner/` | training in place: passes written out, optimiser, plan of memory |

#[cfg(feature = "cuda")]
pub mod error;
pub mod learner;
pub mod shape;
#[cfg(feature = "cuda")]
pub mod weights;

#[cfg(feature = "cuda")]
pub use error::DeviceError;
pub use shape::TextShape;
#[cfg(feature = "cuda")]
pub use weights::{Layer, TextWeights};

//! The vision side of LLaVA-OneVision: SigLIP over squares, the projector, and tokens arranged to pictures and videos.
//!
//! | file | what it is |
//! |---|---|
//! | `mixture.rs` | what each token of a visual is made of, as lists for the card |
//! | `turns.rs` | how many squares go through the tower together |
//! | `weights.rs` | weights on the card |
//! | `tower.rs` | squares to features |
//! | `check.rs`, `measure.rs` | beside the model of the host, and beside the floor of the card |

#[cfg(feature = "cuda")]
pub mod check;
#[cfg(feature = "cuda")]
pub mod measure;
pub mod mixture;
#[cfg(feature = "cuda")]
mod tower;
#[cfg(any(feature = "cuda", test))]
mod turns;
#[cfg(feature = "cuda")]
mod weights;

pub use mixture::Mixture;
#[cfg(feature = "cuda")]
pub use tower::SiglipTower;

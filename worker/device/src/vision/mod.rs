//! The vision tower of Qwen2.5-VL on the card. Learning it: `learner/vision/`.
//!
//! | file | what it is |
//! |---|---|
//! | `layout.rs` | how frames lie behind one another: windows, positions, segments |
//! | `weights.rs` | packed weights, from the host and back |
//! | `tower.rs` | features of pictures, computed |

mod layout;
#[cfg(feature = "cuda")]
mod tower;
#[cfg(feature = "cuda")]
mod weights;

pub use layout::{Frames, Layout, LayoutError, MOST_PATCHES, chunks, tokens};
#[cfg(feature = "cuda")]
pub use tower::QwenTower;
#[cfg(feature = "cuda")]
pub(crate) use {
    tower::{attention, grid_of, heads, norm},
    weights::{Block, Linear},
};

//! The language model that the families share: Qwen2 with plain or multimodal rotary positions.
//!
//! | file | what it is |
//! |---|---|
//! | `config.rs` | sizes and names |
//! | `tower.rs` | whole rows, and spans of sequences over a pool of keys and values |

mod config;
mod tower;

pub use config::{TextConfig, TextNames};
pub(crate) use config::{TextDefaults, parse};
pub(crate) use tower::TextTower;

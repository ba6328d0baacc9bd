//! Vision-language models on candle: one family per folder, from a Hugging Face style directory to hidden states.
//!
//! Every device and dtype that candle has is a parameter. On the CPU in f32 the hot operations are fused, each with its
//! own backward; elsewhere they are composed from candle operations that all have one (candle's own fused operations
//! silently drop gradients).
//!
//! # Layout
//!
//! | file | what it is |
//! |---|---|
//! | `vlm.rs` | a model of any family: what engine, trainer and server see |
//! | `config.rs` | `config.json`: which family, sizes, ids |
//! | `parameter.rs` | what a configuration asks for, without allocating it |
//! | `weights/` | named variables: load, draw, save, copy |
//! | `lora.rs` | low-rank adapters, as PEFT has them |
//! | `processor.rs` | messages, pictures and videos to ids, positions and visuals |
//! | `tokenizer.rs` | text to ids and back, stop and pad ids |
//! | `chat.rs` | messages to text by the checkpoint's own template |
//! | `media/` | pictures and videos as users give them, within limits |
//! | `visual.rs` | a picture or video as a vision tower reads it |
//! | `text/` | the language model that the families share |
//! | `qwen2_5_vl/`, `llava_onevision/` | what is peculiar to a family: config, vision, visual processor |
//! | `layers.rs` | the pieces that towers are made of |
//! | `rope.rs` | rotary tables |
//! | `batch.rs` | ragged rows of tokens and visual features |
//! | `pool.rs` | keys and values of sequences that grow, in blocks |
//! | `ops/` | normalization, linear, gate, rotation, attention: composed and fused |
//! | `error.rs` | what can go wrong, with the file, tensor or number that was wrong |

pub mod batch;
pub mod chat;
pub mod config;
mod error;
mod layers;
pub mod llava_onevision;
pub mod lora;
pub mod media;
pub mod ops;
pub mod parameter;
pub mod pool;
pub mod processor;
pub mod qwen2_5_vl;
pub mod rope;
#[cfg(test)]
mod tests;
pub mod text;
pub mod tokenizer;
pub mod visual;
mod vlm;
pub mod weights;

pub use batch::{Row, TextBatch};
pub use chat::{ChatTemplate, Content, Message, Part};
pub use config::{Config, Vision};
pub use error::{ModelError, WeightProblems};
pub use lora::{Lora, LoraConfig};
pub use media::{ImageLimits, Medium, MediumSize, Picture, Sampling, Video, VideoLimits};
pub use parameter::Parameter;
pub use pool::{KvPool, Span};
pub use processor::{Plan, Processor, Prompt};
pub use tokenizer::{TokenBytes, Tokenizer};
pub use visual::{Grid, Layout, Visual, VisualProcessor};
pub use vlm::{LoadOptions, Pass, Vlm};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

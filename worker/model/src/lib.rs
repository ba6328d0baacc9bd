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
//! | `error.rs` | what can go wrong, with the file, tensor or number that was wrong |
//! | `weights.rs` | named variables: load, draw, save, copy |
//! | `tokenizer.rs` | text to ids and back, stop and pad ids |
//! | `chat.rs` | messages to text by the checkpoint's own template |
//! | `media/` | pictures and videos as users give them, within limits |
//! | `visual.rs` | a picture or video as a vision tower reads it |
//! | `rope.rs` | rotary tables |
//! | `batch.rs` | ragged rows of tokens and image features |
//! | `cache.rs` | keys and values of rows that are being decoded |
//! | `ops/` | normalization, linear, gate, rotation, attention: composed and fused |
//! | `llava_onevision/` | the family: pictures and videos to squares |
//! | `qwen2_5_vl/` | the family: config, vision, text, positions, processor |

pub mod batch;
pub mod cache;
pub mod chat;
mod error;
pub mod llava_onevision;
pub mod media;
pub mod ops;
pub mod qwen2_5_vl;
pub mod rope;
pub mod tokenizer;
pub mod visual;
pub mod weights;

pub use batch::{Row, TextBatch};
pub use cache::KvCache;
pub use chat::{ChatTemplate, Content, Message, Part};
pub use error::ModelError;
pub use media::{ImageLimits, Medium, MediumSize, Picture, Sampling, Video, VideoLimits};
pub use qwen2_5_vl::{
    LoadOptions, Pass, Qwen25Vl,
    config::Config,
    processor::{ProcessedImage, Processor, Prompt},
};
pub use tokenizer::Tokenizer;
pub use visual::{Grid, Layout, Visual, VisualProcessor};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

//! LLaVA-OneVision: a picture as several squares, a projector and a language model.
//!
//! # Layout
//!
//! | file | what it is |
//! |---|---|
//! | `anyres.rs` | how a picture of any size becomes squares, and how many tokens those become |
//! | `visual_processor.rs` | pictures and videos to normalized squares |

pub mod anyres;
pub mod visual_processor;

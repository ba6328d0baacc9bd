//! Prompts in, tokens and log-probabilities out.
//!
//! One loop serves users, compares responses as a critic and rolls out for GRPO: [`Engine::step`] reads as schedule,
//! run, postprocess. A trainer calls [`generate`] on its own thread and lends the model; a server gives the model to
//! an [`EngineThread`] and talks to it by messages. A request's tokens depend on its seed and not on what else is in
//! the batch, up to the rounding of the matrix products (whose order of summation may change with the row count); see
//! `docs/engine.md`.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`request`] | what is asked for and what comes back |
//! | [`constraint`] | what a completion may be |
//! | [`choice`] | a set of answers as a trie |
//! | [`grammar`] | JSON schemas, regular expressions and grammars, compiled for a tokenizer |
//! | [`recipe`] | what the samples of a request share of how they are drawn |
//! | [`history`] | penalties for what was said |
//! | [`distribution`] | probabilities, and what `top_k`, `top_p` and `min_p` leave of them |
//! | [`sampler`] | from logits to a token and its log-probability |
//! | [`shared`] | logits that several samples draw from |
//! | [`sequence`] | one sample on its way |
//! | [`limits`] | what may be in memory at once, and how much one step computes |
//! | [`prefix`] | keys of blocks: what they were computed from |
//! | [`blocks`] | which blocks are free, shared or remembered |
//! | [`row`] | a sample with its place in the queue and its blocks |
//! | [`group`] | a request that has not ended: its prompt and its samples |
//! | [`scheduler`] | who runs in a step: tokens, rows and blocks, in a fair order |
//! | [`runner`] | what a model must offer |
//! | [`prompt`], [`features`], [`vlm`] | the runner of the vision-language models |
//! | [`engine`] | the loop |
//! | [`stats`] | what it holds and has done |
//! | [`rollout`] | the loop on the caller's thread |
//! | [`thread`] | the loop on its own thread, for async callers |

pub mod blocks;
pub mod choice;
pub mod constraint;
pub mod distribution;
pub mod engine;
pub mod error;
pub mod features;
pub mod grammar;
pub mod group;
pub mod history;
pub mod limits;
pub mod prefix;
pub mod prompt;
pub mod recipe;
pub mod request;
pub mod rollout;
pub mod row;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod shared;
pub mod stats;
pub mod thread;
pub mod vlm;

pub use constraint::Constraint;
pub use engine::{Engine, Event, Step};
pub use error::EngineError;
pub use grammar::{Grammar, GrammarSource, Grammars};
pub use limits::Limits;
pub use prompt::Prompt;
pub use recipe::Recipe;
pub use request::{Completion, FinishReason, Group, Request, Sampling, Token};
pub use rollout::{engine_for, generate, generate_each, run_each};
pub use runner::Runner;
pub use stats::{Figure, Stats};
pub use thread::{EngineHandle, EngineThread, Health, LoadPolicy, Overloaded, Tokens};
pub use vlm::VlmRunner;

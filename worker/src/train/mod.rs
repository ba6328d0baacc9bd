//! The loops of role `train`: supervised fine-tuning and GRPO, with rollouts in the same process or by rollout pods.
//!
//! Every draw follows from (seed, purpose, step) and every sum is added in an order that depends on the data alone, so a
//! run that was killed and goes on from its newest checkpoint ends with the same bytes as one that was not.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`run`] | the loop: evaluate, checkpoint, step, until the goal, the guard or a signal |
//! | [`sft`] | one step of supervised fine-tuning |
//! | [`grpo`] | one step of GRPO: rollouts, rewards, reference, updates |
//! | [`rollout`] | completions that are asked for, in fixed pieces, of the engine or of rollout pods |
//! | [`fleet`], [`pod_client`] | rollout pods: who is asked for what, and how |
//! | [`actor`] | the model that is trained, and what a step asks of it |
//! | [`autograd`] | an actor of candle's tensors, on the CPU or a GPU |
//! | `packed` | an actor of packed weights and own kernels, on a GPU |
//! | [`choice`] | which of them a run takes |
//! | [`inputs`] | what is read before the first step |
//! | [`examples`], [`gallery`] | canonical rows as token ids; the pictures that they show |
//! | [`modules`] | which parameters a job's `freeze` means |
//! | [`order`] | which rows a step takes; seeds |
//! | [`parallel`] | parts of a computation on threads, results in order |
//! | [`evaluation`] | greedy answers on held-out rows |
//! | [`checkpoint`] | weights, optimiser and position, written and restored |
//! | [`journal`] | `metrics.jsonl` and what it tells the progress |
//! | [`plot`] | curves of the run as SVG |
//! | [`error`] | what ends a run |

pub mod actor;
pub mod autograd;
pub mod checkpoint;
pub mod choice;
pub mod error;
pub mod evaluation;
pub mod examples;
pub mod fleet;
pub mod gallery;
pub mod grpo;
pub mod inputs;
pub mod journal;
pub mod modules;
pub mod order;
#[cfg(feature = "cuda")]
mod packed;
pub mod parallel;
pub mod plot;
pub mod pod_client;
pub mod rollout;
pub mod run;
pub mod sft;

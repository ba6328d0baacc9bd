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
//! | [`rollout`] | completions of prompts, in fixed pieces, by the engine or by rollout pods |
//! | [`fleet`], [`pod_client`] | rollout pods: who is asked for what, and how |
//! | [`learner`] | model and optimiser: one update from the shards of a mini-batch |
//! | [`scoring`] | log-probabilities of completions, with or without gradient |
//! | [`examples`] | canonical rows as token ids, and the pictures they show |
//! | [`features`] | image features that are computed once while the vision tower is frozen |
//! | [`order`] | which rows a step takes; seeds |
//! | [`parallel`] | parts of a computation on threads, results in order |
//! | [`evaluation`] | greedy answers on held-out rows |
//! | [`checkpoint`] | weights, optimiser and position, written and restored |
//! | [`journal`] | `metrics.jsonl` and what it tells the progress |
//! | [`plot`] | curves of the run as SVG |
//! | [`error`] | what ends a run |

pub mod checkpoint;
pub mod error;
pub mod evaluation;
pub mod examples;
pub mod features;
pub mod fleet;
pub mod grpo;
pub mod journal;
pub mod learner;
pub mod order;
pub mod parallel;
pub mod plot;
pub mod pod_client;
pub mod rollout;
pub mod run;
pub mod scoring;
pub mod sft;

//! The mathematics of one update: rewards, advantages, log-probabilities, losses, the optimiser. No files, network or clock;
//! every result follows from the arguments alone.
//!
//! The formulas are those of the released LLaVA-Critic-R1 trainer (an EasyR1 fork) with one deliberate difference: tokens are
//! normalised over the whole mini-batch, so that a mini-batch may be split in any way and summed to the same loss.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`reward`] | format, boxed answer, weighted terms |
//! | [`grade`] | when two answers are the same |
//! | [`advantage`] | rewards of a group to advantages |
//! | [`batch`] | samples, de-duplication, token weights, splits |
//! | [`logprob`] | log-probabilities of given tokens from hidden states |
//! | [`policy`] | clipped policy loss with k3 KL: sums over tokens, and slopes at their log-probabilities |
//! | [`loss`] | the same loss as a tensor, and cross-entropy |
//! | [`gradient`] | gradients by variable: sums in a fixed order, global norm |
//! | [`adamw`] | the optimiser and its state |
//! | [`schedule`] | the learning rate over the run |

pub mod adamw;
pub mod advantage;
pub mod batch;
pub mod grade;
pub mod gradient;
pub mod logprob;
pub mod loss;
pub mod policy;
pub mod reward;
pub mod schedule;

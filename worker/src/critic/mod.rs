//! Best of n: which of many candidates a critic picks, how sure it is, and what the picking costs.
//!
//! | file | what |
//! |---|---|
//! | [`pair`] | two candidates in an order, what a critic says about them, and what both orders say together |
//! | [`field`] | candidates of which equal texts are one entrant, and what most of them answer |
//! | [`draw`](mod@draw) | everything that chance decides, from the seed |
//! | [`bracket`] | who meets whom: knock-out, sequential, round robin; no critic, no clock |
//! | [`contest`] | plays a bracket over a [`Critic`], round by round, and counts what that took |
//! | [`remember`] | a critic that is asked nothing twice |
//! | [`scale`] | scores: their labels, and the critic's distribution over them |
//! | [`choice`] | labels as tokens after an open box |
//! | [`selector`] | the ways to choose |
//! | [`judge`] | the critic that the engine is |
//! | [`best_of_n`] | one job: candidates, contest, report |
//!
//! Everything but the last two is pure: candidates are numbers, and a critic is whatever answers for a pair of them.

pub mod best_of_n;
pub mod bracket;
pub mod choice;
pub mod contest;
pub mod draw;
pub mod field;
pub mod judge;
pub mod pair;
pub mod remember;
pub mod scale;
pub mod selector;
#[cfg(test)]
mod tests;

use std::future::Future;

use self::pair::{Opinion, Pair};

/// Whoever says which candidate of a pair is better.
pub trait Critic: Sync {
    /// Why it cannot say.
    type Error: Send;

    /// One opinion for each pair, in their order. The pairs are one batch: they do not depend on each other.
    fn judge(&self, pairs: &[Pair]) -> impl Future<Output = Result<Vec<Opinion>, Self::Error>> + Send;
}

impl<C: Critic> Critic for &C {
    type Error = C::Error;

    fn judge(&self, pairs: &[Pair]) -> impl Future<Output = Result<Vec<Opinion>, Self::Error>> + Send {
        (**self).judge(pairs)
    }
}

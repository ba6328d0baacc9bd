//! Leader election: of several operators one makes passes, the others keep their copies warm and wait.
//!
//! The promise is that a deposed leader writes nothing, also one that was frozen and never learnt of it. Three things keep it:
//!
//! 1. Every write to the Lease carries the version that was read before, so of two candidates one gets a conflict.
//! 2. A candidate waits until it has seen the Lease unchanged for the whole lease duration, on its own clock ([`claim`]).
//! 3. A leader's writes pass a [`WriteGuard`] that lets them out only until the renew deadline, which is shorter, counted from
//!    the *begin* of its last successful renewal.
//!
//! | file | what |
//! |---|---|
//! | [`config`] | settings, and which of them are refused |
//! | [`claim`] | what a candidate does about the Lease that it read |
//! | [`guard`] | the layer of the client that refuses writes |
//! | [`clients`] | one guarded client for passes, one for the Lease |
//! | [`candidate`] | reads and writes the Lease: campaign, term, release |
//! | [`moment`] | a clock that goes on while this process is frozen |

pub mod candidate;
pub mod claim;
pub mod clients;
pub mod config;
pub mod guard;
pub mod moment;

pub use self::{
    candidate::{Candidate, Lost, Term},
    clients::{candidate, with_user_agent},
    config::{ElectionConfig, ElectionConfigError},
    guard::{Fenced, WriteGuard},
};

//! One model over several processes: tensor parallelism.
//!
//! | file | what it is |
//! |---|---|
//! | `shard.rs` | which part of each packed weight a rank holds, and the shape of what is left to compute |
//! | `tcp.rs` | collective operations of CPU processes over TCP |
//! | `rendezvous.rs` | how the processes find each other and prove that they know the same token |
//! | `frame.rs` | what travels: bounded frames |
//! | `nccl.rs` | collective operations of GPUs, in the order of a stream and inside graphs |
//! | `orders.rs` | how the other ranks repeat the steps of the one that runs the engine |
//! | `reference.rs` | a language model in plain f32, split or whole: what the split computation must equal |

mod error;
mod frame;
#[cfg(feature = "nccl")]
pub mod nccl;
#[cfg(feature = "nccl")]
pub(crate) mod orders;
pub mod reference;
mod rendezvous;
pub mod shard;
mod tcp;

use flotilla_kernels::Float;

pub use error::{Cause, CollectiveError, Operation};
pub use frame::Wire;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use rendezvous::{Membership, Token};
pub use shard::{Shard, ShardError};
pub use tcp::Tcp;

/// Operations that all ranks of a group start together: the same ones, in the same order, with as many numbers. A rank
/// that fails makes the operation an error of every other.
pub trait Collective {
    /// Numbers that are read: a slice of the host, or a buffer of the card.
    type Read<'a, T: Wire>;
    /// Numbers that are written.
    type Write<'a, T: Wire>;

    /// Which member this is, from 0.
    fn rank(&self) -> usize;

    /// Members.
    fn size(&self) -> usize;

    /// Replaces `values` by their sums over all ranks. Every rank gets the same bits.
    fn all_reduce_sum<T: Wire + Float>(&mut self, values: Self::Write<'_, T>) -> Result<(), CollectiveError>;

    /// Writes the parts of all ranks, in their order, to `whole`.
    fn all_gather<T: Wire>(
        &mut self,
        part: Self::Read<'_, T>,
        whole: Self::Write<'_, T>,
    ) -> Result<(), CollectiveError>;

    /// Replaces `values` by those of the rank `root`.
    fn broadcast<T: Wire>(&mut self, values: Self::Write<'_, T>, root: usize) -> Result<(), CollectiveError>;

    /// Returns once every rank has come here.
    fn barrier(&mut self) -> Result<(), CollectiveError>;
}

//! One model over several GPUs of this machine. This process is rank 0: it serves, and its GPU is the first. The other ranks
//! are processes of the same program, started here, which repeat its steps and end with it. docs/tensor-parallel.md says what
//! each holds and computes.
//!
//! | file | what |
//! |---|---|
//! | `places.rs` | which GPUs, and everything that keeps them from sharing a model, before it is loaded |
//! | `followers.rs` | the other processes: started, watched, ended with this one |
//! | `fate.rs` | why the group can serve no longer |
//! | `duty.rs` | what a follower is told |
//! | `lead.rs` | rank 0: the model with its followers |
//! | `follow.rs` | the other ranks |

mod duty;
mod fate;
pub mod follow;
pub mod followers;
mod lead;
mod places;

#[cfg(feature = "nccl")]
use std::time::Duration;

pub use fate::Fate;
pub use lead::{Led, lead};
pub use places::{GroupFault, MOST, Places, too_large};

/// GPUs that share a model, and how to hear that they no longer do.
#[derive(Clone, Debug)]
pub struct Group {
    /// Which GPUs.
    pub places: Places,
    /// Told why they cannot go on.
    pub fate: Fate,
}

/// How long a rank waits for another in a step. A process that ends is noticed at once; this is for one that hangs, and
/// longer than a kernel takes to be compiled that only one rank finds in its cache.
#[cfg(feature = "nccl")]
const PATIENCE: Duration = Duration::from_secs(120);

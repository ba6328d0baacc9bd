//! How fast a released shape runs on this card with random weights, through the engine as users meet it.
//!
//! | file | what it is |
//! |---|---|
//! | `question.rs` | parts of the table, lengths of whole jobs, as options say them |
//! | `floor.rs`, `stages.rs` | the least time that memory or arithmetic allow, of a step of GRPO by stage |
//! | `line.rs`, `names.rs`, `report.rs` | what is measured |
//! | `peer.rs` | what transformers reached, by the names of our lines |
//! | `table.rs` | text and document |
//! | `memory.rs` | where a step of GRPO has its memory |
//! | `picture.rs` | a picture at the beginning of a prompt |
//! | `knockout.rs` | who is compared with whom in a best of n |
//! | `bench.rs` | random weights, and engines over them |
//! | `decode.rs`, `request.rs`, `vision.rs` | steps, whole requests and prompts, pictures |
//! | `grpo.rs`, `best_of.rs` | whole jobs |
//! | `run.rs` | all that is wanted of a shape, in order |
//!
//! What needs no card is built and tested without one.

mod floor;
pub mod knockout;
mod line;
mod memory;
pub mod names;
pub mod peer;
pub mod picture;
mod question;
mod report;
pub mod stages;
mod table;

#[cfg(feature = "cuda")]
mod bench;
#[cfg(feature = "cuda")]
mod best_of;
#[cfg(feature = "cuda")]
mod decode;
#[cfg(feature = "cuda")]
mod grpo;
#[cfg(feature = "cuda")]
mod request;
#[cfg(feature = "cuda")]
mod run;
#[cfg(feature = "cuda")]
mod vision;

pub use floor::{
    Ceiling, Floor, decode_bytes, decode_operations, forward_operations, prefill_operations, vision_operations,
};
pub use line::Line;
pub use memory::Memory;
pub use peer::Peers;
pub use question::{BestOf, Grpo, Lengths, LengthsError, MOST_CANDIDATES, Options, Part, Tower, divide};
pub use report::{Contest, GrpoStep, Report, Stage, Wave};
pub use table::{PUBLISHED, Table};

#[cfg(feature = "cuda")]
pub use bench::Bench;
#[cfg(feature = "cuda")]
pub use run::run;
#[cfg(feature = "cuda")]
pub(crate) use vision::settled;
#[cfg(feature = "cuda")]
pub use vision::vision;

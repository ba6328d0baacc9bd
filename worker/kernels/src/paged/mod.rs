//! Attention of one new token per sequence over paged keys and values, with a prefix that a group shares read once.
//!
//! A step begins with `plan`, which divides the step's work evenly over the card from the lengths that it finds there; each
//! layer then calls `attend`. The grids depend on [`Decode`] alone, so that a recorded graph serves every step of a batch
//! size, and results do not depend on the order in which blocks of threads run.
//!
//! Sharing a prefix costs partial results, and before Hopper a launch. It pays where a group is large or there are several: 16 groups of 8
//! rows over 1,536 tokens, say; one such group alone is faster without ([`Decode::groups`] of 0).

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
pub use launch::{Operands, Scratch, attend, plan};

use crate::ShapeError;

/// Attention of one new token per sequence: what stays the same from step to step, and so may be part of a recorded graph.
/// Lengths, block tables and groups are read from the card at every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decode {
    /// Sequences of the batch, unused ones included.
    pub rows: usize,
    /// Query heads; a multiple of `kv_heads`, at most 8 for each of them.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Numbers of one head, a multiple of 8 up to 128. 64 and 128 are the fast ones.
    pub head_dim: usize,
    /// Tokens of a block of the pool, a power of two from 8.
    pub block_size: usize,
    /// Entries of a row of the block table.
    pub max_blocks: usize,
    /// The most groups of rows that share a prefix; 0 for a kernel that knows none.
    pub groups: usize,
    /// Factor of the scores, positive: `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
}

impl Decode {
    /// Query heads of a head of keys and values.
    pub fn heads_per_kv(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Numbers of keys, or of values, of one block of the pool.
    pub fn block_elements(&self) -> usize {
        self.kv_heads * self.block_size * self.head_dim
    }

    /// Whether the kernels are made for it.
    pub fn check(&self) -> Result<(), ShapeError> {
        let name = "paged attention";
        ShapeError::unless(
            name,
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && (1..=8).contains(&self.heads_per_kv()),
            || {
                format!(
                    "{} query heads for {} heads of keys and values: 1 to 8 for each",
                    self.heads, self.kv_heads
                )
            },
        )?;
        ShapeError::unless(
            name,
            self.head_dim.is_multiple_of(8) && (8..=128).contains(&self.head_dim),
            || format!("heads of {} numbers: a multiple of 8 up to 128", self.head_dim),
        )?;
        ShapeError::unless(name, self.block_size >= 8 && self.block_size.is_power_of_two(), || {
            format!("blocks of {} tokens: a power of two from 8", self.block_size)
        })?;
        let most = 1usize << 31;
        // Of the line on which the kernel divides its work; a prefix costs up to four times as much as a row.
        let units =
            (2 * self.rows + 4 * self.groups + 4) * self.kv_heads * (self.max_blocks * self.block_size / STEP + 1);
        ShapeError::unless(
            name,
            self.rows < 1 << 16 && self.groups < 1 << 16 && self.max_blocks * self.block_size < most && units < most,
            || {
                format!(
                    "{} rows of {} blocks of {} tokens",
                    self.rows, self.max_blocks, self.block_size
                )
            },
        )?;
        ShapeError::unless(name, self.scale > 0.0 && self.scale.is_finite(), || {
            format!("scores scaled by {}", self.scale)
        })
    }
}

/// Tokens of the unit in which work is divided.
const STEP: usize = 16;

#[cfg(feature = "cuda")]
static SOURCE: Source = Source {
    name: "paged",
    text: concat!(
        include_str!("plan.cu"),
        include_str!("rows.cu"),
        include_str!("prefixes.cu"),
        include_str!("merge.cu")
    ),
};

/// Prefixes and rows in one launch, by `wgmma`.
#[cfg(feature = "cuda")]
static HOPPER: Source = Source {
    name: "paged_hopper",
    text: concat!(
        include_str!("plan.cu"),
        include_str!("rows.cu"),
        include_str!("../gpu/barriers.cu"),
        include_str!("../gpu/wgmma.cu"),
        include_str!("hopper.cu"),
        include_str!("merge.cu")
    ),
};

/// Parity with the reference.
#[cfg(feature = "cuda")]
pub fn checks() -> Vec<Check> {
    check::checks()
}

/// Speed beside the floor.
#[cfg(feature = "cuda")]
pub fn cases() -> Vec<Case> {
    check::cases()
}

/// Sources with the constants of their builds.
#[cfg(feature = "cuda")]
pub fn sources() -> Vec<(&'static Source, Vec<String>)> {
    launch::builds()
        .into_iter()
        .map(|(source, elem, defines)| {
            let numbers = defines.iter().map(|(name, value)| format!("{name}={value}"));
            (source, numbers.chain([format!("ELEM={elem}")]).collect())
        })
        .collect()
}

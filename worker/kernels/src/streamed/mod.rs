//! Linear layers of 17 to 128 rows on Hopper: a decode step of many sequences, still bound by reading the weight.
//!
//! What is computed is what [`crate::skinny`] computes, and its reference is that of this one too.

use crate::{bench::Case, check::Check, gpu::source::Source};

mod check;
mod launch;

pub use launch::{MOST_PARTS, count, linear, parts, pays, serves};

/// Rows that the kernel is for; with fewer [`crate::skinny`] is the faster one.
pub const ROWS: std::ops::RangeInclusive<usize> = crate::skinny::MOST_ROWS + 1..=128;

static SOURCE: Source = Source {
    name: "streamed",
    text: concat!(
        include_str!("../gpu/barriers.cu"),
        include_str!("../gpu/wgmma.cu"),
        include_str!("kernel.cu")
    ),
};

/// Parity with the reference.
pub fn checks() -> Vec<Check> {
    check::checks()
}

/// Speed beside the floor.
pub fn cases() -> Vec<Case> {
    check::cases()
}

/// The source with the constants of its builds.
pub fn sources() -> Vec<(&'static Source, Vec<String>)> {
    launch::builds()
        .into_iter()
        .map(|defines| {
            let numbers = defines.iter().map(|(name, value)| format!("{name}={value}"));
            (&SOURCE, numbers.collect())
        })
        .collect()
}

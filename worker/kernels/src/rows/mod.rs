//! Rows moved: embeddings, features into their places, conversions, random weights.
//!
//! Indices are read on the card and checked there: one beyond its table reads zeros or writes nothing. Sums over rows have a
//! fixed order, so that equal inputs give equal bits.

#[cfg(feature = "cuda")]
mod check;
mod groups;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
mod pack;
pub mod reference;

#[cfg(feature = "cuda")]
pub(crate) use check::{NONE, in_a_graph, near, random_bf16};
pub use groups::Groups;
#[cfg(feature = "cuda")]
pub(crate) use launch::add_partials;
#[cfg(feature = "cuda")]
pub use launch::{
    DeviceGroups, add, cast, column_sums, column_sums_scratch, copy_blocks, embed, embedding_gradient, fill_normal,
    fill_uniform, gather_rows, place, scale,
};
#[cfg(feature = "cuda")]
pub(crate) use pack::{Summed, pack};

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
static SOURCE: Source = Source {
    name: "rows",
    text: concat!(include_str!("pack.cu"), include_str!("kernel.cu")),
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
    let builds = [
        "ELEM=bf16 TARGET=0 GRADIENT=0 ADDEND=1",
        "ELEM=bf16 TARGET=1 GRADIENT=1 ADDEND=1 PACK=1",
        "ELEM=float TARGET=1 GRADIENT=0 ADDEND=1",
        "ELEM=float TARGET=1 GRADIENT=0 ADDEND=0",
    ];
    let defines = |build: &str| build.split(' ').map(str::to_owned).collect();
    let of_numbers = builds.iter().map(|build| (&SOURCE, defines(build)));
    of_numbers.chain([(&SOURCE, Vec::new())]).collect()
}

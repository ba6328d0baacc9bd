//! What is done to pictures around a vision tower that sees squares: squares of pixels are cut into patches before it, and its
//! tokens are arranged after it, each row of the result a weighted sum of up to four rows.
//!
//! Which rows and which weights is data: cutting off margins, making a map smaller, pooling frames and ending lines are lists
//! that the host makes, and one kernel applies them. An index that there is no row for adds nothing.

#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
pub use launch::{mix_rows, patches};

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

/// Rows that one row of a result is made of at most.
pub const TAPS: usize = 4;

/// Squares of pixels, `[count, channels, side, side]`, and the patches that they are cut into row by row. Pixels at the right
/// and below that fill no patch are left out.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Squares {
    /// Squares.
    pub count: usize,
    /// Colour channels.
    pub channels: usize,
    /// Side of a square, in pixels.
    pub side: usize,
    /// Side of a patch, in pixels.
    pub patch: usize,
}

impl Squares {
    /// Patches of one side of a square.
    pub fn grid(&self) -> usize {
        self.side / self.patch
    }

    /// Patches of all squares.
    pub fn patches(&self) -> usize {
        self.count * self.grid() * self.grid()
    }

    /// Numbers of a patch: its pixels row by row, channel after channel.
    pub fn patch_values(&self) -> usize {
        self.channels * self.patch * self.patch
    }

    /// Numbers of all squares.
    pub fn values(&self) -> usize {
        self.count * self.channels * self.side * self.side
    }
}

#[cfg(feature = "cuda")]
static SOURCE: Source = Source {
    name: "pictures",
    text: concat!(include_str!("../rows/pack.cu"), include_str!("kernel.cu")),
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
        "ELEM=bf16 PATCH=14 CHANNELS=3",
        "ELEM=bf16 PATCH=7 CHANNELS=1 PACK=1",
        "ELEM=float PATCH=14 CHANNELS=3",
    ];
    let defines = |build: &str| build.split(' ').map(str::to_owned).collect();
    builds.iter().map(|build| (&SOURCE, defines(build))).collect()
}

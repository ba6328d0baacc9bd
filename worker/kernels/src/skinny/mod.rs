//! Linear layers of few rows: a decode step, bound by reading the weight.

#[cfg(feature = "cuda")]
use crate::{bench::Case, check::Check, gpu::source::Source};

#[cfg(feature = "cuda")]
pub(crate) mod check;
#[cfg(feature = "cuda")]
mod launch;
pub mod reference;

#[cfg(feature = "cuda")]
pub use launch::{Added, linear};

/// The most rows.
pub const MOST_ROWS: usize = 16;

/// A linear layer of few rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Skinny {
    /// Rows of `x`, 1 to [`MOST_ROWS`]; [`crate::streamed`] has more.
    pub rows: usize,
    /// Columns of the result.
    pub outputs: usize,
    /// Columns of `x`, a multiple of 8.
    pub inputs: usize,
    /// What becomes of the sums.
    pub epilogue: Epilogue,
}

/// What becomes of the sums of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Epilogue {
    /// They are the result.
    Plain,
    /// `swish(gate) * up`: the weight has `2 * outputs` rows, those of the gate first.
    Swiglu,
}

impl Skinny {
    /// Without an activation.
    pub fn plain(rows: usize, outputs: usize, inputs: usize) -> Self {
        Self {
            rows,
            outputs,
            inputs,
            epilogue: Epilogue::Plain,
        }
    }

    /// Gate and up projections and what joins them; `outputs` is the width of the feed-forward layer.
    pub fn swiglu(rows: usize, outputs: usize, inputs: usize) -> Self {
        Self {
            epilogue: Epilogue::Swiglu,
            ..Self::plain(rows, outputs, inputs)
        }
    }

    /// Rows of the weight.
    pub fn weight_rows(&self) -> usize {
        match self.epilogue {
            Epilogue::Plain => self.outputs,
            Epilogue::Swiglu => 2 * self.outputs,
        }
    }

    /// Outputs that a block of threads computes together: 16 rows of the weight.
    #[cfg(feature = "cuda")]
    fn tile(&self) -> usize {
        match self.epilogue {
            Epilogue::Plain => 16,
            Epilogue::Swiglu => 8,
        }
    }
}

#[cfg(feature = "cuda")]
static SOURCE: Source = Source {
    name: "skinny",
    text: include_str!("kernel.cu"),
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
        .map(|(elem, defines)| {
            let numbers = defines.iter().map(|(name, value)| format!("{name}={value}"));
            (&SOURCE, numbers.chain([format!("ELEM={elem}")]).collect())
        })
        .collect()
}

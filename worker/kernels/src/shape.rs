//! Checks of lengths and shapes before a kernel is launched: a kernel itself checks nothing.

/// Operands that do not fit together.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{kernel}: {fault}")]
pub struct ShapeError {
    /// The kernel.
    pub kernel: &'static str,
    /// What does not fit, with the numbers.
    pub fault: String,
}

impl ShapeError {
    /// An operand of the wrong length.
    pub fn length(kernel: &'static str, operand: &str, length: usize, wanted: usize) -> Result<(), Self> {
        Self::unless(kernel, length == wanted, || {
            format!("{operand} has {length} elements, {wanted} are needed")
        })
    }

    /// An operand that is too short.
    pub fn at_least(kernel: &'static str, operand: &str, length: usize, wanted: usize) -> Result<(), Self> {
        Self::unless(kernel, length >= wanted, || {
            format!("{operand} has {length} elements, at least {wanted} are needed")
        })
    }

    /// Any other fault.
    pub fn unless(kernel: &'static str, holds: bool, fault: impl FnOnce() -> String) -> Result<(), Self> {
        if holds {
            Ok(())
        } else {
            Err(Self { kernel, fault: fault() })
        }
    }
}

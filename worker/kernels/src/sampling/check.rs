//! Parity and speed.

use crate::{bench::Case, check::Check};

pub fn checks() -> Vec<Check> {
    Vec::new()
}

pub fn cases() -> Vec<Case> {
    Vec::new()
}

//! Parity and speed.
use crate::{bench::Case, check::Check};
pub(super) fn checks() -> Vec<Check> { Vec::new() }
pub(super) fn cases() -> Vec<Case> { Vec::new() }

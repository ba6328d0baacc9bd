//! How many numbers one access of a kernel may move.

use crate::{Buffer, element::Element};

/// Numbers of `T` in one access: 16 bytes, or fewer where `width` or an address is not a multiple of them.
pub(crate) fn pack<T: Element>(width: usize, addresses: &[u64]) -> usize {
    let mut pack = 16 / size_of::<T>();
    while !width.is_multiple_of(pack)
        || addresses
            .iter()
            .any(|address| !address.is_multiple_of((pack * size_of::<T>()) as u64))
    {
        pack /= 2;
    }
    pack
}

/// What a kernel of rows reads: a matrix, or a product that is the sum of so many matrices.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Summed<'a, T> {
    Whole(&'a Buffer<T>),
    Parts(&'a Buffer<f32>, usize),
}

impl<'a, T: Element> Summed<'a, T> {
    /// As a kernel takes it: one of the two, and the number of parts.
    pub(crate) fn operands(self) -> (Option<&'a Buffer<T>>, Option<&'a Buffer<f32>>, usize) {
        match self {
            Self::Whole(matrix) => (Some(matrix), None, 0),
            Self::Parts(parts, count) => (None, Some(parts), count),
        }
    }

    pub(crate) fn pointer(self) -> u64 {
        match self {
            Self::Whole(matrix) => matrix.pointer(),
            Self::Parts(parts, _) => parts.pointer(),
        }
    }
}

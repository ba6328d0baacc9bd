//! How many numbers one access of a kernel may move.

use crate::element::Element;

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

//! Keys and values of sequences that grow, in blocks that are allocated once.

use std::sync::atomic::{AtomicU64, Ordering};

use flotilla_kernels::{Buffer, Float, Gpu, GpuError, rows};

use crate::{copies, shape::TextShape};

/// Keys and values of every layer, each `[blocks, kv_heads, block_size, head_dim]`.
#[derive(Clone, Debug)]
pub struct DevicePool<T> {
    pub(crate) layers: Vec<(Buffer<T>, Buffer<T>)>,
    /// Blocks.
    pub blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
    block_elements: usize,
    /// Which pool it is: recorded steps are of one.
    pub(crate) number: u64,
}

impl<T: Float> DevicePool<T> {
    /// Blocks with anything in them.
    pub fn new(gpu: &Gpu, shape: &TextShape, blocks: usize, block_size: usize) -> Result<Self, GpuError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let block_elements = block_size * shape.key_width();
        let layer = |_| Ok((gpu.alloc(blocks * block_elements)?, gpu.alloc(blocks * block_elements)?));
        Ok(Self {
            layers: (0..shape.layers).map(layer).collect::<Result<_, GpuError>>()?,
            blocks,
            block_size,
            block_elements,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        2 * self.layers.len() * self.blocks * self.block_elements * T::DTYPE.bytes()
    }

    /// Copies whole blocks, from the first of each pair to the second, one pair after the other.
    pub fn copy(&self, gpu: &Gpu, pairs: &[(u32, u32)]) -> Result<(), GpuError> {
        for pairs in copies::at_once(pairs) {
            let words = pairs.iter().flat_map(|(from, to)| [*from, *to]).collect::<Vec<_>>();
            let words = gpu.upload(&words)?;
            for (keys, values) in &self.layers {
                rows::copy_blocks(gpu, keys, values, &words, self.block_elements)?;
            }
        }
        Ok(())
    }
}

//! What is written into blocks of keys and values, in place.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, Tensor, bail};

use super::operand;
use crate::ops::Heads;

/// See [`crate::ops::Kernels::store`].
pub fn store(qkv: &Tensor, keys: &Tensor, values: &Tensor, slots: &[u32], heads: Heads) -> Result<()> {
    let qkv = qkv.contiguous()?;
    let size = heads.kv_size();
    for (blocks, offset) in [(keys, heads.q_size()), (values, heads.q_size() + size)] {
        blocks.inplace_op2(&qkv, &Store { slots, offset, size })?;
    }
    Ok(())
}

/// Copies `size` values at `offset` of each row to the row's slot.
struct Store<'a> {
    slots: &'a [u32],
    offset: usize,
    size: usize,
}

impl InplaceOp2 for Store<'_> {
    fn name(&self) -> &'static str {
        "fused-store"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let source = operand(s2, l2)?;
        let blocks = target(s1, l1)?;
        let width = source.len() / self.slots.len().max(1);
        for (row, slot) in source.chunks_exact(width).zip(self.slots) {
            let to = *slot as usize * self.size;
            if to + self.size > blocks.len() {
                bail!("slot {slot} of {} blocks' values", blocks.len());
            }
            blocks[to..to + self.size].copy_from_slice(&row[self.offset..self.offset + self.size]);
        }
        Ok(())
    }
}

/// See [`crate::ops::Kernels::copy_blocks`].
pub fn copy_blocks(blocks: &Tensor, pairs: &[(u32, u32)]) -> Result<()> {
    let size = blocks.dim(1)? * blocks.dim(2)?;
    blocks.inplace_op1(&CopyBlocks { pairs, size })
}

/// Copies `size` values from the first of each pair to the second.
struct CopyBlocks<'a> {
    pairs: &'a [(u32, u32)],
    size: usize,
}

impl InplaceOp1 for CopyBlocks<'_> {
    fn name(&self) -> &'static str {
        "fused-copy-blocks"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let blocks = target(storage, layout)?;
        for (from, to) in self.pairs {
            let (from, to) = (*from as usize * self.size, *to as usize * self.size);
            if from.max(to) + self.size > blocks.len() {
                bail!("a copy leaves the blocks");
            }
            blocks.copy_within(from..from + self.size, to);
        }
        Ok(())
    }
}

/// The values that an operation changes.
fn target<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("blocks must be contiguous");
    };
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        _ => bail!("fused operations write f32"),
    }
}

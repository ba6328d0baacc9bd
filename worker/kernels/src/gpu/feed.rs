//! Numbers of the host that go to the card while it computes on those that are there.

use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError, result};

use super::{Buffer, Gpu, GpuError};
use crate::{element::Element, shape::ShapeError};

/// Memory that the host fills from its beginning, part by part. A part is copied beside the kernels that were launched before,
/// and kernels launched after it wait for it: as long as there is work for the card, copies take no time of its.
pub struct Feed<T> {
    gpu: Gpu,
    beside: Arc<CudaStream>,
    buffer: Buffer<T>,
    filled: usize,
}

impl<T> std::fmt::Debug for Feed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Feed({} of {:?})", self.filled, self.buffer)
    }
}

impl Gpu {
    /// Room for `length` numbers, none of them there yet.
    pub fn feed<T: Element>(&self, length: usize) -> Result<Feed<T>, GpuError> {
        let buffer = self.alloc(length)?;
        // It begins when the memory is there, and whoever had it before has done with it.
        let beside = self.stream.fork().map_err(GpuError::driver("make a stream"))?;
        Ok(Feed {
            gpu: self.clone(),
            beside,
            buffer,
            filled: 0,
        })
    }
}

impl<T: Element> Feed<T> {
    /// Copies the next numbers, those of all slices behind one another, and gives where they are. The host may change its own as
    /// soon as this returns.
    pub fn push(&mut self, slices: &[&[T]]) -> Result<Buffer<T>, GpuError> {
        let begin = self.filled;
        let length = slices.iter().map(|slice| slice.len()).sum::<usize>();
        ShapeError::at_least("feed", "the buffer", self.buffer.len(), begin + length)?;
        self.gpu.bind()?;
        let copied = slices.iter().try_for_each(|slice| self.copy(slice));
        if let Err(error) = copied.and_then(|()| self.gpu.stream.join(&self.beside)) {
            // The memory may be freed now, and nobody else waits for what was begun.
            let waited = self.beside.synchronize();
            waited.map_err(GpuError::driver("wait for a copy"))?;
            return Err(GpuError::driver("copy to the GPU")(error));
        }
        self.buffer.slice(begin..self.filled)
    }

    /// Begins one copy.
    fn copy(&mut self, slice: &[T]) -> Result<(), DriverError> {
        if slice.is_empty() {
            return Ok(());
        }
        let to = self.buffer.pointer() + (self.filled * size_of::<T>()) as u64;
        self.filled += slice.len();
        // SAFETY: `push` has seen that the destination has room; pageable memory has been staged when the call returns. The
        // memory is freed in the order of the GPU's stream, which waits for the copy.
        unsafe { result::memcpy_htod_async(to, slice, self.beside.cu_stream()) }
    }
}

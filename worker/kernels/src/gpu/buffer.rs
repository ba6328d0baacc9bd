//! Memory of the card.

use std::{
    fmt,
    marker::PhantomData,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use cudarc::driver::{CudaStream, result};

use super::{Gpu, GpuError};
use crate::{element::Element, shape::ShapeError};

/// How much is allocated, and how often it was.
#[derive(Debug, Default)]
pub struct Meter {
    pub(super) allocations: AtomicUsize,
    pub(super) bytes: AtomicUsize,
    pub(super) peak: AtomicUsize,
}

/// One allocation. Freed in the order of the stream when the last buffer into it is gone.
struct Memory {
    pointer: u64,
    bytes: usize,
    stream: Arc<CudaStream>,
    meter: Arc<Meter>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.meter.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        let context = self.stream.context();
        if context.bind_to_thread().is_ok() {
            // SAFETY: the pointer came from `malloc_async`, and no buffer into it is left.
            context.record_err(unsafe { result::free_async(self.pointer, self.stream.cu_stream()) });
        }
    }
}

/// Numbers on the card: a whole allocation or a part of one. A clone is the same memory, as of a tensor; all work on it is in
/// the order of one stream, so that a kernel sees what those before it wrote.
pub struct Buffer<T> {
    memory: Arc<Memory>,
    /// In bytes.
    offset: usize,
    /// In elements.
    length: usize,
    holds: PhantomData<T>,
}

impl<T> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        Self {
            memory: self.memory.clone(),
            offset: self.offset,
            length: self.length,
            holds: PhantomData,
        }
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer<{}>[{}]", std::any::type_name::<T>(), self.length)
    }
}

impl<T: Element> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Where they are on the card.
    pub fn pointer(&self) -> u64 {
        self.memory.pointer + self.offset as u64
    }

    /// A part of it, the same memory.
    pub fn slice(&self, range: Range<usize>) -> Result<Self, GpuError> {
        ShapeError::unless("slice", range.start <= range.end && range.end <= self.length, || {
            format!("{range:?} of {} elements", self.length)
        })?;
        Ok(Self {
            memory: self.memory.clone(),
            offset: self.offset + range.start * size_of::<T>(),
            length: range.len(),
            holds: PhantomData,
        })
    }

    /// The same bytes as other numbers: an arena cut into buffers of different types. The bytes must divide evenly, and the
    /// address must be aligned for them.
    pub fn cast<U: Element>(&self) -> Result<Buffer<U>, GpuError> {
        let bytes = self.length * size_of::<T>();
        ShapeError::unless(
            "cast",
            bytes.is_multiple_of(size_of::<U>()) && self.pointer().is_multiple_of(size_of::<U>() as u64),
            || {
                format!(
                    "{bytes} bytes at {:#x} as elements of {}",
                    self.pointer(),
                    size_of::<U>()
                )
            },
        )?;
        Ok(Buffer {
            memory: self.memory.clone(),
            offset: self.offset,
            length: bytes / size_of::<U>(),
            holds: PhantomData,
        })
    }
}

impl Gpu {
    /// Memory with anything in it.
    pub fn alloc<T: Element>(&self, length: usize) -> Result<Buffer<T>, GpuError> {
        // Vectors of 16 bytes are read up to the end of a row: nothing is smaller than one.
        let bytes = (length * size_of::<T>()).next_multiple_of(16).max(16);
        self.bind()?;
        // SAFETY: what is read before it is written is numbers of any value, which every `Element` may have.
        let pointer = unsafe { result::malloc_async(self.stream.cu_stream(), bytes) };
        let pointer = pointer.map_err(|source| match self.memory() {
            Ok((free, total)) if free < bytes => GpuError::OutOfMemory { bytes, free, total },
            _ => GpuError::Driver {
                action: "allocate",
                source,
            },
        })?;
        let meter = &self.meter;
        meter.allocations.fetch_add(1, Ordering::Relaxed);
        let now = meter.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        meter.peak.fetch_max(now, Ordering::Relaxed);
        Ok(Buffer {
            memory: Arc::new(Memory {
                pointer,
                bytes,
                stream: self.stream.clone(),
                meter: meter.clone(),
            }),
            offset: 0,
            length,
            holds: PhantomData,
        })
    }

    /// Memory full of zero bytes.
    pub fn zeros<T: Element>(&self, length: usize) -> Result<Buffer<T>, GpuError> {
        let buffer = self.alloc(length)?;
        self.clear(&buffer)?;
        Ok(buffer)
    }

    /// Memory full of [`Element::POISON`].
    pub fn poisoned<T: Element>(&self, length: usize) -> Result<Buffer<T>, GpuError> {
        self.upload(&vec![T::POISON; length])
    }

    /// A copy of the host's numbers.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<T>, GpuError> {
        let buffer = self.alloc(values.len())?;
        self.write(&buffer, values)?;
        Ok(buffer)
    }

    /// Copies the host's numbers to the beginning of a buffer. They may be changed as soon as this returns.
    pub fn write<T: Element>(&self, to: &Buffer<T>, values: &[T]) -> Result<(), GpuError> {
        ShapeError::at_least("write", "the buffer", to.len(), values.len())?;
        if values.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the destination has room; pageable memory has been staged when the call returns.
        let copied = unsafe { result::memcpy_htod_async(to.pointer(), values, self.stream.cu_stream()) };
        copied.map_err(GpuError::driver("copy to the GPU"))
    }

    /// The numbers on the host, after everything before has been computed.
    pub fn download<T: Element>(&self, from: &Buffer<T>) -> Result<Vec<T>, GpuError> {
        let mut values = vec![T::default(); from.len()];
        self.read(from, &mut values)?;
        Ok(values)
    }

    /// As [`Self::download`], into memory that is there: the first `values.len()` numbers.
    pub fn read<T: Element>(&self, from: &Buffer<T>, values: &mut [T]) -> Result<(), GpuError> {
        ShapeError::at_least("read", "the buffer", from.len(), values.len())?;
        if values.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the source has as many; the copy has ended when `synchronize` returns.
        let copied = unsafe { result::memcpy_dtoh_async(values, from.pointer(), self.stream.cu_stream()) };
        copied.map_err(GpuError::driver("copy from the GPU"))?;
        self.synchronize()
    }

    /// Copies numbers from one buffer to the beginning of another.
    pub fn copy<T: Element>(&self, from: &Buffer<T>, to: &Buffer<T>) -> Result<(), GpuError> {
        ShapeError::at_least("copy", "the destination", to.len(), from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let bytes = from.len() * size_of::<T>();
        // SAFETY: both ranges are allocated.
        let copied = unsafe { result::memcpy_dtod_async(to.pointer(), from.pointer(), bytes, self.stream.cu_stream()) };
        copied.map_err(GpuError::driver("copy on the GPU"))
    }

    /// Zero bytes.
    pub fn clear<T: Element>(&self, buffer: &Buffer<T>) -> Result<(), GpuError> {
        if buffer.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let bytes = buffer.len() * size_of::<T>();
        // SAFETY: the range is allocated, and zero bytes are a number of every `Element`.
        let cleared = unsafe { result::memset_d8_async(buffer.pointer(), 0, bytes, self.stream.cu_stream()) };
        cleared.map_err(GpuError::driver("clear"))
    }

    /// Allocations since the start: a step that has warmed up adds none.
    pub fn allocations(&self) -> usize {
        self.meter.allocations.load(Ordering::Relaxed)
    }

    /// Bytes in buffers now.
    pub fn allocated_bytes(&self) -> usize {
        self.meter.bytes.load(Ordering::Relaxed)
    }

    /// The most bytes that were in buffers at once since [`Self::reset_peak`].
    pub fn peak_bytes(&self) -> usize {
        self.meter.peak.load(Ordering::Relaxed)
    }

    /// Begins a new peak.
    pub fn reset_peak(&self) {
        self.meter.peak.store(self.allocated_bytes(), Ordering::Relaxed);
    }
}

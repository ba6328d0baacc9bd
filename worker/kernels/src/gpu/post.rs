//! Page-locked memory of the host: what goes to the card and comes back while nobody waits.

use cudarc::driver::{CudaEvent, result};

use super::{Buffer, Gpu, GpuError};
use crate::{
    check::{Check, CheckError, Distance, Draw},
    element::Element,
    shape::ShapeError,
};

/// Numbers on their way to the card. They are copied in the order of the stream, and the host goes on at once.
#[derive(Debug)]
pub struct Outbox<T> {
    memory: Locked<T>,
    filled: usize,
}

/// Numbers on their way from the card. Others may be computed before the host reads them.
#[derive(Debug)]
pub struct Inbox<T> {
    memory: Locked<T>,
    received: usize,
}

/// Memory that the card reads and writes at its own time.
struct Locked<T> {
    gpu: Gpu,
    pointer: *mut T,
    length: usize,
    /// When the last copy has been made.
    copied: CudaEvent,
}

// SAFETY: it is memory of the process that nothing else points to.
unsafe impl<T: Send> Send for Locked<T> {}

impl<T> std::fmt::Debug for Locked<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Locked<{}>[{}]", std::any::type_name::<T>(), self.length)
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        // A copy may be on its way; where waiting fails the context is lost, and its copies with it.
        let waited = self.copied.synchronize();
        // SAFETY: the pointer came from `malloc_host`.
        let freed = waited.and_then(|()| unsafe { result::free_host(self.pointer.cast()) });
        self.gpu.context.record_err(freed);
    }
}

impl<T: Element> Locked<T> {
    fn new(gpu: &Gpu, length: usize) -> Result<Self, GpuError> {
        let copied = gpu.context.new_event(None);
        let copied = copied.map_err(GpuError::driver("make an event"))?;
        let bytes = (length * size_of::<T>()).max(1);
        gpu.bind()?;
        // SAFETY: it is written before it is read.
        let pointer = unsafe { result::malloc_host(bytes, 0) };
        let pointer = pointer.map_err(GpuError::driver("allocate page-locked memory"))?;
        // SAFETY: so many bytes were allocated, and zero bytes are a number of every `Element`.
        unsafe { pointer.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self {
            gpu: gpu.clone(),
            pointer: pointer.cast(),
            length,
            copied,
        })
    }

    fn wait(&self) -> Result<(), GpuError> {
        self.copied.synchronize().map_err(GpuError::driver("wait for a copy"))
    }

    fn record(&self) -> Result<(), GpuError> {
        let recorded = self.copied.record(&self.gpu.stream);
        recorded.map_err(GpuError::driver("mark a copy"))
    }

    fn values(&self) -> &[T] {
        // SAFETY: allocated with so many elements and initialised; whoever reads has waited for the card.
        unsafe { std::slice::from_raw_parts(self.pointer, self.length) }
    }

    fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and there is no other reference.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.length) }
    }
}

impl Gpu {
    /// An outbox with nothing in it.
    pub fn outbox<T: Element>(&self) -> Result<Outbox<T>, GpuError> {
        let memory = Locked::new(self, 0)?;
        Ok(Outbox { memory, filled: 0 })
    }

    /// An inbox for at most `length` numbers.
    pub fn inbox<T: Element>(&self, length: usize) -> Result<Inbox<T>, GpuError> {
        let memory = Locked::new(self, length)?;
        Ok(Inbox { memory, received: 0 })
    }
}

impl<T: Element> Outbox<T> {
    /// Room for `length` numbers, with anything in it, once what was sent before has left.
    pub fn fill(&mut self, length: usize) -> Result<&mut [T], GpuError> {
        self.memory.wait()?;
        if length > self.memory.length {
            self.memory = Locked::new(&self.memory.gpu, length.next_power_of_two())?;
        }
        self.filled = length;
        Ok(&mut self.memory.values_mut()[..length])
    }

    /// What [`Self::fill`] gave last, once it has left where it was sent.
    pub fn filled(&mut self) -> Result<&mut [T], GpuError> {
        self.fill(self.filled)
    }

    /// Copies what was filled in to the beginning of a buffer.
    pub fn send(&mut self, to: &Buffer<T>) -> Result<(), GpuError> {
        ShapeError::at_least("send", "the buffer", to.len(), self.filled)?;
        let gpu = &self.memory.gpu;
        gpu.bind()?;
        let values = &self.memory.values()[..self.filled];
        // SAFETY: the destination has room; the numbers change and go after `copied` alone.
        let copied = unsafe { result::memcpy_htod_async(to.pointer(), values, gpu.stream.cu_stream()) };
        // Part of a copy that failed may be on its way.
        self.memory.record()?;
        copied.map_err(GpuError::driver("copy to the GPU"))
    }
}

impl<T: Element> Inbox<T> {
    /// Takes a copy of a buffer as it is when everything before has been computed.
    pub fn receive(&mut self, from: &Buffer<T>) -> Result<(), GpuError> {
        ShapeError::at_least("receive", "the inbox", self.memory.length, from.len())?;
        self.received = from.len();
        let stream = self.memory.gpu.stream.clone();
        self.memory.gpu.bind()?;
        let values = &mut self.memory.values_mut()[..from.len()];
        // SAFETY: the source has as many; they are read, and go, after `copied` alone.
        let copied = unsafe { result::memcpy_dtoh_async(values, from.pointer(), stream.cu_stream()) };
        self.memory.record()?;
        copied.map_err(GpuError::driver("copy from the GPU"))
    }

    /// Waits for what is received.
    pub fn read(&mut self) -> Result<&[T], GpuError> {
        self.memory.wait()?;
        Ok(&self.memory.values()[..self.received])
    }
}

/// What arrives is what was sent, whatever is done afterwards.
pub(crate) fn checks() -> Vec<Check> {
    vec![Check {
        name: "numbers there and back",
        run: check_there_and_back,
    }]
}

fn check_there_and_back(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let on_card = gpu.alloc::<u32>(20_000)?;
    let mut outbox = gpu.outbox()?;
    let mut inboxes = [gpu.inbox(on_card.len())?, gpu.inbox(on_card.len())?];
    let mut before: Option<Vec<u32>> = None;
    for round in 0..20 {
        let count = draw.between(1, on_card.len());
        let numbers = draw.order(count);
        outbox.fill(count)?.copy_from_slice(&numbers);
        outbox.send(&on_card)?;
        inboxes[round % 2].receive(&on_card.slice(0..count)?)?;
        gpu.clear(&on_card)?;
        // Read after the next ones are on their way.
        if let Some(before) = before.replace(numbers) {
            Distance::equal(inboxes[(round + 1) % 2].read()?, &before)?;
        }
    }
    Ok(Distance::EQUAL)
}

//! Time on the card.

use cudarc::driver::{CudaEvent, sys};

use super::{Gpu, GpuError};

/// Measures work of the stream by events on the card.
#[derive(Debug)]
pub struct Clock {
    begin: CudaEvent,
    end: CudaEvent,
}

impl Gpu {
    /// A clock.
    pub fn clock(&self) -> Result<Clock, GpuError> {
        let event = || {
            let made = self.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
            made.map_err(GpuError::driver("make an event"))
        };
        Ok(Clock {
            begin: event()?,
            end: event()?,
        })
    }

    /// Seconds between the begin and the end of `work` on the card, after waiting for it.
    pub fn time<E: From<GpuError>>(&self, clock: &Clock, work: impl FnOnce() -> Result<(), E>) -> Result<f64, E> {
        clock
            .begin
            .record(&self.stream)
            .map_err(GpuError::driver("start a clock"))?;
        work()?;
        clock
            .end
            .record(&self.stream)
            .map_err(GpuError::driver("stop a clock"))?;
        self.synchronize()?;
        let elapsed = clock
            .begin
            .elapsed_ms(&clock.end)
            .map_err(GpuError::driver("read a clock"))?;
        Ok(f64::from(elapsed) / 1e3)
    }
}

//! Launches that are recorded once and repeated.

use cudarc::driver::{CudaGraph, sys};

use super::{Gpu, GpuError};

/// Recorded launches. The buffers that they use must outlive it: whoever holds a graph holds them.
pub struct Graph(CudaGraph);

// SAFETY: a graph may be used from any thread, by one at a time; `launch` takes it mutably.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

impl Gpu {
    /// Records what `work` launches without running it. `work` must not allocate, read or wait: run it once before, so that
    /// kernels are compiled and matrix products planned. The buffers it uses must be kept as long as the graph.
    pub fn record<E: From<GpuError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        let begun = self
            .stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
        begun.map_err(GpuError::driver("begin a graph"))?;
        let worked = work();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let ended = self.stream.end_capture(flags).map_err(GpuError::driver("end a graph"));
        worked?;
        let graph = ended?.ok_or_else(|| {
            E::from(GpuError::Driver {
                action: "record an empty graph",
                source: cudarc::driver::result::DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE),
            })
        })?;
        graph.upload().map_err(GpuError::driver("upload a graph"))?;
        Ok(Graph(graph))
    }

    /// Puts recorded launches into the stream again.
    pub fn replay(&self, graph: &mut Graph) -> Result<(), GpuError> {
        graph.0.launch().map_err(GpuError::driver("launch a graph"))
    }
}

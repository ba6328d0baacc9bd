//! One GPU: its stream, its memory, its kernels.

mod buffer;
mod choices;
mod clock;
mod error;
mod feed;
mod gemm;
mod graph;
mod kept;
pub(crate) mod launch;
#[cfg(feature = "nccl")]
pub mod nccl;
mod post;
pub mod source;
mod survey;
pub(crate) mod tensor_map;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use cudarc::driver::{CudaContext, CudaStream, result, sys};

pub use buffer::Buffer;
pub use clock::Clock;
pub use error::GpuError;
pub use feed::Feed;
pub use gemm::{Finish, Gemm};
pub use graph::Graph;
pub(crate) use post::checks as post_checks;
pub use post::{Inbox, Outbox};
pub use survey::{Listed, Survey, survey};

/// A GPU with one stream, in whose order everything happens. A clone is the same.
#[derive(Clone, Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    library: Arc<source::Library>,
    meter: Arc<buffer::Meter>,
    blas: Arc<Mutex<gemm::Blas>>,
    architecture: String,
    processors: usize,
    /// Products take the library's first proposal.
    fixed: Arc<AtomicBool>,
}

/// What a card is.
#[derive(Clone, Debug)]
pub struct Card {
    /// The vendor's name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
    /// Bytes that nobody has taken.
    pub free: usize,
    /// Multiprocessors.
    pub processors: usize,
    /// Bytes of level 2 cache.
    pub cache: usize,
    /// The newest CUDA version that the driver runs, as 13000 for 13.0.
    pub driver: i32,
    /// Version of NVRTC.
    pub nvrtc: (i32, i32),
    /// Version of cuBLASLt, as 130200 for 13.2.
    pub blas: usize,
}

/// How many GPUs this process sees, or why none: no driver, or a driver that does not start.
pub fn count() -> Result<usize, GpuError> {
    // SAFETY: loading the driver's library runs its initialisers and nothing else.
    let library = unsafe { libloading::Library::new("libcuda.so.1") };
    library.map_err(|error| GpuError::NoDriver(cause(&error)))?;
    match result::init() {
        Ok(()) => {}
        // Hidden by CUDA_VISIBLE_DEVICES, or not given to the container.
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
        Err(error) => return Err(GpuError::driver("start the driver")(error)),
    }
    let count = result::device::get_count().map_err(GpuError::driver("count the GPUs"))?;
    Ok(usize::try_from(count).unwrap_or_default())
}

/// What the loader said.
fn cause(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Whether a library that is loaded at its first use is there: without it, cudarc would panic then.
fn require(library: &'static str, names: &[&str]) -> Result<(), GpuError> {
    let mut said = String::new();
    for name in names {
        // SAFETY: as above.
        match unsafe { libloading::Library::new(*name) } {
            Ok(_) => return Ok(()),
            Err(error) => said = cause(&error),
        }
    }
    Err(GpuError::NoLibrary { library, cause: said })
}

/// Version of cuBLASLt, which must have been found.
fn blas_version() -> usize {
    // SAFETY: takes and writes nothing.
    unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() }
}

impl Gpu {
    /// The GPU of this number, with a stream of its own.
    pub fn new(ordinal: usize) -> Result<Self, GpuError> {
        let found = count()?;
        if ordinal >= found {
            return Err(GpuError::NoDriver(format!(
                "GPU {ordinal} was asked for, the driver shows {found}"
            )));
        }
        require("libnvrtc.so.13", &["libnvrtc.so.13", "libnvrtc.so"])?;
        require("libcublasLt.so.13", &["libcublasLt.so.13", "libcublasLt.so"])?;
        let context = CudaContext::new(ordinal).map_err(GpuError::driver("open the GPU"))?;
        let (major, minor) = context
            .compute_capability()
            .map_err(GpuError::driver("read the compute capability"))?;
        if major < 8 {
            let name = context.name().unwrap_or_default();
            let needed = "8.0 (bf16 tensor cores)";
            return Err(GpuError::TooOld {
                name,
                major,
                minor,
                needed,
            });
        }
        // SAFETY: buffers of this crate do not use the events; they are freed in the order of the one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(GpuError::driver("make a stream"))?;
        keep_freed_memory(&context)?;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context
            .attribute(attribute)
            .map_err(GpuError::driver("count multiprocessors"))?;
        // Instructions of Hopper alone (wgmma) need the `a`.
        let suffix = if (major, minor) == (9, 0) { "a" } else { "" };
        let name = context.name().map_err(GpuError::driver("ask for the GPU's name"))?;
        let choices = choices::Choices::of_card(&name, blas_version());
        Ok(Self {
            blas: Arc::new(Mutex::new(gemm::Blas::new(choices)?)),
            context,
            stream,
            library: Arc::default(),
            meter: Arc::default(),
            architecture: format!("sm_{major}{minor}{suffix}"),
            processors: usize::try_from(processors).unwrap_or(1),
            fixed: Arc::default(),
        })
    }

    /// From now on equal inputs give equal bits in every process on equal cards. Which of several proposals for a product is the
    /// fastest is a clock's answer: those that are remembered in `FLOTILLA_KERNEL_CACHE` are taken, and where there is no such folder the
    /// library's first.
    pub fn fix_products(&self) {
        self.fixed.store(true, Ordering::Relaxed);
    }

    fn bind(&self) -> Result<(), GpuError> {
        self.context
            .bind_to_thread()
            .map_err(GpuError::driver("make the GPU current"))
    }

    /// Free and all bytes of the card.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        self.context
            .mem_get_info()
            .map_err(GpuError::driver("ask for free memory"))
    }

    /// Multiprocessors.
    pub fn processors(&self) -> usize {
        self.processors
    }

    /// Whether kernels for Hopper alone (`wgmma`) run here.
    pub(crate) fn is_hopper(&self) -> bool {
        self.architecture == "sm_90a"
    }

    /// Waits until everything in the stream has been done.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.stream.synchronize().map_err(GpuError::driver("wait for the GPU"))
    }

    /// What keeps the GPU from computing anything any more, said without waiting for what it computes: an error of a kernel or
    /// of the card stays until the process ends.
    pub fn fault(&self) -> Option<GpuError> {
        if let Err(error) = self.bind() {
            return Some(error);
        }
        // SAFETY: the stream is alive as long as this.
        let state = unsafe { sys::cuStreamQuery(self.stream.cu_stream()) };
        match state {
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_NOT_READY => None,
            failed => failed.result().map_err(GpuError::driver("go on")).err(),
        }
    }

    /// What the card is.
    pub fn card(&self) -> Result<Card, GpuError> {
        let driver = GpuError::driver;
        let (free, memory) = self.memory()?;
        let cache = self
            .context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)
            .map_err(driver("read the cache size"))?;
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }
            .result()
            .map_err(driver("read the driver's version"))?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers.
        let asked = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) };
        asked.result().map_err(|error| GpuError::Compile {
            kernel: "nvrtc",
            log: format!("{error:?}"),
        })?;
        Ok(Card {
            name: self.context.name().map_err(driver("read the name"))?,
            capability: self
                .context
                .compute_capability()
                .map_err(driver("read the capability"))?,
            memory,
            free,
            processors: self.processors,
            cache: usize::try_from(cache).unwrap_or_default(),
            driver: version,
            nvrtc: (major, minor),
            blas: blas_version(),
        })
    }
}

/// Freed memory stays with the process: a step that allocates what the last one freed asks nobody.
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<(), GpuError> {
    context
        .bind_to_thread()
        .map_err(GpuError::driver("make the GPU current"))?;
    let mut threshold = u64::MAX;
    // SAFETY: the attribute is a 64-bit number.
    let set = unsafe {
        result::device::get_default_mem_pool(context.cu_device()).and_then(|pool| {
            result::mem_pool::set_attribute(
                pool,
                sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut threshold).cast(),
            )
        })
    };
    set.map_err(GpuError::driver("keep freed memory"))
}

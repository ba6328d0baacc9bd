use crate::shape::ShapeError;

/// Why the GPU could not do something.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// No driver on this machine.
    #[error("no CUDA driver: {0}")]
    NoDriver(String),
    /// A library that the driver does not bring.
    #[error("{library} was not found ({cause}): install the CUDA 13 runtime libraries or set LD_LIBRARY_PATH to them")]
    NoLibrary {
        /// File name.
        library: &'static str,
        /// What the loader said.
        cause: String,
    },
    /// A card that is too old.
    #[error("{name} has compute capability {major}.{minor}; {needed} or newer is needed")]
    TooOld {
        /// The card.
        name: String,
        /// Its capability.
        major: i32,
        /// Its capability.
        minor: i32,
        /// What is needed.
        needed: &'static str,
    },
    /// An error of the driver.
    #[error("{action}: {source}")]
    Driver {
        /// What was done.
        action: &'static str,
        /// What came of it.
        source: cudarc::driver::result::DriverError,
    },
    /// Not enough memory.
    #[error("{bytes} bytes do not fit: {free} of {total} bytes of the GPU are free")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Free bytes.
        free: usize,
        /// Bytes of the card.
        total: usize,
    },
    /// A source that NVRTC refuses.
    #[error("{kernel} does not compile:\n{log}")]
    Compile {
        /// The source.
        kernel: &'static str,
        /// What NVRTC said.
        log: String,
    },
    /// An error of cuBLASLt.
    #[error("cuBLASLt, {action}: {status}")]
    Blas {
        /// What was done.
        action: String,
        /// What came of it.
        status: String,
    },
    /// An error of NCCL.
    #[error("NCCL, {action}: {status}")]
    Nccl {
        /// What was done.
        action: &'static str,
        /// What came of it.
        status: String,
    },
    /// Operands that do not fit together.
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

impl GpuError {
    /// For `map_err`.
    pub(crate) fn driver(action: &'static str) -> impl FnOnce(cudarc::driver::result::DriverError) -> Self {
        move |source| Self::Driver { action, source }
    }
}

//! One kernel, called.

use std::ffi::c_void;

use cudarc::driver::sys::{self, CUfunction_attribute_enum};

use super::{Gpu, GpuError, source::Kernel, tensor_map::TensorMap};
use crate::{Buffer, element::Element};

/// A parameter of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    Pointer(u64),
    I32(i32),
    U32(u32),
    U64(u64),
    F32(f32),
    Map(TensorMap),
}

impl Arg {
    fn address(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) | Self::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::I32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Map(map) => std::ptr::from_ref(&map.0).cast_mut().cast(),
        }
    }
}

impl<T: Element> From<&Buffer<T>> for Arg {
    fn from(buffer: &Buffer<T>) -> Self {
        Self::Pointer(buffer.pointer())
    }
}

/// A buffer that may be left out: a null pointer.
impl<T: Element> From<Option<&Buffer<T>>> for Arg {
    fn from(buffer: Option<&Buffer<T>>) -> Self {
        Self::Pointer(buffer.map_or(0, Buffer::pointer))
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::I32(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl From<TensorMap> for Arg {
    fn from(map: TensorMap) -> Self {
        Self::Map(map)
    }
}

/// A count or an index: a C `int`. Larger ones do not occur: launchers split or refuse.
impl From<usize> for Arg {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "shapes are checked below 2^31"
    )]
    fn from(value: usize) -> Self {
        debug_assert!(i32::try_from(value).is_ok());
        Self::I32(value as i32)
    }
}

/// Blocks and threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub blocks: (u32, u32, u32),
    pub threads: u32,
    /// Dynamic shared memory in bytes; above 48 KiB the kernel is told so.
    pub shared_bytes: u32,
    /// Blocks may begin when all of the kernel before have said that they allow it, or have ended. The kernel must wait
    /// (`wait_for_previous`) before it touches what any kernel before it wrote, or writes what one reads, and what it reads of
    /// that must be neither `const __restrict__` nor `ld.global.nc`: of such memory the compiler may fetch before the wait.
    /// Kernels that write weights must be followed by one that is not early, since `streamed` fetches weights before it waits.
    pub early: bool,
}

impl Grid {
    /// One-dimensional.
    #[allow(clippy::cast_possible_truncation, reason = "a grid has fewer than 2^31 blocks")]
    pub fn new(blocks: usize, threads: u32) -> Self {
        Self {
            blocks: (blocks as u32, 1, 1),
            threads,
            shared_bytes: 0,
            early: false,
        }
    }

    /// Three-dimensional.
    #[allow(clippy::cast_possible_truncation, reason = "a grid has fewer than 2^31 blocks")]
    pub fn of(blocks: (usize, usize, usize), threads: u32) -> Self {
        Self {
            blocks: (blocks.0 as u32, blocks.1 as u32, blocks.2 as u32),
            threads,
            shared_bytes: 0,
            early: false,
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "shared memory is at most 227 KiB")]
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes as u32;
        self
    }

    /// See [`Self::early`].
    pub fn early(self) -> Self {
        Self { early: true, ..self }
    }
}

impl Gpu {
    /// Puts a kernel into the stream. Launchers alone call it, after they have checked that every buffer is as long as the
    /// kernel takes it to be. A grid without blocks is no launch.
    pub(crate) fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) -> Result<(), GpuError> {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
            return Ok(());
        }
        let function = self.function(kernel)?;
        self.bind()?;
        if grid.shared_bytes > 48 * 1024 {
            let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let set = function.set_attribute(attribute, i32::try_from(grid.shared_bytes).unwrap_or(i32::MAX));
            set.map_err(GpuError::driver("ask for shared memory"))?;
        }
        let mut parameters = args.iter().map(Arg::address).collect::<Vec<_>>();
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks.0,
            gridDimY: grid.blocks.1,
            gridDimZ: grid.blocks.2,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(grid.early),
        };
        // SAFETY: the parameters are those of the kernel, and its buffers are as long as it takes them to be: launchers see to
        // it. Buffers are freed in the order of the stream, after this.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
            .result()
        };
        launched.map_err(|source| GpuError::Driver {
            action: kernel.name,
            source,
        })
    }
}

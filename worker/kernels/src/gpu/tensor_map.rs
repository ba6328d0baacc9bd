//! How the tensor memory accelerator of Hopper is told of a matrix.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::{Buffer, Gpu, GpuError};
use crate::{element::Float, shape::ShapeError};

/// A matrix of which a kernel copies boxes to shared memory, swizzled as `wgmma` reads them. It holds the matrix's address, not its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorMap(pub(super) sys::CUtensorMap);

/// Bytes of a row of a box: what is swizzled together.
const LINE: usize = 128;

impl Gpu {
    /// Of a row-major matrix `[rows, columns]`, whose boxes have `box_rows` rows, at most 256, of 128 bytes. Where a box goes beyond
    /// the matrix, it is filled with zeros. The matrix must begin, and each row be, at a multiple of 16 bytes.
    pub(crate) fn tensor_map<T: Float>(
        &self,
        matrix: &Buffer<T>,
        (rows, columns): (usize, usize),
        box_rows: usize,
    ) -> Result<TensorMap, GpuError> {
        let name = "tensor map";
        let bytes = size_of::<T>();
        ShapeError::at_least(name, "the matrix", matrix.len(), rows * columns)?;
        ShapeError::unless(
            name,
            rows > 0 && columns > 0 && (columns * bytes).is_multiple_of(16) && matrix.pointer().is_multiple_of(16),
            || format!("{rows} rows of {columns} numbers at {:#x}", matrix.pointer()),
        )?;
        ShapeError::unless(name, (1..=256).contains(&box_rows), || {
            format!("boxes of {box_rows} rows")
        })?;
        self.bind()?;
        let dtype = match T::DTYPE {
            crate::Dtype::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            crate::Dtype::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (sizes, strides) = ([columns as u64, rows as u64], [(columns * bytes) as u64]);
        let (extents, steps) = ([(LINE / bytes) as u32, box_rows as u32], [1, 1]);
        // SAFETY: two sizes, one stride, two extents and two steps, as a matrix of rank 2 has; the driver copies them.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                dtype,
                2,
                matrix.pointer() as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                extents.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().map_err(GpuError::driver("describe a matrix"))?;
        Ok(TensorMap(map))
    }
}

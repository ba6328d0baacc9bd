//! What a machine offers, asked without opening a GPU.

use cudarc::driver::{result, sys};

use super::{GpuError, count, require};

/// The libraries besides the driver's that tensors on a GPU and kernels of this crate need.
const LIBRARIES: [(&str, &[&str]); 4] = [
    ("libcublas.so.13", &["libcublas.so.13", "libcublas.so"]),
    ("libcublasLt.so.13", &["libcublasLt.so.13", "libcublasLt.so"]),
    ("libcurand.so.10", &["libcurand.so.10", "libcurand.so"]),
    ("libnvrtc.so.13", &["libnvrtc.so.13", "libnvrtc.so"]),
];

/// A GPU as the driver lists it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listed {
    /// The vendor's name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
}

/// What the driver and the loader say.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Survey {
    /// The newest CUDA version that the driver runs, as 13000 for 13.0.
    pub driver: i32,
    /// The GPUs that this process sees, in the order of their numbers.
    pub cards: Vec<Listed>,
    /// File names of CUDA libraries that the loader does not find.
    pub missing: Vec<&'static str>,
}

/// Asks driver and loader.
///
/// # Errors
/// There is no driver, or it does not start.
pub fn survey() -> Result<Survey, GpuError> {
    let found = count()?;
    let mut driver = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&raw mut driver) }
        .result()
        .map_err(GpuError::driver("read the driver's version"))?;
    let cards = (0..i32::try_from(found).unwrap_or(0)).map(list);
    let missing = LIBRARIES
        .iter()
        .filter(|(library, names)| require(library, names).is_err());
    Ok(Survey {
        driver,
        cards: cards.collect::<Result<_, _>>()?,
        missing: missing.map(|(library, _)| *library).collect(),
    })
}

fn list(ordinal: i32) -> Result<Listed, GpuError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let asked = result::device::get(ordinal).and_then(|device| {
        // SAFETY: the device is one that the driver has given.
        unsafe {
            Ok(Listed {
                name: result::device::get_name(device)?,
                capability: (
                    result::device::get_attribute(device, MAJOR)?,
                    result::device::get_attribute(device, MINOR)?,
                ),
                memory: result::device::total_mem(device)?,
            })
        }
    });
    asked.map_err(GpuError::driver("ask for a GPU's name"))
}

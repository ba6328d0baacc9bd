//! How fast kernels are, beside the floor that memory or arithmetic sets. The example `kernels bench` prints them.

use crate::{Gpu, GpuError, check::Draw};

/// One measured kernel at one shape.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Kernel and shape, as `rms_norm 4096x3584`.
    pub name: &'static str,
    /// Makes its inputs.
    pub prepare: fn(&Gpu, &mut Draw) -> Result<Prepared, GpuError>,
}

/// A launch that can be repeated, and the least that it must do.
pub struct Prepared {
    /// One launch (or the few that belong together). Repetitions may use other inputs, so that they do not measure the cache.
    pub run: Box<dyn FnMut() -> Result<(), GpuError>>,
    /// Bytes that must be read or written at least once.
    pub bytes: f64,
    /// Floating-point operations on tensor cores.
    pub operations: f64,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Prepared({} bytes, {} operations)", self.bytes, self.operations)
    }
}

/// What this card reaches at best.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Bytes per second of a large copy, read and written bytes both counted.
    pub bandwidth: f64,
    /// Operations per second of a large product of bf16 matrices.
    pub arithmetic: f64,
}

/// A measurement.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Kernel and shape.
    pub name: &'static str,
    /// Median seconds.
    pub seconds: f64,
    /// Seconds that no version can go below by much.
    pub floor: f64,
    /// Bytes per second.
    pub bandwidth: f64,
    /// Operations per second.
    pub arithmetic: f64,
}

/// Median seconds of `run` on the card, after warming up; each measured sample repeats it for about a millisecond.
pub fn median<E: From<GpuError>>(gpu: &Gpu, mut run: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let clock = gpu.clock()?;
    run()?;
    let once = gpu.time(&clock, &mut run)?;
    let repeats = ((1e-3 / once.max(1e-7)) as usize).clamp(1, 200);
    let samples = if once > 0.2 { 3 } else { 11 };
    let mut seconds = (0..samples)
        .map(|_| Ok(gpu.time(&clock, || (0..repeats).try_for_each(|_| run()))? / repeats as f64))
        .collect::<Result<Vec<_>, E>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[samples / 2])
}

/// Measures the ceilings: a copy of 2 GiB, and a product of two matrices of 8,192 x 8,192 random bf16 numbers.
pub fn ceilings(gpu: &Gpu) -> Result<Ceilings, GpuError> {
    let bytes = 2usize << 30;
    let (from, to) = (gpu.alloc::<u8>(bytes)?, gpu.alloc::<u8>(bytes)?);
    let copy = median(gpu, || gpu.copy(&from, &to))?;
    drop((from, to));
    let side = 8192;
    let mut draw = Draw::new(1);
    let values = draw.normal::<half::bf16>(side * side, 1.0);
    let (a, b) = (gpu.upload(&values)?, gpu.upload(&values)?);
    let out = gpu.alloc::<half::bf16>(side * side)?;
    let gemm = crate::Gemm::linear(side, side, side);
    let product = median(gpu, || gpu.gemm(gemm, &a, &b, &out))?;
    Ok(Ceilings {
        bandwidth: 2.0 * bytes as f64 / copy,
        arithmetic: gemm.operations() / product,
    })
}

impl Case {
    /// Measures it.
    pub fn measure(&self, gpu: &Gpu, ceilings: &Ceilings, seed: u64) -> Result<Measured, GpuError> {
        let mut prepared = (self.prepare)(gpu, &mut Draw::new(seed))?;
        let seconds = median(gpu, &mut prepared.run)?;
        Ok(Measured {
            name: self.name,
            seconds,
            floor: (prepared.bytes / ceilings.bandwidth).max(prepared.operations / ceilings.arithmetic),
            bandwidth: prepared.bytes / seconds,
            arithmetic: prepared.operations / seconds,
        })
    }
}

/// Every benchmark of the crate.
pub fn all() -> Vec<Case> {
    [
        crate::activation::cases(),
        crate::attention::cases(),
        crate::norm::cases(),
        crate::optimizer::cases(),
        crate::paged::cases(),
        crate::pictures::cases(),
        crate::rotary::cases(),
        crate::rows::cases(),
        crate::sampling::cases(),
        crate::skinny::cases(),
        crate::streamed::cases(),
        crate::vocabulary::cases(),
    ]
    .concat()
}

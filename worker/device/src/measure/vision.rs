//! Pictures through the tower.

use std::time::Instant;

use flotilla_kernels::Gpu;
use half::bf16;

use super::{Ceiling, Line, floor::vision_operations};
use crate::{error::DeviceError, shape::QwenVision, vision::QwenTower};

/// Seconds of what runs on the card: the median of five times after a first one.
pub(crate) fn settled(gpu: &Gpu, mut run: impl FnMut() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
    run()?;
    let times = (0..5).map(|_| {
        gpu.synchronize()?;
        let begin = Instant::now();
        run()?;
        gpu.synchronize()?;
        Ok(begin.elapsed().as_secs_f64())
    });
    let mut times = times.collect::<Result<Vec<_>, DeviceError>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Pictures of `side` patches each way through a random tower, `count` together, from their values on the host.
pub fn vision(
    gpu: &Gpu,
    ceiling: &Ceiling,
    shape: &QwenVision,
    count: usize,
    side: usize,
) -> Result<Line, DeviceError> {
    let tower = QwenTower::<bf16>::random(gpu, shape.clone(), 1)?;
    let patches = side * side;
    let values = vec![0.25f32; count * patches * shape.patch_values()];
    let grids = vec![[1, side, side]; count];
    let seconds = settled(gpu, || tower.forward(&values, &grids).map(drop))?;
    let floor = ceiling.arithmetic(vision_operations(shape, patches) * count as f64);
    let what = format!("vision {count} of {patches} patches");
    Ok(Line::new(what, (count, "pictures"), seconds, floor))
}

//! Parity and speed.

use half::bf16;

use super::{Squares, TAPS, mix_rows, patches, reference};
use crate::{
    Float, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
    rows::{NONE, near, random_bf16},
};

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "patches f32",
            run: check_patches::<f32>,
        },
        Check {
            name: "patches bf16",
            run: check_patches::<bf16>,
        },
        Check {
            name: "pixels copied beside kernels",
            run: check_feed,
        },
        Check {
            name: "mix_rows f32",
            run: check_mix_rows::<f32>,
        },
        Check {
            name: "mix_rows bf16",
            run: check_mix_rows::<bf16>,
        },
    ]
}

fn check_patches<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let square = |count, channels, side, patch| Squares {
        count,
        channels,
        side,
        patch,
    };
    let odd = draw.between(1, 9);
    for squares in [
        square(2, 3, 384, 14),
        square(draw.between(1, 9), 3, 56, 14),
        square(
            draw.between(1, 5),
            draw.between(1, 4),
            odd * draw.between(1, 4) + draw.below(odd),
            odd,
        ),
    ] {
        let pixels = draw.normal::<f32>(squares.values(), 1.0);
        let on_card = gpu.upload(&pixels)?;
        let values = squares.patch_values();
        for width in [values, values.next_multiple_of(8), values + 1] {
            let out = gpu.poisoned::<T>(squares.patches() * width)?;
            patches(gpu, squares, &on_card, width, &out)?;
            let expected = reference::patches(squares, &pixels, width);
            let expected = expected.into_iter().map(T::from_f32).collect::<Vec<_>>();
            Distance::equal(&gpu.download(&out)?, &expected)?;
        }
    }
    Ok(Distance::EQUAL)
}

/// Parts of what the host feeds are read by kernels while the next are copied.
fn check_feed(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let parts = (0..6).map(|_| draw.between(1, 1 << 20)).collect::<Vec<_>>();
    let values = draw.normal::<f32>(parts.iter().sum(), 1.0);
    // Memory that the next allocation gets, full of something else.
    drop(gpu.poisoned::<f32>(values.len())?);
    let out = gpu.poisoned::<bf16>(values.len())?;
    let mut feed = gpu.feed(values.len())?;
    let mut start = 0;
    for length in parts {
        let mut own = values[start..start + length].to_vec();
        let (left, right) = own.split_at(length / 3);
        let part = feed.push(&[left, &[], right])?;
        own.fill(f32::NAN);
        crate::rows::cast(gpu, &part, &out.slice(start..start + length)?)?;
        start += length;
    }
    drop(feed);
    let expected = values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    Distance::equal(&gpu.download(&out)?, &expected)
}

fn check_mix_rows<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for width in [3584, 64, 2 * draw.between(1, 50), 2 * draw.between(1, 50) + 1] {
        let (rows, count) = (draw.between(20, 60), draw.between(5, 40));
        let from = draw.normal::<T>(rows * width, 1.0);
        let mut at = (0..count * TAPS).map(|_| draw.below(rows) as i32).collect::<Vec<_>>();
        let mut weights = draw.normal::<f32>(count * TAPS, 0.5);
        // Rows that are copied, in part missing, and missing altogether.
        at[..3 * TAPS].copy_from_slice(&[
            3,
            -1,
            -1,
            -1,
            rows as i32,
            0,
            i32::MIN,
            5,
            -1,
            rows as i32,
            i32::MAX,
            -7,
        ]);
        weights[0] = 1.0;
        let expected = reference::mix_rows(&widen(&from), width, &at, &weights);
        let (on_card, at, weights) = (gpu.upload(&from)?, gpu.upload(&at)?, gpu.upload(&weights)?);
        let out = gpu.poisoned::<T>(count * width)?;
        mix_rows(gpu, width, &on_card, &at, &weights, &out)?;
        let out = gpu.download(&out)?;
        Distance::equal(&out[..width], &from[3 * width..4 * width])?;
        Distance::equal(&out[2 * width..3 * width], &vec![T::default(); width])?;
        worst = worst.worst(near(&out, &expected)?);
    }
    Ok(worst)
}

/// The squares that go through a tower together at most, of a SigLIP of 384 pixels.
const SQUARES: Squares = Squares {
    count: 44,
    channels: 3,
    side: 384,
    patch: 14,
};
/// Width of the language model, and of a patch with its zeros.
const WIDTH: usize = 3584;
const PATCH: usize = 592;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "patches of 44 squares of 384x384",
            prepare: cut,
        },
        Case {
            name: "mix_rows 32000x3584, one row each",
            prepare: |gpu, draw| mixed(gpu, draw, 32_000, 1),
        },
        Case {
            name: "mix_rows 6272x3584, means of four rows each",
            prepare: |gpu, draw| mixed(gpu, draw, 6272, TAPS),
        },
    ]
}

fn cut(gpu: &Gpu, _: &mut Draw) -> Result<Prepared, GpuError> {
    let pixels = gpu.alloc::<f32>(SQUARES.values())?;
    crate::rows::fill_normal(gpu, &pixels, 1.0, 1)?;
    let out = gpu.alloc::<bf16>(SQUARES.patches() * PATCH)?;
    let gpu = gpu.clone();
    // Pixels beyond the last patch need not be read.
    let read = SQUARES.patches() * SQUARES.patch_values() * size_of::<f32>();
    Ok(Prepared {
        bytes: (read + out.len() * size_of::<bf16>()) as f64,
        run: Box::new(move || patches(&gpu, SQUARES, &pixels, PATCH, &out)),
        operations: 0.0,
    })
}

/// `rows` of `taps` distinct rows each.
fn mixed(gpu: &Gpu, draw: &mut Draw, rows: usize, taps: usize) -> Result<Prepared, GpuError> {
    let from = random_bf16(gpu, rows * taps * WIDTH)?;
    let mut order = draw.order(rows * taps).into_iter().map(|row| row as i32);
    let at = (0..rows * TAPS).map(|tap| {
        if tap % TAPS < taps {
            order.next().unwrap_or(-1)
        } else {
            -1
        }
    });
    let at = gpu.upload(&at.collect::<Vec<_>>())?;
    let weights = gpu.upload(&vec![(taps as f32).recip(); rows * TAPS])?;
    let out = gpu.alloc::<bf16>(rows * WIDTH)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || mix_rows(&gpu, WIDTH, &from, &at, &weights, &out)),
        bytes: ((taps + 1) * rows * WIDTH * size_of::<bf16>()) as f64,
        operations: 0.0,
    })
}

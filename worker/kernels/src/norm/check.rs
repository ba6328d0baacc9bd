//! Parity and speed.

use half::bf16;

use super::{
    Norm, RmsNormBackward, layer_norm, reference, rms_norm, rms_norm_backward, rms_norm_backward_scratch,
    rms_norm_of_parts,
};
use crate::{
    Float, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
    rows::{NONE, in_a_graph, near, random_bf16},
};

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "rms_norm f32",
            run: check_rms_norm::<f32>,
        },
        Check {
            name: "rms_norm bf16",
            run: check_rms_norm::<bf16>,
        },
        Check {
            name: "rms_norm of parts f32",
            run: check_parts::<f32>,
        },
        Check {
            name: "rms_norm of parts bf16",
            run: check_parts::<bf16>,
        },
        Check {
            name: "rms_norm misaligned bf16",
            run: check_misaligned,
        },
        Check {
            name: "rms_norm_backward f32",
            run: check_rms_norm_backward::<f32>,
        },
        Check {
            name: "rms_norm_backward bf16",
            run: check_rms_norm_backward::<bf16>,
        },
        Check {
            name: "rms_norm_backward equal bits bf16",
            run: check_equal_bits,
        },
        Check {
            name: "layer_norm f32",
            run: check_layer_norm::<f32>,
        },
        Check {
            name: "layer_norm bf16",
            run: check_layer_norm::<bf16>,
        },
    ]
}

/// Few rows and many, widths of models and odd ones.
fn shapes(draw: &mut Draw) -> Vec<Norm> {
    let shape = |rows, width| Norm { rows, width, eps: 1e-6 };
    vec![
        shape(draw.between(1, 9), 3584),
        shape(draw.between(300, 400), 3584),
        shape(draw.between(1, 9), 1152),
        shape(draw.between(300, 400), 72),
        shape(draw.between(1, 9), 8191),
        shape(draw.between(300, 400), 33),
        shape(1, 1),
    ]
}

/// A product in parts beside the same product added up and rounded before.
fn check_parts<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    for norm in shapes(draw) {
        let (matrix, count) = (norm.rows * norm.width, draw.between(1, 9));
        let parts = draw.normal::<f32>(count * matrix, 1.0);
        let mut x = vec![0.0; matrix];
        for part in parts.chunks_exact(matrix) {
            x.iter_mut().zip(part).for_each(|(x, part)| *x += part);
        }
        let x = x.into_iter().map(T::from_f32).collect::<Vec<_>>();
        let (past, weight) = (rows::<T>(draw, norm), draw.normal::<T>(norm.width, 1.0));
        let (x, weight) = (gpu.upload(&x)?, gpu.upload(&weight)?);
        let results = [false, true].map(|in_parts| {
            let (residual, out) = (gpu.upload(&past)?, gpu.poisoned::<T>(matrix)?);
            if in_parts {
                rms_norm_of_parts(gpu, norm, (&gpu.upload(&parts)?, count), &residual, &weight, &out)?;
            } else {
                rms_norm(gpu, norm, &x, Some(&residual), &weight, &out, None)?;
            }
            Ok::<_, GpuError>((gpu.download(&residual)?, gpu.download(&out)?))
        });
        let [whole, parts] = results;
        let (whole, parts) = (whole?, parts?);
        Distance::equal(&parts.0, &whole.0)?;
        Distance::equal(&parts.1, &whole.1)?;
    }
    Ok(Distance::EQUAL)
}

/// Rows of different sizes, one of them zeros.
fn rows<T: Float>(draw: &mut Draw, norm: Norm) -> Vec<T> {
    let mut x = draw.normal::<T>(norm.rows * norm.width, 1.0);
    for row in x.chunks_exact_mut(norm.width) {
        let size = [0.01, 1.0, 300.0][draw.below(3)];
        for x in row {
            *x = T::from_f32(x.to_f32() * size);
        }
    }
    x[..norm.width].fill(T::from_f32(0.0));
    x
}

fn check_rms_norm<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for norm in shapes(draw) {
        let (x, past) = (rows::<T>(draw, norm), rows::<T>(draw, norm));
        let weight = draw.normal::<T>(norm.width, 1.0);
        let on_card = (gpu.upload(&x)?, gpu.upload(&weight)?);

        let (out, inverse) = (gpu.poisoned::<T>(x.len())?, gpu.poisoned::<f32>(norm.rows)?);
        rms_norm(gpu, norm, &on_card.0, None, &on_card.1, &out, Some(&inverse))?;
        let expected = reference::rms_norm::<T>(&widen(&x), &widen(&weight), norm.eps);
        worst = worst.worst(near(&gpu.download(&out)?, &expected.0)?);
        worst = worst.worst(near(&gpu.download(&inverse)?, &expected.1)?);

        // With a residual, and over its own input.
        let residual = gpu.upload(&past)?;
        rms_norm(gpu, norm, &on_card.0, Some(&residual), &on_card.1, &on_card.0, None)?;
        let mut sum = widen(&past);
        reference::add_residual::<T>(&mut sum, &widen(&x));
        let expected = reference::rms_norm::<T>(&sum, &widen(&weight), norm.eps);
        worst = worst.worst(near(&gpu.download(&on_card.0)?, &expected.0)?);
        Distance::equal(&widen(&gpu.download(&residual)?), &sum)?;
    }
    Ok(worst)
}

fn check_misaligned(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let norm = Norm {
        rows: 3,
        width: 64,
        eps: 1e-5,
    };
    let (x, weight) = (draw.normal::<bf16>(1 + 3 * 64, 1.0), draw.normal::<bf16>(64, 1.0));
    let part = gpu.upload(&x)?.slice(1..x.len())?;
    let out = gpu.poisoned::<bf16>(3 * 64)?;
    rms_norm(gpu, norm, &part, None, &gpu.upload(&weight)?, &out, None)?;
    let (expected, _) = reference::rms_norm::<bf16>(&widen(&x[1..]), &widen(&weight), norm.eps);
    near(&gpu.download(&out)?, &expected)
}

fn check_rms_norm_backward<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    // The gradient of a row of one number is 0.
    for norm in shapes(draw).into_iter().filter(|norm| norm.width > 1) {
        let x = draw.normal::<T>(norm.rows * norm.width, 3.0);
        let (dy, past) = (draw.normal::<T>(x.len(), 1.0), draw.normal::<T>(x.len(), 1.0));
        let weight = draw.normal::<T>(norm.width, 1.0);
        let before = draw.normal::<f32>(norm.width, 1.0);
        let (wide_x, wide_weight) = (widen(&x), widen(&weight));
        let (_, inverse) = reference::rms_norm::<T>(&wide_x, &wide_weight, norm.eps);
        let (dx, dweight) = reference::rms_norm_backward::<T>(&widen(&dy), &wide_x, &wide_weight, &inverse);
        let inputs = (gpu.upload(&dy)?, gpu.upload(&x)?, gpu.upload(&weight)?);
        let inverse = gpu.upload(&inverse)?;
        let scratch = gpu.poisoned::<f32>(rms_norm_backward_scratch(gpu, norm))?;
        let (accumulated, sums) = (gpu.upload(&past)?, gpu.upload(&before)?);
        let operands = RmsNormBackward {
            dy: &inputs.0,
            x: &inputs.1,
            weight: &inputs.2,
            inverse_rms: &inverse,
            dx: &accumulated,
            accumulate: true,
            dweight: Some((&sums, &scratch)),
        };
        rms_norm_backward(gpu, norm, operands)?;
        let expected = widen(&past).iter().zip(&dx).map(|(a, b)| a + b).collect::<Vec<_>>();
        worst = worst.worst(near(&gpu.download(&accumulated)?, &expected)?);
        let expected = before.iter().zip(&dweight).map(|(a, b)| a + b).collect::<Vec<_>>();
        worst = worst.worst(near(&gpu.download(&sums)?, &expected)?);
        // Without a weight's gradient, over its own input.
        let operands = RmsNormBackward {
            dx: &inputs.0,
            accumulate: false,
            dweight: None,
            ..operands
        };
        rms_norm_backward(gpu, norm, operands)?;
        worst = worst.worst(near(&gpu.download(&inputs.0)?, &dx)?);
    }
    Ok(worst)
}

fn check_equal_bits(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let norm = Norm {
        rows: 777,
        width: 1152,
        eps: 1e-6,
    };
    let (dy, x) = (
        draw.normal::<bf16>(norm.rows * norm.width, 1.0),
        draw.normal::<bf16>(norm.rows * norm.width, 1.0),
    );
    let (dy, x) = (gpu.upload(&dy)?, gpu.upload(&x)?);
    let weight = gpu.upload(&draw.normal::<bf16>(norm.width, 1.0))?;
    let inverse = gpu.upload(&vec![1.0f32; norm.rows])?;
    let scratch = gpu.poisoned::<f32>(rms_norm_backward_scratch(gpu, norm))?;
    let once = || {
        let (dx, sums) = (gpu.poisoned::<bf16>(x.len())?, gpu.zeros::<f32>(norm.width)?);
        let operands = RmsNormBackward {
            dy: &dy,
            x: &x,
            weight: &weight,
            inverse_rms: &inverse,
            dx: &dx,
            accumulate: false,
            dweight: Some((&sums, &scratch)),
        };
        rms_norm_backward(gpu, norm, operands)?;
        Ok::<_, GpuError>((gpu.download(&dx)?, gpu.download(&sums)?))
    };
    let (first, second) = (once()?, once()?);
    Ok(Distance::equal(&second.0, &first.0)?.worst(Distance::equal(&second.1, &first.1)?))
}

/// As [`near`]; a mean of 50 takes some bits of an f32.
fn near_sums<T: Float>(out: &[T], expected: &[f32]) -> Result<Distance, CheckError> {
    let distance = near(out, expected)?;
    let bound = distance.bound.max(2e-5);
    Ok(Distance { bound, ..distance })
}

fn check_layer_norm<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for norm in shapes(draw) {
        // A mean far from 0: the variance must not be a difference of large sums.
        let x = draw.normal::<T>(norm.rows * norm.width, 1.0);
        let x = x.iter().map(|x| T::from_f32(x.to_f32() + 50.0)).collect::<Vec<_>>();
        let past = draw.normal::<T>(x.len(), 1.0);
        let (weight, bias) = (draw.normal::<T>(norm.width, 1.0), draw.normal::<T>(norm.width, 1.0));
        let scales = (gpu.upload(&weight)?, gpu.upload(&bias)?);
        let (weight, bias) = (widen(&weight), widen(&bias));
        let (on_card, residual) = (gpu.upload(&x)?, gpu.upload(&past)?);
        let out = gpu.poisoned::<T>(x.len())?;
        layer_norm(gpu, norm, &on_card, None, &scales.0, &scales.1, &out)?;
        let expected = reference::layer_norm(&widen(&x), &weight, &bias, norm.eps);
        worst = worst.worst(near_sums(&gpu.download(&out)?, &expected)?);
        layer_norm(gpu, norm, &on_card, Some(&residual), &scales.0, &scales.1, &on_card)?;
        let mut sum = widen(&past);
        reference::add_residual::<T>(&mut sum, &widen(&x));
        let expected = reference::layer_norm(&sum, &weight, &bias, norm.eps);
        worst = worst.worst(near_sums(&gpu.download(&on_card)?, &expected)?);
        Distance::equal(&widen(&gpu.download(&residual)?), &sum)?;
    }
    Ok(worst)
}

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "rms_norm residual 8192x3584",
            prepare: |gpu, _| forward(gpu, 8192, 3584, true),
        },
        Case {
            name: "rms_norm 8192x3584",
            prepare: |gpu, _| forward(gpu, 8192, 3584, false),
        },
        Case {
            name: "rms_norm residual 32768x1280",
            prepare: |gpu, _| forward(gpu, 32_768, 1280, true),
        },
        Case {
            name: "rms_norm residual decode 1x3584, 20 in a graph",
            prepare: |gpu, _| in_a_graph(gpu, 20, forward(gpu, 1, 3584, true)?),
        },
        Case {
            name: "rms_norm residual decode 64x3584, 20 in a graph",
            prepare: |gpu, _| in_a_graph(gpu, 20, forward(gpu, 64, 3584, true)?),
        },
        Case {
            name: "rms_norm residual decode 256x3584, 20 in a graph",
            prepare: |gpu, _| in_a_graph(gpu, 20, forward(gpu, 256, 3584, true)?),
        },
        Case {
            name: "rms_norm_backward 8192x3584",
            prepare: |gpu, _| backward(gpu, 8192, 3584, true),
        },
        Case {
            name: "rms_norm_backward frozen weight 8192x3584",
            prepare: |gpu, _| backward(gpu, 8192, 3584, false),
        },
        Case {
            name: "layer_norm residual 32768x1152",
            prepare: layers,
        },
    ]
}

fn forward(gpu: &Gpu, rows: usize, width: usize, sums: bool) -> Result<Prepared, GpuError> {
    let norm = Norm { rows, width, eps: 1e-6 };
    let (x, residual) = (random_bf16(gpu, rows * width)?, random_bf16(gpu, rows * width)?);
    let (weight, out) = (random_bf16(gpu, width)?, random_bf16(gpu, rows * width)?);
    let inverse = gpu.zeros::<f32>(rows)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || {
            let residual = sums.then_some(&residual);
            rms_norm(&gpu, norm, &x, residual, &weight, &out, Some(&inverse))
        }),
        bytes: (rows * width * 2 * if sums { 4 } else { 2 }) as f64,
        operations: 0.0,
    })
}

fn backward(gpu: &Gpu, rows: usize, width: usize, trained: bool) -> Result<Prepared, GpuError> {
    let norm = Norm { rows, width, eps: 1e-6 };
    let (dy, x) = (random_bf16(gpu, rows * width)?, random_bf16(gpu, rows * width)?);
    let (weight, dx) = (random_bf16(gpu, width)?, random_bf16(gpu, rows * width)?);
    let (inverse, sums) = (gpu.zeros::<f32>(rows)?, gpu.zeros::<f32>(width)?);
    let scratch = gpu.zeros::<f32>(rms_norm_backward_scratch(gpu, norm))?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || {
            let operands = RmsNormBackward {
                dy: &dy,
                x: &x,
                weight: &weight,
                inverse_rms: &inverse,
                dx: &dx,
                accumulate: true,
                dweight: trained.then_some((&sums, &scratch)),
            };
            rms_norm_backward(&gpu, norm, operands)
        }),
        bytes: (rows * width * 2 * 4) as f64,
        operations: 0.0,
    })
}

fn layers(gpu: &Gpu, _: &mut Draw) -> Result<Prepared, GpuError> {
    let (rows, width) = (32_768, 1152);
    let norm = Norm { rows, width, eps: 1e-6 };
    let (x, residual) = (random_bf16(gpu, rows * width)?, random_bf16(gpu, rows * width)?);
    let (weight, bias) = (random_bf16(gpu, width)?, random_bf16(gpu, width)?);
    let out = random_bf16(gpu, rows * width)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || layer_norm(&gpu, norm, &x, Some(&residual), &weight, &bias, &out)),
        bytes: (rows * width * 2 * 4) as f64,
        operations: 0.0,
    })
}

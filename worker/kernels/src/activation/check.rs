//! Parity and speed.

use half::bf16;

use super::{
    Gelu, add_bias, bias_gradient, bias_gradient_scratch, gelu, gelu_backward, reference, swiglu, swiglu_backward,
};
use crate::{
    Float, Gemm, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
    rows::{NONE, in_a_graph, near, random_bf16},
};

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check {
            name: "swiglu f32",
            run: check_swiglu::<f32>,
        },
        Check {
            name: "swiglu bf16",
            run: check_swiglu::<bf16>,
        },
        Check {
            name: "gelu f32",
            run: check_gelu::<f32>,
        },
        Check {
            name: "gelu bf16",
            run: check_gelu::<bf16>,
        },
        Check {
            name: "bias f32",
            run: check_bias::<f32>,
        },
        Check {
            name: "bias bf16",
            run: check_bias::<bf16>,
        },
        Check {
            name: "product with bias f32",
            run: check_product::<f32>,
        },
        Check {
            name: "product with bias bf16",
            run: check_product::<bf16>,
        },
    ]
}

/// A bias that is added by the product itself, over what is there and onto it; and another bias of the same shape after it.
fn check_product<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for (rows, outputs, inputs) in [
        (300, 1280, 1176),
        (64, 128, 96),
        (draw.between(1, 99), 8 * draw.between(1, 99), 88),
    ] {
        let (x, weight) = (
            draw.normal::<T>(rows * inputs, 1.0),
            draw.normal::<T>(outputs * inputs, 0.1),
        );
        let before = draw.normal::<T>(rows * outputs, 1.0);
        let (on_card, weights) = (gpu.upload(&x)?, gpu.upload(&weight)?);
        let (x, weight) = (widen(&x), widen(&weight));
        for adds in [false, true, false] {
            let bias = draw.normal::<T>(outputs, 1.0);
            let product = Gemm::linear(rows, outputs, inputs);
            let product = if adds { product.accumulate() } else { product };
            let out = gpu.upload(&before)?;
            gpu.gemm_with_bias(product, &on_card, &weights, &gpu.upload(&bias)?, &out)?;
            let cells = (0..rows * outputs).map(|at| {
                let (row, column) = (
                    &x[at / outputs * inputs..][..inputs],
                    &weight[at % outputs * inputs..][..inputs],
                );
                let sum = row
                    .iter()
                    .zip(column)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum::<f64>();
                let past = if adds { before[at].to_f32() } else { 0.0 };
                (sum + f64::from(bias[at % outputs].to_f32()) + f64::from(past)) as f32
            });
            // The library may round the product before it adds the bias.
            worst = worst.worst(Distance::of(&gpu.download(&out)?, &cells.collect::<Vec<_>>())?);
        }
    }
    Ok(worst)
}

/// Rows and widths.
fn shapes(draw: &mut Draw) -> [(usize, usize); 5] {
    [
        (draw.between(1, 20), 18_944),
        (draw.between(1, 20), 3420),
        (draw.between(1, 99), 4304),
        (draw.between(1, 99), 2 * draw.between(1, 99)),
        (draw.between(1, 99), 2 * draw.between(1, 99) + 1),
    ]
}

/// Among ordinary numbers a few that saturate every sigmoid.
fn numbers<T: Float>(draw: &mut Draw, length: usize) -> Vec<T> {
    let mut x = draw.normal::<T>(length, 2.0);
    for extreme in [-300.0, -90.0, -30.0, 30.0, 90.0, 300.0] {
        let at = draw.below(length);
        x[at] = T::from_f32(extreme);
    }
    x
}

fn check_swiglu<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for (rows, ff) in shapes(draw) {
        let (gate_up, dout) = (numbers::<T>(draw, rows * 2 * ff), draw.normal::<T>(rows * ff, 1.0));
        let (wide, wide_dout) = (widen(&gate_up), widen(&dout));
        let (expected, gradient) = (
            reference::swiglu(&wide, ff),
            reference::swiglu_backward(&wide, &wide_dout, ff),
        );
        let (gate_up, dout) = (gpu.upload(&gate_up)?, gpu.upload(&dout)?);
        let out = gpu.poisoned::<T>(rows * ff)?;
        swiglu(gpu, rows, ff, &gate_up, &out)?;
        worst = worst.worst(near(&gpu.download(&out)?, &expected)?);
        let d_gate_up = gpu.poisoned::<T>(rows * 2 * ff)?;
        swiglu_backward(gpu, rows, ff, &gate_up, &dout, &d_gate_up, None)?;
        worst = worst.worst(near(&gpu.download(&d_gate_up)?, &gradient)?);
        // In place, with the output again.
        swiglu_backward(gpu, rows, ff, &gate_up, &dout, &gate_up, Some(&dout))?;
        worst = worst.worst(near(&gpu.download(&gate_up)?, &gradient)?);
        worst = worst.worst(near(&gpu.download(&dout)?, &expected)?);
    }
    Ok(worst)
}

fn check_gelu<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for kind in [Gelu::Tanh, Gelu::Erf, Gelu::Quick] {
        for (rows, width) in shapes(draw) {
            let (x, bias) = (numbers::<T>(draw, rows * width), draw.normal::<T>(width, 1.0));
            let dout = draw.normal::<T>(x.len(), 1.0);
            let bias = (draw.below(4) > 0).then_some(bias);
            let sum = match &bias {
                Some(bias) => reference::add_bias(&widen(&x), &widen(bias)),
                None => widen(&x),
            };
            let of = |x: &f32| reference::gelu(kind, f64::from(*x)) as f32;
            let expected = sum.iter().map(of).collect::<Vec<_>>();
            let slope =
                |(x, dout): (&f32, &T)| (reference::gelu_slope(kind, f64::from(*x)) * f64::from(dout.to_f32())) as f32;
            let gradient = sum.iter().zip(&dout).map(slope).collect::<Vec<_>>();
            let bias = bias.map(|bias| gpu.upload(&bias)).transpose()?;
            let (x, dout) = (gpu.upload(&x)?, gpu.upload(&dout)?);
            let out = gpu.poisoned::<T>(rows * width)?;
            gelu(gpu, kind, (rows, width), &x, bias.as_ref(), &out)?;
            worst = worst.worst(near(&gpu.download(&out)?, &expected)?);
            gelu_backward(gpu, kind, (rows, width), &x, bias.as_ref(), &dout, &dout)?;
            worst = worst.worst(near(&gpu.download(&dout)?, &gradient)?);
            gelu(gpu, kind, (rows, width), &x, bias.as_ref(), &x)?;
            worst = worst.worst(near(&gpu.download(&x)?, &expected)?);
        }
    }
    Ok(worst)
}

fn check_bias<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = NONE;
    for (rows, width) in shapes(draw).into_iter().chain([(2345, 4608), (3000, 37)]) {
        let (x, bias) = (draw.normal::<T>(rows * width, 1.0), draw.normal::<T>(width, 1.0));
        let before = draw.normal::<f32>(width, 1.0);
        let sums = crate::rows::reference::column_sums(&widen(&x), width);
        let (on_card, gradient) = (gpu.upload(&x)?, gpu.upload(&before)?);
        let scratch = gpu.poisoned::<f32>(bias_gradient_scratch(rows, width))?;
        bias_gradient(gpu, rows, width, &on_card, &gradient, &scratch)?;
        let expected = before.iter().zip(&sums).map(|(a, b)| a + b).collect::<Vec<_>>();
        let first = gpu.download(&gradient)?;
        worst = worst.worst(near(&first, &expected)?);
        gpu.write(&gradient, &before)?;
        bias_gradient(gpu, rows, width, &on_card, &gradient, &scratch)?;
        Distance::equal(&gpu.download(&gradient)?, &first)?;
        add_bias(gpu, rows, width, &gpu.upload(&bias)?, &on_card)?;
        let expected = reference::add_bias(&widen(&x), &widen(&bias));
        worst = worst.worst(near(&gpu.download(&on_card)?, &expected)?);
    }
    Ok(worst)
}

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case {
            name: "swiglu 8192x18944",
            prepare: |gpu, _| forward(gpu, 8192, 18_944),
        },
        Case {
            name: "swiglu decode 1x18944, 20 in a graph",
            prepare: |gpu, _| in_a_graph(gpu, 20, forward(gpu, 1, 18_944)?),
        },
        Case {
            name: "swiglu decode 64x18944, 20 in a graph",
            prepare: |gpu, _| in_a_graph(gpu, 20, forward(gpu, 64, 18_944)?),
        },
        Case {
            name: "swiglu decode 256x18944, 20 in a graph",
            prepare: |gpu, _| in_a_graph(gpu, 20, forward(gpu, 256, 18_944)?),
        },
        Case {
            name: "swiglu_backward in place, output again 8192x18944",
            prepare: |gpu, _| backward(gpu, true),
        },
        Case {
            name: "swiglu_backward in place 8192x18944",
            prepare: |gpu, _| backward(gpu, false),
        },
        Case {
            name: "gelu tanh with bias 32768x4304",
            prepare: |gpu, _| gelus(gpu, Gelu::Tanh),
        },
        Case {
            name: "gelu erf with bias 32768x4304",
            prepare: |gpu, _| gelus(gpu, Gelu::Erf),
        },
        Case {
            name: "add_bias 32768x1280",
            prepare: |gpu, _| biases(gpu, 32_768, 1280),
        },
        Case {
            name: "bias_gradient 16384x4608",
            prepare: |gpu, _| bias_gradients(gpu, 16_384, 4608),
        },
    ]
}

fn forward(gpu: &Gpu, rows: usize, ff: usize) -> Result<Prepared, GpuError> {
    let (gate_up, out) = (random_bf16(gpu, rows * 2 * ff)?, random_bf16(gpu, rows * ff)?);
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || swiglu(&gpu, rows, ff, &gate_up, &out)),
        bytes: (3 * rows * ff * 2) as f64,
        operations: 0.0,
    })
}

fn backward(gpu: &Gpu, again: bool) -> Result<Prepared, GpuError> {
    let (rows, ff) = (8192, 18_944);
    let (gate_up, dout) = (random_bf16(gpu, rows * 2 * ff)?, random_bf16(gpu, rows * ff)?);
    let out = random_bf16(gpu, rows * ff)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || swiglu_backward(&gpu, rows, ff, &gate_up, &dout, &gate_up, again.then_some(&out))),
        bytes: (rows * ff * 2 * if again { 6 } else { 5 }) as f64,
        operations: 0.0,
    })
}

fn gelus(gpu: &Gpu, kind: Gelu) -> Result<Prepared, GpuError> {
    let (rows, width) = (32_768, 4304);
    let (x, out) = (random_bf16(gpu, rows * width)?, random_bf16(gpu, rows * width)?);
    let bias = random_bf16(gpu, width)?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || gelu(&gpu, kind, (rows, width), &x, Some(&bias), &out)),
        bytes: (2 * rows * width * 2) as f64,
        operations: 0.0,
    })
}

fn biases(gpu: &Gpu, rows: usize, width: usize) -> Result<Prepared, GpuError> {
    let (x, bias) = (random_bf16(gpu, rows * width)?, random_bf16(gpu, width)?);
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || add_bias(&gpu, rows, width, &bias, &x)),
        bytes: (2 * rows * width * 2) as f64,
        operations: 0.0,
    })
}

fn bias_gradients(gpu: &Gpu, rows: usize, width: usize) -> Result<Prepared, GpuError> {
    let (dy, dbias) = (random_bf16(gpu, rows * width)?, gpu.zeros::<f32>(width)?);
    let scratch = gpu.zeros::<f32>(bias_gradient_scratch(rows, width))?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || bias_gradient(&gpu, rows, width, &dy, &dbias, &scratch)),
        bytes: (rows * width * 2) as f64,
        operations: 0.0,
    })
}

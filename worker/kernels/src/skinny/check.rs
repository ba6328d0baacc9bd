use half::bf16;

use super::{Added, Epilogue, Skinny, linear, reference};
use crate::{
    Buffer, Float, Gemm, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
};

pub fn checks() -> Vec<Check> {
    macro_rules! check {
        ($name:literal, $run:expr) => {
            Check {
                name: $name,
                run: $run,
            }
        };
    }
    vec![
        check!("skinny bf16 every number of rows", |gpu, draw| rows::<bf16>(
            gpu,
            draw,
            Epilogue::Plain
        )),
        check!("skinny f32 every number of rows", |gpu, draw| rows::<f32>(
            gpu,
            draw,
            Epilogue::Plain
        )),
        check!("skinny bf16 SwiGLU, every number of rows", |gpu, draw| rows::<bf16>(
            gpu,
            draw,
            Epilogue::Swiglu
        )),
        check!("skinny f32 SwiGLU, every number of rows", |gpu, draw| rows::<f32>(
            gpu,
            draw,
            Epilogue::Swiglu
        )),
        check!("skinny bf16 qkv of 7B", |gpu, draw| compare::<bf16>(
            gpu,
            draw,
            Skinny::plain(5, 4608, 3584)
        )),
        check!("skinny bf16 many tiles of outputs", |gpu, draw| compare::<bf16>(
            gpu,
            draw,
            Skinny::plain(3, 33_333, 136)
        )),
        check!("skinny bf16 SwiGLU, many tiles of outputs", |gpu, draw| {
            compare::<bf16>(gpu, draw, Skinny::swiglu(11, 16_001, 72))
        }),
        check!("skinny bf16 many inputs", |gpu, draw| compare::<bf16>(
            gpu,
            draw,
            Skinny::plain(16, 100, 18_944)
        )),
    ]
}

/// Odd numbers of outputs, and numbers of inputs that fill no chunk.
fn rows<T: Float>(gpu: &Gpu, draw: &mut Draw, epilogue: Epilogue) -> Result<Distance, CheckError> {
    let mut worst = Distance {
        relative: 0.0,
        bound: 1.0,
    };
    for rows in 1..=super::MOST_ROWS {
        let skinny = Skinny {
            rows,
            outputs: draw.between(1, 300),
            inputs: 8 * draw.between(1, 150),
            epilogue,
        };
        worst = worst.worst(compare::<T>(gpu, draw, skinny)?);
    }
    Ok(worst)
}

fn compare<T: Float>(gpu: &Gpu, draw: &mut Draw, skinny: Skinny) -> Result<Distance, CheckError> {
    let deviation = 1.0 / (skinny.inputs as f32).sqrt();
    let x = draw.normal::<T>(skinny.rows * skinny.inputs, 1.0);
    let weight = draw.normal::<T>(skinny.weight_rows() * skinny.inputs, deviation);
    let bias = draw.normal::<T>(skinny.weight_rows(), 1.0);
    let residual = draw.normal::<T>(skinny.rows * skinny.outputs, 1.0);
    let (x_there, weight_there) = (gpu.upload(&x)?, gpu.upload(&weight)?);
    let (bias_there, residual_there) = (gpu.upload(&bias)?, gpu.upload(&residual)?);
    let (x, weight, bias, residual) = (widen(&x), widen(&weight), widen(&bias), widen(&residual));
    let mut worst = Distance {
        relative: 0.0,
        bound: 1.0,
    };
    for (biased, added) in [(false, false), (true, false), (true, true)] {
        // A sum goes into the residual itself.
        let out = if added {
            residual_there.clone()
        } else {
            gpu.poisoned(residual.len())?
        };
        let to_add = Added {
            bias: biased.then_some(&bias_there),
            residual: added.then_some(&out),
        };
        linear(gpu, skinny, &x_there, &weight_there, to_add, &out)?;
        let wanted = reference::linear(
            skinny,
            &x,
            &weight,
            biased.then_some(&bias[..]),
            added.then_some(&residual[..]),
        );
        worst = worst.worst(Distance::of(&gpu.download(&out)?, &wanted)?);
    }
    Ok(worst)
}

pub fn cases() -> Vec<Case> {
    macro_rules! cases {
        ($($name:literal, $rows:literal => $skinny:expr;)*) => {
            vec![$(
                Case {
                    name: concat!("skinny 28 x ", $name, " m ", $rows),
                    prepare: |gpu, draw| prepare(gpu, draw, $skinny($rows), false),
                },
                Case {
                    name: concat!("skinny 28 x ", $name, " m ", $rows, " by cuBLASLt"),
                    prepare: |gpu, draw| prepare(gpu, draw, $skinny($rows), true),
                },
            )*]
        };
    }
    cases! {
        "qkv 4608x3584", 1 => QKV; "qkv 4608x3584", 2 => QKV; "qkv 4608x3584", 4 => QKV;
        "qkv 4608x3584", 8 => QKV; "qkv 4608x3584", 16 => QKV;
        "out 3584x3584", 1 => OUT; "out 3584x3584", 2 => OUT; "out 3584x3584", 4 => OUT;
        "out 3584x3584", 8 => OUT; "out 3584x3584", 16 => OUT;
        "gate_up 37888x3584", 1 => GATE_UP; "gate_up 37888x3584", 2 => GATE_UP; "gate_up 37888x3584", 4 => GATE_UP;
        "gate_up 37888x3584", 8 => GATE_UP; "gate_up 37888x3584", 16 => GATE_UP;
        "down 3584x18944", 1 => DOWN; "down 3584x18944", 2 => DOWN; "down 3584x18944", 4 => DOWN;
        "down 3584x18944", 8 => DOWN; "down 3584x18944", 16 => DOWN;
        "head 152064x3584", 1 => HEAD; "head 152064x3584", 2 => HEAD; "head 152064x3584", 4 => HEAD;
        "head 152064x3584", 8 => HEAD; "head 152064x3584", 16 => HEAD;
    }
}

const QKV: fn(usize) -> Skinny = |rows| Skinny::plain(rows, 4608, 3584);
const OUT: fn(usize) -> Skinny = |rows| Skinny::plain(rows, 3584, 3584);
const GATE_UP: fn(usize) -> Skinny = |rows| Skinny::swiglu(rows, 18_944, 3584);
const DOWN: fn(usize) -> Skinny = |rows| Skinny::plain(rows, 3584, 18_944);
const HEAD: fn(usize) -> Skinny = |rows| Skinny::plain(rows, 152_064, 3584);

/// The library's product of gate and up leaves their activation to another kernel, which is not measured.
fn prepare(gpu: &Gpu, draw: &mut Draw, skinny: Skinny, by_library: bool) -> Result<Prepared, GpuError> {
    if by_library {
        return by_the_library(gpu, draw, skinny);
    }
    let product = move |gpu: &Gpu, x: &Buffer<bf16>, weight: &Buffer<bf16>, out: &Buffer<bf16>| {
        linear(gpu, skinny, x, weight, Added::NOTHING, out)
    };
    layers(gpu, draw, skinny, skinny.outputs, product)
}

/// Layers computed by cuBLASLt, without an activation.
pub(crate) fn by_the_library(gpu: &Gpu, draw: &mut Draw, skinny: Skinny) -> Result<Prepared, GpuError> {
    let gemm = Gemm::linear(skinny.rows, skinny.weight_rows(), skinny.inputs);
    let product =
        move |gpu: &Gpu, x: &Buffer<bf16>, weight: &Buffer<bf16>, out: &Buffer<bf16>| gpu.gemm(gemm, x, weight, out);
    layers(gpu, draw, skinny, skinny.weight_rows(), product)
}

/// A step's layers of one shape, whose results have so many columns; `product` has the inputs, the weight and the result.
pub(crate) fn layers(
    gpu: &Gpu,
    draw: &mut Draw,
    skinny: Skinny,
    columns: usize,
    product: impl Fn(&Gpu, &Buffer<bf16>, &Buffer<bf16>, &Buffer<bf16>) -> Result<(), GpuError> + 'static,
) -> Result<Prepared, GpuError> {
    let weights = skinny.weight_rows() * skinny.inputs;
    // Layer after layer, so that none finds its weights in the cache.
    let layers = 400_000_000usize.div_ceil(2 * weights);
    let some = gpu.upload(&draw.normal::<bf16>(1 << 20, 0.02))?;
    let layers = (0..layers)
        .map(|_| {
            let weight = gpu.alloc::<bf16>(weights)?;
            for from in (0..weights).step_by(some.len()) {
                let length = some.len().min(weights - from);
                gpu.copy(&some.slice(0..length)?, &weight.slice(from..from + length)?)?;
            }
            Ok(weight)
        })
        .collect::<Result<Vec<_>, GpuError>>()?;
    let x = gpu.upload(&draw.normal::<bf16>(skinny.rows * skinny.inputs, 1.0))?;
    let out = gpu.alloc::<bf16>(skinny.rows * columns)?;
    let numbers = weights + skinny.rows * (skinny.inputs + columns);
    let layer = |layer: usize| product(gpu, &x, &layers[layer % layers.len()], &out);
    layer(0)?;
    // As a step runs it: from a graph.
    let mut graph = gpu.record(|| (0..LAYERS).try_for_each(layer))?;
    let kept = (x, out, layers, product);
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || {
            let _ = &kept;
            gpu.replay(&mut graph)
        }),
        bytes: (LAYERS * 2 * numbers) as f64,
        operations: 0.0,
    })
}

/// Layers of a step in a benchmark: its times and bytes are those of so many.
const LAYERS: usize = 28;

use half::bf16;

use super::{MOST_PARTS, count, linear, parts, serves};
use crate::{
    Dtype, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
    skinny::{
        Epilogue, Skinny,
        check::{by_the_library, layers},
        reference,
    },
};

pub fn checks() -> Vec<Check> {
    macro_rules! checks {
        ($($name:literal => $run:expr;)*) => {
            vec![$(Check { name: concat!("streamed bf16 ", $name), run: $run },)*]
        };
    }
    checks! {
        "numbers of rows" => |gpu, draw| rows(gpu, draw, Skinny::plain);
        "SwiGLU, numbers of rows" => |gpu, draw| rows(gpu, draw, Skinny::swiglu);
        "outputs and inputs that fill no tile" => |gpu, draw| {
            let (outputs, inputs) = (8 * draw.between(1, 300), 8 * draw.between(1, 300));
            compare(gpu, draw, Skinny::plain(100, outputs, inputs))
        };
        "SwiGLU, outputs and inputs that fill no tile" => |gpu, draw| {
            let (outputs, inputs) = (8 * draw.between(1, 300), 8 * draw.between(1, 300));
            compare(gpu, draw, Skinny::swiglu(100, outputs, inputs))
        };
        "in parts, numbers of rows" => |gpu, draw| in_parts(gpu, draw);
        "outputs of 7B" => |gpu, draw| compare(gpu, draw, Skinny::plain(128, 18_944, 512));
        "SwiGLU, 7B's outputs" => |gpu, draw| compare(gpu, draw, Skinny::swiglu(19, 18_944, 512));
        "many inputs" => |gpu, draw| compare(gpu, draw, Skinny::plain(33, 512, 18_944));
        "twice the same" => |gpu, draw| twice(gpu, draw, Skinny::swiglu(128, 3584, 3584));
    }
}

fn rows(gpu: &Gpu, draw: &mut Draw, layer: fn(usize, usize, usize) -> Skinny) -> Result<Distance, CheckError> {
    let mut worst = Distance {
        relative: 0.0,
        bound: 1.0,
    };
    for rows in [17, 32, 63, 64, 65, 96, 127, 128] {
        let (outputs, inputs) = (8 * draw.between(1, 100), 8 * draw.between(1, 150));
        worst = worst.worst(compare(gpu, draw, layer(rows, outputs, inputs))?);
    }
    Ok(worst)
}

/// Inputs, and the result of the kernel; before Hopper there is none.
type Computed = Option<(Vec<bf16>, Vec<bf16>, Vec<bf16>)>;

fn compute(gpu: &Gpu, draw: &mut Draw, layer: Skinny) -> Result<Computed, CheckError> {
    if !serves(gpu, Dtype::Bf16, layer) {
        return if gpu.is_hopper() {
            Err(CheckError::Differs(format!("{layer:?} is not served")))
        } else {
            Ok(None)
        };
    }
    let x = draw.normal::<bf16>(layer.rows * layer.inputs, 1.0);
    let weight = draw.normal::<bf16>(layer.weight_rows() * layer.inputs, 1.0 / (layer.inputs as f32).sqrt());
    let (x_there, weight_there) = (gpu.upload(&x)?, gpu.upload(&weight)?);
    let out = gpu.poisoned(layer.rows * layer.outputs)?;
    linear(gpu, layer, &x_there, &weight_there, &out)?;
    Ok(Some((x, weight, gpu.download(&out)?)))
}

fn compare(gpu: &Gpu, draw: &mut Draw, layer: Skinny) -> Result<Distance, CheckError> {
    let Some((x, weight, out)) = compute(gpu, draw, layer)? else {
        return Ok(Distance::EQUAL);
    };
    Distance::of(&out, &reference::linear(layer, &widen(&x), &widen(&weight), None, None))
}

/// Sums of parts of the inputs, added up here.
fn in_parts(gpu: &Gpu, draw: &mut Draw) -> Result<Distance, CheckError> {
    let mut worst = Distance {
        relative: 0.0,
        bound: 1.0,
    };
    let odd = Skinny::plain(100, 8 * draw.between(1, 300), 8 * draw.between(64, 300));
    for layer in [17, 64, 65, 128]
        .map(|rows| Skinny::plain(rows, 3584, 3584))
        .into_iter()
        .chain([odd])
    {
        let Some(count) = count(gpu, Dtype::Bf16, layer) else {
            return if gpu.is_hopper() {
                Err(CheckError::Differs(format!("{layer:?} is not served")))
            } else {
                Ok(Distance::EQUAL)
            };
        };
        let x = draw.normal::<bf16>(layer.rows * layer.inputs, 1.0);
        let weight = draw.normal::<bf16>(layer.outputs * layer.inputs, 1.0 / (layer.inputs as f32).sqrt());
        let sums = gpu.poisoned::<f32>(count * layer.rows * layer.outputs)?;
        parts(gpu, layer, &gpu.upload(&x)?, &gpu.upload(&weight)?, &sums)?;
        let sums = gpu.download(&sums)?;
        let mut out = vec![0.0; layer.rows * layer.outputs];
        for sums in sums.chunks_exact(out.len()) {
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
        let wanted = reference::linear(layer, &widen(&x), &widen(&weight), None, None);
        worst = worst.worst(Distance::of(&out, &wanted)?);
    }
    Ok(worst)
}

/// Equal inputs give equal bits.
fn twice(gpu: &Gpu, draw: &mut Draw, layer: Skinny) -> Result<Distance, CheckError> {
    let seed = draw.below(1 << 30) as u64;
    let first = compute(gpu, &mut Draw::new(seed), layer)?;
    let second = compute(gpu, &mut Draw::new(seed), layer)?;
    match (first, second) {
        (Some((.., first)), Some((.., second))) => Distance::equal(&first, &second),
        _ => Ok(Distance::EQUAL),
    }
}

pub fn cases() -> Vec<Case> {
    macro_rules! cases {
        ($($name:literal, $rows:literal => $layer:expr;)*) => {
            vec![$(
                Case {
                    name: concat!("streamed 28 x ", $name, " m ", $rows),
                    prepare: |gpu, draw| prepare(gpu, draw, $layer($rows)),
                },
                Case {
                    name: concat!("streamed 28 x ", $name, " m ", $rows, " by cuBLASLt"),
                    prepare: |gpu, draw| by_the_library(gpu, draw, $layer($rows)),
                },
            )*]
        };
    }
    cases! {
        "qkv 4608x3584", 128 => QKV;
        "out 3584x3584", 32 => OUT; "out 3584x3584", 64 => OUT; "out 3584x3584", 128 => OUT;
        "gate_up 37888x3584", 32 => GATE_UP; "gate_up 37888x3584", 64 => GATE_UP; "gate_up 37888x3584", 128 => GATE_UP;
        "down 3584x18944", 32 => DOWN; "down 3584x18944", 64 => DOWN; "down 3584x18944", 128 => DOWN;
    }
}

/// In parts where it is a layer without an activation; adding them up is not measured.
fn prepare(gpu: &Gpu, draw: &mut Draw, layer: Skinny) -> Result<Prepared, GpuError> {
    if layer.epilogue == Epilogue::Swiglu {
        return layers(gpu, draw, layer, layer.outputs, move |gpu, x, weight, out| {
            linear(gpu, layer, x, weight, out)
        });
    }
    let sums = gpu.alloc::<f32>(MOST_PARTS * layer.rows * layer.outputs)?;
    layers(gpu, draw, layer, layer.outputs, move |gpu, x, weight, _| {
        parts(gpu, layer, x, weight, &sums)
    })
}

const QKV: fn(usize) -> Skinny = |rows| Skinny::plain(rows, 4608, 3584);
const OUT: fn(usize) -> Skinny = |rows| Skinny::plain(rows, 3584, 3584);
const GATE_UP: fn(usize) -> Skinny = |rows| Skinny::swiglu(rows, 18_944, 3584);
const DOWN: fn(usize) -> Skinny = |rows| Skinny::plain(rows, 3584, 18_944);

//! Parity of norm and update with the reference, and their speed.

use half::bf16;

use super::{
    AdamW, BLOCK, CHUNK, GradientNorm, Pace, Rounding, StateKind, States, Update, adamw, clip, partials,
    reference::{self, Moments},
    squares, sum,
};
use crate::{
    Buffer, Dtype, Float, Gpu, GpuError,
    bench::{Case, Prepared},
    check::{Check, CheckError, Distance, Draw, widen},
};

/// Lengths around every boundary: of a vector, of a block of 8-bit moments, of a thread block.
const LENGTHS: [usize; 8] = [1, 3, 255, 256, 257, 2048, 4099, 40_003];

type Outcome = Result<Distance, CheckError>;

pub(super) fn checks() -> Vec<Check> {
    macro_rules! check {
        ($name:literal, $run:expr) => {
            Check {
                name: $name,
                run: $run,
            }
        };
    }
    use {Rounding::*, StateKind::*};
    vec![
        check!("gradient_norm bf16", norm::<bf16>),
        check!("gradient_norm f32", norm::<f32>),
        check!("gradient_norm bf16 not finite", not_finite::<bf16>),
        check!("gradient_norm f32 not finite", not_finite::<f32>),
        check!("adamw f32, states f32, 1 step", |gpu, draw| steps::<f32, f32>(
            gpu, draw, F32, Nearest, 1
        )),
        check!("adamw f32, states f32, 20 steps", |gpu, draw| steps::<f32, f32>(
            gpu, draw, F32, Nearest, 20
        )),
        check!("adamw f32, states bf16, 20 steps", |gpu, draw| steps::<f32, f32>(
            gpu, draw, Bf16, Nearest, 20
        )),
        check!("adamw f32, states 8 bits, 20 steps", |gpu, draw| steps::<f32, f32>(
            gpu, draw, Bit8, Nearest, 20
        )),
        check!("adamw bf16, states f32, 1 step", |gpu, draw| steps::<bf16, bf16>(
            gpu, draw, F32, Stochastic, 1
        )),
        check!("adamw bf16, states f32, 20 steps", |gpu, draw| steps::<bf16, bf16>(
            gpu, draw, F32, Stochastic, 20
        )),
        check!("adamw bf16, states bf16, 1 step", |gpu, draw| steps::<bf16, bf16>(
            gpu, draw, Bf16, Stochastic, 1
        )),
        check!("adamw bf16, states bf16, 20 steps", |gpu, draw| steps::<bf16, bf16>(
            gpu, draw, Bf16, Stochastic, 20
        )),
        check!("adamw bf16, states 8 bits, 1 step", |gpu, draw| steps::<bf16, bf16>(
            gpu, draw, Bit8, Stochastic, 1
        )),
        check!("adamw bf16, states 8 bits, 20 steps", |gpu, draw| steps::<bf16, bf16>(
            gpu, draw, Bit8, Stochastic, 20
        )),
        check!("adamw bf16 to nearest, states bf16", |gpu, draw| steps::<bf16, bf16>(
            gpu, draw, Bf16, Nearest, 5
        )),
        check!("adamw bf16, gradients f32, states f32", |gpu, draw| steps::<bf16, f32>(
            gpu, draw, F32, Stochastic, 5
        )),
        check!(
            "adamw bf16, gradients f32, states bf16",
            |gpu, draw| steps::<bf16, f32>(gpu, draw, Bf16, Stochastic, 5)
        ),
        check!(
            "adamw bf16, gradients f32, states 8 bits",
            |gpu, draw| steps::<bf16, f32>(gpu, draw, Bit8, Stochastic, 5)
        ),
        check!("adamw bf16 skipped", skipped::<bf16>),
        check!("adamw f32 skipped", skipped::<f32>),
        check!("adamw bf16 replayed at other rates", paced::<bf16>),
        check!("adamw f32 replayed at other rates", paced::<f32>),
        check!("adamw bf16 mean of stochastic rounding", unbiased),
    ]
}

/// Against a sum in f64; the same twice; the same from the sums of two ranks.
fn norm<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Outcome {
    let lengths = [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 4321, 0, 8];
    let gradients = lengths.map(|length| draw.normal::<T>(length, 0.1));
    let mut norm = GradientNorm::new(gpu, lengths)?;
    let buffers = gradients.iter().map(|gradient| gpu.upload(gradient));
    let buffers = buffers.collect::<Result<Vec<_>, _>>()?;
    let all = || gradients.iter().flatten().map(|x| f64::from(x.to_f32()).powi(2));
    let expected = reference::clip(all().sum(), 0.25, 1.0);
    let mut found = Vec::new();
    for _ in 0..2 {
        norm.begin();
        buffers.iter().try_for_each(|gradient| norm.add(gpu, gradient))?;
        found.push(gpu.download(norm.clip(gpu, 0.25, 1.0)?)?);
    }
    Distance::equal(&found[0], &found[1])?;
    let partial = norm.added()?;
    let sums = gpu.poisoned::<f32>(2)?;
    sum(gpu, &partial.slice(0..3)?, &sums.slice(0..1)?)?;
    sum(gpu, &partial.slice(3..partial.len())?, &sums.slice(1..2)?)?;
    let of_ranks = gpu.poisoned(2)?;
    clip(gpu, &sums, 0.25, 1.0, &of_ranks)?;
    let far = Distance::within(&found[0], &expected, 2e-6)?;
    Ok(far.worst(Distance::within(&gpu.download(&of_ranks)?, &expected, 2e-6)?))
}

/// One number that is none, anywhere.
fn not_finite<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Outcome {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for length in [1, 1000, CHUNK + 77] {
            let mut gradient = draw.normal::<T>(length, 1.0);
            gradient[draw.below(length)] = T::from_f32(bad);
            let sums = gpu.poisoned(partials(length))?;
            let out = gpu.upload(&[0.5f32; 2])?;
            squares(gpu, &gpu.upload(&gradient)?, &sums)?;
            clip(gpu, &sums, 1.0, 1.0, &out)?;
            let out = gpu.download(&out)?;
            if out[0].is_finite() || out[1] != 0.0 {
                return Err(CheckError::Differs(format!("{bad} among {length}: {out:?}")));
            }
        }
    }
    Ok(Distance::EQUAL)
}

/// Gradients over six decades, blocks of zeros among them.
fn gradients<T: Float>(draw: &mut Draw, length: usize) -> Vec<T> {
    let mut gradients = draw.normal::<f32>(length, 1.0);
    for block in gradients.chunks_mut(BLOCK) {
        let dead = draw.below(8) == 0;
        for gradient in block {
            *gradient *= if dead { 0.0 } else { 10f32.powi(-(draw.below(7) as i32)) };
        }
    }
    gradients.into_iter().map(T::from_f32).collect()
}

fn optimizer(rounding: Rounding) -> AdamW {
    AdamW {
        learning_rate: f64::from(1e-3f32),
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        step: 1,
        seed: 0x1234_5678_9abc,
        rounding,
    }
}

/// Steps of kernel and reference side by side: equal bits, but for 8-bit states, of which one in ten thousand may take the code
/// beside the reference's. Each of their steps begins from what the kernel left: the largest of a block decides on the codes of
/// all 256, so one that went its own way takes its whole block along, and that is no fault.
fn steps<T: Float, G: Float>(gpu: &Gpu, draw: &mut Draw, kind: StateKind, rounding: Rounding, steps: u32) -> Outcome {
    let mut worst = Distance::EQUAL;
    for length in LENGTHS {
        let mut parameters = draw.normal::<T>(length, 0.02);
        let mut moments = Moments::zeros(kind, length);
        let on_gpu = gpu.upload(&parameters)?;
        let states = States::zeros(gpu, kind, length)?;
        let scale = 0.25 + draw.below(1000) as f32 / 1000.0;
        let clip = gpu.upload(&[1.0, scale])?;
        let tensor = draw.below(1000) as u32;
        let mut apart = Vec::new();
        for step in 1..=steps {
            let gradients = gradients::<G>(draw, length);
            let of = AdamW {
                step,
                ..optimizer(rounding)
            };
            reference::adamw(&of, &mut parameters, &widen(&gradients), &mut moments, tensor, scale);
            let buffer = gpu.upload(&gradients)?;
            let update = Update {
                parameters: &on_gpu,
                gradients: &buffer,
                states: &states,
                tensor,
                clip: Some(&clip),
                pace: None,
                zero_gradients: step % 2 == 0,
            };
            adamw(gpu, &of, &update)?;
            let left = gpu.download(&buffer)?;
            let kept = if step % 2 == 0 {
                vec![G::default(); length]
            } else {
                gradients
            };
            Distance::equal(&left, &kept)?;
            let (found, held) = (gpu.download(&on_gpu)?, downloaded(gpu, &states)?);
            if kind == StateKind::Bit8 {
                apart.extend(codes_apart(&found, &parameters, &held, &moments, step)?);
                (parameters, moments) = (found, held);
            } else {
                Distance::equal(&found, &parameters)?;
                moments_equal(&held, &moments)?;
            }
        }
        let share = Distance {
            relative: apart.len() as f64 / (length * steps as usize).max(100_000) as f64,
            bound: 1e-4,
        };
        if !share.holds() {
            let some = apart[..apart.len().min(3)].join("; ");
            let many = apart.len();
            return Err(CheckError::Differs(format!(
                "{many} of {length} in {steps} steps: {some}"
            )));
        }
        worst = worst.worst(share);
    }
    Ok(worst)
}

fn downloaded(gpu: &Gpu, states: &States) -> Result<Moments, GpuError> {
    Ok(match states {
        States::F32 { m, v } => Moments::F32 {
            m: gpu.download(m)?,
            v: gpu.download(v)?,
        },
        States::Bf16 { m, v } => Moments::Bf16 {
            m: gpu.download(m)?,
            v: gpu.download(v)?,
        },
        States::Bit8 { m, v, units } => Moments::Bit8 {
            m: gpu.download(m)?,
            v: gpu.download(v)?,
            units: gpu.download(units)?,
        },
    })
}

fn moments_equal(found: &Moments, wanted: &Moments) -> Outcome {
    match (found, wanted) {
        (Moments::F32 { m, v }, Moments::F32 { m: m2, v: v2 }) => {
            Distance::equal(m, m2)?;
            Distance::equal(v, v2)
        }
        (Moments::Bf16 { m, v }, Moments::Bf16 { m: m2, v: v2 }) => {
            Distance::equal(m, m2)?;
            Distance::equal(v, v2)
        }
        (found, wanted) if found == wanted => Ok(Distance::EQUAL),
        _ => Err(CheckError::Differs("moments".to_owned())),
    }
}

/// The numbers that one step left elsewhere than the reference, in words. Roots and quotients are approximate to the last bits
/// here: where a moment is within a millionth of what decides between two codes, it may take the other one.
fn codes_apart<T: Float>(
    found: &[T],
    wanted: &[T],
    held: &Moments,
    moments: &Moments,
    step: u32,
) -> Result<Vec<String>, CheckError> {
    let (
        Moments::Bit8 { m, v, units },
        Moments::Bit8 {
            m: m2,
            v: v2,
            units: units2,
        },
    ) = (held, moments)
    else {
        return Err(CheckError::Differs("kinds of moments".to_owned()));
    };
    for (at, (unit, wanted)) in units.iter().zip(units2).enumerate() {
        let near = (unit - wanted).abs() <= 1e-6 * wanted;
        if !near {
            return Err(CheckError::Differs(format!(
                "step {step}, unit {at}: {unit:e}, {wanted:e} expected"
            )));
        }
    }
    let mut apart = Vec::new();
    for at in 0..wanted.len() {
        let (p, p2) = (found[at].to_f32(), wanted[at].to_f32());
        if (p - p2).abs() <= 3e-6 * p2.abs() + 3e-8 && (m[at], v[at]) == (m2[at], v2[at]) {
            continue;
        }
        apart.push(format!(
            "step {step} at {at}: {p:e} {} {}, {p2:e} {} {} expected",
            m[at], v[at], m2[at], v2[at]
        ));
    }
    Ok(apart)
}

/// A scale of 0 leaves everything but the gradients as it was.
fn skipped<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Outcome {
    let length = 4099;
    for kind in [StateKind::F32, StateKind::Bf16, StateKind::Bit8] {
        let parameters = draw.normal::<T>(length, 0.02);
        let on_gpu = gpu.upload(&parameters)?;
        let states = States::zeros(gpu, kind, length)?;
        let mut gradients = draw.normal::<T>(length, 1.0);
        gradients[4098] = T::from_f32(f32::NAN);
        let buffer = gpu.upload(&gradients)?;
        let mut norm = GradientNorm::new(gpu, [length])?;
        norm.add(gpu, &buffer)?;
        let update = Update {
            parameters: &on_gpu,
            gradients: &buffer,
            states: &states,
            tensor: 0,
            clip: Some(norm.clip(gpu, 1.0, 1.0)?),
            pace: None,
            zero_gradients: true,
        };
        adamw(gpu, &optimizer(Rounding::Stochastic), &update)?;
        Distance::equal(&gpu.download(&on_gpu)?, &parameters)?;
        Distance::equal(&gpu.download(&buffer)?, &vec![T::default(); length])?;
        moments_equal(&downloaded(gpu, &states)?, &Moments::zeros(kind, length))?;
    }
    Ok(Distance::EQUAL)
}

/// A whole step in a graph, replayed with other gradients and rates: as the same steps called by the host. One of them is
/// skipped, and not counted.
fn paced<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Outcome {
    let length = 5000;
    let parameters = draw.normal::<T>(length, 0.02);
    let (by_graph, by_host) = (gpu.upload(&parameters)?, gpu.upload(&parameters)?);
    let kind = StateKind::Bf16;
    let (graph_states, host_states) = (States::zeros(gpu, kind, length)?, States::zeros(gpu, kind, length)?);
    let buffer = gpu.upload(&draw.normal::<T>(length, 1.0))?;
    let mut norm = GradientNorm::new(gpu, [length])?;
    let pace = Pace::new(gpu, 0)?;
    let base = optimizer(Rounding::Stochastic);
    let step = |norm: &mut GradientNorm| -> Result<(), GpuError> {
        norm.begin();
        norm.add(gpu, &buffer)?;
        let clip = norm.clip(gpu, 1.0, 1.0)?;
        pace.advance(gpu, &base, clip)?;
        let update = Update {
            parameters: &by_graph,
            gradients: &buffer,
            states: &graph_states,
            tensor: 3,
            clip: Some(clip),
            pace: Some(&pace),
            zero_gradients: false,
        };
        adamw(gpu, &base, &update)
    };
    // Compiles; the gradient is no number, so that nothing is changed or counted.
    gpu.write(&buffer, &[T::from_f32(f32::NAN)])?;
    step(&mut norm)?;
    let mut graph = gpu.record(|| step(&mut norm))?;
    let mut applied = 0;
    for round in 0..6 {
        let rate = 1e-3f32 * (1 + round) as f32;
        let mut gradients = draw.normal::<T>(length, 1.0);
        if round == 2 {
            gradients[77] = T::from_f32(f32::INFINITY);
        }
        gpu.write(&buffer, &gradients)?;
        pace.set_learning_rate(gpu, rate)?;
        gpu.replay(&mut graph)?;
        let clip = norm.clip(gpu, 1.0, 1.0)?;
        applied += u32::from(round != 2);
        let of = AdamW {
            learning_rate: f64::from(rate),
            step: applied,
            ..base
        };
        let update = Update {
            parameters: &by_host,
            gradients: &buffer,
            states: &host_states,
            tensor: 3,
            clip: Some(clip),
            pace: None,
            zero_gradients: false,
        };
        adamw(gpu, &of, &update)?;
    }
    Distance::equal(&[pace.updates(gpu)?], &[applied])?;
    moments_equal(&downloaded(gpu, &graph_states)?, &downloaded(gpu, &host_states)?)?;
    Distance::equal(&gpu.download(&by_graph)?, &gpu.download(&by_host)?)
}

/// Equal parameters and gradients, rounded a million times by different numbers: how far the mean is from what was rounded, in
/// distances between neighbours; five standard deviations are allowed.
fn unbiased(gpu: &Gpu, draw: &mut Draw) -> Outcome {
    let (length, tensors) = (131_072, 8);
    let value = bf16::from_f32(1.0 + draw.below(64) as f32 / 128.0);
    let of = AdamW {
        learning_rate: 1e-4 * (1 + draw.below(30)) as f64,
        weight_decay: 0.0,
        seed: draw.below(1 << 40) as u64,
        ..optimizer(Rounding::Stochastic)
    };
    let gradients = gpu.upload(&vec![bf16::ONE; length])?;
    let mut total = 0f64;
    for tensor in 0..tensors {
        let parameters = gpu.upload(&vec![value; length])?;
        let update = Update {
            parameters: &parameters,
            gradients: &gradients,
            states: &States::zeros(gpu, StateKind::F32, length)?,
            tensor,
            clip: None,
            pace: None,
            zero_gradients: false,
        };
        adamw(gpu, &of, &update)?;
        total += gpu
            .download(&parameters)?
            .iter()
            .map(|p| f64::from(p.to_f32()))
            .sum::<f64>();
    }
    let count = length as f64 * f64::from(tensors);
    let mut exact = [value.to_f32()];
    let mut moments = Moments::zeros(StateKind::F32, 1);
    reference::adamw(&of, &mut exact, &[1.0], &mut moments, 0, 1.0);
    // Neighbours between 1 and 2 are 2⁻⁷ apart, below 1 they are half as far.
    Ok(Distance {
        relative: (total / count - f64::from(exact[0])).abs() * 128.0,
        bound: 5.0 * 0.5 / count.sqrt(),
    })
}

pub(super) fn cases() -> Vec<Case> {
    macro_rules! case {
        ($name:literal, $prepare:expr) => {
            Case {
                name: $name,
                prepare: $prepare,
            }
        };
    }
    use StateKind::*;
    vec![
        case!("gradient_norm 500M bf16", norm_speed::<bf16>),
        case!("gradient_norm 500M f32", norm_speed::<f32>),
        case!("adamw 500M bf16, states f32", |gpu, draw| speed::<bf16, bf16>(
            gpu, draw, F32, false
        )),
        case!("adamw 500M bf16, states bf16", |gpu, draw| speed::<bf16, bf16>(
            gpu, draw, Bf16, false
        )),
        case!("adamw 500M bf16, states 8 bits", |gpu, draw| speed::<bf16, bf16>(
            gpu, draw, Bit8, false
        )),
        case!(
            "adamw 500M bf16, states 8 bits, zeroed",
            |gpu, draw| speed::<bf16, bf16>(gpu, draw, Bit8, true)
        ),
        case!("adamw 500M bf16, gradients f32, states f32", |gpu, draw| speed::<
            bf16,
            f32,
        >(
            gpu, draw, F32, false
        )),
        case!("adamw 500M f32, states f32", |gpu, draw| speed::<f32, f32>(
            gpu, draw, F32, false
        )),
    ]
}

const MANY: usize = 500_000_000;

/// Many numbers, a million of them different.
fn tiled<T: Float>(gpu: &Gpu, draw: &mut Draw, deviation: f32) -> Result<Buffer<T>, GpuError> {
    let tile = gpu.upload(&draw.normal::<T>(1 << 20, deviation))?;
    let all = gpu.alloc::<T>(MANY)?;
    for begin in (0..MANY).step_by(tile.len()) {
        let end = MANY.min(begin + tile.len());
        gpu.copy(&tile.slice(0..end - begin)?, &all.slice(begin..end)?)?;
    }
    Ok(all)
}

fn norm_speed<T: Float>(gpu: &Gpu, draw: &mut Draw) -> Result<Prepared, GpuError> {
    let gradient = tiled::<T>(gpu, draw, 1.0)?;
    let mut norm = GradientNorm::new(gpu, [MANY])?;
    let gpu = gpu.clone();
    Ok(Prepared {
        run: Box::new(move || {
            norm.begin();
            norm.add(&gpu, &gradient)?;
            norm.clip(&gpu, 1.0, 1.0).map(drop)
        }),
        bytes: (MANY * T::DTYPE.bytes()) as f64,
        operations: 0.0,
    })
}

fn speed<T: Float, G: Float>(
    gpu: &Gpu,
    draw: &mut Draw,
    kind: StateKind,
    zero_gradients: bool,
) -> Result<Prepared, GpuError> {
    let (parameters, gradients) = (tiled::<T>(gpu, draw, 0.02)?, tiled::<G>(gpu, draw, 1e-3)?);
    let states = States::zeros(gpu, kind, MANY)?;
    let clip = gpu.upload(&[1f32, 1.0])?;
    let rounding = match T::DTYPE {
        Dtype::Bf16 => Rounding::Stochastic,
        Dtype::F32 => Rounding::Nearest,
    };
    let mut of = AdamW {
        learning_rate: 1e-6,
        ..optimizer(rounding)
    };
    let gpu = gpu.clone();
    let gradient_passes = if zero_gradients { 2 } else { 1 };
    Ok(Prepared {
        run: Box::new(move || {
            let update = Update {
                parameters: &parameters,
                gradients: &gradients,
                states: &states,
                tensor: 0,
                clip: Some(&clip),
                pace: None,
                zero_gradients,
            };
            adamw(&gpu, &of, &update)?;
            of.step += 1;
            Ok(())
        }),
        bytes: (MANY * (2 * T::DTYPE.bytes() + gradient_passes * G::DTYPE.bytes()) + 2 * kind.bytes(MANY)) as f64,
        operations: 0.0,
    })
}

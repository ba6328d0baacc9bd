//! The update in plain Rust, with the same operations in the same order as the kernel, and the same random bits.

use half::bf16;

use super::{AdamW, BLOCK, Rounding, StateKind};
use crate::{Dtype, Float};

const M_STEPS: f32 = 127.0 * 127.0;
const V_STEPS: f32 = 255.0 * 255.0;
const LEAST_UNIT: f32 = 1e-30;
/// Roots of less are roots of this, 2⁻¹⁰⁰; not with moments of 8 bits.
const LEAST_V: f32 = 7.888_609e-31;
/// Keeps the largest of a block just below its code.
const BELOW_ONE: f32 = 1.0 - 1.0 / 1_048_576.0;

/// The moments of one parameter, as the GPU holds them.
#[derive(Clone, Debug, PartialEq)]
pub enum Moments {
    /// 8 bytes a parameter.
    F32 {
        /// First moments.
        m: Vec<f32>,
        /// Second moments.
        v: Vec<f32>,
    },
    /// 4 bytes a parameter.
    Bf16 {
        /// First moments.
        m: Vec<bf16>,
        /// Second moments.
        v: Vec<bf16>,
    },
    /// 2 bytes a parameter, and 8 for each block.
    Bit8 {
        /// Codes of first moments.
        m: Vec<i8>,
        /// Codes of second moments.
        v: Vec<u8>,
        /// `[blocks, 2]`: units of `m` and of the root of `v`.
        units: Vec<f32>,
    },
}

impl Moments {
    /// Zero moments of `length` parameters.
    pub fn zeros(kind: StateKind, length: usize) -> Self {
        match kind {
            StateKind::F32 => Self::F32 {
                m: vec![0.0; length],
                v: vec![0.0; length],
            },
            StateKind::Bf16 => Self::Bf16 {
                m: vec![bf16::ZERO; length],
                v: vec![bf16::ZERO; length],
            },
            StateKind::Bit8 => Self::Bit8 {
                m: vec![0; length],
                v: vec![0; length],
                units: vec![0.0; 2 * length.div_ceil(BLOCK)],
            },
        }
    }

    /// `(m, v)` of one parameter.
    pub fn of(&self, at: usize) -> (f32, f32) {
        match self {
            Self::F32 { m, v } => (m[at], v[at]),
            Self::Bf16 { m, v } => (m[at].to_f32(), v[at].to_f32()),
            Self::Bit8 { m, v, units } => {
                let block = at / BLOCK;
                (decode_m(m[at], units[2 * block]), decode_v(v[at], units[2 * block + 1]))
            }
        }
    }
}

/// One update of one parameter; gradients are multiplied by `scale`, and a scale of 0 changes nothing.
pub fn adamw<T: Float>(
    optimizer: &AdamW,
    parameters: &mut [T],
    gradients: &[f32],
    moments: &mut Moments,
    tensor: u32,
    scale: f32,
) {
    if scale == 0.0 {
        return;
    }
    let factors = optimizer.factors();
    let least = if matches!(moments, Moments::Bit8 { .. }) {
        0.0
    } else {
        LEAST_V
    };
    for (block, (parameters, gradients)) in parameters.chunks_mut(BLOCK).zip(gradients.chunks(BLOCK)).enumerate() {
        let first = block * BLOCK;
        let mut updated = [(0f32, 0f32, 0f32); BLOCK];
        for (i, (parameter, gradient)) in parameters.iter_mut().zip(gradients).enumerate() {
            let g = gradient * scale;
            let (m, v) = moments.of(first + i);
            let m = factors.rest1.mul_add(g - m, m);
            let v = (factors.rest2 * g).mul_add(g, factors.beta2 * v);
            let root = v.max(least).sqrt();
            let change = m / root.mul_add(factors.correction, factors.epsilon);
            let p = (-factors.step_size).mul_add(change, parameter.to_f32() * factors.decay);
            *parameter = match (T::DTYPE, optimizer.rounding) {
                (Dtype::Bf16, Rounding::Stochastic) => {
                    T::from_f32(round(p, draw(optimizer, tensor, first + i, OF_P)).to_f32())
                }
                _ => T::from_f32(p),
            };
            updated[i] = (m, v, root);
        }
        store(moments, first, &updated[..parameters.len()], |at, factor| {
            draw(optimizer, tensor, at, factor)
        });
    }
}

/// Stores `(m, v, root of v)` of a block that begins at `first`.
fn store(moments: &mut Moments, first: usize, updated: &[(f32, f32, f32)], chance: impl Fn(usize, u32) -> u32) {
    match moments {
        Moments::F32 { m, v } => {
            for (i, of) in updated.iter().enumerate() {
                (m[first + i], v[first + i]) = (of.0, of.1);
            }
        }
        Moments::Bf16 { m, v } => {
            for (i, of) in updated.iter().enumerate() {
                let at = first + i;
                m[at] = round(of.0, chance(at, OF_M));
                v[at] = round(of.1, chance(at, OF_V));
            }
        }
        Moments::Bit8 { m, v, units } => {
            let largest = |of: fn(&(f32, f32, f32)) -> f32| updated.iter().map(of).fold(0.0, f32::max);
            let m_unit = match largest(|of| of.0.abs()) * (1.0 / M_STEPS) {
                unit if unit < LEAST_UNIT => 0.0,
                unit => unit,
            };
            let v_unit = largest(|of| of.2) * (1.0 / V_STEPS);
            units[first / BLOCK * 2] = m_unit;
            units[first / BLOCK * 2 + 1] = v_unit;
            for (i, of) in updated.iter().enumerate() {
                let at = first + i;
                m[at] = encode_m(of.0, inverse(m_unit), chance(at, OF_M));
                v[at] = encode_v(of.2, inverse(v_unit), chance(at, OF_V));
            }
        }
    }
}

fn inverse(unit: f32) -> f32 {
    if unit > 0.0 { 1.0 / unit * BELOW_ONE } else { 0.0 }
}

fn decode_m(code: i8, unit: f32) -> f32 {
    let code = f32::from(code);
    unit * (code * code.abs())
}

fn decode_v(code: u8, unit: f32) -> f32 {
    let root = unit * (f32::from(code) * f32::from(code));
    root * root
}

/// The code below `x`, which is in squares of codes, the square of that code, and the distance to the next square.
fn code_below(x: f32) -> (f32, f32, f32) {
    let code = (x.sqrt() - 0.5).round_ties_even();
    (code, code * code, 2.0f32.mul_add(code, 1.0))
}

/// Whether `chance / 2³²` of `step` is less than `above`.
fn goes_up(above: f32, step: f32, chance: u32) -> bool {
    f32::from_bits(0x3f80_0000 | chance >> 9).mul_add(step, -step) < above
}

#[allow(clippy::cast_possible_truncation, reason = "codes are at most 127")]
fn encode_m(m: f32, per_unit: f32, chance: u32) -> i8 {
    let x = m.abs() * per_unit;
    let (mut code, low, step) = code_below(x);
    if goes_up(x - low, step, chance) {
        code += 1.0;
    }
    code.copysign(m) as i8
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "codes are between 1 and 255"
)]
fn encode_v(root: f32, per_unit: f32, chance: u32) -> u8 {
    let x = root * per_unit;
    let (mut code, low, step) = code_below(x);
    if goes_up((x - low) * (x + low), step * 2.0f32.mul_add(low, step), chance) {
        code += 1.0;
    }
    code.max(1.0) as u8
}

/// Rounded to bf16 up or down: up with the probability of the part cut off, where `chance` is one of 2³² equally likely numbers.
#[allow(clippy::cast_possible_truncation, reason = "the upper half of 32 bits")]
pub fn round(x: f32, chance: u32) -> bf16 {
    if x.is_nan() {
        return bf16::from_bits(0x7fff);
    }
    bf16::from_bits(((x.to_bits() + (chance >> 16)) >> 16) as u16)
}

/// For the parameter itself.
const OF_P: u32 = 1;
/// For `m`.
const OF_M: u32 = 0x870b;
/// For `v`.
const OF_V: u32 = 0x40c9;

/// Random bits for the parameter at `at` or a moment of it. A lane of the kernel holds four neighbours and the four 128 further,
/// and takes eight times 16 bits from one call of the generator; odd factors make three numbers of each.
fn draw(optimizer: &AdamW, tensor: u32, at: usize, factor: u32) -> u32 {
    let (block, within) = (at / BLOCK, at % BLOCK);
    let (quad, lane, of_four) = (within / 128, within % 128 / 4, within % 4);
    let lanes = (block * BLOCK / 8 + lane) as u64;
    let stream = u64::from(tensor) << 32 | u64::from(optimizer.step);
    let of_eight = quad * 4 + of_four;
    let word = philox(lanes, stream, optimizer.seed)[of_eight / 2];
    word.wrapping_mul(if of_eight % 2 == 0 { factor << 16 } else { factor })
}

/// Philox 4x32-10 (Salmon et al. 2011), as `prelude.cu` has it.
fn philox(counter: u64, stream: u64, seed: u64) -> [u32; 4] {
    let halves = |x: u64| ((x & 0xffff_ffff) as u32, (x >> 32) as u32);
    let ((mut c0, mut c1), (mut c2, mut c3)) = (halves(counter), halves(stream));
    let (mut k0, mut k1) = halves(seed);
    for _ in 0..10 {
        let (low0, high0) = halves(0xD251_1F53 * u64::from(c0));
        let (low1, high1) = halves(0xCD9E_8D57 * u64::from(c2));
        (c0, c1, c2, c3) = (high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// `[norm, scale]` of gradients whose squares sum to `squares`.
#[allow(clippy::cast_possible_truncation, reason = "results are f32")]
pub fn clip(squares: f64, factor: f32, max_norm: f32) -> [f32; 2] {
    let norm = (f64::from(factor) * squares.sqrt()) as f32;
    if !norm.is_finite() {
        return [norm, 0.0];
    }
    let scale = (f64::from(max_norm) / (f64::from(norm) + 1e-6)).min(1.0);
    [norm, (f64::from(factor) * scale) as f32]
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn optimizer(learning_rate: f64) -> AdamW {
        AdamW {
            learning_rate,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            step: 1,
            seed: 1,
            rounding: Rounding::Stochastic,
        }
    }

    fn normal(random: &mut ChaCha8Rng) -> f32 {
        (-2.0 * (1.0 - random.random::<f32>()).ln()).sqrt() * (std::f32::consts::TAU * random.random::<f32>()).cos()
    }

    /// The generator's published answer for counter and key of zeros.
    #[test]
    fn philox_is_philox() {
        assert_eq!(philox(0, 0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    }

    /// Against `torch.optim.AdamW`'s formula, written in f64.
    #[test]
    fn many_steps_are_those_of_the_formula_in_f64() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let length = 300;
        let mut parameters = (0..length).map(|_| normal(&mut random)).collect::<Vec<_>>();
        let mut naive = parameters
            .iter()
            .map(|p| (f64::from(*p), 0f64, 0f64))
            .collect::<Vec<_>>();
        let mut moments = Moments::zeros(StateKind::F32, length);
        for step in 1..=50 {
            let gradients = (0..length).map(|_| normal(&mut random)).collect::<Vec<_>>();
            let of = AdamW {
                step,
                weight_decay: 0.1,
                ..optimizer(1e-2)
            };
            adamw(&of, &mut parameters, &gradients, &mut moments, 0, 0.5);
            for ((p, m, v), g) in naive.iter_mut().zip(&gradients) {
                let g = f64::from(*g) * 0.5;
                *p *= 1.0 - of.learning_rate * of.weight_decay;
                *m = of.beta1 * *m + (1.0 - of.beta1) * g;
                *v = of.beta2 * *v + (1.0 - of.beta2) * g * g;
                let corrected = *m / (1.0 - of.beta1.powi(step as i32));
                let root = (*v / (1.0 - of.beta2.powi(step as i32))).sqrt();
                *p -= of.learning_rate * corrected / (root + of.epsilon);
            }
        }
        for (p, (naive, ..)) in parameters.iter().zip(&naive) {
            assert!(
                (f64::from(*p) - naive).abs() < 1e-5 * (1.0 + naive.abs()),
                "{p} {naive}"
            );
        }
    }

    #[test]
    fn rounding_keeps_the_mean_and_what_needs_none() {
        for x in [1.003f32, -0.1234, 3.1e-3, 7.77e20] {
            let mean = (0..65536)
                .map(|chance| f64::from(round(x, chance << 16).to_f32()))
                .sum::<f64>()
                / 65536.0;
            assert!((mean / f64::from(x) - 1.0).abs() < 1e-7, "{x}: {mean}");
        }
        for x in [0.0f32, 1.0, -2.5, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(round(x, u32::MAX).to_f32(), x);
        }
        assert!(round(f32::from_bits(0x7fff_ffff), u32::MAX).is_nan());
        assert!(round(f32::from_bits(0x7f80_0001), 0).is_nan());
    }

    #[test]
    fn codes_keep_the_mean_and_what_is_a_code() {
        for code in -127..=127i8 {
            let unit = 3.7e-5;
            for chance in [0, 1 << 31, u32::MAX] {
                let again = encode_m(decode_m(code, unit), inverse(unit), chance);
                let close = (i32::from(again) - i32::from(code)).abs();
                assert!(
                    close == 0 || close == 1 && chance != 1 << 31,
                    "{code} {again} by {chance}"
                );
            }
        }
        let mut random = ChaCha8Rng::seed_from_u64(5);
        for _ in 0..50 {
            let x = random.random::<f32>();
            let (m_unit, v_unit) = (1.0 / M_STEPS, 1.0 / V_STEPS);
            let (mut m, mut v) = (0f64, 0f64);
            for chance in 0..65536 {
                m += f64::from(decode_m(encode_m(-x, inverse(m_unit), chance << 16), m_unit));
                v += f64::from(decode_v(encode_v(x.sqrt(), inverse(v_unit), chance << 16), v_unit));
            }
            assert!((m / 65536.0 + f64::from(x)).abs() < 3e-6, "{m} {x}");
            assert!((v / 65536.0 - f64::from(x)).abs() < 3e-6, "{v} {x}");
        }
        // The largest of a block is a code whatever the rounding of its unit.
        for _ in 0..1000 {
            let (m, root) = (normal(&mut random).abs(), normal(&mut random).abs());
            for chance in [0, 1 << 31, u32::MAX] {
                let code = encode_m(m, inverse(m * (1.0 / M_STEPS)), chance);
                assert!(code == 127 || code == 126 && chance == u32::MAX, "{code}");
                assert!(encode_v(root, inverse(root * (1.0 / V_STEPS)), chance) >= 254);
            }
        }
        assert_eq!(encode_v(0.0, 1.0, 0), 1);
    }

    /// A parameter far above what an update moves: 1 + 0.02 is a hundred updates of 2e-4 away, and half an ulp of bf16 is 2e-3.
    #[test]
    fn small_updates_are_lost_to_the_nearest_and_kept_at_random() {
        let walk = |rounding| {
            let mut parameters = vec![bf16::ONE; 1000];
            let mut moments = Moments::zeros(StateKind::F32, 1000);
            for step in 1..=400 {
                let gradients = parameters.iter().map(|p| p.to_f32() - 1.02).collect::<Vec<_>>();
                let of = AdamW {
                    step,
                    rounding,
                    ..optimizer(2e-4)
                };
                adamw(&of, &mut parameters, &gradients, &mut moments, 0, 1.0);
            }
            parameters.iter().map(|p| f64::from(p.to_f32())).sum::<f64>() / 1000.0
        };
        assert_eq!(walk(Rounding::Nearest), 1.0);
        let found = walk(Rounding::Stochastic);
        assert!((found - 1.02).abs() < 2e-3, "{found}");
    }

    /// Half of a block goes on with gradients of 1, the other half falls to 0.1: its second moments sink by a thousandth a step.
    #[test]
    fn second_moments_follow_where_rounding_to_the_nearest_stands_still() {
        let (length, before, after) = (BLOCK, 200, 4000);
        let gradient = |step, at| if step > before && at % 2 == 0 { 0.1f32 } else { 1.0 };
        let mean = |kind| {
            let mut moments = Moments::zeros(kind, length);
            for step in 1..=before + after {
                let gradients = (0..length).map(|at| gradient(step, at)).collect::<Vec<_>>();
                let of = AdamW {
                    step,
                    ..optimizer(1e-3)
                };
                adamw(&of, &mut vec![0f32; length], &gradients, &mut moments, 0, 1.0);
            }
            let fallen = (0..length).step_by(2).map(|at| f64::from(moments.of(at).1));
            fallen.sum::<f64>() / (length / 2) as f64
        };
        let exact = mean(StateKind::F32);
        for kind in [StateKind::Bf16, StateKind::Bit8] {
            let found = mean(kind);
            assert!((found / exact - 1.0).abs() < 0.1, "{kind:?}: {found} of {exact}");
        }
        let mut nearest = bf16::ZERO;
        for step in 1..=before + after {
            let g = gradient(step, 0);
            nearest = bf16::from_f32(0.999f32.mul_add(nearest.to_f32(), 0.001 * g * g));
        }
        assert!(nearest.to_f64() > 5.0 * exact, "{nearest} of {exact}");
    }

    /// Noisy quadratics whose curvatures span four decades inside every block: the loss that is left, beside that of f32.
    fn loss_left(kind: StateKind) -> f64 {
        let length = 1024;
        let mut random = ChaCha8Rng::seed_from_u64(11);
        let curvatures = (0..length)
            .map(|_| 10f32.powf(-4.0 * random.random::<f32>()))
            .collect::<Vec<_>>();
        let mut parameters = (0..length).map(|_| normal(&mut random)).collect::<Vec<f32>>();
        let mut moments = Moments::zeros(kind, length);
        let loss = |parameters: &[f32]| {
            let each = parameters.iter().zip(&curvatures).map(|(p, c)| f64::from(c * p * p));
            each.sum::<f64>() / length as f64
        };
        let steps = 1500;
        for step in 1..=steps {
            let gradients = parameters.iter().zip(&curvatures);
            let gradients = gradients
                .map(|(p, c)| c * (p + 0.5 * normal(&mut random)))
                .collect::<Vec<_>>();
            let of = AdamW {
                step,
                beta2: 0.99,
                ..optimizer(1e-2 * (1.0 - f64::from(step - 1) / f64::from(steps)))
            };
            adamw(&of, &mut parameters, &gradients, &mut moments, 0, 1.0);
        }
        loss(&parameters)
    }

    #[test]
    fn small_states_descend_as_f32_states_do() {
        let full = loss_left(StateKind::F32);
        for (kind, most) in [(StateKind::Bf16, 1.03), (StateKind::Bit8, 1.1)] {
            let left = loss_left(kind);
            println!("{kind:?}: {left:.3e} of {full:.3e}");
            assert!(left < full * most, "{kind:?}: {left} of {full}");
        }
    }

    #[test]
    fn a_norm_that_is_no_number_scales_by_zero() {
        assert_eq!(clip(25.0, 1.0, 1.0), [5.0, (1.0 / (5.0 + 1e-6)) as f32]);
        assert_eq!(clip(25.0, 0.1, 1.0), [0.5, 0.1]);
        assert_eq!(clip(25.0, 1.0, f32::INFINITY), [5.0, 1.0]);
        assert_eq!(clip(f64::INFINITY, 1.0, 1.0)[1], 0.0);
        assert_eq!(clip(f64::NAN, 1.0, 1.0)[1], 0.0);
    }
}

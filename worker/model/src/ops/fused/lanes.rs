//! Sums and the exponential, written so that compilers turn them into vector instructions.
//!
//! Products are added with one rounding (`mul_add`): an instruction of its own in the callers that [`super::vectorize`]
//! compiles, and on aarch64.

/// Values that are worked on together: two 256-bit registers.
pub const LANES: usize = 16;

/// Sum of products.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail = a_chunks
        .remainder()
        .iter()
        .zip(b_chunks.remainder())
        .map(|(x, y)| x * y)
        .sum::<f32>();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] = x[lane].mul_add(y[lane], sums[lane]);
        }
    }
    reduce(sums) + tail
}

/// Sum of the lanes, in a fixed tree.
#[inline(always)]
fn reduce(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// `target += factor * source`.
#[inline(always)]
pub fn add_scaled(target: &mut [f32], factor: f32, source: &[f32]) {
    for (t, s) in target.iter_mut().zip(source) {
        *t = factor.mul_add(*s, *t);
    }
}

/// Sum of values.
#[inline(always)]
pub fn sum(values: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder().iter().sum::<f32>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] += chunk[lane];
        }
    }
    reduce(sums) + tail
}

/// Largest value.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    values
        .iter()
        .fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

/// `e^x` to about two units in the last place; 0 below -87.3, finite above 88.
///
/// Range reduction by `ln 2` in two parts and a polynomial of degree 6 on the rest (the coefficients of Cephes `expf`).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer that stands in the low bits
    const LOW: f32 = -87.3;
    let clamped = if x < LOW { LOW } else { x };
    let clamped = if clamped > 88.0 { 88.0 } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p: f32 = 1.987_569_1e-4;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = (p * r).mul_add(r, r + 1.0);
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let y = y * power;
    if x < LOW { 0.0 } else { y }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_accurate_to_float_precision() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}): relative error {error}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::INFINITY).is_finite());
    }

    #[test]
    fn sums_take_the_tail_along() {
        let values = (0..37).map(|i| i as f32).collect::<Vec<_>>();
        assert_eq!(sum(&values), 666.0);
        assert_eq!(dot(&values, &values), values.iter().map(|v| v * v).sum::<f32>());
        assert_eq!(max(&values), 36.0);
    }
}

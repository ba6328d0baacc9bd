//! Norms in plain Rust, in f32 with statistics in f64.

use crate::Float;

fn rounded<T: Float>(x: f32) -> f32 {
    T::from_f32(x).to_f32()
}

/// `residual <- T(residual + x)`: what is normed.
pub fn add_residual<T: Float>(residual: &mut [f32], x: &[f32]) {
    for (residual, x) in residual.iter_mut().zip(x) {
        *residual = rounded::<T>(*residual + x);
    }
}

/// `weight * T(x / rms)` of each row, and `1 / rms` of each.
pub fn rms_norm<T: Float>(x: &[f32], weight: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let (mut out, mut inverse) = (Vec::with_capacity(x.len()), Vec::new());
    for row in x.chunks_exact(weight.len()) {
        let squares = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let of_row = (squares / weight.len() as f64 + f64::from(eps)).sqrt().recip() as f32;
        out.extend(
            row.iter()
                .zip(weight)
                .map(|(x, weight)| rounded::<T>(x * of_row) * weight),
        );
        inverse.push(of_row);
    }
    (out, inverse)
}

/// Gradients of `x` and of the weight.
pub fn rms_norm_backward<T: Float>(dy: &[f32], x: &[f32], weight: &[f32], inverse: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let (mut dx, mut dweight) = (Vec::with_capacity(x.len()), vec![0f64; width]);
    for ((dy, x), inverse) in dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(inverse) {
        let normed = |i: usize| f64::from(x[i]) * f64::from(*inverse);
        let gradient = |i: usize| f64::from(dy[i]) * f64::from(weight[i]);
        let along = (0..width).map(|i| gradient(i) * normed(i)).sum::<f64>() / width as f64;
        dx.extend((0..width).map(|i| ((gradient(i) - normed(i) * along) * f64::from(*inverse)) as f32));
        for (i, sum) in dweight.iter_mut().enumerate() {
            *sum += f64::from(dy[i]) * f64::from(rounded::<T>(x[i] * inverse));
        }
    }
    (dx, dweight.into_iter().map(|sum| sum as f32).collect())
}

/// `(x - mean) / deviation * weight + bias` of each row.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len() as f64;
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / width;
        let variance = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / width;
        let inverse = (variance + f64::from(eps)).sqrt().recip();
        let normed = row.iter().map(|x| (f64::from(*x) - mean) * inverse);
        let scaled = normed.zip(weight.iter().zip(bias));
        out.extend(scaled.map(|(x, (weight, bias))| (x * f64::from(*weight) + f64::from(*bias)) as f32));
    }
    out
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn a_row_is_divided_by_its_root_mean_square() {
        let (out, inverse) = rms_norm::<f32>(&[3.0, 4.0, 0.0, 0.0], &[1.0, 1.0, 1.0, 2.0], 0.0);
        assert_eq!(inverse, [0.4]);
        assert_eq!(out, [1.2, 1.6, 0.0, 0.0]);
    }

    #[test]
    fn the_normed_value_is_rounded_before_the_weight() {
        let (out, inverse) = rms_norm::<bf16>(&[1.0, 3.0], &[3.0, 3.0], 0.0);
        assert_eq!(out[1], bf16::from_f32(3.0 * inverse[0]).to_f32() * 3.0);
        assert_ne!(out[1], 3.0 * inverse[0] * 3.0);
    }

    #[test]
    fn the_gradients_are_finite_differences() {
        let (x, weight) = ([0.3f32, -1.2, 0.7, 2.0, 0.1, -0.4], [0.5f32, 1.5, -2.0]);
        let dy = [1.0f32, -0.5, 0.25, 0.1, 2.0, -1.0];
        let loss = |x: &[f32], weight: &[f32]| {
            let (out, _) = rms_norm::<f32>(x, weight, 1e-6);
            out.iter().zip(dy).map(|(out, dy)| f64::from(out * dy)).sum::<f64>()
        };
        let (_, inverse) = rms_norm::<f32>(&x, &weight, 1e-6);
        let (dx, dweight) = rms_norm_backward::<f32>(&dy, &x, &weight, &inverse);
        let step = 1e-2f32;
        for i in 0..x.len() {
            let (mut up, mut down) = (x, x);
            up[i] += step;
            down[i] -= step;
            let slope = (loss(&up, &weight) - loss(&down, &weight)) / f64::from(2.0 * step);
            assert!((slope - f64::from(dx[i])).abs() < 1e-3, "{i}: {slope}, {}", dx[i]);
        }
        for i in 0..weight.len() {
            let (mut up, mut down) = (weight, weight);
            up[i] += step;
            down[i] -= step;
            let slope = (loss(&x, &up) - loss(&x, &down)) / f64::from(2.0 * step);
            assert!(
                (slope - f64::from(dweight[i])).abs() < 1e-3,
                "{i}: {slope}, {}",
                dweight[i]
            );
        }
    }

    #[test]
    fn a_layer_norm_has_mean_bias_and_deviation_weight() {
        let out = layer_norm(&[101.0, 103.0], &[2.0, 2.0], &[5.0, 6.0], 0.0);
        assert_eq!(out, [3.0, 8.0]);
    }
}

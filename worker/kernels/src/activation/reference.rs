//! Activations in plain Rust, in f64.

/// Which GELU.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Gelu {
    /// By `tanh`: `gelu_pytorch_tanh` of SigLIP.
    Tanh,
    /// Exact, by `erf`: mergers and projectors.
    Erf,
    /// `x * sigmoid(1.702 x)`.
    Quick,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `silu(gate) * up` of rows `[2 * ff]`.
pub fn swiglu(gate_up: &[f32], ff: usize) -> Vec<f32> {
    let row = |row: &[f32]| {
        let (gate, up) = row.split_at(ff);
        let of = |(gate, up): (&f32, &f32)| (f64::from(*gate) * sigmoid(f64::from(*gate)) * f64::from(*up)) as f32;
        gate.iter().zip(up).map(of).collect::<Vec<_>>()
    };
    gate_up.chunks_exact(2 * ff).flat_map(row).collect()
}

/// Gradient of [`swiglu`].
pub fn swiglu_backward(gate_up: &[f32], dout: &[f32], ff: usize) -> Vec<f32> {
    let mut gradient = Vec::with_capacity(gate_up.len());
    for (row, dout) in gate_up.chunks_exact(2 * ff).zip(dout.chunks_exact(ff)) {
        let number = |at: usize| f64::from(row[at]);
        let d_gate = |i: usize| {
            let s = sigmoid(number(i));
            f64::from(dout[i]) * number(ff + i) * (s + number(i) * s * (1.0 - s))
        };
        gradient.extend((0..ff).map(|i| d_gate(i) as f32));
        gradient.extend((0..ff).map(|i| (f64::from(dout[i]) * number(i) * sigmoid(number(i))) as f32));
    }
    gradient
}

/// The error function: its series near 0, a continued fraction of its complement further out.
fn erf(x: f64) -> f64 {
    if x < 0.0 {
        return -erf(-x);
    }
    if x < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..80 {
            let n = f64::from(n);
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let fraction = (1..=60).rev().fold(x, |below, n| x + f64::from(n) / 2.0 / below);
    1.0 - (-x * x).exp() / fraction / std::f64::consts::PI.sqrt()
}

/// The function.
pub fn gelu(kind: Gelu, x: f64) -> f64 {
    match kind {
        Gelu::Tanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        Gelu::Erf => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Gelu::Quick => x * sigmoid(1.702 * x),
    }
}

/// Its derivative.
pub fn gelu_slope(kind: Gelu, x: f64) -> f64 {
    match kind {
        Gelu::Tanh => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let tanh = (root * (x + 0.044715 * x.powi(3))).tanh();
            0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * root * (1.0 + 3.0 * 0.044715 * x * x)
        }
        Gelu::Erf => {
            let density = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
            0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2)) + x * density
        }
        Gelu::Quick => {
            let s = sigmoid(1.702 * x);
            s + 1.702 * x * s * (1.0 - s)
        }
    }
}

/// `x + bias` of each row.
pub fn add_bias(x: &[f32], bias: &[f32]) -> Vec<f32> {
    let row = |row: &[f32]| row.iter().zip(bias).map(|(x, bias)| x + bias).collect::<Vec<_>>();
    x.chunks_exact(bias.len()).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Gelu; 3] = [Gelu::Tanh, Gelu::Erf, Gelu::Quick];

    #[test]
    fn the_error_function_is_that_of_tables() {
        for (x, value) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.4, 0.999_311_486_103_354_9),
            (2.6, 0.999_763_965_583_470_7),
            (-3.0, -0.999_977_909_503_001_4),
        ] {
            assert!((erf(x) - value).abs() < 1e-11, "erf({x}) = {}", erf(x));
        }
    }

    #[test]
    fn every_gelu_is_the_identity_far_right_and_nothing_far_left() {
        for kind in KINDS {
            assert!((gelu(kind, 20.0) - 20.0).abs() < 1e-9);
            assert!(gelu(kind, -20.0).abs() < 1e-9);
            assert_eq!(gelu(kind, 0.0), 0.0);
            assert!((gelu(kind, 1.0) - gelu(Gelu::Erf, 1.0)).abs() < 6e-3);
        }
    }

    #[test]
    fn slopes_are_finite_differences() {
        for kind in KINDS {
            for x in [-4.0, -1.0, -0.1, 0.0, 0.7, 3.0] {
                let slope = (gelu(kind, x + 1e-5) - gelu(kind, x - 1e-5)) / 2e-5;
                assert!((slope - gelu_slope(kind, x)).abs() < 1e-8, "{kind:?} at {x}");
            }
        }
    }

    #[test]
    fn the_gradient_of_swiglu_is_a_finite_difference() {
        let (x, dout, ff) = (
            [0.3f32, -1.2, 0.7, 2.0, 0.1, -0.4, 1.5, -3.0],
            [1.0f32, -0.5, 0.25, 2.0],
            2,
        );
        let loss = |x: &[f32]| {
            let out = swiglu(x, ff);
            out.iter()
                .zip(dout)
                .map(|(out, dout)| f64::from(out * dout))
                .sum::<f64>()
        };
        let gradient = swiglu_backward(&x, &dout, ff);
        for i in 0..x.len() {
            let (mut up, mut down) = (x, x);
            up[i] += 1e-2;
            down[i] -= 1e-2;
            let slope = (loss(&up) - loss(&down)) / 2e-2;
            assert!(
                (slope - f64::from(gradient[i])).abs() < 1e-3,
                "{i}: {slope}, {}",
                gradient[i]
            );
        }
    }
}

//! What the kernel computes.

use super::{Epilogue, Skinny};

/// `x` `[rows, inputs]` times `weight` `[weight_rows, inputs]` transposed, plus `bias` `[weight_rows]`, through the epilogue,
/// plus `residual` `[rows, outputs]`.
pub fn linear(skinny: Skinny, x: &[f32], weight: &[f32], bias: Option<&[f32]>, residual: Option<&[f32]>) -> Vec<f32> {
    let Skinny {
        rows, outputs, inputs, ..
    } = skinny;
    let sum = |row: usize, of: usize| {
        let products = x[row * inputs..][..inputs].iter().zip(&weight[of * inputs..][..inputs]);
        let sum = products.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
        sum + bias.map_or(0.0, |bias| f64::from(bias[of]))
    };
    let mut out = Vec::with_capacity(rows * outputs);
    for row in 0..rows {
        for output in 0..outputs {
            let result = match skinny.epilogue {
                Epilogue::Plain => sum(row, output),
                Epilogue::Swiglu => {
                    let gate = sum(row, output);
                    gate / (1.0 + (-gate).exp()) * sum(row, outputs + output)
                }
            };
            out.push((result + residual.map_or(0.0, |residual| f64::from(residual[out.len()]))) as f32);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_matrix_product_with_what_is_added() {
        let x = [1.0, 2.0, -1.0, 0.5];
        let weight = [1.0, 1.0, 0.0, 3.0, -2.0, 0.5];
        let out = linear(
            Skinny::plain(2, 3, 2),
            &x,
            &weight,
            Some(&[1.0, 0.0, 0.0]),
            Some(&[0.0, 0.0, 0.0, 0.0, 10.0, 0.0]),
        );
        assert_eq!(out, [4.0, 6.0, -1.0, 0.5, 11.5, 2.25]);
    }

    #[test]
    fn gate_and_up_are_joined() {
        let out = linear(Skinny::swiglu(1, 1, 2), &[1.0, 2.0], &[1.0, 0.5, 3.0, 0.0], None, None);
        assert!((out[0] - 3.0 * 2.0 / (1.0 + (-2f32).exp())).abs() < 1e-6);
    }
}

//! Rotary tables: the cosine and sine of each row's angles.

use candle_core::{DType, Device, Tensor};

use crate::Result;

/// Position of a token on the three axes time, height and width.
pub type Position = [u32; 3];

/// Cosines and sines for the rows of a batch. Only one half of a head is kept: the reference repeats it.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// `[rows, head_dim / 2]`.
    pub cos: Tensor,
    /// `[rows, head_dim / 2]`.
    pub sin: Tensor,
}

impl Rotary {
    /// From angles in radians, `rows x half` values.
    pub fn from_angles(angles: &[f32], half: usize, dtype: DType, device: &Device) -> Result<Self> {
        let rows = angles.len() / half;
        let table = |f: fn(f32) -> f32| -> Result<Tensor> {
            let values = angles.iter().map(|a| f(*a)).collect::<Vec<_>>();
            Ok(Tensor::from_vec(values, (rows, half), device)?.to_dtype(dtype)?)
        };
        Ok(Self {
            cos: table(f32::cos)?,
            sin: table(f32::sin)?,
        })
    }
}

/// Frequencies `1 / theta^(2 i / dim)` for `i` below `dim / 2`, in f32 as the reference computes them.
pub fn frequencies(theta: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / dim as f32))
        .collect()
}

/// Angles of multimodal rotary embedding: frequency `i` belongs to the axis whose section it falls into.
pub fn mrope_angles(positions: &[Position], frequencies: &[f32], section: [usize; 3]) -> Vec<f32> {
    let axis = |i: usize| match i {
        i if i < section[0] => 0,
        i if i < section[0] + section[1] => 1,
        _ => 2,
    };
    let axes = (0..frequencies.len()).map(axis).collect::<Vec<_>>();
    let mut angles = Vec::with_capacity(positions.len() * frequencies.len());
    for position in positions {
        angles.extend(
            frequencies
                .iter()
                .zip(&axes)
                .map(|(f, axis)| position[*axis] as f32 * f),
        );
    }
    angles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_frequency_turns_with_its_own_axis() {
        let angles = mrope_angles(&[[1, 10, 100]], &[1.0, 1.0, 1.0, 1.0], [2, 1, 1]);
        assert_eq!(angles, [1.0, 1.0, 10.0, 100.0]);
    }

    #[test]
    fn frequencies_fall_from_one_towards_the_inverse_base() {
        let f = frequencies(10_000.0, 8);
        assert_eq!(f.len(), 4);
        for (f, want) in f.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((f - want).abs() < 1e-7 * want.max(1e-1), "{f} {want}");
        }
    }
}

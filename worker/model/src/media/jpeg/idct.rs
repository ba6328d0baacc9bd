//! Coefficients to samples: the accurate integer transform of libjpeg (`jidctint`, after Loeffler, Ligtenberg and
//! Moschytz), whose roundings every libjpeg shares.

/// Fractional bits of the constants.
const CONSTANT: u32 = 13;
/// Fractional bits that are kept between the two passes.
const BETWEEN: u32 = 2;

const F_0_298: i32 = 2446;
const F_0_390: i32 = 3196;
const F_0_541: i32 = 4433;
const F_0_765: i32 = 6270;
const F_0_899: i32 = 7373;
const F_1_175: i32 = 9633;
const F_1_501: i32 = 12299;
const F_1_847: i32 = 15137;
const F_1_961: i32 = 16069;
const F_2_053: i32 = 16819;
const F_2_562: i32 = 20995;
const F_3_072: i32 = 25172;

/// The 64 samples of a block, row by row.
pub(super) fn samples(block: &[i16], quantization: &[u16; 64]) -> [u8; 64] {
    let mut work = [0i32; 64];
    for ((value, coefficient), step) in work.iter_mut().zip(block).zip(quantization) {
        *value = i32::from(*coefficient) * i32::from(*step);
    }
    for column in 0..8 {
        let input: [i32; 8] = std::array::from_fn(|row| work[row * 8 + column]);
        if input[1..] == [0; 7] {
            // What the transform gives, without it: most columns of most blocks.
            let flat = mul(input[0], 1 << BETWEEN);
            (0..8).for_each(|row| work[row * 8 + column] = flat);
            continue;
        }
        for (row, value) in one_dimension(input, CONSTANT - BETWEEN).into_iter().enumerate() {
            work[row * 8 + column] = value;
        }
    }
    let mut output = [0; 64];
    for row in 0..8 {
        let input = std::array::from_fn(|column| work[row * 8 + column]);
        let values = one_dimension(input, CONSTANT + BETWEEN + 3);
        for (sample, value) in output[row * 8..].iter_mut().zip(values) {
            *sample = value.saturating_add(128).clamp(0, 255) as u8;
        }
    }
    output
}

/// Damaged files overflow; what comes out then does not matter.
fn mul(a: i32, b: i32) -> i32 {
    a.wrapping_mul(b)
}

fn one_dimension(x: [i32; 8], shift: u32) -> [i32; 8] {
    let add = i32::wrapping_add;
    let sub = i32::wrapping_sub;
    // Even part.
    let z1 = mul(add(x[2], x[6]), F_0_541);
    let (t2, t3) = (sub(z1, mul(x[6], F_1_847)), add(z1, mul(x[2], F_0_765)));
    let (t0, t1) = (mul(add(x[0], x[4]), 1 << CONSTANT), mul(sub(x[0], x[4]), 1 << CONSTANT));
    let even = [add(t0, t3), add(t1, t2), sub(t1, t2), sub(t0, t3)];
    // Odd part.
    let (z1, z2) = (mul(add(x[7], x[1]), -F_0_899), mul(add(x[5], x[3]), -F_2_562));
    let (z3, z4) = (add(x[7], x[3]), add(x[5], x[1]));
    let z5 = mul(add(z3, z4), F_1_175);
    let (z3, z4) = (add(mul(z3, -F_1_961), z5), add(mul(z4, -F_0_390), z5));
    let odd = [
        add(mul(x[1], F_1_501), add(z1, z4)),
        add(mul(x[3], F_3_072), add(z2, z3)),
        add(mul(x[5], F_2_053), add(z2, z4)),
        add(mul(x[7], F_0_298), add(z1, z3)),
    ];
    let round = |value: i32| add(value, 1 << (shift - 1)) >> shift;
    let mut output = [0; 8];
    for (k, (even, odd)) in even.into_iter().zip(odd).enumerate() {
        output[k] = round(add(even, odd));
        output[7 - k] = round(sub(even, odd));
    }
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_dc_alone_is_flat() {
        let mut block = [0; 64];
        block[0] = 10;
        assert_eq!(samples(&block, &[8; 64]), [138; 64]);
        block[0] = i16::MAX;
        assert_eq!(samples(&block, &[u16::MAX; 64]).len(), 64);
    }
}

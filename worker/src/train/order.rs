//! Which units (rows, or both orders of a pair) a step takes; seeds of every draw.

use flotilla_artifacts::digest::sha256_hex;
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// The seed of one draw: it follows from the run's seed, what is drawn and the step, so nothing needs to be remembered.
pub fn derive_seed(seed: u64, purpose: &str, step: u64) -> u64 {
    let digest = sha256_hex(format!("{seed}/{purpose}/{step}").as_bytes());
    u64::from_str_radix(&digest[..16], 16).unwrap_or(seed)
}

/// A permutation of `0..count`.
pub fn permutation(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    order
}

/// The units of a step, counted from 0: each pass over the data is permuted anew, and what does not fill a step at the
/// end of a pass is left out of that pass.
pub fn units_of_step(units: usize, per_step: usize, seed: u64, step: u32) -> Vec<usize> {
    let per_step = per_step.min(units);
    if per_step == 0 {
        return Vec::new();
    }
    let steps = units / per_step;
    let (pass, place) = (step as usize / steps, step as usize % steps);
    let order = permutation(units, derive_seed(seed, "order", pass as u64));
    order[place * per_step..(place + 1) * per_step].to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_pass_takes_no_unit_twice(units in 1_usize..60, per_step in 1_usize..20, seed: u64) {
            let steps = units / per_step.min(units);
            let mut taken: Vec<usize> =
                (0..steps).flat_map(|step| units_of_step(units, per_step, seed, step as u32)).collect();
            let count = taken.len();
            taken.sort_unstable();
            taken.dedup();
            prop_assert_eq!(taken.len(), count);
            prop_assert!(units - count < per_step);
        }
    }

    #[test]
    fn seeds_differ_by_purpose_and_step() {
        let seeds = [
            derive_seed(1, "order", 0),
            derive_seed(1, "order", 1),
            derive_seed(1, "rollout", 0),
            derive_seed(2, "order", 0),
        ];
        for (index, seed) in seeds.iter().enumerate() {
            assert!(!seeds[..index].contains(seed));
        }
    }
}

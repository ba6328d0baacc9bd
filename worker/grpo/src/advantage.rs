//! Rewards of a group to advantages (GRPO, section 2.1 of the fork's notes; Dr. GRPO without the division).

/// Added to the standard deviation.
const EPSILON: f64 = 1e-6;

/// How rewards of a group become advantages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Scaling {
    /// `(r - mean) / (std + 1e-6)`, std with n-1.
    Group,
    /// `r - mean`.
    None,
}

/// Advantage of each completion of one group. Equal rewards give exactly zero: such a group has nothing to say.
pub fn group_advantages(rewards: &[f64], scaling: Scaling) -> Vec<f32> {
    if rewards.windows(2).all(|pair| pair[0] == pair[1]) {
        return vec![0.0; rewards.len()];
    }
    let count = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / count;
    let variance = rewards.iter().map(|reward| (reward - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let divisor = match scaling {
        Scaling::Group => variance.sqrt() + EPSILON,
        Scaling::None => 1.0,
    };
    rewards
        .iter()
        .map(|reward| ((reward - mean) / divisor) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn advantages_equal_those_of_the_fork() {
        let expected = [0.863_634_82_f64, -0.772_725_82, -0.954_543_65, 0.863_634_82];
        let found = group_advantages(&[1.0, 0.1, 0.0, 1.0], Scaling::Group);
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 2e-7, "{found} {expected}");
        }
        assert_eq!(group_advantages(&[0.9; 4], Scaling::Group), vec![0.0; 4]);
    }

    #[test]
    fn without_scaling_the_mean_alone_is_taken_away() {
        assert_eq!(group_advantages(&[1.0, 0.0], Scaling::None), vec![0.5, -0.5]);
    }

    proptest! {
        #[test]
        fn advantages_of_a_group_sum_to_zero(rewards in prop::collection::vec(0.0_f64..1.0, 2..16)) {
            let sum: f32 = group_advantages(&rewards, Scaling::Group).iter().sum();
            prop_assert!(sum.abs() < 1e-4, "{sum}");
        }

        #[test]
        fn a_group_of_one_or_of_equals_has_no_advantage(reward in 0.0_f64..1.0, n in 1_usize..9) {
            prop_assert!(group_advantages(&vec![reward; n], Scaling::Group).iter().all(|a| *a == 0.0));
        }
    }
}

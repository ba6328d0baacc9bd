//! The loss of one update: the clipped policy loss with dual clip and k3 KL, and cross-entropy. Sums over tokens of a
//! mini-batch, weighted by [`crate::batch::token_weights`], so that shards add up to the whole.

use candle_core::{Result, Tensor};

use crate::policy::{Known, MAX_KL, MAX_LOG_RATIO, PolicyLoss, PolicyStatistics};

/// What is known about each token before the update; every tensor is `[tokens]`, f32, without gradient.
#[derive(Clone, Debug)]
pub struct TokenTargets {
    /// Log-probability under the weights that sampled it.
    pub old: Tensor,
    /// Log-probability under the frozen reference; None leaves the KL term out.
    pub reference: Option<Tensor>,
    /// Advantage.
    pub advantage: Tensor,
    /// Weight in the loss.
    pub weight: Tensor,
}

impl PolicyLoss {
    /// Weighted sum over tokens, a scalar differentiable in `log_probs` (`[tokens]`, under the weights being trained).
    pub fn loss(&self, log_probs: &Tensor, targets: &TokenTargets) -> Result<Tensor> {
        let log_ratio = (log_probs - &targets.old)?.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)?;
        let clipped = log_ratio.clamp(self.lowest_log_ratio(), self.clip_high.ln_1p())?;
        let cost = targets.advantage.neg()?;
        let unclipped_loss = (&cost * log_ratio.exp()?)?;
        let clipped_loss = (&cost * clipped.exp()?)?;
        let mut loss = unclipped_loss.maximum(&clipped_loss)?;
        if let Some(dual_clip) = self.dual_clip {
            // Infinite where the advantage is not negative: there the bound does not hold.
            let negative = targets.advantage.lt(0.0)?;
            let bound = negative.where_cond(&(&cost * dual_clip)?, &(cost.zeros_like()? + f64::INFINITY)?)?;
            loss = loss.minimum(&bound)?;
        }
        if let Some(reference) = &targets.reference {
            let kl = k3(log_probs, reference)?;
            loss = (loss + (kl * self.kl_coefficient)?)?;
        }
        (loss * &targets.weight)?.sum_all()
    }

    /// The same sums in f64 on the host, with what metrics show besides.
    pub fn statistics(&self, log_probs: &Tensor, targets: &TokenTargets) -> Result<PolicyStatistics> {
        let column = Tensor::to_vec1::<f32>;
        let reference = targets.reference.as_ref().map(column).transpose()?;
        let known = Known {
            old: &column(&targets.old)?,
            reference: reference.as_deref(),
            advantage: &column(&targets.advantage)?,
            weight: &column(&targets.weight)?,
        };
        Ok(self.gradient(&column(log_probs)?, known, &mut Vec::new()))
    }

    fn lowest_log_ratio(&self) -> f64 {
        (1.0 - self.clip_low).max(f64::MIN_POSITIVE).ln().max(-MAX_LOG_RATIO)
    }
}

/// `exp(x) - x - 1` with `x = reference - log_probs`: an estimate of the KL divergence that is never negative.
fn k3(log_probs: &Tensor, reference: &Tensor) -> Result<Tensor> {
    let x = (reference - log_probs)?.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)?;
    ((x.exp()? - &x)? - 1.0)?.clamp(-MAX_KL, MAX_KL)
}

/// Cross-entropy of given tokens: the weighted sum of their negative log-probabilities.
pub fn cross_entropy(log_probs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    (log_probs * weight)?.sum_all()?.neg()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        advantage::{Scaling, group_advantages},
        batch::{Aggregation, token_weights},
    };

    const RELEASED: PolicyLoss = PolicyLoss {
        clip_low: 0.2,
        clip_high: 0.3,
        dual_clip: Some(3.0),
        kl_coefficient: 0.01,
    };

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).expect("tensor")
    }

    /// Rows of (old, new - old, reference) and rewards; the golden group of the notes on the fork.
    struct Case {
        new: Vec<f32>,
        targets: TokenTargets,
    }

    fn golden(aggregation: Aggregation) -> Case {
        let old: [&[f32]; 4] = [&[-1.0, -0.5, -2.0], &[-0.7, -1.2], &[-0.3, -0.9, -1.1, -0.2], &[-2.5]];
        let step: [&[f32]; 4] = [&[0.3, -0.1, 0.05], &[0.5, -0.4], &[1.5, 0.0, -0.25, 0.2], &[-0.6]];
        let reference: [&[f32]; 4] = [&[-1.1, -0.4, -2.2], &[-0.6, -1.5], &[-0.5, -0.9, -1.0, -0.4], &[-2.0]];
        let advantages = group_advantages(&[1.0, 0.1, 0.0, 1.0], Scaling::Group);
        let weights = token_weights(&old.map(|row| (row.len(), 1)), aggregation);
        let spread =
            |values: &[f32]| -> Vec<f32> { (0..4).flat_map(|row| vec![values[row]; old[row].len()]).collect() };
        let new: Vec<f32> = old
            .concat()
            .iter()
            .zip(step.concat())
            .map(|(old, step)| old + step)
            .collect();
        Case {
            new,
            targets: TokenTargets {
                old: tensor(&old.concat()),
                reference: Some(tensor(&reference.concat())),
                advantage: tensor(&spread(&advantages)),
                weight: tensor(&spread(&weights)),
            },
        }
    }

    fn loss_and_gradient(policy: PolicyLoss, new: &[f32], targets: &TokenTargets) -> (f32, Vec<f32>) {
        let new = Var::from_tensor(&tensor(new)).expect("var");
        let loss = policy.loss(&new, targets).expect("loss");
        let gradients = loss.backward().expect("backward");
        let gradient = gradients.get(&new).expect("gradient").to_vec1().expect("f32");
        (loss.to_scalar().expect("scalar"), gradient)
    }

    #[test]
    fn loss_and_gradients_equal_those_of_the_fork() {
        let case = golden(Aggregation::TokenMean);
        let (total, gradient) = loss_and_gradient(RELEASED, &case.new, &case.targets);
        assert!((f64::from(total) - 0.437_504_29).abs() < 1e-6, "{total}");
        let expected = [
            0.000_329_68,
            -0.078_366_31,
            -0.090_570_23,
            0.127_730_62,
            -0.000_105_17,
            0.000_817_32,
            0.095_454_37,
            -0.000_419_07,
            0.116_917_91,
            -0.049_401_45_f32,
        ];
        for (found, expected) in gradient.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn statistics_equal_those_of_the_fork() {
        let case = golden(Aggregation::TokenMean);
        let found = RELEASED
            .statistics(&tensor(&case.new), &case.targets)
            .expect("statistics");
        for (name, found, expected) in [
            ("pg_loss", found.policy_loss, 0.435_382_04),
            ("k3", found.kl, 0.212_225_15),
            ("ppo_kl", found.ppo_kl, -0.12),
            ("pg_clipfrac_higher", found.clipped, 0.3),
            ("pg_clipfrac_lower", found.dual_clipped, 0.1),
        ] {
            assert!((found - expected).abs() < 1e-6, "{name} {found} {expected}");
        }
    }

    #[test]
    fn a_sequence_mean_equals_that_of_upstream() {
        let mut case = golden(Aggregation::SequenceMean);
        case.targets.reference = None;
        let (loss, _) = loss_and_gradient(RELEASED, &case.new, &case.targets);
        assert!((loss - 0.242_920_55).abs() < 1e-6, "{loss}");
    }

    #[test]
    fn at_ratio_one_the_gradient_is_the_policy_gradient() {
        let mut case = golden(Aggregation::TokenMean);
        case.targets.reference = None;
        let old = case.targets.old.to_vec1::<f32>().expect("old");
        let (_, gradient) = loss_and_gradient(RELEASED, &old, &case.targets);
        let advantage = case.targets.advantage.to_vec1::<f32>().expect("advantage");
        for (gradient, advantage) in gradient.iter().zip(advantage) {
            assert!((gradient + advantage / 10.0).abs() < 1e-7, "{gradient} {advantage}");
        }
    }

    #[test]
    fn equal_rewards_give_no_gradient_where_policy_and_reference_agree() {
        let mut case = golden(Aggregation::TokenMean);
        case.targets.advantage = tensor(&[0.0; 10]);
        case.targets.reference = Some(tensor(&case.new));
        let (loss, gradient) = loss_and_gradient(RELEASED, &case.new, &case.targets);
        assert_eq!((loss, gradient), (0.0, vec![0.0; 10]));
    }

    #[test]
    fn cross_entropy_is_the_weighted_negative_log_probability() {
        let loss = cross_entropy(&tensor(&[-1.0, -3.0]), &tensor(&[0.25, 0.5])).expect("loss");
        assert_eq!(loss.to_scalar::<f32>().expect("scalar"), 1.75);
    }

    /// One sequence: tokens of (new, old, reference), advantage, count.
    type Sequence = (Vec<(f32, f32, f32)>, f32, u32);

    fn sequences() -> impl Strategy<Value = Vec<Sequence>> {
        let token = (-4.0_f32..0.0, -4.0_f32..0.0, -4.0_f32..0.0);
        prop::collection::vec((prop::collection::vec(token, 1..6), -2.0_f32..2.0, 1_u32..5), 1..9)
    }

    fn targets_of(sequences: &[Sequence], weights: &[f32]) -> (Vec<f32>, TokenTargets) {
        let column = |pick: fn(&(f32, f32, f32)) -> f32| -> Vec<f32> {
            sequences
                .iter()
                .flat_map(|(tokens, ..)| tokens.iter().map(pick))
                .collect()
        };
        let spread = |value: &dyn Fn(usize) -> f32| -> Vec<f32> {
            (0..sequences.len())
                .flat_map(|row| vec![value(row); sequences[row].0.len()])
                .collect()
        };
        let targets = TokenTargets {
            old: tensor(&column(|token| token.1)),
            reference: Some(tensor(&column(|token| token.2))),
            advantage: tensor(&spread(&|row| sequences[row].1)),
            weight: tensor(&spread(&|row| weights[row])),
        };
        (column(|token| token.0), targets)
    }

    fn weights_of(sequences: &[Sequence], aggregation: Aggregation) -> Vec<f32> {
        let lengths: Vec<_> = sequences
            .iter()
            .map(|(tokens, _, count)| (tokens.len(), *count))
            .collect();
        token_weights(&lengths, aggregation)
    }

    fn loss_of(sequences: &[Sequence], weights: &[f32]) -> f32 {
        let (new, targets) = targets_of(sequences, weights);
        loss_and_gradient(RELEASED, &new, &targets).0
    }

    fn close(a: f32, b: f32) -> bool {
        (a - b).abs() < 2e-5 * (1.0 + a.abs())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn tensors_and_plain_arithmetic_agree(sequences in sequences()) {
            let weights = weights_of(&sequences, Aggregation::TokenMean);
            let (new, targets) = targets_of(&sequences, &weights);
            let sums = RELEASED.statistics(&tensor(&new), &targets).expect("statistics");
            let expected = sums.policy_loss + RELEASED.kl_coefficient * sums.kl;
            prop_assert!(close(loss_of(&sequences, &weights), expected as f32));
        }

        #[test]
        fn the_order_of_samples_does_not_matter(mut sequences in sequences()) {
            let weights = weights_of(&sequences, Aggregation::SequenceMean);
            let before = loss_of(&sequences, &weights);
            sequences.reverse();
            let weights = weights_of(&sequences, Aggregation::SequenceMean);
            prop_assert!(close(before, loss_of(&sequences, &weights)));
        }

        #[test]
        fn any_split_of_a_mini_batch_sums_to_the_whole(sequences in sequences(), cut in 0_usize..9) {
            let weights = weights_of(&sequences, Aggregation::TokenMean);
            let cut = cut.min(sequences.len() - 1).max(1).min(sequences.len());
            let whole = loss_of(&sequences, &weights);
            let mut parts = loss_of(&sequences[..cut], &weights[..cut]);
            if cut < sequences.len() {
                parts += loss_of(&sequences[cut..], &weights[cut..]);
            }
            prop_assert!(close(whole, parts), "{} {}", whole, parts);
        }

        #[test]
        fn trained_once_with_its_count_a_sample_weighs_what_its_copies_do(sequences in sequences(), token_mean: bool) {
            let aggregation = if token_mean { Aggregation::TokenMean } else { Aggregation::SequenceMean };
            let copies: Vec<Sequence> = sequences
                .iter()
                .flat_map(|(tokens, advantage, count)| vec![(tokens.clone(), *advantage, 1); *count as usize])
                .collect();
            let once = loss_of(&sequences, &weights_of(&sequences, aggregation));
            let each = loss_of(&copies, &weights_of(&copies, aggregation));
            prop_assert!(close(once, each), "{} {}", once, each);
        }
    }
}

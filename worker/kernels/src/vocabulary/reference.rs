//! What the kernels compute, with all logits at once.

/// Sizes and temperature of a head.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Tokens.
    pub rows: usize,
    /// Numbers of a hidden state.
    pub width: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// What logits are divided by.
    pub temperature: f32,
}

/// Each `[rows]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Natural logarithm of the target's probability; 0 in ignored rows.
    pub log_prob: Vec<f32>,
    /// In nats; 0 in ignored rows.
    pub entropy: Vec<f32>,
    /// Logarithm of the sum of the exponentials of the divided logits.
    pub lse: Vec<f32>,
}

/// Gradients, each shaped as what it is the gradient by.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// By the hidden states.
    pub hidden: Vec<f32>,
    /// By the weight.
    pub weight: Vec<f32>,
}

impl Head {
    /// Divided logits of a row.
    fn logits(&self, hidden: &[f32], weight: &[f32]) -> Vec<f64> {
        let product = |token: &[f32]| {
            let products = hidden.iter().zip(token).map(|(x, w)| f64::from(*x) * f64::from(*w));
            products.sum::<f64>() / f64::from(self.temperature)
        };
        weight.chunks_exact(self.width).map(product).collect()
    }
}

fn log_sum_exp(logits: &[f64]) -> f64 {
    let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    highest + logits.iter().map(|z| (z - highest).exp()).sum::<f64>().ln()
}

fn entropy(logits: &[f64], lse: f64) -> f64 {
    let terms = logits.iter().map(|z| (z - lse).exp() * (lse - z));
    terms.filter(|term| !term.is_nan()).sum()
}

/// Log-probabilities of targets, entropies, and what backward needs.
#[allow(clippy::cast_possible_truncation, reason = "results are f32")]
pub fn forward(head: &Head, hidden: &[f32], weight: &[f32], targets: &[i32]) -> Scored {
    let mut scored = Scored {
        log_prob: Vec::with_capacity(head.rows),
        entropy: Vec::with_capacity(head.rows),
        lse: Vec::with_capacity(head.rows),
    };
    for (hidden, target) in hidden.chunks_exact(head.width).zip(targets) {
        let logits = head.logits(hidden, weight);
        let lse = log_sum_exp(&logits);
        let (log_prob, entropy) = match usize::try_from(*target) {
            Err(_) => (0.0, 0.0),
            Ok(target) => (
                logits.get(target).map_or(f64::NEG_INFINITY, |z| z - lse),
                entropy(&logits, lse),
            ),
        };
        scored.log_prob.push(log_prob as f32);
        scored.entropy.push(entropy as f32);
        scored.lse.push(lse as f32);
    }
    scored
}

/// Gradients of a loss, given those by each log-probability and each entropy.
#[allow(clippy::cast_possible_truncation, reason = "results are f32")]
pub fn backward(
    head: &Head,
    (hidden, weight, targets): (&[f32], &[f32], &[i32]),
    d_log_prob: &[f32],
    d_entropy: &[f32],
) -> Gradients {
    let width = head.width;
    let mut by_hidden = vec![0f64; hidden.len()];
    let mut by_weight = vec![0f64; weight.len()];
    for (row, x) in hidden.chunks_exact(width).enumerate() {
        let Ok(target) = usize::try_from(targets[row]) else {
            continue;
        };
        let logits = head.logits(x, weight);
        let lse = log_sum_exp(&logits);
        let entropy = entropy(&logits, lse);
        for (token, z) in logits.iter().enumerate() {
            let (log_p, p) = (z - lse, (z - lse).exp());
            let hit = f64::from(u8::from(token == target));
            let by_entropy = if p > 0.0 { p * (log_p + entropy) } else { 0.0 };
            let d = f64::from(d_log_prob[row]) * (hit - p) - f64::from(d_entropy[row]) * by_entropy;
            let d = d / f64::from(head.temperature);
            for at in 0..width {
                by_hidden[row * width + at] += d * f64::from(weight[token * width + at]);
                by_weight[token * width + at] += d * f64::from(x[at]);
            }
        }
    }
    let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
    Gradients {
        hidden: narrow(by_hidden),
        weight: narrow(by_weight),
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const HEAD: Head = Head {
        rows: 3,
        width: 4,
        vocabulary: 7,
        temperature: 0.7,
    };

    fn numbers(random: &mut ChaCha8Rng, length: usize) -> Vec<f32> {
        (0..length).map(|_| random.random_range(-1f32..1.0)).collect()
    }

    #[test]
    fn log_probabilities_and_entropies_are_those_of_a_plain_softmax() {
        let head = Head {
            rows: 2,
            width: 1,
            vocabulary: 3,
            temperature: 0.5,
        };
        // softmax([0, ln 3, ln 2] / 0.5) = [1, 9, 4] / 14
        let weight = [0.0, 3f32.ln(), 2f32.ln()];
        let scored = forward(&head, &[1.0, 1.0], &weight, &[1, 3]);
        let shares = [1.0 / 14.0, 9.0 / 14.0, 4.0 / 14.0f32];
        let entropy = -shares.iter().map(|p| p * p.ln()).sum::<f32>();
        assert!((scored.log_prob[0] - shares[1].ln()).abs() < 1e-6);
        assert_eq!(scored.log_prob[1], f32::NEG_INFINITY);
        assert!(scored.entropy.iter().all(|one| (one - entropy).abs() < 1e-6));
        assert!((scored.lse[0] - 14f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn ignored_rows_count_nothing() {
        let mut random = ChaCha8Rng::seed_from_u64(2);
        let (hidden, weight) = (numbers(&mut random, 12), numbers(&mut random, 28));
        let targets = [-1, 3, -100];
        let scored = forward(&HEAD, &hidden, &weight, &targets);
        assert_eq!((scored.log_prob[0], scored.entropy[2]), (0.0, 0.0));
        let gradients = backward(&HEAD, (&hidden, &weight, &targets), &[1.0; 3], &[1.0; 3]);
        assert_eq!(gradients.hidden[..4], [0.0; 4]);
        assert!(gradients.hidden[4..8].iter().all(|one| *one != 0.0));
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let (hidden, weight) = (numbers(&mut random, 12), numbers(&mut random, 28));
        let (d_log_prob, d_entropy) = (numbers(&mut random, 3), numbers(&mut random, 3));
        let targets = [6, 0, 2];
        let loss = |hidden: &[f32], weight: &[f32]| {
            let mut loss = 0f64;
            for (row, x) in hidden.chunks_exact(HEAD.width).enumerate() {
                let logits = HEAD.logits(x, weight);
                let lse = log_sum_exp(&logits);
                loss += f64::from(d_log_prob[row]) * (logits[targets[row] as usize] - lse);
                loss += f64::from(d_entropy[row]) * entropy(&logits, lse);
            }
            loss
        };
        let gradients = backward(&HEAD, (&hidden, &weight, &targets), &d_log_prob, &d_entropy);
        let step = 1f32 / 1024.0;
        let moved = |values: &[f32], at: usize, by: f32| {
            let mut values = values.to_vec();
            values[at] += by;
            values
        };
        for at in 0..hidden.len() {
            let high = loss(&moved(&hidden, at, step), &weight);
            let low = loss(&moved(&hidden, at, -step), &weight);
            let slope = (high - low) / (2.0 * f64::from(step));
            assert!((slope - f64::from(gradients.hidden[at])).abs() < 1e-5);
        }
        for at in 0..weight.len() {
            let high = loss(&hidden, &moved(&weight, at, step));
            let low = loss(&hidden, &moved(&weight, at, -step));
            let slope = (high - low) / (2.0 * f64::from(step));
            assert!((slope - f64::from(gradients.weight[at])).abs() < 1e-5);
        }
    }
}

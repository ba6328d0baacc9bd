//! A critic of known accuracy.

use std::{
    convert::Infallible,
    sync::{Mutex, PoisonError},
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::{
    Critic,
    pair::{Opinion, Pair},
};
use crate::service::verdict::Verdict;

/// Names the better of two candidates with probability `accuracy`, independently each time; of equals it names either
/// with probability 1/2.
#[derive(Debug)]
pub struct Scripted {
    /// How good each candidate is.
    pub quality: Vec<f64>,
    /// None: it always says 1.
    accuracy: Option<f64>,
    chance: Mutex<ChaCha8Rng>,
}

impl Scripted {
    pub fn new(quality: Vec<f64>, accuracy: f64, seed: u64) -> Self {
        Self {
            quality,
            accuracy: Some(accuracy),
            chance: Mutex::new(ChaCha8Rng::seed_from_u64(seed)),
        }
    }

    pub fn always_first(n: usize) -> Self {
        Self {
            accuracy: None,
            ..Self::new(vec![0.0; n], 0.0, 0)
        }
    }

    fn verdict(&self, pair: Pair, chance: &mut ChaCha8Rng) -> Verdict {
        let Some(accuracy) = self.accuracy else {
            return Verdict::First;
        };
        let (first, second) = (self.quality[pair.first], self.quality[pair.second]);
        let first_is_better = match first.total_cmp(&second) {
            std::cmp::Ordering::Equal => chance.random(),
            order => order.is_gt() == chance.random_bool(accuracy),
        };
        if first_is_better {
            Verdict::First
        } else {
            Verdict::Second
        }
    }
}

impl Critic for Scripted {
    type Error = Infallible;

    async fn judge(&self, pairs: &[Pair]) -> Result<Vec<Opinion>, Infallible> {
        let mut chance = self.chance.lock().unwrap_or_else(PoisonError::into_inner);
        let opinions = pairs.iter().map(|pair| Opinion {
            verdict: Some(self.verdict(*pair, &mut chance)),
            ..Opinion::default()
        });
        Ok(opinions.collect())
    }
}

//! What a follower is told: one line of JSON on its standard input, which no other user of the machine can read as they can
//! arguments. The pipe stays open as long as rank 0 lives; its end means that there is nobody left to follow.

use std::{fmt, path::PathBuf};

use flotilla_api::role::Precision;
use serde::{Deserialize, Serialize};

/// A follower's part in a group.
#[derive(Clone, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Duty {
    /// Which member it is, from 1.
    pub rank: usize,
    /// Members, rank 0 included.
    pub size: usize,
    /// Where rank 0 waits.
    pub address: String,
    /// What the members prove to each other that they know.
    pub token: String,
    /// Number of its GPU.
    pub gpu: usize,
    /// The model's directory.
    pub directory: PathBuf,
    /// Draw the weights from this seed in place of reading them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub random_seed: Option<u64>,
    /// Format of weights, activations, keys and values: 32 bits or bf16.
    pub dtype: Precision,
    /// The longest sequence, in tokens.
    pub max_tokens: usize,
    /// Samples of a step.
    pub max_rows: usize,
    /// Tokens of a step.
    pub max_step_tokens: usize,
    /// Tokens of a block of keys and values.
    pub block_size: usize,
}

impl fmt::Debug for Duty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Duty(rank {} of {}, cuda:{})", self.rank, self.size, self.gpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duty_travels_as_one_line_and_its_token_stays_out_of_logs() {
        let duty = Duty {
            rank: 1,
            size: 2,
            address: "127.0.0.1:1".to_owned(),
            token: "secret".to_owned(),
            gpu: 1,
            directory: "/models/large".into(),
            random_seed: None,
            dtype: Precision::Bf16,
            max_tokens: 8,
            max_rows: 2,
            max_step_tokens: 4,
            block_size: 16,
        };
        let line = serde_json::to_string(&duty).expect("serializes");
        assert!(!line.contains('\n') && line.contains(r#""dtype":"bf16""#), "{line}");
        assert_eq!(serde_json::from_str::<Duty>(&line).expect("parses"), duty);
        assert!(!format!("{duty:?}").contains("secret"));
    }
}

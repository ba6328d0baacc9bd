//! How much memory serving takes on each card, and how many tokens' keys and values fit beside it: computed from shapes
//! alone, before any card is asked for. Training has a plan of its own.

use std::fmt::Write;

use flotilla_kernels::Dtype;

use crate::{
    parallel::{Shard, ShardError},
    shape::{TextShape, VisionShape},
};

/// How a model is served.
#[derive(Clone, Debug, PartialEq)]
pub struct Serving {
    /// Of weights, activations, keys and values.
    pub dtype: Dtype,
    /// Tokens of the largest step: a part of a long prompt.
    pub step_tokens: usize,
    /// Sequences that get a token in one step.
    pub sequences: usize,
    /// Bytes that are nobody's tensor: the driver's context, scratch memory of cuBLAS and NCCL, code, graphs.
    pub reserve: usize,
}

impl Default for Serving {
    fn default() -> Self {
        Self {
            dtype: Dtype::Bf16,
            step_tokens: 8192,
            sequences: 256,
            reserve: 2 << 30,
        }
    }
}

/// Bytes on the fullest card of a group, which is rank 0's.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The language model's part.
    pub weights: usize,
    /// The vision tower, which rank 0 holds whole.
    pub vision: usize,
    /// Activations of the largest step, and logits.
    pub step: usize,
    /// [`Serving::reserve`].
    pub reserve: usize,
    /// Keys and values of one token.
    pub kv_token: usize,
    /// The card.
    pub card: usize,
}

impl Plan {
    /// All but keys and values.
    pub fn fixed(&self) -> usize {
        self.weights + self.vision + self.step + self.reserve
    }

    /// Bytes for keys and values; none if not even the rest fits.
    pub fn kv(&self) -> Option<usize> {
        self.card.checked_sub(self.fixed())
    }

    /// Tokens whose keys and values fit.
    pub fn kv_tokens(&self) -> usize {
        self.kv().unwrap_or_default() / self.kv_token
    }
}

impl Serving {
    /// What cards of `card` bytes hold where `size` of them share a model.
    pub fn plan(
        &self,
        text: &TextShape,
        vision: Option<&VisionShape>,
        card: usize,
        size: usize,
    ) -> Result<Plan, ShardError> {
        let local = Shard::new(text, 0, size)?.local();
        let bytes = self.dtype.bytes();
        // Stream, normalized stream and the sum that comes to it; queries, keys and values; what was attended to; both
        // halves of the MLP and their product.
        let token = 3 * local.hidden + local.packed_width() + local.query_width() + 3 * local.intermediate;
        // A card's logits in the model's format, and all of them in f32 where tokens are drawn.
        let logits = local.vocabulary * bytes + text.vocabulary * size_of::<f32>();
        Ok(Plan {
            weights: local.parameters() * bytes,
            vision: vision.map_or(0, VisionShape::parameters) * bytes,
            step: self.step_tokens * token * bytes + self.sequences * logits,
            reserve: self.reserve,
            kv_token: local.kv_values() * bytes,
            card,
        })
    }

    /// A table in Markdown: models by name, cards by name and bytes, numbers of cards that share a model.
    pub fn table(&self, models: &[&str], cards: &[(&str, usize)], sizes: &[usize]) -> String {
        let mut table = String::from(
            "| model | card | cards | weights GB | vision GB | step GB | left for KV GB | KV KiB per token | KV tokens |\n\
             |---|---|---|---|---|---|---|---|---|\n",
        );
        for name in models {
            let Some(text) = TextShape::named(name) else { continue };
            let vision = VisionShape::named(name);
            for (card, bytes) in cards {
                for size in sizes {
                    let row = match self.plan(&text, vision.as_ref(), *bytes, *size) {
                        Ok(plan) => plan.row(),
                        Err(error) => format!("not possible: {error} | | | | | |"),
                    };
                    // Writing to a string does not fail.
                    let _ = writeln!(table, "| {name} | {card} | {size} | {row}");
                }
            }
        }
        table
    }
}

impl Plan {
    fn row(&self) -> String {
        let giga = |bytes: usize| format!("{:.1}", bytes as f64 / 1e9);
        let (left, tokens) = match self.kv() {
            Some(bytes) => (giga(bytes), grouped(self.kv_tokens())),
            None => (format!("{} too few", giga(self.fixed() - self.card)), "none".to_owned()),
        };
        format!(
            "{} | {} | {} | {left} | {} | {tokens} |",
            giga(self.weights),
            giga(self.vision),
            giga(self.step),
            self.kv_token as f64 / 1024.0
        )
    }
}

/// With commas between thousands.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(name: &str, card: usize, size: usize) -> Plan {
        let (text, vision) = (TextShape::named(name).unwrap(), VisionShape::named(name));
        Serving::default().plan(&text, vision.as_ref(), card, size).unwrap()
    }

    #[test]
    fn a_plan_of_one_card_holds_the_whole_model() {
        let plan = plan("qwen2.5-vl-7b", 80_000_000_000, 1);
        assert_eq!(plan.weights + plan.vision, 2 * 8_292_166_656);
        assert_eq!(plan.kv_token, 57_344);
        assert_eq!(plan.kv_tokens(), plan.kv().unwrap() / 57_344);
    }

    #[test]
    fn seventy_two_billion_need_more_than_one_card() {
        assert_eq!(plan("qwen2.5-vl-72b", 141_000_000_000, 1).kv(), None);
        assert_eq!(plan("qwen2.5-vl-72b", 141_000_000_000, 1).kv_tokens(), 0);
        assert!(plan("qwen2.5-vl-72b", 80_000_000_000, 2).kv_tokens() < 20_000);
        assert!(plan("qwen2.5-vl-72b", 141_000_000_000, 2).kv_tokens() > 300_000);
        assert!(plan("qwen2.5-vl-72b", 80_000_000_000, 4).kv_tokens() > 400_000);
        assert_eq!(plan("qwen2.5-vl-72b", 80_000_000_000, 4).kv_token, 327_680 / 4);
    }

    /// More cards never leave fewer tokens on each.
    #[test]
    fn every_card_more_is_room_for_tokens() {
        let tokens = [2, 4, 8].map(|size| plan("qwen2.5-vl-72b", 141_000_000_000, size).kv_tokens());
        assert!(tokens[0] < tokens[1] && tokens[1] < tokens[2], "{tokens:?}");
    }

    #[test]
    fn what_is_not_possible_stands_in_the_table_with_its_reason() {
        let cards = [("H100", 80_000_000_000)];
        let table = Serving::default().table(&["qwen2.5-vl-7b", "qwen2.5-vl-72b"], &cards, &[1, 8]);
        assert_eq!(table.lines().count(), 2 + 4);
        assert!(table.lines().all(|line| line.matches('|').count() == 10), "{table}");
        assert!(
            table.contains("not possible: 8 ranks cannot share 28 query heads"),
            "{table}"
        );
        assert!(table.contains("too few"), "{table}");
    }

    #[test]
    fn thousands_are_grouped() {
        let texts = [0, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "1,234,567"]);
    }
}

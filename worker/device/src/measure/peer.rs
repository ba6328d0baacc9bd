//! What a peer reached, as `scripts/peer_bench.py --json FILE` wrote it, by the names that our lines have.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::names;

/// What a peer reached.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Peers {
    /// Rate by the name of our line.
    pub rates: BTreeMap<String, f64>,
    /// Of which shape.
    pub shape: Option<String>,
    /// On which card.
    pub card: Option<String>,
}

impl Peers {
    /// Rates that may stand beside what is measured of this shape on this card.
    ///
    /// # Errors
    /// They are of something else, which is said.
    pub fn beside(self, shape: &str, card: &str) -> Result<BTreeMap<String, f64>, String> {
        let [of, on] = [&self.shape, &self.card].map(|said| said.as_deref().unwrap_or("unknown"));
        if self.rates.is_empty() || (of, on) == (shape, card) {
            return Ok(self.rates);
        }
        Err(format!(
            "the peer's file is of shape {of} on card {on}: nothing of it stands beside {shape} on {card}"
        ))
    }
}

/// One line of the file. The first one says which card, shape and versions they were, and has no name.
#[derive(Deserialize)]
struct Row {
    card: Option<String>,
    shape: Option<String>,
    name: Option<String>,
    value: Option<f64>,
    unit: Option<String>,
}

/// Our line that answers the same question as a row of the peer; the same lengths, the same counting.
pub fn ours(name: &str) -> Option<String> {
    let words = name.split_whitespace().collect::<Vec<_>>();
    let group = |samples: &str, picture| Some(names::requests((1, samples.parse().ok()?), (1536, 256), picture));
    match words.as_slice() {
        ["decode", "static" | "eager", rows] => Some(format!("decode {rows} x 1024")),
        ["decode", "batch", requests] => Some(names::requests((requests.parse().ok()?, 1), (1024, 128), false)),
        ["group", "picture" | "prefix", "static", samples] => group(samples, true),
        ["group", "static" | "batch", samples] => group(samples, false),
        ["prefill", shape] => Some(format!("prefill {}", shape.replace('x', " x "))),
        ["vision", count] => Some(format!("vision {count} of 5476 patches")),
        ["grpo", "8x8x256"] => Some("grpo 8x8x512+256".to_owned()),
        _ => None,
    }
}

/// Reads the lines of a file; the best where one question was measured in several ways.
pub fn read(text: &str) -> Result<Peers, serde_json::Error> {
    let mut peers = Peers::default();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let row: Row = serde_json::from_str(line)?;
        peers.card = peers.card.or(row.card);
        peers.shape = peers.shape.or(row.shape);
        let rates = row.unit.is_some_and(|unit| unit.ends_with("/s"));
        let named = row.name.as_deref().and_then(ours);
        if let (true, Some(name), Some(value)) = (rates, named, row.value) {
            let best = peers.rates.entry(name).or_insert(value);
            *best = value.max(*best);
        }
    }
    peers.rates.retain(|_, rate| *rate > 0.0);
    Ok(peers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as the script writes them.
    const FILE: &str = r#"{"card": "NVIDIA H100 80GB HBM3", "shape": "qwen2.5-vl-7b", "torch": "2.11.0", "cuda": "13.0", "transformers": "5.17.0", "attention": "sdpa"}
{"name": "decode eager 32", "value": 236.5, "unit": "tokens/s", "note": "", "peak_gib": 20.1, "took_s": 9.0}
{"name": "decode static 32", "value": 1653.0, "unit": "tokens/s", "note": "", "peak_gib": 20.1, "took_s": 9.0}
{"name": "group static 128", "value": 2100.0, "unit": "tokens/s", "note": ""}
{"name": "group batch 128", "value": 900.0, "unit": "tokens/s", "note": ""}
{"name": "group picture static 128", "error": "OutOfMemoryError: x", "took_s": 9.0}
{"name": "group picture static 8", "value": 400.0, "unit": "tokens/s", "note": ""}
{"name": "group prefix static 8", "value": 500.0, "unit": "tokens/s", "note": ""}
{"name": "grpo 8x8x256", "value": 3100.0, "unit": "tokens/s", "note": "15.9 s"}
{"name": "train 8x2048", "error": "OutOfMemoryError: x", "took_s": 1.0}
{"name": "prefill 8x2048", "error": "not begun after 420 s"}
"#;

    #[test]
    fn the_best_way_of_a_peer_stands_beside_our_line() {
        let expected = [
            ("decode 32 x 1024", 1653.0),
            ("request of 128 x 1536+256", 2100.0),
            ("request of 8 x 1536+256, picture", 500.0),
            ("grpo 8x8x512+256", 3100.0),
        ];
        let expected = expected.map(|(name, rate)| (name.to_owned(), rate));
        let peers = read(FILE).expect("peers");
        assert_eq!(peers.rates, expected.clone().into());
        let beside = peers.clone().beside("qwen2.5-vl-7b", "NVIDIA H100 80GB HBM3");
        assert_eq!(beside, Ok(expected.into()));
        for (shape, card) in [
            ("qwen2.5-vl-3b", "NVIDIA H100 80GB HBM3"),
            ("qwen2.5-vl-7b", "NVIDIA H200"),
        ] {
            let other = peers.clone().beside(shape, card).expect_err("of something else");
            assert!(other.ends_with(&format!("beside {shape} on {card}")), "{other}");
        }
        assert!(Peers::default().beside("qwen2.5-vl-3b", "a card").is_ok());
    }

    #[test]
    fn seconds_are_no_rate_and_text_is_no_file() {
        let old = r#"{"name": "grpo 8x8x256", "value": 15.9, "unit": "s"}"#;
        assert_eq!(read(old).expect("peers"), Peers::default());
        assert!(read("card NVIDIA").is_err());
    }

    #[test]
    fn rows_without_an_equal_stand_beside_nothing() {
        for name in [
            "train 8x2048",
            "ceiling copy",
            "grpo 8x8x512",
            "group prefix 8",
            "decode",
        ] {
            assert_eq!(ours(name), None, "{name}");
        }
        assert_eq!(ours("decode batch 32").as_deref(), Some("requests 32 x 1024+128"));
        assert_eq!(ours("group batch 8").as_deref(), Some("request of 8 x 1536+256"));
        assert_eq!(ours("prefill 1x4096").as_deref(), Some("prefill 1 x 4096"));
        assert_eq!(ours("vision 4").as_deref(), Some("vision 4 of 5476 patches"));
    }
}

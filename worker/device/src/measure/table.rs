//! Reports as lines of text, each beside what a peer reached, and as one document.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{GrpoStep, Line, Peers, Report};

/// EasyR1's published throughput of GRPO on Qwen2.5-VL-7B, in tokens per second and GPU, and the lengths of its step.
pub const PUBLISHED: (f64, f64) = (1200.0, 1400.0);
const PUBLISHED_OF: (&str, &str) = ("qwen2.5-vl-7b", "64x5x431+300/4");

/// Characters of the names of lines.
const WHAT: usize = 64;

/// Reports so far.
#[derive(Debug)]
pub struct Table {
    peers: Peers,
    /// Of them, what may stand beside this shape on this card.
    beside: BTreeMap<String, f64>,
    shape: String,
    document: Vec<Value>,
}

impl Table {
    /// Empty.
    pub fn new(peers: Peers) -> Self {
        Self {
            peers,
            beside: BTreeMap::new(),
            shape: String::new(),
            document: Vec::new(),
        }
    }

    /// Takes a report; the text to print for it.
    pub fn take(&mut self, report: &Report) -> String {
        match report {
            Report::Begin { shape, card, ceiling } => {
                shape.clone_into(&mut self.shape);
                let beside = std::mem::take(&mut self.peers).beside(shape, card);
                let strange = beside.as_ref().err().cloned();
                self.beside = beside.unwrap_or_default();
                self.document.push(json!({
                    "peer_left_out": strange, "shape": shape, "card": card, "copy_bytes_per_second": ceiling.bandwidth, "bf16_flops": ceiling.arithmetic,
                }));
                format!(
                    "{shape}, random weights, {card}: copies {:.2} TB/s, bf16 products {:.0} TFLOP/s\n{}{}",
                    ceiling.bandwidth / 1e12,
                    ceiling.arithmetic / 1e12,
                    strange.map(|strange| format!("{strange}\n")).unwrap_or_default(),
                    head()
                )
            }
            Report::Line(line) => {
                let peer = self.peer(&line.what);
                self.document
                    .push(json!({"line": line, "of_floor": line.share(), "peer_rate": peer}));
                row(line, peer)
            }
            Report::Grpo(step) => self.grpo(step),
            Report::BestOf(contest) => {
                let line = contest.line();
                self.document
                    .push(json!({"best_of": contest, "line": line, "of_floor": line.share()}));
                format!("{}\n{contest}", row(&line, None))
            }
            Report::Failed { what, error } => {
                self.document.push(json!({"failed": what, "error": error}));
                format!("{what:<WHAT$} FAILED: {error}")
            }
        }
    }

    /// How much could not be measured.
    pub fn failed(&self) -> usize {
        self.document.iter().filter(|part| part.get("failed").is_some()).count()
    }

    /// Everything so far.
    pub fn document(&self) -> Value {
        Value::from(self.document.clone())
    }

    fn peer(&self, what: &str) -> Option<f64> {
        self.beside.get(what).copied()
    }

    fn grpo(&mut self, step: &GrpoStep) -> String {
        let (what, rate) = (step.what(), step.tokens_per_second());
        let peer = self.peer(&what);
        let (shape, lengths) = PUBLISHED_OF;
        let is_published = self.shape == shape
            && lengths.parse() == Ok(step.step.lengths)
            && step.picture.is_some()
            && step.memory.summary().reference;
        let published = is_published.then_some(PUBLISHED);
        self.document.push(json!({
            "grpo": step, "what": what, "tokens_per_second": rate, "of_floor": step.floor() / step.seconds(), "peer_rate": peer, "published": published,
        }));
        let times = published.map(|(least, most)| {
            let (least, most) = (rate / most, rate / least);
            format!("\n  {least:.1} to {most:.1} times the published rate per GPU")
        });
        format!(
            "{what:<WHAT$} {rate:>10.1} {:>9.2} {:>8} {:>9.2} {:>8.0}% {}\n{step}{}",
            1e3 * step.seconds(),
            "-",
            1e3 * step.floor(),
            100.0 * step.floor() / step.seconds(),
            beside(rate, peer),
            times.unwrap_or_default()
        )
    }
}

/// Names of the columns.
fn head() -> String {
    format!(
        "{:<WHAT$} {:>10} {:>9} {:>8} {:>9} {:>9} {:>10} {:>7}",
        "WHAT", "PER SECOND", "MS", "HOST MS", "FLOOR MS", "OF FLOOR", "PEER/S", "RATIO"
    )
}

fn row(line: &Line, peer: Option<f64>) -> String {
    format!(
        "{:<WHAT$} {:>10.1} {:>9.2} {:>8} {:>9.2} {:>8.0}% {}",
        line.what,
        line.rate,
        line.milliseconds,
        line.host.map_or_else(|| "-".to_owned(), |host| format!("{host:.2}")),
        line.floor,
        100.0 * line.share(),
        beside(line.rate, peer)
    )
}

fn beside(rate: f64, peer: Option<f64>) -> String {
    match peer {
        Some(peer) => format!("{peer:>10.1} {:>7.2}", rate / peer),
        None => format!("{:>10} {:>7}", "-", "-"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        TextShape,
        measure::{Ceiling, Floor, Grpo, Memory, Stage, Tower, picture::Size},
    };

    fn step(step: Grpo) -> GrpoStep {
        let shape = TextShape::named("qwen2.5-vl-7b").unwrap();
        GrpoStep {
            step,
            stages: vec![
                Stage {
                    name: "sample",
                    seconds: 4.0,
                    floor: 3.0,
                },
                Stage {
                    name: "update",
                    seconds: 6.0,
                    floor: 4.5,
                },
            ],
            tokens: 49_152,
            drawn: 16_384,
            picture: None,
            apart: 0.01,
            peak_bytes: 72_000_000_000,
            memory: Memory::plan(&shape, None, &step, 85_029_158_912).unwrap(),
        }
    }

    /// Of this shape, on a card on which a peer reached this rate at the 7B one; and what is printed first.
    fn begun_of(shape: &str, what: &str, rate: f64) -> (Table, String) {
        let card = "a card".to_owned();
        let mut table = Table::new(Peers {
            rates: [(what.to_owned(), rate)].into(),
            shape: Some("qwen2.5-vl-7b".to_owned()),
            card: Some(card.clone()),
        });
        let ceiling = Ceiling {
            bandwidth: 3e12,
            arithmetic: 8e14,
        };
        let shape = shape.to_owned();
        let text = table.take(&Report::Begin { shape, card, ceiling });
        (table, text)
    }

    fn begun(what: &str, rate: f64) -> Table {
        let (table, text) = begun_of("qwen2.5-vl-7b", what, rate);
        assert!(text.starts_with("qwen2.5-vl-7b, random weights, a card"), "{text}");
        table
    }

    #[test]
    fn a_peers_file_of_another_shape_is_left_out_and_the_document_says_so() {
        let (table, text) = begun_of("qwen2.5-vl-3b", "decode 1 x 1024", 100.0);
        assert!(text.contains("the peer's file is of shape qwen2.5-vl-7b"), "{text}");
        assert!(table.document()[0]["peer_left_out"].is_string());
        assert_eq!(table.peer("decode 1 x 1024"), None);
    }

    #[test]
    fn the_published_rate_stands_beside_its_own_lengths_alone() {
        let mut table = begun("nothing", 1.0);
        let mut published = step(Grpo::new("64x5x431+300/4".parse().unwrap()));
        published.picture = Some(Size { side: 40 });
        let text = table.take(&Report::Grpo(Box::new(published.clone())));
        assert!(text.ends_with("times the published rate per GPU"), "{text}");
        published.step.lengths = "32x8x1536+512".parse().unwrap();
        assert!(!table.take(&Report::Grpo(Box::new(published))).contains("published"));
    }

    #[test]
    fn a_step_of_the_peers_lengths_stands_beside_the_peer_and_no_other_does() {
        let mut table = begun("grpo 8x8x512+256", 2457.6);
        let equal = table.take(&Report::Grpo(Box::new(step(Grpo::of_peer()))));
        assert!(
            equal.starts_with("grpo 8x8x512+256 ") && equal.contains("2.00"),
            "{equal}"
        );
        assert!(equal.contains("7500.00       75%"), "{equal}");
        assert!(equal.contains("floor   3.00 s,  75 % of it"), "{equal}");
        let other = step(Grpo::new("8x8x512+256".parse().unwrap()));
        assert_eq!(other.what(), "grpo 8x8x512+256, 2 updates, reference");
        let mut shown = other.clone();
        shown.picture = Some(Size { side: 74 });
        assert_eq!(shown.what(), "grpo 8x8x512+256, 2 updates, reference, pictures");
        shown.step.tower = Tower::Frozen;
        assert!(shown.what().ends_with(", pictures, frozen tower"));
        assert!(shown.to_string().contains("74 x 74 patches"));
        table.take(&Report::Grpo(Box::new(other)));
        let document = table.document();
        assert_eq!(document[1]["peer_rate"], 2457.6);
        assert_eq!(document[1]["grpo"]["memory"]["reference"], false);
        // The first is what was measured of the card.
        assert_eq!(document.as_array().map(Vec::len), Some(3));
        assert!(document[2]["peer_rate"].is_null() && document[2]["published"].is_null());
        assert_eq!(document[2]["grpo"]["memory"]["reference"], true);
    }

    #[test]
    fn a_line_shows_its_share_of_the_floor_and_of_the_peer() {
        let floor = Floor {
            seconds: 0.005,
            bound: "memory",
        };
        let line = Line::new("decode 32 x 1024".to_owned(), (32, "tokens"), 0.01, floor).with_host(0.0001);
        let mut table = begun(&line.what, 1600.0);
        let text = table.take(&Report::Line(line));
        for part in ["3200.0", "10.00", "0.10", "5.00", "50%", "1600.0", "2.00"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let failed = Report::Failed {
            what: "vision".to_owned(),
            error: "no memory".to_owned(),
        };
        assert_eq!(table.failed(), 0);
        assert!(table.take(&failed).contains("FAILED: no memory"));
        assert_eq!(table.failed(), 1);
        assert_eq!(table.document().as_array().map(Vec::len), Some(3));
    }
}

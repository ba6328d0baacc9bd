//! Reports as lines of text, each beside what a peer reached, and as one document.

use serde_json::{Value, json};

use super::{GrpoStep, Line, Peers, Report};

/// Published throughput of GRPO on a 7B vision-language model, in tokens per second and GPU.
pub const PUBLISHED: (f64, f64) = (1200.0, 1400.0);

/// Characters of the names of lines.
const WHAT: usize = 64;

/// Reports so far.
#[derive(Debug)]
pub struct Table {
    peers: Peers,
    document: Vec<Value>,
}

impl Table {
    /// Empty.
    pub fn new(peers: Peers) -> Self {
        Self {
            peers,
            document: Vec::new(),
        }
    }

    /// Takes a report; the text to print for it.
    pub fn take(&mut self, report: &Report) -> String {
        match report {
            Report::Begin { shape, card, ceiling } => {
                self.document.push(json!({
                    "shape": shape, "card": card, "copy_bytes_per_second": ceiling.bandwidth, "bf16_flops": ceiling.arithmetic,
                }));
                format!(
                    "{shape}, random weights, {card}: copies {:.2} TB/s, bf16 products {:.0} TFLOP/s\n{}",
                    ceiling.bandwidth / 1e12,
                    ceiling.arithmetic / 1e12,
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

    /// Everything so far.
    pub fn document(&self) -> Value {
        Value::from(self.document.clone())
    }

    fn peer(&self, what: &str) -> Option<f64> {
        self.peers.get(what).copied()
    }

    fn grpo(&mut self, step: &GrpoStep) -> String {
        let (what, rate) = (step.what(), step.tokens_per_second());
        let peer = self.peer(&what);
        self.document.push(json!({
            "grpo": step, "what": what, "tokens_per_second": rate, "peer_rate": peer, "published": PUBLISHED,
        }));
        format!(
            "{what:<WHAT$} {rate:>10.1} {:>9.2} {:>8} {:>9} {:>9} {}\n{step}\n  {:.1} to {:.1} times the published rate per GPU",
            1e3 * step.seconds(),
            "-",
            "-",
            "-",
            beside(rate, peer),
            rate / PUBLISHED.1,
            rate / PUBLISHED.0
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
        "{:<48} {:>10.1} {:>9.2} {:>8} {:>9.2} {:>8.0}% {}",
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
        measure::{Floor, Grpo, Memory, Stage, Tower, picture::Size},
    };

    fn step(step: Grpo) -> GrpoStep {
        let shape = TextShape::named("qwen2.5-vl-7b").unwrap();
        GrpoStep {
            step,
            stages: vec![
                Stage {
                    name: "sample",
                    seconds: 4.0,
                },
                Stage {
                    name: "update",
                    seconds: 6.0,
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

    #[test]
    fn a_step_of_the_peers_lengths_stands_beside_the_peer_and_no_other_does() {
        let mut table = Table::new([("grpo 8x8x512+256".to_owned(), 2457.6)].into());
        let equal = table.take(&Report::Grpo(Box::new(step(Grpo::of_peer()))));
        assert!(
            equal.starts_with("grpo 8x8x512+256 ") && equal.contains("2.00"),
            "{equal}"
        );
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
        assert_eq!(document[0]["peer_rate"], 2457.6);
        assert_eq!(document[0]["grpo"]["memory"]["reference"], false);
        assert!(document[1]["peer_rate"].is_null());
        assert_eq!(document[1]["grpo"]["memory"]["reference"], true);
    }

    #[test]
    fn a_line_shows_its_share_of_the_floor_and_of_the_peer() {
        let floor = Floor {
            seconds: 0.005,
            bound: "memory",
        };
        let line = Line::new("decode 32 x 1024".to_owned(), (32, "tokens"), 0.01, floor).with_host(0.0001);
        let mut table = Table::new([(line.what.clone(), 1600.0)].into());
        let text = table.take(&Report::Line(line));
        for part in ["3200.0", "10.00", "0.10", "5.00", "50%", "1600.0", "2.00"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let failed = Report::Failed {
            what: "vision".to_owned(),
            error: "no memory".to_owned(),
        };
        assert!(table.take(&failed).contains("FAILED: no memory"));
        assert_eq!(table.document().as_array().map(Vec::len), Some(2));
    }
}

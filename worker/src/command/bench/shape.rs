//! `bench --shape`: a released shape with random weights on a GPU, each figure beside its floor and beside what a peer reached.

use std::{collections::BTreeMap, path::Path};

use clap::{Args, ValueEnum};
use serde::Deserialize;

#[cfg(feature = "cuda")]
use crate::device::Place;
use crate::{device::Wanted, error::WorkerError};

/// Arguments of `bench --shape`.
#[derive(Args, Clone, Debug)]
pub struct ShapeArguments {
    /// A released shape instead of a model, with random weights on the GPU: qwen2.5-vl-3b, qwen2.5-vl-7b, llava-onevision-0.5b,
    /// llava-onevision-7b … Needs a build with CUDA.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "adapter"], requires = "random")]
    pub shape: Option<String>,
    /// Draw the weights at random: speed does not depend on them.
    #[arg(long, requires = "shape")]
    pub random: bool,
    /// Parts of the table.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Part::Decode, Part::Group, Part::Prefill, Part::Vision, Part::Grpo])]
    pub parts: Vec<Part>,
    /// JSON lines that `scripts/peer_bench.py --json FILE` wrote on the same card: what transformers reached, shown beside.
    #[arg(long, value_name = "FILE")]
    pub peer: Option<std::path::PathBuf>,
}

/// Parts of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Part {
    /// 1, 8, 32, 128 and 256 sequences after prompts of 1,024 tokens.
    Decode,
    /// Groups over one prompt of 1,536 tokens.
    Group,
    /// Prompts.
    Prefill,
    /// Pictures of 5,476 patches (1,036 x 1,036 pixels); of LLaVA-OneVision pictures of 2 and 10 squares, and 32 frames.
    Vision,
    /// One step of GRPO, all parameters trained.
    Grpo,
}

/// What a peer reached: rate by the name that our line has.
pub type Peers = BTreeMap<String, f64>;

#[derive(Deserialize)]
struct PeerLine {
    what: String,
    value: Option<f64>,
}

/// Our line that answers the same question as a line of `scripts/peer_bench.py`: its rows of whole requests, prompts included, and
/// its step of GRPO, which has other lengths, stand beside none.
fn ours(what: &str) -> Option<String> {
    let words = what.split_whitespace().collect::<Vec<_>>();
    match words.as_slice() {
        ["decode", "static" | "eager", rows] => Some(format!("decode {rows} x 1024")),
        ["prefill", shape] => Some(format!("prefill {}", shape.replace('x', " x "))),
        ["vision", count] => Some(format!("vision {count} of 5476 patches")),
        _ => None,
    }
}

/// Reads what the peer reached; the best where it was measured in several ways.
pub fn read_peers(path: &Path) -> Result<Peers, WorkerError> {
    let failed =
        |error: crate::error::Cause| WorkerError::permanent(format!("failed to read {}", path.display()), error);
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.into()))?;
    let mut peers = Peers::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let line: PeerLine = serde_json::from_str(line).map_err(|error| failed(error.into()))?;
        if let Some(name) = ours(&line.what) {
            let best = peers.entry(name).or_insert(0.0);
            *best = line.value.unwrap_or_default().max(*best);
        }
    }
    peers.retain(|_, rate| *rate > 0.0);
    Ok(peers)
}

/// Prints the table, or one JSON document.
#[cfg(not(feature = "cuda"))]
pub fn run(arguments: &ShapeArguments, _device: Wanted, _json: bool) -> Result<(), WorkerError> {
    if let Some(path) = &arguments.peer {
        read_peers(path)?;
    }
    Err(WorkerError::invalid(crate::device::Fault::Unbuilt.to_string()))
}

/// Prints the table, or one JSON document.
#[cfg(feature = "cuda")]
pub fn run(arguments: &ShapeArguments, device: Wanted, json: bool) -> Result<(), WorkerError> {
    let name = arguments.shape.as_deref().unwrap_or_default();
    let peers = match &arguments.peer {
        Some(path) => read_peers(path)?,
        None => Peers::new(),
    };
    let number = match device.open()?.place {
        Place::Cuda(number) => number,
        Place::Cpu => {
            return Err(WorkerError::invalid(
                "bench --shape measures a GPU: `flotilla-worker doctor` says why there is none",
            ));
        }
    };
    cuda::run(name, number, &arguments.parts, &peers, json)
}

#[cfg(feature = "cuda")]
mod cuda {
    use flotilla_device::{
        DeviceError, Sharing, TextShape, VisionShape,
        measure::{self, Bench, Grpo, GrpoStep, Line},
        shape, siglip,
    };
    use flotilla_kernels::{
        Gpu,
        bench::{Ceilings, ceilings},
    };
    use serde_json::{Value, json};

    use super::{Part, Peers};
    use crate::error::WorkerError;

    /// Published throughput of GRPO on a 7B vision-language model, in tokens per second and GPU.
    const PUBLISHED: (f64, f64) = (1200.0, 1400.0);

    pub fn run(name: &str, number: usize, parts: &[Part], peers: &Peers, json: bool) -> Result<(), WorkerError> {
        let failed = |error: DeviceError| WorkerError::retryable("failed to measure", error);
        let (Some(text), Some(vision)) = (TextShape::named(name), VisionShape::named(name)) else {
            let names = shape::NAMES.join(", ");
            return Err(WorkerError::invalid(format!("no shape {name:?}; there are {names}")));
        };
        let gpu = Gpu::new(number).map_err(|error| failed(error.into()))?;
        let card = gpu.card().map_err(|error| failed(error.into()))?;
        let ceilings = ceilings(&gpu).map_err(|error| failed(error.into()))?;
        let mut table = Table::new(peers, json);
        table.begin(name, &card.name, &ceilings);
        let bench = Bench::new(&gpu, &text, ceilings).map_err(failed)?;
        if parts.contains(&Part::Decode) {
            for rows in [1, 8, 32, 128, 256] {
                table.line(bench.decode(rows, 1024));
            }
        }
        if parts.contains(&Part::Group) {
            for (groups, n) in [(1, 8), (1, 128), (16, 8)] {
                table.line(bench.groups(groups, n, 1536, Sharing::WhereItPays));
                table.line(bench.groups(groups, n, 1536, Sharing::Never));
                table.line(bench.alone(groups * n, 1536));
            }
        }
        if parts.contains(&Part::Prefill) {
            table.line(bench.prefill(1, 4096));
            table.line(bench.prefill(8, 2048));
        }
        if parts.contains(&Part::Grpo) {
            let spec = Grpo {
                prompts: 8,
                group: 8,
                prompt_tokens: 1536,
                new_tokens: 512,
                reference: card.memory > 100 << 30,
            };
            table.grpo(bench.grpo(spec));
        }
        drop(bench);
        match &vision {
            VisionShape::Qwen(tower) if parts.contains(&Part::Vision) => {
                for count in [1, 4] {
                    table.line(measure::vision(&gpu, &ceilings, tower, count, 74));
                }
            }
            VisionShape::Siglip(tower) if parts.contains(&Part::Vision) => {
                let lines = siglip::measure::lines(&gpu, &ceilings, tower).map_err(failed)?;
                lines.into_iter().for_each(|line| table.line(Ok(line)));
            }
            _ => {}
        }
        table.end();
        Ok(())
    }

    struct Table<'a> {
        peers: &'a Peers,
        json: bool,
        document: Vec<Value>,
    }

    impl<'a> Table<'a> {
        fn new(peers: &'a Peers, json: bool) -> Self {
            Self {
                peers,
                json,
                document: Vec::new(),
            }
        }

        fn begin(&mut self, shape: &str, card: &str, ceilings: &Ceilings) {
            self.document.push(json!({
                "shape": shape, "card": card, "copy_bytes_per_second": ceilings.bandwidth, "bf16_flops": ceilings.arithmetic,
            }));
            if !self.json {
                println!(
                    "{shape}, random weights, {card}: copies {:.2} TB/s, bf16 products {:.0} TFLOP/s",
                    ceilings.bandwidth / 1e12,
                    ceilings.arithmetic / 1e12
                );
                println!(
                    "{:<48} {:>10} {:>9} {:>8} {:>9} {:>9} {:>10} {:>7}",
                    "WHAT", "PER SECOND", "MS", "HOST MS", "FLOOR MS", "OF FLOOR", "PEER/S", "RATIO"
                );
            }
        }

        fn line(&mut self, line: Result<Line, DeviceError>) {
            let line = match line {
                Ok(line) => line,
                Err(error) => return self.failed(&error),
            };
            let peer = self.peers.get(&line.what).copied();
            self.document
                .push(json!({"line": line, "of_floor": line.share(), "peer_rate": peer}));
            if !self.json {
                print!(
                    "{:<48} {:>10.1} {:>9.2} {:>8} {:>9.2} {:>8.0}%",
                    line.what,
                    line.rate,
                    line.milliseconds,
                    line.host.map_or_else(|| "-".to_owned(), |host| format!("{host:.2}")),
                    line.floor,
                    100.0 * line.share()
                );
                match peer {
                    Some(peer) => println!(" {peer:>10.1} {:>7.2}", line.rate / peer),
                    None => println!(" {:>10} {:>7}", "-", "-"),
                }
            }
        }

        fn failed(&mut self, error: &DeviceError) {
            self.document.push(json!({"error": error.to_string()}));
            if !self.json {
                println!("FAILED: {error}");
            }
        }

        fn grpo(&mut self, step: Result<GrpoStep, DeviceError>) {
            let step = match step {
                Ok(step) => step,
                Err(error) => return self.failed(&error),
            };
            let (rate, peer) = (step.tokens_per_second(), self.peers.get("grpo").copied());
            self.document
                .push(json!({"grpo": step, "tokens_per_second": rate, "peer_rate": peer, "published": PUBLISHED}));
            if self.json {
                return;
            }
            println!("GRPO, 8 prompts of 1,536 tokens, 8 samples of 512 each, all parameters trained:");
            for (stage, seconds) in [
                ("sample", step.sample),
                ("reward", step.reward),
                ("old", step.old),
                ("reference", step.reference),
                ("update", step.update),
            ] {
                println!(
                    "  {stage:<10} {seconds:>8.2} s {:>5.1} %",
                    100.0 * seconds / step.seconds()
                );
            }
            println!(
                "  together   {:>8.2} s, {rate:.0} tokens/s, {:.1} to {:.1} times the published rate per GPU",
                step.seconds(),
                rate / PUBLISHED.1,
                rate / PUBLISHED.0
            );
            println!(
                "  sampler and learner differ by {:.4} in the mean log-probability",
                step.apart
            );
            println!("  {}", step.plan.to_string().replace('\n', "\n  "));
            println!("  {:<18} {:>8.2} GB at most", "measured", step.peak_bytes as f64 / 1e9);
        }

        fn end(&self) {
            if self.json {
                println!("{:#}", Value::from(self.document.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_way_of_a_peer_stands_beside_our_line() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let lines = [
            r#"{"what": "decode static 32", "value": 1653.0, "unit": "tokens/s"}"#,
            r#"{"what": "decode batch 32", "value": 236.5, "unit": "tokens/s"}"#,
            r#"{"what": "prefill 8x2048", "value": 36768.0, "unit": "tokens/s"}"#,
            r#"{"what": "train 8x2048", "value": null, "unit": "tokens/s", "note": "out of memory"}"#,
        ];
        std::fs::write(file.path(), lines.join("\n")).expect("written");
        let peers = read_peers(file.path()).expect("peers");
        let expected = [("decode 32 x 1024", 1653.0), ("prefill 8 x 2048", 36768.0)];
        assert_eq!(peers, expected.map(|(name, rate)| (name.to_owned(), rate)).into());
    }

    #[test]
    fn a_file_that_is_no_json_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "card NVIDIA").expect("written");
        let error = read_peers(file.path()).expect_err("no JSON").to_string();
        assert!(error.contains(&file.path().display().to_string()), "{error}");
    }
}

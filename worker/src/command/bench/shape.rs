//! `bench --shape`: a released shape with random weights on a GPU, each figure beside its floor and beside what a peer reached.

use std::path::Path;

use clap::{
    Args,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use flotilla_device::{
    TextShape,
    measure::{BestOf, Grpo, Lengths, Options, Part, Peers, Tower, peer},
    shape,
};

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
    #[arg(
        long,
        value_name = "PART,…",
        value_parser = part_by_name(),
        value_delimiter = ',',
        default_values_t = Part::ALL,
        requires = "shape"
    )]
    pub parts: Vec<Part>,
    /// Steps of the part `grpo`: PROMPTSxSAMPLESxTOKENS+NEW, with /UPDATES where it is not two.
    #[arg(
        long,
        value_name = "LENGTHS,…",
        value_delimiter = ',',
        default_values_t = [Lengths::default()],
        requires = "shape"
    )]
    pub grpo: Vec<Lengths>,
    /// No reference model in them: else there is one, a second copy of the weights, where the card has room.
    #[arg(long, requires = "shape")]
    pub no_reference: bool,
    /// No pictures in them: else each prompt of a Qwen2.5-VL has the largest square picture of at most 1,036 x 1,036 pixels
    /// that it has room for.
    #[arg(long, requires = "shape")]
    pub no_pictures: bool,
    /// Do not train the vision tower in them: else it is, where there are pictures.
    #[arg(long, requires = "shape", conflicts_with = "no_pictures")]
    pub freeze_vision: bool,
    /// Of the part `best-of-n`: CANDIDATESxTOKENS+NEW+CRITIC.
    #[arg(long, value_name = "LENGTHS", default_value_t, requires = "shape")]
    pub best_of: BestOf,
    /// JSON lines that `scripts/peer_bench.py --json FILE` wrote on the same card: what transformers reached, shown beside.
    #[arg(long, value_name = "FILE", requires = "shape")]
    pub peer: Option<std::path::PathBuf>,
}

/// A part by its name, with what it measures in the help.
fn part_by_name() -> impl TypedValueParser<Value = Part> {
    let values = Part::ALL.map(|part| PossibleValue::new(part.name()).help(part.about()));
    PossibleValuesParser::new(values).try_map(|name| name.parse::<Part>())
}

impl ShapeArguments {
    /// What is measured.
    pub fn options(&self) -> Options {
        let step = |lengths: &Lengths| Grpo {
            reference: !self.no_reference,
            pictures: !self.no_pictures,
            tower: match self.freeze_vision {
                true => Tower::Frozen,
                false => Tower::Trained,
            },
            ..Grpo::new(*lengths)
        };
        Options {
            parts: self.parts.clone(),
            grpo: self.grpo.iter().map(step).collect(),
            best_of: self.best_of,
        }
    }
}

/// Reads what the peer reached.
fn read_peers(path: &Path) -> Result<Peers, WorkerError> {
    let failed =
        |error: crate::error::Cause| WorkerError::permanent(format!("failed to read {}", path.display()), error);
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.into()))?;
    peer::read(&text).map_err(|error| failed(error.into()))
}

/// Prints the table, or one JSON document. What is wrong with the arguments is said on every machine.
pub fn run(arguments: &ShapeArguments, device: Wanted, json: bool) -> Result<(), WorkerError> {
    let name = arguments.shape.as_deref().unwrap_or_default();
    if TextShape::named(name).is_none() {
        return Err(WorkerError::invalid(shape::unknown(name)));
    }
    let peers = arguments.peer.as_deref().map(read_peers).transpose()?;
    measure(name, &arguments.options(), peers.unwrap_or_default(), device, json)
}

#[cfg(not(feature = "cuda"))]
fn measure(_: &str, _: &Options, _: Peers, _: Wanted, _: bool) -> Result<(), WorkerError> {
    Err(WorkerError::invalid(crate::device::Fault::Unbuilt.to_string()))
}

#[cfg(feature = "cuda")]
fn measure(name: &str, options: &Options, peers: Peers, device: Wanted, json: bool) -> Result<(), WorkerError> {
    use flotilla_device::{
        DeviceError,
        measure::{self, Table},
    };

    let Place::Cuda(number) = device.open()?.place else {
        return Err(WorkerError::invalid(
            "bench --shape measures a GPU: `flotilla-worker doctor` says why there is none",
        ));
    };
    let failed = |error: DeviceError| WorkerError::retryable("failed to measure", error);
    let gpu = flotilla_kernels::Gpu::new(number).map_err(|error| failed(error.into()))?;
    let mut table = Table::new(peers);
    let mut say = |report| {
        let text = table.take(&report);
        if !json {
            println!("{text}");
        }
    };
    measure::run(&gpu, name, options, &mut say).map_err(failed)?;
    if json {
        println!("{:#}", table.document());
    }
    match table.failed() {
        0 => Ok(()),
        failed => Err(WorkerError::Retryable {
            what: format!("{failed} parts could not be measured"),
            source: None,
        }),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, Parser};
    use flotilla_device::measure::knockout::{self, Knockout};

    use super::*;
    use crate::{
        command::bench::BenchArguments,
        critic::{
            bracket::{Kind, Meeting},
            draw::Draw,
            pair::Pair,
        },
    };

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        bench: BenchArguments,
    }

    fn arguments(given: &[&str]) -> Result<ShapeArguments, clap::Error> {
        let given = ["bench"].iter().chain(given);
        let matches = Program::command().try_get_matches_from(given)?;
        Ok(Program::from_arg_matches(&matches)?.bench.shape)
    }

    #[test]
    fn an_unknown_shape_is_told_with_those_that_there_are() {
        let wrong = arguments(&["--shape", "qwen2.5-vl-8b", "--random"]).expect("valid");
        let error = run(&wrong, Wanted::Auto, false).expect_err("no such shape");
        for part in ["qwen2.5-vl-8b", "qwen2.5-vl-7b", "llava-onevision-72b"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert_eq!(error.exit_code(), WorkerError::invalid("").exit_code());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_how_to_get_one() {
        let right = arguments(&["--shape", "qwen2.5-vl-3b", "--random"]).expect("valid");
        let error = run(&right, Wanted::Auto, false).expect_err("no CUDA");
        assert!(error.to_string().contains("make build-cuda"), "{error}");
    }

    #[test]
    fn parts_and_lengths_become_what_is_measured() {
        let all = arguments(&["--shape", "qwen2.5-vl-7b", "--random"])
            .expect("valid")
            .options();
        assert_eq!((all.parts, all.best_of), (Part::ALL.to_vec(), BestOf::default()));
        assert_eq!(all.grpo, [Grpo::new(Lengths::default())]);
        let given = ["--shape", "qwen2.5-vl-7b", "--random", "--parts", "grpo,best-of-n"];
        let more = [
            "--grpo",
            "64x8x1536+1024,8x8x512+256/1",
            "--no-reference",
            "--best-of",
            "16x64+8+4",
        ];
        let some = arguments(&[given.as_slice(), more.as_slice()].concat())
            .expect("valid")
            .options();
        assert_eq!(some.parts, [Part::Grpo, Part::BestOf]);
        assert_eq!(
            (some.grpo[0].lengths.samples(), some.grpo[1].lengths.mini_batches),
            (512, 1)
        );
        assert!(!some.grpo[1].reference && some.grpo[1].pictures);
        assert_eq!(some.grpo[1].tower, Tower::Trained);
        let frozen = arguments(&[given.as_slice(), &["--freeze-vision"]].concat()).expect("valid");
        assert_eq!(frozen.options().grpo[0].tower, Tower::Frozen);
        assert!(arguments(&[given.as_slice(), &["--freeze-vision", "--no-pictures"]].concat()).is_err());
        assert_eq!((some.best_of.n, some.best_of.critic_tokens), (16, 4));
        for wrong in [["--parts", "groups"], ["--grpo", "8x8"], ["--best-of", "1x64+8+4"]] {
            assert!(
                arguments(&[given.as_slice(), wrong.as_slice()].concat()).is_err(),
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn a_file_that_is_no_json_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "card NVIDIA").expect("written");
        let error = read_peers(file.path()).expect_err("no JSON").to_string();
        assert!(error.contains(&file.path().display().to_string()), "{error}");
    }

    /// What is measured are the calls of a job whose critic cannot tell, so that lots decide.
    #[test]
    fn the_measured_contest_asks_what_the_critic_s_knock_out_asks() {
        for n in [2, 3, 7, 128] {
            let (draw, entrants) = (Draw::new(5, n), (0..n).collect::<Vec<_>>());
            let mut bracket = Kind::Knockout.bracket(&entrants, &draw);
            let mut measured = Knockout::new(draw.places(&entrants));
            let mut sizes = Vec::new();
            while !bracket.pairs().is_empty() {
                let pairs = bracket.pairs();
                let ours = measured
                    .pairs()
                    .into_iter()
                    .map(|[first, second]| Pair { first, second });
                assert_eq!(ours.collect::<Vec<_>>(), pairs, "{n}");
                let meetings = pairs.iter().map(|pair| Meeting {
                    pair: *pair,
                    winner: draw.by_lot(*pair),
                    by_lot: true,
                    margin: None,
                });
                let meetings = meetings.collect::<Vec<_>>();
                bracket.record(&meetings);
                measured.record(&meetings.iter().map(|meeting| meeting.winner).collect::<Vec<_>>());
                sizes.push(pairs.len());
            }
            assert_eq!(measured.winner(), bracket.winner());
            let asked = knockout::rounds(n, 1);
            assert_eq!(asked.iter().map(Vec::len).collect::<Vec<_>>(), sizes, "{n}");
        }
    }
}

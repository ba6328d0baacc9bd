//! What measurements say.

use std::fmt;

use serde::Serialize;

use super::{BestOf, Ceiling, Floor, Grpo, Line, Memory, Tower, memory, picture::Size};

/// One of the things that [`run`](super::run) says, in order.
#[derive(Clone, Debug)]
pub enum Report {
    /// What is measured on which card.
    Begin {
        /// The shape's name.
        shape: String,
        /// The card's name.
        card: String,
        /// What the card reaches.
        ceiling: Ceiling,
    },
    /// A line.
    Line(Line),
    /// A step of GRPO.
    Grpo(Box<GrpoStep>),
    /// A best of n.
    BestOf(Contest),
    /// What could not be measured, and why.
    Failed {
        /// What was to be measured.
        what: String,
        /// Why it was not.
        error: String,
    },
}

/// A part of something, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// Its name.
    pub name: &'static str,
    /// Seconds.
    pub seconds: f64,
    /// The least seconds that memory and arithmetic allow; 0 where neither sets them.
    pub floor: f64,
}

/// Seconds of one step of GRPO by stage, in one process over one copy of the weights that are trained.
#[derive(Clone, Debug, Serialize)]
pub struct GrpoStep {
    /// What was asked for.
    pub step: Grpo,
    /// In their order: `vision` encodes pictures, for the samples and again after each update that changes the tower; `sample`
    /// draws, `reward` scores by a rule, `memory` frees the engine's and allocates the learner's, `reference` and `old` are
    /// log-probabilities of the reference, its pictures encoded in it, and of all but the first mini-batch; `update` is gradients
    /// of the language model and updates of all mini-batches, `tower` gradients of the tower.
    pub stages: Vec<Stage>,
    /// Tokens of prompts and samples that are trained on; a prompt counts for each of its samples.
    pub tokens: usize,
    /// Tokens that were drawn.
    pub drawn: usize,
    /// The picture that each prompt had.
    pub picture: Option<Size>,
    /// Mean of `|d|` of the sampler's log-probabilities and the learner's, under the same weights.
    pub apart: f64,
    /// The most bytes that were allocated.
    pub peak_bytes: usize,
    /// Bytes as planned.
    #[serde(serialize_with = "summary")]
    pub memory: Memory,
}

fn summary<S: serde::Serializer>(memory: &Memory, serializer: S) -> Result<S::Ok, S::Error> {
    let summary: memory::Summary = memory.summary();
    summary.serialize(serializer)
}

impl GrpoStep {
    /// The whole.
    pub fn seconds(&self) -> f64 {
        self.stages.iter().map(|stage| stage.seconds).sum()
    }

    /// The least seconds of all stages, one after the other.
    pub fn floor(&self) -> f64 {
        self.stages.iter().map(|stage| stage.floor).sum()
    }

    /// Tokens of prompts and samples per second of the whole step: the `perf/throughput` of EasyR1 and verl.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds()
    }

    /// The question, by which a peer's answer is found: lengths, and what goes beyond one update over text.
    pub fn what(&self) -> String {
        let updates = self.step.lengths.mini_batches;
        let more = [
            (updates > 1).then(|| format!(", {updates} updates")),
            self.memory.reference.then(|| ", reference".to_owned()),
            self.picture.map(|_| match self.step.tower {
                Tower::Trained => ", pictures".to_owned(),
                Tower::Frozen => ", pictures, frozen tower".to_owned(),
            }),
            (!self.step.keep).then(|| ", nothing kept".to_owned()),
        ];
        format!(
            "grpo {}{}",
            self.step.lengths,
            more.into_iter().flatten().collect::<String>()
        )
    }
}

/// Stages, the whole, and the plan.
impl fmt::Display for GrpoStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.seconds();
        for Stage { name, seconds, floor } in &self.stages {
            write!(f, "  {name:<10} {seconds:>8.2} s {:>5.1} %", 100.0 * seconds / all)?;
            match *floor > 0.0 {
                true => writeln!(f, ", floor {floor:>6.2} s, {:>3.0} % of it", 100.0 * floor / seconds)?,
                false => writeln!(f)?,
            }
        }
        writeln!(
            f,
            "  together   {all:>8.2} s, {} tokens, {} of them drawn",
            self.tokens, self.drawn
        )?;
        if let Some(Size { side }) = self.picture {
            writeln!(f, "  pictures of {side} x {side} patches")?;
        }
        writeln!(
            f,
            "  sampler and learner differ by {:.4} in the mean log-probability",
            self.apart
        )?;
        writeln!(f, "  {}", self.memory.to_string().replace('\n', "\n  "))?;
        write!(f, "  {:.1} GB were allocated at most", self.peak_bytes as f64 / 1e9)
    }
}

/// One stage of a best of n.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Wave {
    /// Requests that were in the engine at once.
    pub requests: usize,
    /// Tokens of their prompts, that of the candidates once.
    pub asked: usize,
    /// Tokens of prompts that were computed.
    pub computed: usize,
    /// Tokens that were drawn.
    pub drawn: usize,
    /// Seconds.
    pub seconds: f64,
    /// Seconds at least.
    pub floor: f64,
}

/// A best of n: candidates, then the rounds of a knock-out.
#[derive(Clone, Debug, Serialize)]
pub struct Contest {
    /// What was asked for.
    pub question: BestOf,
    /// Candidates first, then each round.
    pub waves: Vec<Wave>,
}

impl Contest {
    /// What was measured.
    pub fn what(&self) -> String {
        let alone = if self.question.margins { "" } else { ", without margins" };
        format!("best of {}{alone}", self.question)
    }

    /// The whole.
    pub fn seconds(&self) -> f64 {
        self.waves.iter().map(|wave| wave.seconds).sum()
    }

    /// The least that the whole could take.
    pub fn floor(&self) -> f64 {
        self.waves.iter().map(|wave| wave.floor).sum()
    }

    /// Tokens that were drawn, of candidates and critic, per second of the whole.
    pub fn tokens_per_second(&self) -> f64 {
        let drawn = self.waves.iter().map(|wave| wave.drawn).sum::<usize>();
        drawn as f64 / self.seconds()
    }

    /// The whole as a line of the table.
    pub fn line(&self) -> Line {
        let drawn = self.waves.iter().map(|wave| wave.drawn).sum();
        let floor = Floor {
            seconds: self.floor(),
            bound: "both",
        };
        Line::new(self.what(), (drawn, "tokens"), self.seconds(), floor)
    }
}

/// Stages.
impl fmt::Display for Contest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (round, wave) in self.waves.iter().enumerate() {
            let name = match round {
                0 => format!("{} candidates", self.question.n),
                _ => format!("round {round}, {} comparisons", wave.requests),
            };
            let end = if round + 1 < self.waves.len() { "\n" } else { "" };
            write!(
                f,
                "  {name:<26} {:>7.2} s, floor {:>5.2} s, {:>6.0} tokens/s drawn, {} of {} prompt tokens computed{end}",
                wave.seconds,
                wave.floor,
                wave.drawn as f64 / wave.seconds,
                wave.computed,
                wave.asked
            )?;
        }
        Ok(())
    }
}

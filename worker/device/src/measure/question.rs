//! What is asked of a whole job: lengths and ways, as options say them.

use std::{fmt, ops::Range, str::FromStr};

use serde::Serialize;

use super::picture::Size;
use crate::shape::QwenVision;

/// Lengths that cannot be read.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{given:?} is not {form}, with numbers of at least 1")]
pub struct LengthsError {
    given: String,
    form: &'static str,
}

/// Numbers of at least 1, parted by these characters in this order.
fn numbers<const N: usize>(text: &str, parting: [char; N]) -> Option<(Vec<usize>, &str)> {
    let mut rest = text;
    let mut found = Vec::with_capacity(N);
    for character in parting {
        let (number, after) = rest.split_once(character)?;
        found.push(number.parse().ok().filter(|number| *number > 0)?);
        rest = after;
    }
    Some((found, rest))
}

fn positive(text: &str) -> Option<usize> {
    text.parse().ok().filter(|number| *number > 0)
}

/// One step of GRPO: `PROMPTSxSAMPLESxTOKENS+NEW`, and `/UPDATES` where it is not two.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Lengths {
    /// Prompts.
    pub prompts: usize,
    /// Samples of each.
    pub group: usize,
    /// Tokens of a prompt, those of its picture included.
    pub prompt_tokens: usize,
    /// Tokens of a sample.
    pub new_tokens: usize,
    /// Mini-batches among which the samples are divided: each is an update.
    pub mini_batches: usize,
}

/// Mini-batches where nothing is said: the paper's 256 prompts of a step in batches of 128.
const MINI_BATCHES: usize = 2;

/// What one of the paper's 8 GPUs has of a step of 256 prompts.
impl Default for Lengths {
    fn default() -> Self {
        Self {
            prompts: 32,
            group: 8,
            prompt_tokens: 1536,
            new_tokens: 512,
            mini_batches: MINI_BATCHES,
        }
    }
}

impl FromStr for Lengths {
    type Err = LengthsError;

    fn from_str(text: &str) -> Result<Self, LengthsError> {
        let refused = || LengthsError {
            given: text.to_owned(),
            form: "PROMPTSxSAMPLESxTOKENS+NEW or PROMPTSxSAMPLESxTOKENS+NEW/UPDATES",
        };
        let (found, rest) = numbers(text, ['x', 'x', '+']).ok_or_else(refused)?;
        let (new, mini_batches) = match rest.split_once('/') {
            Some((new, mini_batches)) => (new, positive(mini_batches).ok_or_else(refused)?),
            None => (rest, MINI_BATCHES),
        };
        let lengths = Self {
            prompts: found[0],
            group: found[1],
            prompt_tokens: found[2],
            new_tokens: positive(new).ok_or_else(refused)?,
            mini_batches,
        };
        if mini_batches > lengths.samples() {
            return Err(refused());
        }
        Ok(lengths)
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            prompts,
            group,
            prompt_tokens,
            new_tokens,
            ..
        } = self;
        write!(f, "{prompts}x{group}x{prompt_tokens}+{new_tokens}")
    }
}

impl Lengths {
    /// Samples of a step.
    pub fn samples(&self) -> usize {
        self.prompts * self.group
    }

    /// Tokens of a prompt with one of its samples.
    pub fn sequence(&self) -> usize {
        self.prompt_tokens + self.new_tokens
    }

    /// Samples of each mini-batch: as even as they can be, the larger ones first.
    pub fn updates(&self) -> Vec<Range<usize>> {
        divide(self.samples(), self.mini_batches)
    }
}

/// `count` things in `parts` ranges that differ by one at most, none empty.
pub fn divide(count: usize, parts: usize) -> Vec<Range<usize>> {
    let parts = parts.clamp(1, count.max(1));
    let (each, more) = (count / parts, count % parts);
    let begin = |part: usize| part * each + part.min(more);
    (0..parts).map(|part| begin(part)..begin(part + 1)).collect()
}

/// Whether the vision tower of a step of GRPO learns.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tower {
    /// With the language model, all parameters in one update.
    #[default]
    Trained,
    /// It stays as it is.
    Frozen,
}

impl FromStr for Tower {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "trained" => Ok(Self::Trained),
            "frozen" => Ok(Self::Frozen),
            _ => Err(format!("{text:?} is neither trained nor frozen")),
        }
    }
}

/// A step of GRPO and how it is done.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Grpo {
    /// How much.
    pub lengths: Lengths,
    /// Whether log-probabilities of a frozen reference are computed, from a second copy of the weights, where the card has
    /// room for one.
    pub reference: bool,
    /// Whether each prompt has a picture, where the tower is that of Qwen2.5-VL and the prompt has room for one.
    pub pictures: bool,
    /// Whether that tower is trained.
    pub tower: Tower,
    /// Whether activations are kept for the backward pass, as far as the card has room.
    pub keep: bool,
    /// The most sequences that are sampled at once.
    pub rows: usize,
}

impl Grpo {
    /// Everything that a step of GRPO has.
    pub fn new(lengths: Lengths) -> Self {
        Self {
            lengths,
            reference: true,
            pictures: true,
            tower: Tower::default(),
            keep: true,
            rows: 256,
        }
    }

    /// The picture of each prompt; none where the step wants none or a prompt has no room.
    pub fn picture(&self, tower: &QwenVision) -> Option<Size> {
        let largest = || Size::largest(tower, self.lengths.prompt_tokens);
        self.pictures.then(largest).flatten()
    }

    /// The step that `scripts/peer_bench.py` measures: one update, text alone, no reference.
    pub fn of_peer() -> Self {
        Self {
            reference: false,
            pictures: false,
            ..Self::new(Lengths {
                prompts: 8,
                group: 8,
                prompt_tokens: 512,
                new_tokens: 256,
                mini_batches: 1,
            })
        }
    }
}

/// One best of n: `NxTOKENS+NEW+CRITIC`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct BestOf {
    /// Candidates.
    pub n: usize,
    /// Tokens of the question.
    pub prompt_tokens: usize,
    /// Tokens of a candidate.
    pub new_tokens: usize,
    /// Tokens that the critic writes about a pair.
    pub critic_tokens: usize,
    /// Whether the critic's log-odds are read beside its words, as a job does unless told otherwise: two labels are watched
    /// at every token.
    pub margins: bool,
}

/// What best of n takes at most.
pub const MOST_CANDIDATES: usize = 128;

impl Default for BestOf {
    fn default() -> Self {
        Self {
            n: MOST_CANDIDATES,
            prompt_tokens: 1536,
            new_tokens: 512,
            critic_tokens: 256,
            margins: true,
        }
    }
}

impl FromStr for BestOf {
    type Err = LengthsError;

    fn from_str(text: &str) -> Result<Self, LengthsError> {
        let refused = || LengthsError {
            given: text.to_owned(),
            form: "NxTOKENS+NEW+CRITIC with 2 to 128 candidates",
        };
        let (found, rest) = numbers(text, ['x', '+', '+']).ok_or_else(refused)?;
        let read = Self {
            n: found[0],
            prompt_tokens: found[1],
            new_tokens: found[2],
            critic_tokens: positive(rest).ok_or_else(refused)?,
            margins: true,
        };
        if !(2..=MOST_CANDIDATES).contains(&read.n) {
            return Err(refused());
        }
        Ok(read)
    }
}

impl fmt::Display for BestOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            n,
            prompt_tokens,
            new_tokens,
            critic_tokens,
            ..
        } = self;
        write!(f, "{n}x{prompt_tokens}+{new_tokens}+{critic_tokens}")
    }
}

/// A part of the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// Steps of sequences after prompts of 1,024 tokens.
    Decode,
    /// Steps of samples of one prompt.
    Group,
    /// Whole requests.
    Request,
    /// Prompts.
    Prefill,
    /// Best of n.
    BestOf,
    /// Steps of GRPO.
    Grpo,
    /// The step of GRPO that the peer measures.
    GrpoPeer,
    /// Pictures.
    Vision,
}

impl Part {
    /// In the order in which they are measured.
    pub const ALL: [Self; 8] = [
        Self::Decode,
        Self::Group,
        Self::Request,
        Self::Prefill,
        Self::BestOf,
        Self::Grpo,
        Self::GrpoPeer,
        Self::Vision,
    ];

    /// As an option names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Group => "group",
            Self::Request => "request",
            Self::Prefill => "prefill",
            Self::Vision => "vision",
            Self::BestOf => "best-of-n",
            Self::Grpo => "grpo",
            Self::GrpoPeer => "grpo-peer",
        }
    }

    /// What it measures.
    pub fn about(self) -> &'static str {
        match self {
            Self::Decode => "1, 8, 32, 128 and 256 sequences after prompts of 1,024 tokens, step by step",
            Self::Group => {
                "samples of one prompt of 1,536 tokens, 1,369 of them a picture, step by step, with and without sharing"
            }
            Self::Request => {
                "whole requests, prompts and pictures included: 8 and 128 samples of such a prompt, the same with nothing \
                 shared, and text"
            }
            Self::Prefill => "prompts",
            Self::Vision => "pictures of 5,476 patches (1,036 x 1,036 pixels)",
            Self::BestOf => "candidates and the knock-out in which the model compares them",
            Self::Grpo => "steps of GRPO, all parameters trained, those of the vision tower too",
            Self::GrpoPeer => "the step of GRPO that scripts/peer_bench.py measures: text, one update, no reference",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|part| part.name() == text);
        found.ok_or_else(|| format!("no part {text:?}; there are {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// What is measured of a shape.
#[derive(Clone, Debug)]
pub struct Options {
    /// Parts, measured in the order of [`Part::ALL`].
    pub parts: Vec<Part>,
    /// Steps of the part `grpo`.
    pub grpo: Vec<Grpo>,
    /// Of the part `best-of-n`.
    pub best_of: BestOf,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            parts: Part::ALL.to_vec(),
            grpo: vec![Grpo::new(Lengths::default())],
            best_of: BestOf::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::VisionShape;

    #[test]
    fn lengths_are_read_as_they_are_written() {
        let read = |text: &str| text.parse::<Lengths>();
        assert_eq!(read("32x8x1536+512"), Ok(Lengths::default()));
        let four = read("64x5x431+300/4").expect("valid");
        assert_eq!((four.samples(), four.sequence(), four.mini_batches), (320, 731, 4));
        assert_eq!(read(&four.to_string()).map(|read| read.mini_batches), Ok(2));
        for wrong in [
            "",
            "8x8",
            "8x8x1536",
            "0x8x1536+512",
            "8x8x1536+0",
            "8x8x1536+512/0",
            "1x2x9+9/3",
            "8x8x1536+512x",
        ] {
            let error = read(wrong).expect_err(wrong).to_string();
            assert!(error.contains(wrong) && error.contains("PROMPTSxSAMPLES"), "{error}");
        }
    }

    #[test]
    fn a_best_of_n_is_read_and_has_2_to_128_candidates() {
        assert_eq!("128x1536+512+256".parse::<BestOf>(), Ok(BestOf::default()));
        assert_eq!(BestOf::default().to_string(), "128x1536+512+256");
        for wrong in ["1x9+9+9", "129x9+9+9", "8x9+9", "8x9+9+0"] {
            assert!(wrong.parse::<BestOf>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_part_is_found_by_its_name() {
        for part in Part::ALL {
            assert_eq!(part.name().parse(), Ok(part));
        }
        let error = "groups".parse::<Part>().expect_err("no part");
        assert!(error.contains("group, request"), "{error}");
    }

    #[test]
    fn samples_are_divided_evenly_and_none_is_left() {
        let sizes = |count, parts| {
            divide(count, parts)
                .into_iter()
                .map(|range| range.len())
                .collect::<Vec<_>>()
        };
        assert_eq!(Lengths::default().updates(), [0..128, 128..256]);
        assert_eq!(sizes(10, 4), [3, 3, 2, 2]);
        assert_eq!(sizes(3, 5), [1, 1, 1]);
        assert_eq!(
            divide(10, 3).iter().cloned().flatten().collect::<Vec<_>>(),
            (0..10).collect::<Vec<_>>()
        );
        assert_eq!(divide(0, 2), [std::ops::Range::default()]);
    }

    #[test]
    fn a_tower_is_trained_unless_it_is_called_frozen() {
        assert_eq!(Grpo::new(Lengths::default()).tower, Tower::Trained);
        assert_eq!("frozen".parse(), Ok(Tower::Frozen));
        let error = "no".parse::<Tower>().expect_err("neither");
        assert!(error.contains("\"no\"") && error.contains("frozen"), "{error}");
    }

    #[test]
    fn short_prompts_have_small_pictures_and_steps_without_pictures_none() {
        let Some(VisionShape::Qwen(tower)) = VisionShape::named("qwen2.5-vl-7b") else {
            unreachable!("a released shape")
        };
        let side = |lengths: &str| {
            let step = Grpo::new(lengths.parse().expect("valid"));
            step.picture(&tower).map(|size| size.side)
        };
        assert_eq!(side("32x8x1536+512"), Some(74));
        assert_eq!(side("64x5x431+300/4"), Some(36));
        assert_eq!(side("8x8x64+64"), None);
        assert_eq!(Grpo::of_peer().picture(&tower), None);
    }

    #[test]
    fn the_peers_step_has_one_update_and_nothing_that_the_peer_has_not() {
        let peer = Grpo::of_peer();
        assert_eq!(peer.lengths, "8x8x512+256/1".parse().expect("valid"));
        assert!(!peer.reference && !peer.pictures);
    }
}

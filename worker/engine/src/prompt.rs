//! A prompt for the vision-language models, and what its tokens are for the prefix cache.

use std::{ops::Range, sync::OnceLock};

use candle_core::{DType, Tensor};
use flotilla_model::{Row, Visual, rope::Position};
use sha2::{Digest as _, Sha256};

use crate::runner::Cause;

/// What tells the features of pictures and videos apart.
pub type Digest = [u8; 32];

/// A prompt: tokens with their positions, and pictures and videos as features or still as pixels. It does not change once
/// the engine has it.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// Tokens; its features are those of images that the caller has encoded (a trainer with a frozen vision tower does
    /// so once for a whole run).
    pub row: Row,
    /// Visuals that the engine encodes, with the index of the first placeholder token that each replaces.
    pub visuals: Vec<(usize, Visual)>,
    identity: OnceLock<Identity>,
}

/// What the model computes from, digested where it is large.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Position of the first token after the prompt.
    pub next_position: u32,
    /// Digests of given features, then of the visuals, in the order of the prompt's lists, with the tokens that they
    /// stand for.
    pub features: Vec<(Range<usize>, Digest)>,
    /// See [`Self::features`].
    pub visuals: Vec<(Range<usize>, Digest)>,
}

impl Prompt {
    /// Tokens, and visuals with the index of the first placeholder token that each replaces.
    pub fn new(row: Row, visuals: Vec<(usize, Visual)>) -> Self {
        Self {
            row,
            visuals,
            identity: OnceLock::new(),
        }
    }

    /// What its tokens are. The first call digests pixels and features, which takes a while: callers make it before they
    /// give the prompt to an engine that others wait for.
    pub fn identity(&self) -> Result<&Identity, Cause> {
        if let Some(identity) = self.identity.get() {
            return Ok(identity);
        }
        let identity = self.digest()?;
        Ok(self.identity.get_or_init(|| identity))
    }

    fn digest(&self) -> Result<Identity, Cause> {
        let mut features = Vec::with_capacity(self.row.features.len());
        for (start, tensor) in &self.row.features {
            features.push((*start..start + tensor.dim(0)?, digest_features(tensor)?));
        }
        let starts = self.visuals.iter().map(|(start, _)| *start);
        let visuals = starts.map(|start| self.placeholders(start));
        let digests = self.visuals.iter().map(|(_, visual)| digest_visual(visual));
        Ok(Identity {
            next_position: self.row.next_position(),
            features,
            visuals: visuals.zip(digests).collect(),
        })
    }

    /// The run of placeholder tokens that a visual stands for.
    fn placeholders(&self, start: usize) -> Range<usize> {
        let ids = &self.row.ids;
        let next = self
            .visuals
            .iter()
            .map(|(start, _)| *start)
            .filter(|next| *next > start);
        let end = next.min().unwrap_or(ids.len()).min(ids.len());
        let run = ids.get(start..end).unwrap_or_default();
        let length = run.iter().take_while(|id| Some(*id) == run.first()).count();
        start..start + length
    }

    /// Ids and positions of tokens of the prompt followed by `drawn`.
    pub fn tokens(&self, drawn: &[u32], range: &Range<usize>) -> Result<(Vec<u32>, Vec<Position>), Cause> {
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        self.push_tokens(drawn, range, &mut ids, &mut positions)?;
        Ok((ids, positions))
    }

    /// As [`Self::tokens`], after others.
    pub fn push_tokens(
        &self,
        drawn: &[u32],
        range: &Range<usize>,
        ids: &mut Vec<u32>,
        positions: &mut Vec<Position>,
    ) -> Result<(), Cause> {
        let next_position = self.identity()?.next_position;
        let prompt_tokens = self.row.ids.len();
        let own = range.start.min(prompt_tokens)..range.end.min(prompt_tokens);
        let after = range.start.saturating_sub(prompt_tokens)..range.end.saturating_sub(prompt_tokens);
        ids.extend_from_slice(self.row.ids.get(own.clone()).unwrap_or_default());
        positions.extend_from_slice(self.row.positions.get(own).unwrap_or_default());
        ids.extend_from_slice(drawn.get(after.clone()).unwrap_or_default());
        positions.extend(after.map(|index| [next_position + index as u32; 3]));
        Ok(())
    }

    /// See [`crate::Runner::content`]: ids and positions, and for each token of a picture or video the digest of that and
    /// where in it the token is.
    pub fn content(&self, drawn: &[u32], range: Range<usize>, out: &mut Vec<u8>) -> Result<(), Cause> {
        let identity = self.identity()?;
        let (ids, positions) = self.tokens(drawn, &range)?;
        for ((index, id), position) in range.zip(&ids).zip(&positions) {
            out.extend(id.to_le_bytes());
            out.extend(position.iter().flat_map(|axis| axis.to_le_bytes()));
            for (tokens, digest) in identity.features.iter().chain(&identity.visuals) {
                if tokens.contains(&index) {
                    out.extend(digest);
                    out.extend(((index - tokens.start) as u64).to_le_bytes());
                }
            }
        }
        Ok(())
    }
}

impl From<Row> for Prompt {
    fn from(row: Row) -> Self {
        Self::new(row, Vec::new())
    }
}

impl From<flotilla_model::Prompt> for Prompt {
    fn from(prompt: flotilla_model::Prompt) -> Self {
        let row = Row {
            ids: prompt.ids,
            positions: prompt.positions,
            features: Vec::new(),
        };
        let starts = prompt.spans.iter().map(|(start, _)| *start);
        Self::new(row, starts.zip(prompt.visuals).collect())
    }
}

fn digest_features(features: &Tensor) -> Result<Digest, Cause> {
    let values = features.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut hash = Sha256::new();
    hash.update(b"features");
    update(&mut hash, &values);
    Ok(hash.finalize().into())
}

/// What a visual is, for [`Prompt::identity`] and whoever keeps features by it.
pub fn digest_visual(visual: &Visual) -> Digest {
    let mut hash = Sha256::new();
    // The layout's text has every number that it is made of.
    hash.update(format!("{:?}", visual.layout));
    update(&mut hash, &visual.values);
    hash.finalize().into()
}

/// Takes the values in, some thousand at a time.
fn update(hash: &mut Sha256, values: &[f32]) {
    let mut bytes = Vec::with_capacity(4 * 4096);
    for part in values.chunks(4096) {
        bytes.clear();
        bytes.extend(part.iter().flat_map(|value| value.to_le_bytes()));
        hash.update(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use flotilla_model::Layout;

    use super::*;

    fn visual(value: f32, layout: Layout) -> Visual {
        Visual {
            values: vec![value; 8],
            layout,
        }
    }

    /// Placeholders 9 at 1 to 3 and at 4 to 5, text around them.
    fn prompt(first: Visual, second: Visual) -> Prompt {
        let row = Row::text(vec![1, 9, 9, 9, 9, 9, 2]);
        Prompt::new(row, vec![(1, first), (4, second)])
    }

    fn content(prompt: &Prompt, range: Range<usize>) -> Vec<u8> {
        let mut out = Vec::new();
        prompt.content(&[7, 8], range, &mut out).expect("content");
        out
    }

    #[test]
    fn each_placeholder_belongs_to_its_visual() {
        let prompt = prompt(visual(1.0, Layout::Square), visual(2.0, Layout::Square));
        let identity = prompt.identity().expect("digests");
        let ranges = identity
            .visuals
            .iter()
            .map(|(range, _)| range.clone())
            .collect::<Vec<_>>();
        assert_eq!(ranges, [1..4, 4..6]);
        assert_ne!(identity.visuals[0].1, identity.visuals[1].1);
    }

    #[test]
    fn content_tells_pictures_layouts_and_places_in_them_apart() {
        let plain = || visual(1.0, Layout::Square);
        let same = prompt(plain(), plain());
        assert_eq!(content(&same, 0..9), content(&prompt(plain(), plain()), 0..9));
        for other in [
            prompt(visual(2.0, Layout::Square), plain()),
            prompt(visual(1.0, Layout::Frames { frames: 1 }), plain()),
        ] {
            assert_eq!(content(&same, 0..1), content(&other, 0..1));
            assert_ne!(content(&same, 1..2), content(&other, 1..2));
            assert_eq!(content(&same, 4..9), content(&other, 4..9));
        }
    }

    #[test]
    fn given_features_are_told_apart_by_their_values() {
        let with = |value: f32| {
            let mut row = Row::text(vec![1, 9, 9, 2]);
            let features = Tensor::full(value, (2, 4), &Device::Cpu).expect("features");
            row.features.push((1, features));
            Prompt::from(row)
        };
        assert_eq!(content(&with(1.0), 0..4), content(&with(1.0), 0..4));
        assert_ne!(content(&with(1.0), 1..2), content(&with(2.0), 1..2));
    }

    #[test]
    fn drawn_tokens_are_what_they_would_be_in_a_longer_prompt() {
        let short = Prompt::from(Row::text(vec![1, 2, 3]));
        let long = Prompt::from(Row::text(vec![1, 2, 3, 7, 8]));
        assert_eq!(content(&short, 2..5), content(&long, 2..5));
        let (ids, positions) = short.tokens(&[7, 8], &(2..5)).expect("tokens");
        assert_eq!(ids, [3, 7, 8]);
        assert_eq!(positions, [[2; 3], [3; 3], [4; 3]]);
    }
}

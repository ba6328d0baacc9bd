//! A picture at the beginning of a prompt.

use flotilla_kernels::{Dtype, Float};
use flotilla_model::{
    Layout, ModelError, Row, Visual,
    qwen2_5_vl::positions::{VisualSpan, positions},
};
use half::bf16;
use serde::Serialize;

use crate::shape::QwenVision;

/// Patches each way at most: 1,036 x 1,036 pixels.
pub const SIDE: usize = 74;

/// Patches each way at least.
const LEAST_SIDE: usize = 4;

/// The first token that a picture stands for; what comes before opens the turn.
pub const START: usize = 8;

/// Tokens after a picture at least: a question about it.
const QUESTION: usize = 64;

/// The token that stands for a part of a picture.
const PLACEHOLDER: u32 = 151_655;

/// The size of a square picture.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct Size {
    /// Patches each way: a multiple of those that become one token.
    pub side: usize,
}

impl Size {
    /// The largest that leaves room for a question in a prompt of so many tokens; none where not even 4 x 4 patches do.
    pub fn largest(tower: &QwenVision, prompt_tokens: usize) -> Option<Self> {
        let room = prompt_tokens.checked_sub(START + QUESTION)?;
        let side = room.isqrt().min(SIDE / tower.merge) * tower.merge;
        (side >= LEAST_SIDE).then_some(Self { side })
    }

    /// Patches.
    pub fn patches(self) -> usize {
        self.side * self.side
    }

    /// Tokens of a prompt that it takes.
    pub fn tokens(self, tower: &QwenVision) -> usize {
        self.patches() / (tower.merge * tower.merge)
    }

    /// How many go through the tower together: as many as have no more patches than the largest picture.
    pub fn together(self) -> usize {
        (SIDE * SIDE / self.patches()).max(1)
    }

    /// Bytes of the features of one.
    pub fn feature_bytes(self, tower: &QwenVision) -> usize {
        const BF16: Dtype = bf16::DTYPE;
        self.tokens(tower) * tower.output * BF16.bytes()
    }

    /// Values of a picture like no other of another `seed`.
    pub fn visual(self, tower: &QwenVision, seed: u32) -> Visual {
        let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
        let values = (0..self.patches() * tower.patch_values()).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        });
        Visual {
            values: values.collect(),
            layout: Layout::Patches {
                grid: self.grid(),
                time_step: 0.0,
                video: false,
            },
        }
    }

    /// A prompt with placeholders of the picture in the place of some of its tokens, and positions as they spread over it.
    ///
    /// # Errors
    /// The prompt ends before the picture does.
    pub fn row(self, tower: &QwenVision, mut ids: Vec<u32>) -> Result<Row, ModelError> {
        let span = VisualSpan {
            start: START,
            grid: self.grid(),
            time_step: 0.0,
        };
        let end = START + span.tokens(tower.merge);
        // Where text has the placeholder's id the run would not end where the picture does.
        ids.iter_mut().filter(|id| **id == PLACEHOLDER).for_each(|id| *id = 0);
        let length = ids.len();
        let given = ids.get_mut(START..end);
        let given =
            given.ok_or_else(|| ModelError::Input(format!("a picture of {end} tokens in a prompt of {length}")))?;
        given.fill(PLACEHOLDER);
        Ok(Row {
            positions: positions(length, &[span], tower.merge)?,
            ids,
            features: Vec::new(),
        })
    }

    fn grid(self) -> [usize; 3] {
        [1, self.side, self.side]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::VisionShape;

    fn tower() -> QwenVision {
        match VisionShape::named("qwen2.5-vl-7b") {
            Some(VisionShape::Qwen(tower)) => tower,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_picture_is_the_largest_square_that_leaves_room_for_a_question() {
        let tower = tower();
        let sides = [75, 76, 79, 431, 512, 1440, 1441, 1536, 100_000].map(|tokens| {
            let size = Size::largest(&tower, tokens);
            size.map_or(0, |size| size.side)
        });
        assert_eq!(sides, [0, 4, 4, 36, 40, 72, 74, 74, 74]);
        for tokens in 0..2000 {
            if let Some(size) = Size::largest(&tower, tokens) {
                assert!(START + size.tokens(&tower) + QUESTION <= tokens, "{tokens}");
            }
        }
        let of_short = Size { side: 36 };
        assert_eq!((of_short.tokens(&tower), of_short.side * 14), (324, 504));
        assert_eq!((of_short.together(), Size { side: SIDE }.together()), (4, 1));
    }

    #[test]
    fn a_picture_is_most_of_a_prompt_and_the_text_goes_on_after_its_side() {
        let tower = tower();
        let size = Size::largest(&tower, 1536).unwrap();
        assert_eq!(size.tokens(&tower), 1369);
        let row = size.row(&tower, (0..1536).collect()).unwrap();
        let placeholders = row.ids.iter().filter(|id| **id == PLACEHOLDER).count();
        assert_eq!(
            (placeholders, row.ids[START - 1], row.ids[START + 1369]),
            (1369, 7, 1377)
        );
        assert_eq!(row.positions[START + 1368], [8, 8 + 36, 8 + 36]);
        assert_eq!(row.positions[START + 1369], [45; 3]);
        assert!(size.row(&tower, vec![0; 512]).is_err());
    }

    #[test]
    fn pictures_differ_and_have_the_values_that_the_tower_reads() {
        let tower = tower();
        let size = Size { side: 36 };
        let (one, two) = (size.visual(&tower, 1), size.visual(&tower, 2));
        assert_eq!(one.values.len(), 1296 * tower.patch_values());
        assert!(one.values.iter().all(|value| (-1.0..1.0).contains(value)));
        assert_ne!(one, two);
    }
}

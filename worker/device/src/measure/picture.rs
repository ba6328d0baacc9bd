//! A picture at the beginning of a prompt.

use flotilla_kernels::{Dtype, Float};
use flotilla_model::{
    Layout, ModelError, Row, Visual,
    qwen2_5_vl::positions::{VisualSpan, positions},
};
use half::bf16;

use crate::shape::QwenVision;

/// Patches each way: 1,036 x 1,036 pixels.
pub const SIDE: usize = 74;

/// The first token that a picture stands for; what comes before opens the turn.
const START: usize = 8;

/// The token that stands for a part of a picture.
const PLACEHOLDER: u32 = 151_655;

/// Tokens of a picture.
pub fn tokens(tower: &QwenVision) -> usize {
    (SIDE / tower.merge) * (SIDE / tower.merge)
}

/// Whether a prompt of so many tokens has room for a picture and a question about it.
pub fn fits(tower: &QwenVision, prompt_tokens: usize) -> bool {
    prompt_tokens >= START + tokens(tower) + 64
}

/// Bytes of the tower, its MLP filled up a little, and of the features of so many pictures.
pub fn bytes(tower: &QwenVision, pictures: usize) -> usize {
    const BF16: Dtype = bf16::DTYPE;
    let filling = tower.depth * 3 * 64 * tower.hidden;
    (tower.parameters() + filling + pictures * tokens(tower) * tower.output) * BF16.bytes()
}

/// Where a picture stands in a prompt.
pub fn start() -> usize {
    START
}

/// Values of a picture like no other of another `seed`.
pub fn visual(tower: &QwenVision, seed: u32) -> Visual {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let values = (0..SIDE * SIDE * tower.patch_values()).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    });
    Visual {
        values: values.collect(),
        layout: Layout::Patches {
            grid: [1, SIDE, SIDE],
            time_step: 0.0,
            video: false,
        },
    }
}

/// A prompt with placeholders of a picture in the place of some of its tokens, and positions as they spread over the picture.
pub fn row(tower: &QwenVision, mut ids: Vec<u32>) -> Result<Row, ModelError> {
    let span = VisualSpan {
        start: START,
        grid: [1, SIDE, SIDE],
        time_step: 0.0,
    };
    let end = START + span.tokens(tower.merge);
    // Where text has the placeholder's id the run would not end where the picture does.
    ids.iter_mut().filter(|id| **id == PLACEHOLDER).for_each(|id| *id = 0);
    let length = ids.len();
    let given = ids.get_mut(START..end);
    let given = given.ok_or_else(|| ModelError::Input(format!("a picture of {end} tokens in a prompt of {length}")))?;
    given.fill(PLACEHOLDER);
    Ok(Row {
        positions: positions(length, &[span], tower.merge)?,
        ids,
        features: Vec::new(),
    })
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
    fn a_picture_is_most_of_a_prompt_and_the_text_goes_on_after_its_side() {
        let tower = tower();
        assert_eq!(tokens(&tower), 1369);
        assert!(fits(&tower, 1536) && !fits(&tower, 512));
        let row = row(&tower, (0..1536).collect()).unwrap();
        let placeholders = row.ids.iter().filter(|id| **id == PLACEHOLDER).count();
        assert_eq!(
            (placeholders, row.ids[START - 1], row.ids[START + 1369]),
            (1369, 7, 1377)
        );
        assert_eq!(row.positions[START + 1368], [8, 8 + 36, 8 + 36]);
        assert_eq!(row.positions[START + 1369], [45; 3]);
        assert!(super::row(&tower, vec![0; 512]).is_err());
    }

    #[test]
    fn pictures_differ_and_have_the_values_that_the_tower_reads() {
        let tower = tower();
        let (one, two) = (visual(&tower, 1), visual(&tower, 2));
        assert_eq!(one.values.len(), 5476 * tower.patch_values());
        assert!(one.values.iter().all(|value| (-1.0..1.0).contains(value)));
        assert_ne!(one, two);
    }
}

//! Positions of multimodal rotary embedding: text runs on all axes, an image spreads over height and width.

use crate::{ModelError, Result, rope::Position, visual::Grid};

/// A run of placeholder tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VisualSpan {
    /// Index of the first placeholder.
    pub start: usize,
    /// Patches.
    pub grid: Grid,
    /// Positions between two time slices: `second_per_grid * tokens_per_second`; 0 for an image.
    pub time_step: f64,
}

impl VisualSpan {
    /// Tokens of the span: patches over `merge` squared.
    pub fn tokens(&self, merge: usize) -> usize {
        let [t, h, w] = self.grid;
        t * (h / merge) * (w / merge)
    }
}

/// Positions of `length` tokens of which the spans (in ascending order) are visual.
///
/// Source: `get_rope_index` of the reference; the time of a slice is `floor(slice * time_step)`, computed in floating
/// point as later versions do.
pub fn positions(length: usize, spans: &[VisualSpan], merge: usize) -> Result<Vec<Position>> {
    let mut positions = Vec::with_capacity(length);
    let mut next = 0u32;
    for span in spans {
        let end = span.start + span.tokens(merge);
        if span.start < positions.len() || end > length {
            return Err(ModelError::Input(format!(
                "visual tokens {}..{end} of {length} overlap",
                span.start
            )));
        }
        while positions.len() < span.start {
            positions.push([next; 3]);
            next += 1;
        }
        let [frames, rows, columns] = [span.grid[0], span.grid[1] / merge, span.grid[2] / merge];
        for frame in 0..frames {
            let time = (frame as f64 * span.time_step).floor() as u32;
            for row in 0..rows as u32 {
                positions.extend((0..columns as u32).map(|column| [next + time, next + row, next + column]));
            }
        }
        next = positions[span.start..].iter().flatten().max().map_or(next, |p| p + 1);
    }
    while positions.len() < length {
        positions.push([next; 3]);
        next += 1;
    }
    Ok(positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(positions: &[Position], axis: usize) -> Vec<u32> {
        positions.iter().map(|p| p[axis]).collect()
    }

    #[test]
    fn an_image_between_text_has_the_reference_positions() {
        let span = VisualSpan {
            start: 3,
            grid: [1, 4, 6],
            time_step: 0.0,
        };
        let p = positions(12, &[span], 2).unwrap();
        assert_eq!(axis(&p, 0), [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8]);
        assert_eq!(axis(&p, 1), [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8]);
        assert_eq!(axis(&p, 2), [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn a_video_advances_by_its_time_step() {
        for (seconds, times, tail) in [(1.0, [2, 4, 6], [7, 8]), (2.0, [2, 6, 10], [11, 12])] {
            let span = VisualSpan {
                start: 2,
                grid: [3, 4, 4],
                time_step: seconds * 2.0,
            };
            let t = axis(&positions(16, &[span], 2).unwrap(), 0);
            assert_eq!([t[2], t[6], t[10]], times);
            assert_eq!(t[14..], tail);
        }
    }

    #[test]
    fn spans_that_overlap_are_refused() {
        let span = VisualSpan {
            start: 0,
            grid: [1, 4, 4],
            time_step: 0.0,
        };
        assert!(positions(5, &[span, span], 2).is_err());
        assert!(positions(3, &[span], 2).is_err());
    }
}

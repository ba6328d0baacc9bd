//! How frames of pictures lie behind one another in the tower, and which go through it together. Plain Rust.

use std::ops::Range;

use flotilla_model::{
    qwen2_5_vl::window::{Windows, patch_coordinates},
    visual::Grid,
};

use crate::shape::QwenVision;

/// Patches that go through the tower together, unless one frame has more: the others wait for their turn.
pub const MOST_PATCHES: usize = 24_576;

/// What the tower cannot read.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct LayoutError(pub String);

/// Frames of one picture or video. No frame sees another one: each may go through the tower by itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frames {
    /// Index of the picture or video.
    pub visual: usize,
    /// Which of its frames.
    pub range: Range<usize>,
}

impl Frames {
    /// Their grid, of those of all visuals.
    pub fn grid(&self, grids: &[Grid]) -> Grid {
        let [_, height, width] = grids[self.visual];
        [self.range.len(), height, width]
    }

    /// Their part of the `length` numbers of all frames of their visual.
    pub fn part(&self, grids: &[Grid], length: usize) -> Range<usize> {
        let of_frame = length / grids[self.visual][0];
        self.range.start * of_frame..self.range.end * of_frame
    }
}

/// Tokens that a grid of patches becomes.
pub fn tokens(shape: &QwenVision, grid: &Grid) -> usize {
    grid.iter().product::<usize>() / (shape.merge * shape.merge)
}

/// Distributes the frames of grids over chunks of at most `capacity` patches, in their order. A frame that is larger than the
/// capacity, or no whole number of tokens, is an error.
pub fn chunks(shape: &QwenVision, grids: &[Grid], capacity: usize) -> Result<Vec<Vec<Frames>>, LayoutError> {
    let mut chunks: Vec<Vec<Frames>> = Vec::new();
    let mut room = 0;
    for (visual, [frames, height, width]) in grids.iter().enumerate() {
        let patches = height * width;
        let whole = height.is_multiple_of(shape.merge) && width.is_multiple_of(shape.merge);
        if !whole || frames * patches == 0 {
            let side = shape.merge;
            return Err(LayoutError(format!(
                "{frames} frames of {height} x {width} patches are no tokens of {side} x {side}"
            )));
        }
        if patches > capacity {
            return Err(LayoutError(format!(
                "a frame of {height} x {width} patches is larger than a chunk of {capacity}"
            )));
        }
        let mut start = 0;
        while start < *frames {
            if room < patches {
                chunks.push(Vec::new());
                room = capacity;
            }
            let end = (*frames).min(start + room / patches);
            room -= (end - start) * patches;
            if let Some(chunk) = chunks.last_mut() {
                chunk.push(Frames {
                    visual,
                    range: start..end,
                });
            }
            start = end;
        }
    }
    Ok(chunks)
}

/// Frames behind one another in the order of their windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// Tokens of the frames.
    pub tokens: usize,
    /// Patches, the filling included.
    pub rows: usize,
    /// Token (group of merged patches, in the order of the grids) that stands at each place; -1 for the filling.
    pub order: Vec<i32>,
    /// The place of each token.
    pub places: Vec<i32>,
    /// `[2, rows]`: row and column of each patch in its frame.
    pub positions: Vec<i32>,
    /// Where each window begins, and where the last ends, in patches.
    pub near: Vec<u32>,
    /// The same of frames.
    pub far: Vec<u32>,
}

impl Layout {
    /// Of grids, filled up to `least` tokens by windows of their own, which nothing else sees.
    pub fn new(shape: &QwenVision, grids: &[Grid], least: usize) -> Self {
        let unit = shape.merge * shape.merge;
        let windows = Windows::new(grids, shape.merge, shape.window);
        let (tokens, places) = (windows.order.len(), windows.places());
        let filling = least.saturating_sub(tokens);
        let of_window = (shape.window * shape.window).max(1);
        let starts = (0..filling).step_by(of_window);
        let filled = starts.map(|start| (filling - start).min(of_window) * unit);
        let filled = filled.collect::<Vec<_>>();
        let mut coordinates = Vec::new();
        for [frames, height, width] in grids {
            let frame = patch_coordinates(*height, *width, shape.merge);
            (0..*frames).for_each(|_| coordinates.extend_from_slice(&frame));
        }
        let ordered = windows.order.iter();
        let ordered = ordered.flat_map(|token| &coordinates[token * unit..(token + 1) * unit]);
        let ordered = ordered.copied().chain(std::iter::repeat_n((0, 0), filling * unit));
        let (rows, columns): (Vec<_>, Vec<_>) = ordered.unzip();
        let order = windows.order.iter().map(|token| index(*token));
        Self {
            tokens,
            rows: (tokens + filling) * unit,
            order: order.chain(std::iter::repeat_n(-1, filling)).collect(),
            places: places.into_iter().map(index).collect(),
            positions: rows.into_iter().chain(columns).map(index).collect(),
            near: offsets(windows.window_lengths.iter().chain(&filled)),
            far: offsets(windows.frame_lengths.iter().chain(&filled)),
        }
    }
}

/// An index as kernels have it; one beyond their reach is none.
fn index(at: usize) -> i32 {
    i32::try_from(at).unwrap_or(-1)
}

/// Where each segment begins, and where the last ends.
fn offsets<'a>(lengths: impl Iterator<Item = &'a usize>) -> Vec<u32> {
    let ends = lengths.scan(0, |end, length| {
        *end += *length;
        Some(u32::try_from(*end).unwrap_or(u32::MAX))
    });
    std::iter::once(0).chain(ends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> QwenVision {
        QwenVision {
            depth: 1,
            hidden: 8,
            heads: 2,
            intermediate: 12,
            patch: 2,
            frames: 2,
            merge: 2,
            window: 2,
            full: vec![0],
            output: 8,
        }
    }

    fn run(visual: usize, range: Range<usize>) -> Frames {
        Frames { visual, range }
    }

    #[test]
    fn frames_fill_chunks_in_their_order() {
        let grids = [[1, 4, 6], [5, 2, 4], [1, 6, 6]];
        let found = chunks(&shape(), &grids, 40).expect("chunks");
        assert_eq!(
            found,
            [vec![run(0, 0..1), run(1, 0..2)], vec![run(1, 2..5)], vec![run(2, 0..1)]]
        );
        let whole = chunks(&shape(), &grids, 1000).expect("chunks");
        assert_eq!(whole, [vec![run(0, 0..1), run(1, 0..5), run(2, 0..1)]]);
        assert_eq!(chunks(&shape(), &[], 40), Ok(Vec::new()));
    }

    #[test]
    fn every_frame_is_in_one_chunk_and_no_chunk_is_too_large() {
        let grids = [[3, 4, 6], [1, 2, 2], [7, 6, 4], [2, 8, 8], [1, 4, 4]];
        for capacity in 64..400 {
            let found = chunks(&shape(), &grids, capacity).expect("chunks");
            let mut next = vec![0; grids.len()];
            for chunk in &found {
                let patches = chunk.iter().map(|frames| {
                    let [_, height, width] = grids[frames.visual];
                    frames.range.len() * height * width
                });
                let patches = patches.sum::<usize>();
                assert!((1..=capacity).contains(&patches), "{patches} of {capacity}");
                for frames in chunk {
                    assert_eq!(frames.range.start, next[frames.visual]);
                    next[frames.visual] = frames.range.end;
                }
            }
            assert_eq!(next, grids.map(|[frames, ..]| frames), "{capacity}");
        }
    }

    #[test]
    fn what_is_no_whole_tokens_or_too_large_is_refused() {
        assert!(chunks(&shape(), &[[1, 3, 4]], 100).is_err());
        assert!(chunks(&shape(), &[[0, 4, 4]], 100).is_err());
        assert!(chunks(&shape(), &[[1, 10, 12]], 100).is_err());
    }

    #[test]
    fn the_filling_is_in_windows_of_its_own() {
        let grids = [[1, 4, 6], [2, 2, 4]];
        let exact = Layout::new(&shape(), &grids, 0);
        assert_eq!((exact.tokens, exact.rows), (10, 40));
        assert_eq!(exact.order, [0, 1, 3, 4, 2, 5, 6, 7, 8, 9]);
        assert_eq!(exact.near, [0, 16, 24, 32, 40]);
        assert_eq!(exact.far, [0, 24, 32, 40]);
        let filled = Layout::new(&shape(), &grids, 16);
        assert_eq!((filled.tokens, filled.rows), (10, 64));
        assert_eq!(filled.order[..10], exact.order);
        assert_eq!(filled.order[10..], [-1; 6]);
        assert_eq!(filled.places, exact.places);
        assert_eq!(filled.near, [0, 16, 24, 32, 40, 56, 64]);
        assert_eq!(filled.far, [0, 24, 32, 40, 56, 64]);
        for axis in 0..2 {
            let of = |layout: &Layout| layout.positions[axis * layout.rows..][..40].to_vec();
            assert_eq!(of(&filled), of(&exact));
        }
    }

    #[test]
    fn patches_of_a_token_have_its_rows_and_columns() {
        let layout = Layout::new(&shape(), &[[1, 4, 6]], 0);
        // The third token in the order of windows is that below the first.
        assert_eq!(layout.positions[8..12], [2, 2, 3, 3]);
        assert_eq!(layout.positions[24 + 8..24 + 12], [0, 1, 0, 1]);
        assert_eq!(layout.places, [0, 1, 4, 2, 3, 5]);
    }
}

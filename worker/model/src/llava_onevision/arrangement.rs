//! Which token of which square stands where in the sequence, and where lines end.
//!
//! Source: `pack_image_features`, `unpad_image` and `apply_pooling` of the reference.

use super::VisionConfig;
use crate::{ModelError, Result, visual::Layout};

/// Above this ratio of a map's side to that of the most tokens allowed, the map is shrunk.
const SHRINK_ABOVE: f64 = 1.1;
/// A video frame's side is divided by this.
const FRAME_POOL: usize = 2;

/// One token of the sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cell {
    /// The learned end of a line.
    Newline,
    /// A token of the tower as it is.
    Token(u32),
    /// The bilinear mean of four tokens: index and weight of each.
    Mean([(u32, f32); 4]),
}

/// The tokens of one visual in order; indices count the tower's tokens, square after square.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrangement {
    /// In the order of the sequence.
    pub cells: Vec<Cell>,
    /// Squares that the tower must have seen.
    pub squares: usize,
}

/// A map of tokens, not all of which need be looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Window {
    pub(super) top: usize,
    pub(super) left: usize,
    pub(super) height: usize,
    pub(super) width: usize,
}

impl Arrangement {
    /// The arrangement of a visual of this layout.
    pub fn new(layout: &Layout, config: &VisionConfig) -> Result<Self> {
        let side = config.tower.side();
        let tokens = side * side;
        match *layout {
            Layout::Square => {
                let mut cells = (0..tokens as u32).map(Cell::Token).collect::<Vec<_>>();
                cells.push(Cell::Newline);
                Ok(Self { cells, squares: 1 })
            }
            Layout::Frames { frames } => {
                let pooled = side.div_ceil(FRAME_POOL);
                let whole = Window {
                    top: 0,
                    left: 0,
                    height: side,
                    width: side,
                };
                let mut cells = Vec::with_capacity(frames * pooled * pooled + 1);
                for frame in 0..frames {
                    let at = |row: usize, column: usize| (frame * tokens + row * side + column) as u32;
                    cells.extend(shrunk(whole, (pooled, pooled), at));
                }
                cells.push(Cell::Newline);
                Ok(Self { cells, squares: frames })
            }
            Layout::Anyres { tiles, height, width } => Self::anyres(config, tiles, height, width),
            Layout::Patches { .. } => Err(ModelError::Input(
                "patches of another family cannot be arranged to squares".to_owned(),
            )),
        }
    }

    fn anyres(config: &VisionConfig, tiles: usize, height: usize, width: usize) -> Result<Self> {
        let side = config.tower.side();
        let tokens = side * side;
        let (rows, columns) = config.grid(height, width)?;
        if tiles != rows * columns + 1 {
            return Err(ModelError::Input(format!(
                "{tiles} squares for a picture of {width}x{height} pixels, which is cut into {rows}x{columns} and one"
            )));
        }
        let mut cells = (0..tokens as u32).map(Cell::Token).collect::<Vec<_>>();
        let window = unpadded((rows * side, columns * side), (height, width));
        let at = |row: usize, column: usize| {
            let square = 1 + row / side * columns + column / side;
            (square * tokens + row % side * side + column % side) as u32
        };
        let (map_height, map_width) = map_size(window, side, config.max_tiles);
        let map = if (map_height, map_width) == (window.height, window.width) {
            let rows = window.top..window.top + window.height;
            let columns = window.left..window.left + window.width;
            rows.flat_map(|row| columns.clone().map(move |column| (row, column)))
                .map(|(row, column)| Cell::Token(at(row, column)))
                .collect()
        } else {
            shrunk(window, (map_height, map_width), at)
        };
        for line in map.chunks(map_width.max(1)) {
            cells.extend_from_slice(line);
            cells.push(Cell::Newline);
        }
        Ok(Self { cells, squares: tiles })
    }
}

/// The part of a map (height, width) that the picture (height, width) fills; the rest is padding on both sides.
pub(super) fn unpadded(map: (usize, usize), picture: (usize, usize)) -> Window {
    let (map_height, map_width) = (map.0 as f64, map.1 as f64);
    let (height, width) = (picture.0 as f64, picture.1 as f64);
    // Seven decimals absorb the rounding of the division, as in the reference.
    let fill = |side: f64, scale: f64| ((side * scale * 1e7).round_ties_even() / 1e7) as usize;
    if width / height > map_width / map_height {
        let padding = map.0.saturating_sub(fill(height, map_width / width)) / 2;
        Window {
            top: padding,
            left: 0,
            height: map.0 - 2 * padding,
            width: map.1,
        }
    } else {
        let padding = map.1.saturating_sub(fill(width, map_height / height)) / 2;
        Window {
            top: 0,
            left: padding,
            height: map.0,
            width: map.1 - 2 * padding,
        }
    }
}

/// The size (height, width) to which a map is shrunk so that it has about `max_tiles` squares of tokens.
pub(super) fn map_size(window: Window, side: usize, max_tiles: usize) -> (usize, usize) {
    let ratio = ((window.height * window.width) as f64 / (max_tiles * side * side) as f64).sqrt();
    if ratio > SHRINK_ABOVE {
        let shrink = |side: usize| (side as f64 / ratio).floor() as usize;
        (shrink(window.height), shrink(window.width))
    } else {
        (window.height, window.width)
    }
}

/// Bilinear means over a window, corners not aligned and without antialiasing, rows first.
fn shrunk(window: Window, (height, width): (usize, usize), at: impl Fn(usize, usize) -> u32) -> Vec<Cell> {
    let rows = taps(window.height, height);
    let columns = taps(window.width, width);
    let mut cells = Vec::with_capacity(height * width);
    for (low, high, down) in &rows {
        for (left, right, across) in &columns {
            let index = |row: &usize, column: &usize| at(window.top + row, window.left + column);
            cells.push(Cell::Mean([
                (index(low, left), (1.0 - down) * (1.0 - across)),
                (index(low, right), (1.0 - down) * across),
                (index(high, left), down * (1.0 - across)),
                (index(high, right), down * across),
            ]));
        }
    }
    cells
}

/// For each output position the two input positions around it and the weight of the second.
fn taps(input: usize, output: usize) -> Vec<(usize, usize, f32)> {
    let scale = input as f32 / output as f32;
    (0..output)
        .map(|position| {
            let source = (scale * (position as f32 + 0.5) - 0.5).max(0.0);
            let low = (source as usize).min(input - 1);
            (low, (low + 1).min(input - 1), source - low as f32)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_picture_loses_rows_and_a_tall_one_columns() {
        let window = |map, picture| {
            let w = unpadded(map, picture);
            (w.top, w.left, w.height, w.width)
        };
        assert_eq!(window((54, 54), (480, 640)), (7, 0, 40, 54));
        assert_eq!(window((162, 27), (3000, 200)), (0, 8, 162, 11));
        assert_eq!(window((27, 27), (384, 384)), (0, 0, 27, 27));
    }

    #[test]
    fn a_map_of_more_than_nine_squares_is_shrunk() {
        let window = |height, width| Window {
            top: 0,
            left: 0,
            height,
            width,
        };
        assert_eq!(map_size(window(162, 162), 27, 9), (81, 81));
        assert_eq!(map_size(window(75, 135), 27, 9), (60, 108));
        assert_eq!(map_size(window(81, 81), 27, 9), (81, 81));
    }

    #[test]
    fn weights_of_a_mean_sum_to_one_and_stay_in_the_window() {
        let window = Window {
            top: 2,
            left: 1,
            height: 27,
            width: 5,
        };
        for cell in shrunk(window, (14, 3), |row, column| (row * 100 + column) as u32) {
            let Cell::Mean(taps) = cell else { panic!("{cell:?}") };
            assert!((taps.iter().map(|(_, weight)| weight).sum::<f32>() - 1.0).abs() < 1e-6);
            for (index, _) in taps {
                let (row, column) = (index / 100, index % 100);
                assert!((2..29).contains(&row) && (1..6).contains(&column), "{row} {column}");
            }
        }
    }
}

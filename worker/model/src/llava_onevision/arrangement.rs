//! Which token of which square stands where in the sequence, and where lines end.
//!
//! Source: `pack_image_features`, `unpad_image` and `apply_pooling` of the reference.

use super::VisionConfig;
use crate::{ModelError, Result, visual::Layout};

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
struct Window {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
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
                let pooled = config.anyres.frame_grid();
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
        let plan = config.anyres.plan(height, width)?;
        if tiles != plan.tiles() {
            let expected = plan.tiles();
            return Err(ModelError::Input(format!(
                "{tiles} squares for a picture of {width}x{height} pixels, which becomes {expected}"
            )));
        }
        let mut cells = (0..tokens as u32).map(Cell::Token).collect::<Vec<_>>();
        let columns = plan.squares.1;
        let window = Window {
            top: plan.margin.0,
            left: plan.margin.1,
            height: plan.kept.0,
            width: plan.kept.1,
        };
        let at = |row: usize, column: usize| {
            let square = 1 + row / side * columns + column / side;
            (square * tokens + row % side * side + column % side) as u32
        };
        let map = match plan.shrunk {
            Some(size) => shrunk(window, size, at),
            None => {
                let rows = window.top..window.top + window.height;
                let columns = window.left..window.left + window.width;
                rows.flat_map(|row| columns.clone().map(move |column| (row, column)))
                    .map(|(row, column)| Cell::Token(at(row, column)))
                    .collect()
            }
        };
        // A very narrow picture may leave no column: its lines are newlines alone, as in the reference.
        let (lines, width) = plan.rows_and_columns();
        for line in 0..lines {
            cells.extend_from_slice(&map[line * width..(line + 1) * width]);
            cells.push(Cell::Newline);
        }
        Ok(Self { cells, squares: tiles })
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

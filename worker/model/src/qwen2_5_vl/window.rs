//! The order of tokens in which attention windows are runs, and the runs.

use crate::visual::Grid;

/// How the vision tower arranges the tokens of several images.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Windows {
    /// Token (group of merged patches) that stands at each place.
    pub order: Vec<usize>,
    /// Patches of each window, in this order; no window is empty.
    pub window_lengths: Vec<usize>,
    /// Patches of each frame, in this order.
    pub frame_lengths: Vec<usize>,
}

impl Windows {
    /// For images of these grids: windows of `side x side` tokens, ragged at the right and lower border, frame by frame.
    ///
    /// Source: `get_window_index` of the reference, without the empty windows that it appends.
    pub fn new(grids: &[Grid], merge: usize, side: usize) -> Self {
        let mut windows = Self::default();
        for [frames, height, width] in grids {
            let (rows, columns) = (height / merge, width / merge);
            for _ in 0..*frames {
                windows.push_frame(rows, columns, side, merge * merge);
                windows.frame_lengths.push(height * width);
            }
        }
        windows
    }

    fn push_frame(&mut self, rows: usize, columns: usize, side: usize, unit: usize) {
        let base = self.order.len();
        for top in (0..rows).step_by(side) {
            for left in (0..columns).step_by(side) {
                let start = self.order.len();
                for row in top..(top + side).min(rows) {
                    let cells = left..(left + side).min(columns);
                    self.order.extend(cells.map(|column| base + row * columns + column));
                }
                self.window_lengths.push((self.order.len() - start) * unit);
            }
        }
    }

    /// The place of each token: the inverse of [`Windows::order`].
    pub fn places(&self) -> Vec<usize> {
        let mut places = vec![0; self.order.len()];
        for (place, token) in self.order.iter().enumerate() {
            places[*token] = place;
        }
        places
    }
}

/// Row and column of each patch of one frame, in the order in which patches lie: group by group.
pub fn patch_coordinates(height: usize, width: usize, merge: usize) -> Vec<(usize, usize)> {
    let mut coordinates = Vec::with_capacity(height * width);
    for top in (0..height).step_by(merge) {
        for left in (0..width).step_by(merge) {
            for row in top..top + merge {
                coordinates.extend((left..left + merge).map(|column| (row, column)));
            }
        }
    }
    coordinates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ragged_windows_have_the_reference_order() {
        let windows = Windows::new(&[[1, 12, 20]], 2, 4);
        let expected = [
            0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33, 4, 5, 6, 7, 14, 15, 16, 17, 24, 25, 26, 27, 34,
            35, 36, 37, 8, 9, 18, 19, 28, 29, 38, 39, 40, 41, 42, 43, 50, 51, 52, 53, 44, 45, 46, 47, 54, 55, 56, 57,
            48, 49, 58, 59,
        ];
        assert_eq!(windows.order, expected);
        let ends = windows.window_lengths.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        });
        assert_eq!(ends.collect::<Vec<_>>(), [64, 128, 160, 192, 224, 240]);
        assert_eq!(windows.frame_lengths, [240]);
    }

    #[test]
    fn a_grid_of_one_window_keeps_its_order() {
        let windows = Windows::new(&[[1, 8, 8]], 2, 4);
        assert_eq!(windows.order, (0..16).collect::<Vec<_>>());
        assert_eq!(windows.window_lengths, [64]);
    }

    #[test]
    fn places_undo_the_order_over_frames_and_images() {
        let windows = Windows::new(&[[2, 12, 20], [1, 4, 6]], 2, 4);
        let places = windows.places();
        assert!(
            windows
                .order
                .iter()
                .enumerate()
                .all(|(place, token)| places[*token] == place)
        );
        assert_eq!(windows.frame_lengths, [240, 240, 24]);
    }

    #[test]
    fn patches_lie_group_by_group() {
        let coordinates = patch_coordinates(2, 4, 2);
        assert_eq!(
            coordinates,
            [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
        );
    }
}

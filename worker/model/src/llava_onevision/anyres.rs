//! How a picture of any size becomes squares, and their features one map: geometry only.
//!
//! Source: `select_best_resolution`, `get_patch_output_size` (image_processing_utils.py), `unpad_image`,
//! `pack_image_features` (modeling_llava_onevision.py) and `_get_number_of_features` (processing_llava_onevision.py) of the
//! reference, whose roundings are kept: they decide how many tokens a picture has.

use serde_json::Value;

use crate::{ModelError, Result};

/// The prefix of the only rule that the reference supports.
const RULE: &str = "anyres_max_";
/// Sides that the string form of the original configurations may name, in squares.
const LARGEST_GRID: usize = 64;
/// Pixels that a canvas may have.
const LARGEST_CANVAS: usize = 64 << 20;
/// A map that is less than this times too large is not made smaller.
const TOLERANCE: f64 = 1.1;

/// Which sizes pictures may be fitted into, and how many features are kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Anyres {
    /// Height and width, in pixels, multiples of [`Self::side`].
    pinpoints: Vec<(usize, usize)>,
    /// Side of a square, in pixels.
    side: usize,
    /// Side of the feature map of a square.
    grid: usize,
    /// Squares whose features a map may have before it is made smaller.
    most: usize,
}

/// What becomes of one picture.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AnyresPlan {
    /// Height and width that the picture is fitted into.
    pub canvas: (usize, usize),
    /// Height and width of the picture on the canvas, in its middle; an odd pixel is left below and at the right.
    pub fitted: (usize, usize),
    /// Rows and columns of squares that the canvas is cut into.
    pub squares: (usize, usize),
    /// Rows and columns of the features of all squares together.
    pub map: (usize, usize),
    /// Rows that are cut off above and below, columns left and right.
    pub margin: (usize, usize),
    /// Rows and columns of what is left.
    pub kept: (usize, usize),
    /// Rows and columns that what is left is made smaller to (bilinear, corners not aligned, no antialiasing).
    pub shrunk: Option<(usize, usize)>,
}

impl AnyresPlan {
    /// Squares, the whole picture included.
    pub fn tiles(&self) -> usize {
        self.squares.0 * self.squares.1 + 1
    }

    /// Rows and columns of the map as it goes to the language model; each row is followed by a newline.
    pub fn rows_and_columns(&self) -> (usize, usize) {
        self.shrunk.unwrap_or(self.kept)
    }
}

impl Anyres {
    /// `pinpoints`: height and width of each canvas; `rule`: `anyres_max_9` and the like; `grid`: side of the feature map
    /// of a square of `side` pixels.
    pub fn new(pinpoints: Vec<(usize, usize)>, rule: &str, side: usize, grid: usize) -> Result<Self> {
        let most = rule
            .strip_prefix(RULE)
            .and_then(|most| most.parse().ok())
            .filter(|most| *most > 0);
        let Some(most) = most else {
            return Err(ModelError::Config(format!(
                "vision_aspect_ratio is {rule:?}, only {RULE}N with a number N is supported"
            )));
        };
        if side == 0 || grid == 0 {
            return Err(ModelError::Config("a square has no pixels or no patches".to_owned()));
        }
        let fits = |(height, width): &(usize, usize)| {
            let whole = |length: &usize| *length > 0 && length.is_multiple_of(side);
            let pixels = height.saturating_mul(*width);
            whole(height) && whole(width) && pixels <= LARGEST_CANVAS
        };
        if let Some((height, width)) = pinpoints.iter().find(|pinpoint| !fits(pinpoint)) {
            return Err(ModelError::Config(format!(
                "image_grid_pinpoints has {height}x{width}: the sides have to be multiples of {side}, with at most \
                 {LARGEST_CANVAS} pixels"
            )));
        }
        if pinpoints.is_empty() {
            return Err(ModelError::Config("image_grid_pinpoints is empty".to_owned()));
        }
        Ok(Self {
            pinpoints,
            side,
            grid,
            most,
        })
    }

    /// Side of a square, in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Side of the feature map of a square.
    pub fn grid(&self) -> usize {
        self.grid
    }

    /// What becomes of a picture of this size, the only one of its sample.
    pub fn plan(&self, height: usize, width: usize) -> Result<AnyresPlan> {
        let canvas = self.canvas(height, width)?;
        let squares = (canvas.0 / self.side, canvas.1 / self.side);
        let map = (squares.0 * self.grid, squares.1 * self.grid);
        let margin = margin((height, width), map);
        let kept = (map.0 - 2 * margin.0, map.1 - 2 * margin.1);
        Ok(AnyresPlan {
            canvas,
            fitted: fitted((height, width), canvas),
            squares,
            map,
            margin,
            kept,
            shrunk: self.shrunk(kept),
        })
    }

    /// Tokens of a picture that is the only one of its sample: the whole picture, then the map with its newlines.
    pub fn tokens(&self, height: usize, width: usize) -> Result<usize> {
        let (rows, columns) = self.plan(height, width)?.rows_and_columns();
        Ok(self.grid * self.grid + rows * (columns + 1))
    }

    /// Tokens of one of several pictures: the whole picture and a newline.
    pub fn square_tokens(&self) -> usize {
        self.grid * self.grid + 1
    }

    /// Side of the feature map of a frame, which is half that of a square (rounded up).
    pub fn frame_grid(&self) -> usize {
        self.grid.div_ceil(2)
    }

    /// Tokens of a video: pooled frames, then one newline.
    pub fn video_tokens(&self, frames: usize) -> usize {
        frames * self.frame_grid() * self.frame_grid() + 1
    }

    /// The canvas on which most pixels of the picture survive; of equal ones that with the least waste, of those the first.
    fn canvas(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let (h, w) = (height as f64, width as f64);
        let mut best = None;
        let (mut most, mut least_waste) = (0.0, f64::INFINITY);
        for (rows, columns) in self.pinpoints.iter().filter(|_| height > 0 && width > 0) {
            let (rows, columns) = (*rows as f64, *columns as f64);
            let scale = (columns / w).min(rows / h);
            let surviving = ((w * scale).trunc() * (h * scale).trunc()).min(w * h);
            let waste = rows * columns - surviving;
            if surviving > most || (surviving == most && waste < least_waste) {
                (most, least_waste) = (surviving, waste);
                best = Some((rows as usize, columns as usize));
            }
        }
        // The reference fails too where no pixel survives.
        best.ok_or_else(|| ModelError::Image(format!("{width}x{height} pixels fit into no canvas of the checkpoint")))
    }

    fn shrunk(&self, (rows, columns): (usize, usize)) -> Option<(usize, usize)> {
        let most = (self.most * self.grid * self.grid) as f64;
        let ratio = ((rows * columns) as f64 / most).sqrt();
        let smaller = |side: usize| floor_division(side as f64, ratio) as usize;
        (ratio > TOLERANCE).then(|| (smaller(rows), smaller(columns)))
    }
}

/// The picture's size on a canvas that one of its sides fills.
fn fitted((height, width): (usize, usize), canvas: (usize, usize)) -> (usize, usize) {
    let scale_w = canvas.1 as f64 / width as f64;
    let scale_h = canvas.0 as f64 / height as f64;
    let scaled = |side: usize, scale: f64, most: usize| ((side as f64 * scale).ceil() as usize).min(most);
    if scale_w < scale_h {
        (scaled(height, scale_w, canvas.0), canvas.1)
    } else {
        (canvas.0, scaled(width, scale_h, canvas.1))
    }
}

/// Rows (above and below) and columns (left and right) of the map that show no picture.
fn margin((height, width): (usize, usize), map: (usize, usize)) -> (usize, usize) {
    let (h, w) = (height as f64, width as f64);
    let (rows, columns) = (map.0 as f64, map.1 as f64);
    if w / h > columns / rows {
        let kept = whole_part(h * (columns / w));
        (map.0.saturating_sub(kept) / 2, 0)
    } else {
        let kept = whole_part(w * (rows / h));
        (0, map.1.saturating_sub(kept) / 2)
    }
}

/// Python's `int(round(value, 7))`.
fn whole_part(value: f64) -> usize {
    let above = value.ceil();
    if above - value <= 5e-8 {
        above as usize
    } else {
        value.floor() as usize
    }
}

/// Python's `//` of positive floats: exact where the quotient of floats would round up to a whole number.
fn floor_division(a: f64, b: f64) -> f64 {
    let quotient = (a - a % b) / b;
    let floor = quotient.floor();
    if quotient - floor > 0.5 { floor + 1.0 } else { floor }
}

/// Heights and widths from `image_grid_pinpoints`: a list of pairs of pixels, or `"(1x1),...,(6x6)"`, the range of squares
/// that the original configurations name.
pub fn pinpoints(value: &Value, side: usize) -> Result<Vec<(usize, usize)>> {
    let problem = || {
        ModelError::Config(format!(
            "image_grid_pinpoints is {value}, not a list of heights and widths"
        ))
    };
    match value {
        Value::String(range) => range_of_squares(range, side).ok_or_else(problem),
        other => serde_json::from_value(other.clone()).map_err(|_| problem()),
    }
}

/// All grids from the first to the last of a string that begins and ends with one; rows vary slowest.
fn range_of_squares(range: &str, side: usize) -> Option<Vec<(usize, usize)>> {
    let numbers = range
        .split(|c: char| !c.is_ascii_digit())
        .filter(|part| !part.is_empty());
    let numbers = numbers
        .map(str::parse::<usize>)
        .collect::<std::result::Result<Vec<_>, _>>()
        .ok()?;
    let (first, last) = (numbers.get(..2)?, numbers.get(numbers.len() - 2..)?);
    if numbers.len() % 2 != 0 || last.iter().any(|side| *side > LARGEST_GRID) {
        return None;
    }
    let columns = || first[1]..=last[1];
    Some(
        (first[0]..=last[0])
            .flat_map(|row| columns().map(move |column| (row * side, column * side)))
            .collect(),
    )
}

/// The pinpoints of the released checkpoints: one to six squares of 384 pixels each way.
pub(super) fn released_pinpoints() -> Vec<(usize, usize)> {
    (1..=6)
        .flat_map(|row| (1..=6).map(move |column| (row * 384, column * 384)))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn released() -> Anyres {
        Anyres::new(released_pinpoints(), "anyres_max_9", 384, 27).unwrap()
    }

    #[test]
    fn plans_and_tokens_are_those_of_the_reference() {
        let cases = [
            ((384, 384), (384, 384), (27, 27), None, 1485),
            ((480, 640), (768, 768), (40, 54), None, 2929),
            ((1080, 1920), (1152, 1920), (75, 135), Some((60, 108)), 7269),
            ((899, 1024), (1152, 1152), (71, 81), None, 6551),
            ((1152, 1152), (1152, 1152), (81, 81), None, 7371),
            ((2304, 2304), (2304, 2304), (162, 162), Some((81, 81)), 7371),
            ((100, 1000), (384, 1152), (9, 81), None, 1467),
            ((3000, 200), (2304, 384), (162, 11), None, 2673),
            ((1536, 1152), (1536, 1152), (108, 81), Some((93, 70)), 7332),
        ];
        for ((height, width), canvas, kept, shrunk, tokens) in cases {
            let plan = released().plan(height, width).unwrap();
            assert_eq!(
                (plan.canvas, plan.kept, plan.shrunk),
                (canvas, kept, shrunk),
                "{height}x{width}"
            );
            assert_eq!(released().tokens(height, width).unwrap(), tokens, "{height}x{width}");
        }
    }

    #[test]
    fn several_pictures_and_videos_have_fixed_tokens() {
        assert_eq!((released().square_tokens(), released().video_tokens(32)), (730, 6273));
    }

    #[test]
    fn the_whole_part_ignores_the_eighth_decimal() {
        assert_eq!(
            [53.999_999_99, 53.999_999_9, 54.0, 54.3].map(whole_part),
            [54, 53, 54, 54]
        );
    }

    #[test]
    fn a_range_of_squares_is_the_list_of_the_released_checkpoints() {
        let range = pinpoints(&json!("(1x1),...,(6x6)"), 384).unwrap();
        assert_eq!(range, released_pinpoints());
        assert_eq!(pinpoints(&json!([[384, 768]]), 384).unwrap(), [(384, 768)]);
        for wrong in [json!("1x"), json!("(1x1),(9x99)"), json!([[1]]), json!(3)] {
            assert!(pinpoints(&wrong, 384).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rules_and_canvases_that_the_reference_cannot_follow_are_refused() {
        for rule in ["anyres", "anyres_max_", "anyres_max_0", "pad"] {
            let error = Anyres::new(vec![(384, 384)], rule, 384, 27).unwrap_err();
            assert!(error.to_string().contains("vision_aspect_ratio"), "{rule}");
        }
        for canvas in [vec![(384, 400)], vec![], vec![(384 * 1000, 384)], vec![(0, 384)]] {
            assert!(Anyres::new(canvas, "anyres_max_9", 384, 27).is_err());
        }
        assert!(released().plan(0, 5).is_err());
    }

    proptest! {
        #[test]
        fn what_is_kept_lies_within_the_map(height in 1usize..5000, width in 1usize..5000) {
            if let Ok(plan) = released().plan(height, width) {
                prop_assert!(plan.fitted.0 <= plan.canvas.0 && plan.fitted.1 <= plan.canvas.1);
                prop_assert!(plan.fitted.0 > 0 && plan.fitted.1 > 0);
                prop_assert_eq!(plan.kept.0 + 2 * plan.margin.0, plan.map.0);
                prop_assert_eq!(plan.kept.1 + 2 * plan.margin.1, plan.map.1);
                // The whole picture, 1.1 squared times nine squares, a newline for each row.
                prop_assert!(released().tokens(height, width).unwrap() < 729 + 7939 + 6 * 27);
            }
        }
    }
}

//! What each token of a visual is made of, as lists for the card.

use flotilla_kernels::pictures::TAPS;
use flotilla_model::llava_onevision::Cell;

/// Rows of the tower's tokens and their weights, four for each token of the sequence: what
/// [`mix_rows`](flotilla_kernels::pictures::reference::mix_rows) applies.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mixture {
    /// `[tokens, 4]`; -1 where there are fewer than four rows.
    pub at: Vec<i32>,
    /// `[tokens, 4]`.
    pub weights: Vec<f32>,
}

impl Mixture {
    /// Of a visual's arrangement, whose first square's tokens begin at row `first`; the end of a line is row `newline`.
    pub fn new(cells: &[Cell], first: usize, newline: usize) -> Self {
        let mut mixture = Self {
            at: Vec::with_capacity(cells.len() * TAPS),
            weights: Vec::with_capacity(cells.len() * TAPS),
        };
        for cell in cells {
            match cell {
                Cell::Newline => mixture.push([(newline, 1.0)]),
                Cell::Token(index) => mixture.push([(first + *index as usize, 1.0)]),
                Cell::Mean(taps) => mixture.push(taps.map(|(index, weight)| (first + index as usize, weight))),
            }
        }
        mixture
    }

    /// Rows without weight are not read.
    fn push<const N: usize>(&mut self, taps: [(usize, f32); N]) {
        for (row, weight) in taps {
            let row = if weight == 0.0 { None } else { i32::try_from(row).ok() };
            self.at.push(row.unwrap_or(-1));
            self.weights.push(weight);
        }
        let end = self.at.len().next_multiple_of(TAPS);
        self.at.resize(end, -1);
        self.weights.resize(end, 0.0);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use flotilla_kernels::pictures::reference::mix_rows;
    use flotilla_model::{Config, Layout, LoadOptions, Pass, Vision, Visual, Vlm, llava_onevision::Arrangement};

    use super::*;

    /// Features of a visual by the model of the host.
    fn encoded(model: &Vlm, layout: Layout, values: &[f32]) -> Vec<f32> {
        let visual = Visual {
            values: values.to_vec(),
            layout,
        };
        let features = model.encode(&[&visual], Pass::Infer).unwrap();
        features[0].flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The host's tower gives the tokens of each square alone; mixed, they are the host's features of every layout.
    #[test]
    fn mixtures_arrange_tokens_as_the_model_of_the_host_does() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/fixtures/tiny-llava-onevision");
        let config = Config::load(&dir).unwrap();
        let Vision::LlavaOneVision(vision) = config.vision.clone() else {
            panic!("{:?}", config.vision)
        };
        let width = vision.text_hidden_size;
        let model = Vlm::random(config, 5, &LoadOptions::default()).unwrap();
        let anyres = |height, width| Layout::Anyres {
            tiles: vision.anyres.plan(height, width).unwrap().tiles(),
            height,
            width,
        };
        let layouts = [
            Layout::Square,
            Layout::Frames { frames: 3 },
            // One tile, margins above and below, margins at the sides, a map that is made smaller, lines of nothing.
            anyres(56, 56),
            anyres(50, 230),
            anyres(300, 90),
            anyres(330, 300),
            anyres(2000, 20),
        ];
        for layout in layouts {
            let arrangement = Arrangement::new(&layout, &vision).unwrap();
            let pixels = 3 * vision.tower.image_size.pow(2);
            let values = (0..arrangement.squares * pixels).map(|at| ((at * 7919 % 1013) as f32 / 506.0) - 1.0);
            let values = values.collect::<Vec<_>>();
            let mut tokens = vec![0.0; 2 * width];
            let mut newline = Vec::new();
            for square in values.chunks_exact(pixels) {
                let features = encoded(&model, Layout::Square, square);
                let (own, end) = features.split_at(features.len() - width);
                tokens.extend_from_slice(own);
                newline = end.to_vec();
            }
            tokens.extend(newline);
            let mixture = Mixture::new(&arrangement.cells, 2, tokens.len() / width - 1);
            let mixed = mix_rows(&tokens, width, &mixture.at, &mixture.weights);
            let expected = encoded(&model, layout, &values);
            assert_eq!(mixed.len(), expected.len(), "{layout:?}");
            let apart = mixed
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(apart < 2e-5, "{layout:?}: {apart}");
        }
    }

    #[test]
    fn rows_without_weight_are_left_out() {
        let cells = [Cell::Mean([(3, 0.75), (4, 0.25), (5, 0.0), (6, 0.0)]), Cell::Newline];
        let mixture = Mixture::new(&cells, 10, 99);
        assert_eq!(mixture.at, [13, 14, -1, -1, 99, -1, -1, -1]);
        assert_eq!(mixture.weights, [0.75, 0.25, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
    }
}

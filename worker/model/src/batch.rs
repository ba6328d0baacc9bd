//! Ragged rows of tokens and image features, padded on the right.

use candle_core::Tensor;

use crate::{ModelError, Result, rope::Position};

/// One sequence.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Position of each token.
    pub positions: Vec<Position>,
    /// Image features `[tokens, hidden]` and the index of the first placeholder token they replace.
    pub features: Vec<(usize, Tensor)>,
}

impl Row {
    /// A row of text alone, positions counting from zero.
    pub fn text(ids: Vec<u32>) -> Self {
        let positions = (0..ids.len() as u32).map(|p| [p; 3]).collect();
        Self {
            ids,
            positions,
            features: Vec::new(),
        }
    }

    /// The position of the token that would come next: one past the largest so far, on all axes.
    pub fn next_position(&self) -> u32 {
        self.positions.iter().flatten().max().map_or(0, |p| p + 1)
    }

    /// This row followed by text.
    #[must_use]
    pub fn followed_by(&self, ids: &[u32]) -> Self {
        let mut row = self.clone();
        let next = row.next_position();
        row.ids.extend_from_slice(ids);
        row.positions.extend((0..ids.len() as u32).map(|i| [next + i; 3]));
        row
    }
}

/// Rows of different lengths as one rectangle `[rows, width]`: the shorter ones padded on the right.
#[derive(Clone, Debug)]
pub struct TextBatch {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) lengths: Vec<usize>,
    pub(crate) ids: Vec<u32>,
    pub(crate) positions: Vec<Position>,
    pub(crate) features: Vec<Tensor>,
    pub(crate) feature_slots: Vec<u32>,
}

impl TextBatch {
    /// Lays the rows out; padding has id 0 and position 0 and is never attended to.
    pub fn new(rows: &[Row]) -> Result<Self> {
        let width = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let mut batch = Self {
            rows: rows.len(),
            width,
            lengths: rows.iter().map(|row| row.ids.len()).collect(),
            ids: vec![0; rows.len() * width],
            positions: vec![[0; 3]; rows.len() * width],
            features: Vec::new(),
            feature_slots: Vec::new(),
        };
        for (index, row) in rows.iter().enumerate() {
            batch.place(index, row)?;
        }
        Ok(batch)
    }

    fn place(&mut self, index: usize, row: &Row) -> Result<()> {
        let length = row.ids.len();
        if length == 0 || row.positions.len() != length {
            let positions = row.positions.len();
            return Err(ModelError::Input(format!(
                "row {index} has {length} ids and {positions} positions"
            )));
        }
        let start = index * self.width;
        self.ids[start..start + length].copy_from_slice(&row.ids);
        self.positions[start..start + length].copy_from_slice(&row.positions);
        for (offset, features) in &row.features {
            let tokens = features.dim(0)?;
            if offset + tokens > length {
                let problem = format!("row {index}: {tokens} image tokens at {offset} leave its {length} tokens");
                return Err(ModelError::Input(problem));
            }
            let first = (start + offset) as u32;
            self.feature_slots.extend(first..first + tokens as u32);
            self.features.push(features.clone());
        }
        Ok(())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Tokens of the longest row: the second dimension of hidden states.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Tokens of each row.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_completion_continues_after_the_largest_position_of_any_axis() {
        let prompt = Row {
            ids: vec![1, 2, 3],
            positions: vec![[0; 3], [1, 1, 4], [1, 2, 1]],
            features: vec![],
        };
        let row = prompt.followed_by(&[8, 9]);
        assert_eq!(row.ids, [1, 2, 3, 8, 9]);
        assert_eq!(&row.positions[3..], [[5; 3], [6; 3]]);
    }

    #[test]
    fn features_outside_their_row_are_refused() {
        let mut row = Row::text(vec![1, 2]);
        let features = Tensor::zeros((2, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        row.features.push((1, features));
        let error = TextBatch::new(&[row]).unwrap_err();
        assert!(error.to_string().contains("leave its 2 tokens"), "{error}");
    }
}

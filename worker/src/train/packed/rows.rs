//! Prompts with their completions as the learner reads them.

use std::collections::{BTreeMap, BTreeSet};

use flotilla_device::learner::{Picture, Sample};
use flotilla_kernels::{Buffer, Float};
use flotilla_model::{Row, rope::Position};

use crate::train::{actor::Scored, error::TrainError};

/// What the learner reads of a prompt and its completion.
pub struct Laid<T> {
    ids: Vec<u32>,
    positions: Vec<Position>,
    prompt: usize,
    pictures: Vec<Picture<T>>,
}

/// Features of pictures by their keys, and the gradients by them, where there are any.
pub type Features<T> = BTreeMap<String, (Buffer<T>, Option<Buffer<f32>>)>;

impl<T> Laid<T> {
    /// As the learner takes it.
    pub fn sample(&self) -> Sample<'_, T> {
        Sample {
            ids: &self.ids,
            positions: &self.positions,
            prompt: self.prompt,
            pictures: &self.pictures,
        }
    }
}

/// Rows one after another in parts that show at most so many pictures each, or one row.
pub fn parts_by_pictures<'a, 'b>(rows: &'a [Scored<'b>], most: usize) -> Vec<&'a [Scored<'b>]> {
    let (mut parts, mut first, mut shown) = (Vec::new(), 0, BTreeSet::new());
    for (index, row) in rows.iter().enumerate() {
        let new = |shown: &BTreeSet<&String>| row.example.images.iter().filter(|key| !shown.contains(key)).count();
        if index > first && shown.len() + new(&shown) > most {
            parts.push(&rows[first..index]);
            first = index;
            shown.clear();
        }
        shown.extend(&row.example.images);
    }
    if first < rows.len() {
        parts.push(&rows[first..]);
    }
    parts
}

/// Rows as the learner reads them.
pub fn lay<T: Float>(rows: &[Scored<'_>], features: &Features<T>) -> Result<Vec<Laid<T>>, TrainError> {
    let laid = rows.iter().map(|row| {
        let prompt = &row.example.prompt;
        let whole = Row {
            ids: prompt.ids.clone(),
            positions: prompt.positions.clone(),
            features: Vec::new(),
        }
        .followed_by(row.completion);
        let mut pictures = Vec::with_capacity(prompt.spans.len());
        for ((start, _), key) in prompt.spans.iter().zip(&row.example.images) {
            let found = features.get(key);
            let (features, gradient) =
                found.ok_or_else(|| TrainError::Invalid(format!("no features of image {key}")))?;
            pictures.push(Picture {
                start: *start,
                features: features.clone(),
                gradient: gradient.clone(),
            });
        }
        Ok(Laid {
            ids: whole.ids,
            positions: whole.positions,
            prompt: prompt.ids.len(),
            pictures,
        })
    });
    laid.collect()
}

#[cfg(test)]
mod tests {
    use flotilla_model::Prompt;

    use super::*;
    use crate::train::examples::Example;

    fn example(images: &[&str]) -> Example {
        Example {
            id: String::new(),
            prompt: Prompt {
                ids: vec![1],
                positions: vec![[0; 3]],
                rope_delta: 0,
                visuals: Vec::new(),
                spans: Vec::new(),
            },
            images: images.iter().map(|key| (*key).to_owned()).collect(),
            target: None,
            completion: Vec::new(),
        }
    }

    #[test]
    fn parts_show_at_most_so_many_pictures_and_leave_no_row_out() {
        let examples = [&["a"][..], &["a"], &["b"], &["c", "d", "e"], &["e"], &[]].map(example);
        let rows = examples.each_ref().map(|example| Scored {
            example,
            completion: &[1],
        });
        let lengths = |most| {
            parts_by_pictures(&rows, most)
                .iter()
                .map(|part| part.len())
                .collect::<Vec<_>>()
        };
        assert_eq!(lengths(2), [3, 1, 2]);
        assert_eq!(lengths(1), [2, 1, 1, 2]);
        assert_eq!(lengths(9), [6]);
        assert!(parts_by_pictures(&[], 2).is_empty());
    }
}

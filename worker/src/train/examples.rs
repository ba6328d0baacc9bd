//! Canonical rows as token ids.

use std::collections::{BTreeSet, HashMap};

use candle_core::Tensor;
use flotilla_artifacts::dataset::{Dataset, Row as CanonicalRow};
use flotilla_model::{Content, Medium, Message, ModelError, Part, Processor, Prompt, Row};

use super::{
    error::TrainError,
    gallery::{Images, key},
};

/// Marks the place of an image in a prompt.
const IMAGE_MARK: &str = "<image>";

/// One prompt.
#[derive(Clone, Debug)]
pub struct Example {
    /// Name of the row.
    pub id: String,
    /// Token ids and positions; its pictures are in [`Images`].
    pub prompt: Prompt,
    /// Keys of its pictures, see [`Images`].
    pub images: Vec<String>,
    /// What the boxed answer must be.
    pub target: Option<String>,
    /// Completion to imitate, with the token that ends a turn.
    pub completion: Vec<u32>,
}

impl Example {
    /// The prompt with the features of its pictures.
    pub fn row(&self, features: &HashMap<String, Tensor>) -> Result<Row, TrainError> {
        let missing = |name: &String| TrainError::Invalid(format!("row {}: no features of image {name}", self.id));
        let own = self
            .images
            .iter()
            .map(|name| features.get(name).cloned().ok_or_else(|| missing(name)))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(self.prompt.row(&own)?)
    }
}

/// The prompts of a set, and which of them belong together.
#[derive(Clone, Debug, Default)]
pub struct ExampleSet {
    /// The prompts in order.
    pub examples: Vec<Example>,
    /// Indices of the prompts of one source row: one, or both orders of a pair.
    pub units: Vec<Vec<usize>>,
    /// Rows left out because they exceed the model's context.
    pub too_long: usize,
}

impl ExampleSet {
    /// Appends the rows of a dataset (those of the first `max_rows` source rows, 0: all).
    pub fn append(
        &mut self,
        dataset: &Dataset,
        max_rows: u32,
        processor: &Processor,
        images: &mut Images,
        max_tokens: usize,
    ) -> Result<(), TrainError> {
        let mut source_rows = 0;
        let mut newest = None;
        // Place in `units` of the newest source row, once one of its prompts is in.
        let mut place = None;
        for row in &dataset.rows {
            if newest != Some(row.source_row) {
                if max_rows > 0 && source_rows >= max_rows {
                    break;
                }
                source_rows += 1;
                newest = Some(row.source_row);
                place = None;
            }
            match example(row, dataset, processor, images, max_tokens) {
                Ok(example) => {
                    let unit = *place.get_or_insert(self.units.len());
                    if unit == self.units.len() {
                        self.units.push(Vec::new());
                    }
                    self.units[unit].push(self.examples.len());
                    self.examples.push(example);
                }
                Err(TrainError::Model(ModelError::TooLong { tokens, limit })) => {
                    tracing::warn!(
                        row = row.id,
                        tokens,
                        limit,
                        "row left out: longer than the model's context"
                    );
                    self.too_long += 1;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Keys of all pictures, sorted.
    pub fn image_names(&self) -> BTreeSet<String> {
        self.examples
            .iter()
            .flat_map(|example| example.images.iter().cloned())
            .collect()
    }
}

fn example(
    row: &CanonicalRow,
    dataset: &Dataset,
    processor: &Processor,
    images: &mut Images,
    max_tokens: usize,
) -> Result<Example, TrainError> {
    let pictures = row
        .images
        .iter()
        .map(|name| Ok::<_, TrainError>(Medium::Picture(images.picture(dataset, name)?)))
        .collect::<Result<Vec<_>, _>>()?;
    let message = user_message(&row.prompt, row.images.len());
    let mut prompt = processor.prepare(&[message], &pictures, max_tokens)?;
    // Pixels are large and made again when they are needed; their layouts stay.
    prompt.visuals.iter_mut().for_each(|visual| visual.values = Vec::new());
    let layouts = prompt.visuals.iter().map(|visual| visual.layout);
    let keys = row.images.iter().zip(layouts).map(|(name, layout)| key(name, layout));
    let mut completion = Vec::new();
    if let Some(response) = &row.response {
        completion = processor.tokenizer().encode(response)?;
        completion.extend(processor.tokenizer().stop_ids().first());
        let tokens = prompt.ids.len() + completion.len();
        if tokens > max_tokens {
            return Err(ModelError::TooLong {
                tokens,
                limit: max_tokens,
            }
            .into());
        }
    }
    Ok(Example {
        id: row.id.clone(),
        images: keys.collect(),
        prompt,
        target: row.target().map(str::to_owned),
        completion,
    })
}

/// The user's turn: images at their marks, or before the text where the marks do not fit.
fn user_message(text: &str, images: usize) -> Message {
    let pieces: Vec<&str> = text.split(IMAGE_MARK).collect();
    if images == 0 || pieces.len() != images + 1 {
        return Message::user(images, text);
    }
    let mut parts = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        if index > 0 {
            parts.push(Part::Image);
        }
        if !piece.is_empty() {
            parts.push(Part::Text {
                text: (*piece).to_owned(),
            });
        }
    }
    Message {
        role: "user".into(),
        content: Content::Parts(parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_go_to_their_marks_or_before_the_text() {
        let text = |text: &str| Part::Text { text: text.to_owned() };
        let parts = |message: Message| match message.content {
            Content::Parts(parts) => parts,
            Content::Text(_) => Vec::new(),
        };
        assert_eq!(
            parts(user_message("a<image>b<image>", 2)),
            vec![text("a"), Part::Image, text("b"), Part::Image]
        );
        assert_eq!(parts(user_message("a", 1)), vec![Part::Image, text("a")]);
        assert_eq!(parts(user_message("a<image>", 2)).len(), 3);
    }
}

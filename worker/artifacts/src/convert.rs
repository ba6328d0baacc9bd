//! One source row to canonical rows, or the reason why not. Pure: files that a row names come through a function.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::{
    dataset::{Label, Row},
    picture::{Picture, PictureError, inspect},
    source::{SourceRow, Value, inline_bytes},
};

/// In which order the two responses of a pair are shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Order {
    /// Drawn for each row from the seed.
    Seeded,
    /// Both orders, the first drawn from the seed: two prompts.
    Both,
    /// The preferred response first.
    ChosenFirst,
}

/// What a row means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Task {
    /// Which of two responses is better.
    Preference {
        /// Order of the responses.
        order: Order,
        /// Control: permute the labels over the rows.
        shuffle_labels: bool,
    },
    /// A question with one right answer.
    ExactMatch,
    /// A prompt and the completion to imitate.
    Instruction,
}

/// How rows are read.
#[derive(Clone, Debug)]
pub struct Rules {
    /// What a row means.
    pub task: Task,
    /// Canonical column -> column of the source, where the names differ.
    pub columns: BTreeMap<String, String>,
    /// Seed of every draw.
    pub seed: u64,
    /// Largest encoded image in bytes.
    pub max_image_bytes: u64,
    /// Largest decoded image in pixels.
    pub max_image_pixels: u64,
    /// Longest text field in characters.
    pub max_text_characters: u64,
}

/// Why a row is left out.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Reason {
    /// The source could not give the row.
    #[error("{0}")]
    Unreadable(String),
    /// A column is not there or empty where a value is needed.
    #[error("column {0} is missing or not text")]
    MissingColumn(String),
    /// No image.
    #[error("image is missing: {0}")]
    MissingImage(String),
    /// An image that cannot be decoded or is too large.
    #[error("{0}")]
    Picture(PictureError),
    /// A response, answer or question without text.
    #[error("{0} is empty")]
    Empty(String),
    /// Both responses are the same.
    #[error("both responses are the same text")]
    EqualResponses,
    /// A label that names neither response nor a tie.
    #[error("label {0:?} is not one of 1, 2 and tie")]
    UnknownLabel(String),
    /// A text above the limit.
    #[error("{column} has {characters} characters, the limit is {limit}")]
    TooLong {
        /// Column.
        column: String,
        /// Characters.
        characters: u64,
        /// Limit.
        limit: u64,
    },
    /// The template could not be rendered.
    #[error("render prompt: {0}")]
    Template(String),
}

impl Reason {
    /// Name under which such rows are counted.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "unreadableRow",
            Self::MissingColumn(_) => "missingColumn",
            Self::MissingImage(_) => "missingImage",
            Self::Picture(PictureError::Corrupt(_)) => "corruptImage",
            Self::Picture(PictureError::TooManyBytes { .. } | PictureError::TooManyPixels { .. }) => "imageTooLarge",
            Self::Empty(_) => "emptyText",
            Self::EqualResponses => "equalResponses",
            Self::UnknownLabel(_) => "unknownLabel",
            Self::TooLong { .. } => "textTooLong",
            Self::Template(_) => "templateError",
        }
    }
}

/// What is asked about the images of a row.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Body {
    /// Two responses in the order shown first, and which is better.
    Preference {
        /// The responses.
        responses: [String; 2],
        /// Which is better.
        label: Label,
    },
    /// The right answer.
    ExactMatch(String),
    /// The completion to imitate.
    Instruction(String),
}

/// A source row that was understood.
#[derive(Clone, Debug)]
pub struct Converted {
    /// Index in the source.
    pub source_row: u64,
    /// Name of the row: its column `id`, or one made of the index.
    pub id: String,
    /// The question.
    pub question: String,
    /// File names of the images below `images/`.
    pub images: Vec<String>,
    /// What is asked.
    pub body: Body,
}

/// Reads a file that a row names: bytes, or the reason why not.
pub type LoadFile<'a> = &'a dyn Fn(&str) -> Result<Vec<u8>, String>;

/// Understands one row; its images are handed to `keep` as they were encoded.
pub fn convert(
    row: &SourceRow,
    rules: &Rules,
    load: LoadFile<'_>,
    keep: &mut dyn FnMut(&Picture, &[u8]),
) -> Result<Converted, Reason> {
    let reader = RowReader { row, rules };
    let question = reader.text("question")?;
    let body = match rules.task {
        Task::Preference { order, .. } => reader.preference(order)?,
        Task::ExactMatch => Body::ExactMatch(reader.text("answer")?),
        Task::Instruction => Body::Instruction(reader.text("response")?),
    };
    let pictures = reader.pictures(load)?;
    for (picture, bytes) in &pictures {
        keep(picture, bytes);
    }
    let id = reader.value("id").and_then(Value::as_text).map(str::to_owned);
    Ok(Converted {
        source_row: row.index,
        id: id.unwrap_or_else(|| format!("row-{}", row.index)),
        question,
        images: pictures.iter().map(|(picture, _)| picture.file_name()).collect(),
        body,
    })
}

/// Control: permutes the labels of all pairs by the seed, so that nothing but chance can be learnt.
pub fn shuffle_labels(rows: &mut [Converted], seed: u64) {
    let mut labels: Vec<Label> = rows.iter().filter_map(Converted::label).collect();
    // Stream numbers of rows are their indices; the last stream belongs to no row.
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::MAX);
    labels.shuffle(&mut rng);
    let mut next = labels.into_iter();
    for row in rows {
        if let Body::Preference { label, .. } = &mut row.body
            && let Some(shuffled) = next.next()
        {
            *label = shuffled;
        }
    }
}

/// Question and two responses (empty where the task has none) to the user's text, or why not.
pub type Render<'a> = &'a dyn Fn(&str, &[String; 2]) -> Result<String, String>;

/// The canonical rows of one source row: two for [`Order::Both`], else one.
pub fn expand(row: &Converted, task: Task, render: Render<'_>) -> Result<Vec<Row>, Reason> {
    let base = |responses: &[String; 2]| -> Result<Row, Reason> {
        Ok(Row {
            id: row.id.clone(),
            source_row: row.source_row,
            images: row.images.clone(),
            question: row.question.clone(),
            prompt: render(&row.question, responses).map_err(Reason::Template)?,
            responses: None,
            label: None,
            answer: None,
            response: None,
        })
    };
    match &row.body {
        Body::ExactMatch(answer) => Ok(vec![Row {
            answer: Some(answer.clone()),
            ..base(&Default::default())?
        }]),
        Body::Instruction(response) => Ok(vec![Row {
            response: Some(response.clone()),
            ..base(&Default::default())?
        }]),
        Body::Preference { responses, label } => {
            let first = Row {
                responses: Some(responses.clone()),
                label: Some(*label),
                ..base(responses)?
            };
            if !matches!(task, Task::Preference { order: Order::Both, .. }) {
                return Ok(vec![first]);
            }
            let [a, b] = responses.clone();
            let swapped = [b, a];
            let second = Row {
                id: format!("{}-swapped", row.id),
                label: Some(label.swapped()),
                ..base(&swapped)?
            };
            Ok(vec![
                first,
                Row {
                    responses: Some(swapped),
                    ..second
                },
            ])
        }
    }
}

impl Converted {
    fn label(&self) -> Option<Label> {
        match self.body {
            Body::Preference { label, .. } => Some(label),
            Body::ExactMatch(_) | Body::Instruction(_) => None,
        }
    }
}

/// A row and the names of its columns.
struct RowReader<'a> {
    row: &'a SourceRow,
    rules: &'a Rules,
}

impl RowReader<'_> {
    /// The value of a canonical column, None where there is none.
    fn value(&self, column: &str) -> Option<&Value> {
        let name = self.rules.columns.get(column).map_or(column, String::as_str);
        self.row.columns.get(name).filter(|value| !value.is_null())
    }

    fn text(&self, column: &str) -> Result<String, Reason> {
        let value = self.value(column).and_then(Value::as_text);
        self.checked(column, value.ok_or_else(|| Reason::MissingColumn(column.to_owned()))?)
    }

    /// A text that is neither empty nor too long.
    fn checked(&self, column: &str, text: &str) -> Result<String, Reason> {
        let characters = text.chars().count() as u64;
        if text.trim().is_empty() {
            return Err(Reason::Empty(column.to_owned()));
        }
        if characters > self.rules.max_text_characters {
            return Err(Reason::TooLong {
                column: column.to_owned(),
                characters,
                limit: self.rules.max_text_characters,
            });
        }
        Ok(text.to_owned())
    }

    /// `chosen` and `rejected`, or `responses` (also `response_1`, `response_2`) with `label`.
    fn preference(&self, order: Order) -> Result<Body, Reason> {
        let by_label =
            self.value("chosen").is_none() && self.value("rejected").is_none() && self.value("label").is_some();
        let (better, other, tie) = if by_label {
            let [first, second] = self.responses()?;
            match self.label()? {
                Label::First => (first, second, false),
                Label::Second => (second, first, false),
                Label::Tie => (first, second, true),
            }
        } else {
            (self.text("chosen")?, self.text("rejected")?, false)
        };
        if better.trim() == other.trim() {
            return Err(Reason::EqualResponses);
        }
        let first_is_better = match order {
            Order::ChosenFirst => true,
            Order::Seeded | Order::Both => self.draw(),
        };
        let label = match (tie, first_is_better) {
            (true, _) => Label::Tie,
            (false, true) => Label::First,
            (false, false) => Label::Second,
        };
        let responses = if first_is_better {
            [better, other]
        } else {
            [other, better]
        };
        Ok(Body::Preference { responses, label })
    }

    fn responses(&self) -> Result<[String; 2], Reason> {
        match self.value("responses") {
            Some(Value::List(values)) => match values.as_slice() {
                [first, second] => {
                    let text = |value: &Value| -> Result<String, Reason> {
                        let text = value
                            .as_text()
                            .ok_or_else(|| Reason::MissingColumn("responses".into()))?;
                        self.checked("responses", text)
                    };
                    Ok([text(first)?, text(second)?])
                }
                other => Err(Reason::MissingColumn(format!(
                    "responses (two texts, found {})",
                    other.len()
                ))),
            },
            _ => Ok([self.text("response_1")?, self.text("response_2")?]),
        }
    }

    fn label(&self) -> Result<Label, Reason> {
        let text = self.value("label").and_then(Value::as_text).unwrap_or_default();
        Label::parse(text).ok_or_else(|| Reason::UnknownLabel(text.to_owned()))
    }

    /// A coin that depends on the seed and the row alone, so that a row left out moves no other.
    fn draw(&self) -> bool {
        let mut rng = ChaCha8Rng::seed_from_u64(self.rules.seed);
        rng.set_stream(self.row.index);
        rng.random()
    }

    /// The images of the row, decoded once. Only an instruction may do without.
    fn pictures(&self, load: LoadFile<'_>) -> Result<Vec<(Picture, Vec<u8>)>, Reason> {
        let Some(value) = self.value("image") else {
            return match self.rules.task {
                Task::Instruction => Ok(Vec::new()),
                Task::Preference { .. } | Task::ExactMatch => Err(Reason::MissingImage("column image is empty".into())),
            };
        };
        let values = match value {
            Value::List(values) => values.iter().collect(),
            one => vec![one],
        };
        if values.is_empty() {
            return Err(Reason::MissingImage("column image is an empty list".into()));
        }
        values.into_iter().map(|value| self.picture(value, load)).collect()
    }

    fn picture(&self, value: &Value, load: LoadFile<'_>) -> Result<(Picture, Vec<u8>), Reason> {
        let bytes = encoded(value, load)?;
        let rules = self.rules;
        let picture = inspect(&bytes, rules.max_image_bytes, rules.max_image_pixels).map_err(Reason::Picture)?;
        Ok((picture, bytes))
    }
}

/// Encoded bytes of an image: binary, `{bytes, path}`, a data URL, base64 or a path.
fn encoded(value: &Value, load: LoadFile<'_>) -> Result<Vec<u8>, Reason> {
    let corrupt = |reason: String| Reason::Picture(PictureError::Corrupt(reason));
    match value {
        Value::Bytes(bytes) if bytes.is_empty() => Err(Reason::MissingImage("no bytes".into())),
        Value::Bytes(bytes) => Ok(bytes.clone()),
        Value::Text(text) => match inline_bytes(text) {
            Some(bytes) => bytes.map_err(corrupt),
            None => load(text).map_err(Reason::MissingImage),
        },
        Value::Struct(fields) => {
            let field = |name: &str| fields.get(name).filter(|value| !value.is_null());
            match (field("bytes"), field("path")) {
                // Base64 in a field called `bytes` needs no guessing.
                (Some(Value::Text(text)), _) => inline_bytes(&format!("data:;base64,{text}"))
                    .unwrap_or_else(|| Err("no bytes".into()))
                    .map_err(corrupt),
                (Some(bytes), _) => encoded(bytes, load),
                (None, Some(path)) => encoded(path, load),
                (None, None) => Err(Reason::MissingImage("neither bytes nor path is set".into())),
            }
        }
        Value::Null | Value::List(_) => Err(Reason::MissingImage("value is neither bytes nor path".into())),
    }
}

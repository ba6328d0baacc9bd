//! A prepared dataset on disk: `rows.jsonl`, `dataset.json` and `images/<sha256>.<ext>`, published like a checkpoint.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    checkpoint::verify,
    error::{ArtifactError, io},
    picture::Picture,
    publish::{Draft, Published, is_stable},
};

/// One JSON object per row.
pub const ROWS: &str = "rows.jsonl";
/// What the rows are.
pub const DESCRIPTION: &str = "dataset.json";
/// Directory of the images.
pub const IMAGES: &str = "images";

/// Which of two responses is better.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Label {
    /// The response shown first.
    #[serde(rename = "1")]
    First,
    /// The response shown second.
    #[serde(rename = "2")]
    Second,
    /// Neither.
    #[serde(rename = "tie")]
    Tie,
}

impl Label {
    /// The label as the critic must answer it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::First => "1",
            Self::Second => "2",
            Self::Tie => "tie",
        }
    }

    /// The label after the responses changed places.
    pub fn swapped(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
            Self::Tie => Self::Tie,
        }
    }

    /// Reads a label as datasets write it: `1`, `2`, `tie`, `A`, `B`, `Response 1`, `equal`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "1" | "a" | "response 1" => Some(Self::First),
            "2" | "b" | "response 2" => Some(Self::Second),
            "tie" | "equal" => Some(Self::Tie),
            _ => None,
        }
    }
}

/// A canonical row: one prompt.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Row {
    /// Name of the prompt.
    pub id: String,
    /// Index of the source row. The two orders of a pair share it and stay together.
    pub source_row: u64,
    /// File names below `images/`.
    pub images: Vec<String>,
    /// The question.
    pub question: String,
    /// The user's text, rendered. `<image>` marks where an image goes; without a mark images go first.
    pub prompt: String,
    /// Preference: the responses as shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub responses: Option<[String; 2]>,
    /// Preference: which is better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Label>,
    /// Exact match: the right answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Instruction: the completion to imitate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response: Option<String>,
}

impl Row {
    /// What the boxed answer must be: the label of a pair or the right answer; None for an instruction.
    pub fn target(&self) -> Option<&str> {
        self.label.map(Label::as_str).or(self.answer.as_deref())
    }
}

/// Writes a dataset.
#[derive(Debug)]
pub struct DatasetWriter {
    draft: Draft,
    rows: BufWriter<File>,
}

impl DatasetWriter {
    /// Begins a dataset that will appear at `target`.
    pub fn begin(target: &Path) -> Result<Self, ArtifactError> {
        let draft = Draft::begin(target)?;
        let images = draft.path().join(IMAGES);
        fs::create_dir(&images).map_err(io("create", &images))?;
        let path = draft.path().join(ROWS);
        let rows = BufWriter::new(File::create(&path).map_err(io("create", &path))?);
        Ok(Self { draft, rows })
    }

    /// Stores an image once, as it was encoded.
    pub fn add_image(&self, picture: &Picture, bytes: &[u8]) -> Result<(), ArtifactError> {
        let path = self.draft.path().join(IMAGES).join(picture.file_name());
        if path.exists() {
            return Ok(());
        }
        fs::write(&path, bytes).map_err(io("write", &path))
    }

    /// Appends a row.
    pub fn push(&mut self, row: &Row) -> Result<(), ArtifactError> {
        let path = self.draft.path().join(ROWS);
        let text = serde_json::to_string(row).map_err(|error| ArtifactError::Parse {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        writeln!(self.rows, "{text}").map_err(io("write", &path))
    }

    /// Number of distinct images stored.
    pub fn image_count(&self) -> Result<u64, ArtifactError> {
        let path = self.draft.path().join(IMAGES);
        Ok(fs::read_dir(&path).map_err(io("list", &path))?.count() as u64)
    }

    /// Describes the rows and makes the dataset visible.
    pub fn publish(self, description: &impl Serialize) -> Result<Published, ArtifactError> {
        let Self { draft, mut rows } = self;
        let path = draft.path().join(ROWS);
        rows.flush().map_err(io("write", &path))?;
        drop(rows);
        let path = draft.path().join(DESCRIPTION);
        let text = serde_json::to_vec_pretty(description).map_err(|error| ArtifactError::Parse {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        fs::write(&path, text).map_err(io("write", &path))?;
        draft.publish()
    }
}

/// A dataset that was verified.
#[derive(Clone, Debug)]
pub struct Dataset {
    dir: PathBuf,
    /// `sha256:<hex>` of its manifest.
    pub digest: String,
    /// Bytes of all files.
    pub bytes: u64,
    /// The rows in order.
    pub rows: Vec<Row>,
}

impl Dataset {
    /// Verifies every byte, then reads the rows.
    pub fn open(dir: &Path, expected: Option<&str>) -> Result<Self, ArtifactError> {
        if !is_stable(dir) {
            return Err(ArtifactError::NotStable {
                path: dir.to_path_buf(),
            });
        }
        let verified = verify(dir, expected)?;
        let path = dir.join(ROWS);
        let file = File::open(&path).map_err(io("open", &path))?;
        let mut rows = Vec::new();
        for (number, line) in BufReader::new(file).lines().enumerate() {
            let line = line.map_err(io("read", &path))?;
            rows.push(serde_json::from_str(&line).map_err(|error| ArtifactError::Parse {
                path: path.clone(),
                reason: format!("line {}: {error}", number + 1),
            })?);
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            digest: verified.digest.unwrap_or_default(),
            bytes: verified.bytes,
            rows,
        })
    }

    /// Where an image of a row lies.
    pub fn image_path(&self, name: &str) -> PathBuf {
        self.dir.join(IMAGES).join(name)
    }

    /// Encoded bytes of an image of a row.
    pub fn image(&self, name: &str) -> Result<Vec<u8>, ArtifactError> {
        let path = self.image_path(name);
        fs::read(&path).map_err(io("read", &path))
    }
}

/// What [`DatasetWriter::publish`] wrote about the rows.
pub fn read_description<T: DeserializeOwned>(dir: &Path) -> Result<T, ArtifactError> {
    let path = dir.join(DESCRIPTION);
    let bytes = fs::read(&path).map_err(io("read", &path))?;
    serde_json::from_slice(&bytes).map_err(|error| ArtifactError::Parse {
        path,
        reason: error.to_string(),
    })
}

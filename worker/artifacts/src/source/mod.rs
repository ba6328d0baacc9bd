//! Rows of a user's files, whatever the format: parquet and JSONL, one file or a directory of them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::error::{ArtifactError, io};

mod jsonl;
mod parquet;

/// A value of a source row.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// No value.
    Null,
    /// Text; numbers and booleans come as their shortest text.
    Text(String),
    /// Binary.
    Bytes(Vec<u8>),
    /// Several values.
    List(Vec<Self>),
    /// Named values, for example `image` as `{bytes, path}`.
    Struct(BTreeMap<String, Self>),
}

/// One row of a source.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRow {
    /// Index in the whole source, from 0.
    pub index: u64,
    /// Columns by their name in the source.
    pub columns: BTreeMap<String, Value>,
}

/// A source that can be read row by row.
#[derive(Clone, Debug)]
pub struct Source {
    root: PathBuf,
    files: Vec<PathBuf>,
}

/// What a reader gives for each row: the row, or why these bytes are none.
pub type RowResult = Result<SourceRow, String>;

impl Source {
    /// Finds the row files: the file itself, or every `.parquet`, `.jsonl` and `.ndjson` below the directory, by name.
    pub fn open(path: &Path) -> Result<Self, ArtifactError> {
        if path.is_file() {
            let root = path.parent().unwrap_or(Path::new(".")).to_path_buf();
            return Ok(Self {
                root,
                files: vec![path.to_path_buf()],
            });
        }
        fs::metadata(path).map_err(io("open", path))?;
        let files: Vec<PathBuf> = crate::manifest::list_files(path)?
            .into_iter()
            .map(|file| path.join(file))
            .filter(|file| Format::of(file).is_some())
            .collect();
        if files.is_empty() {
            return Err(ArtifactError::Source {
                path: path.to_path_buf(),
                reason: "no .parquet, .jsonl or .ndjson file is in this directory".into(),
            });
        }
        Ok(Self {
            root: path.to_path_buf(),
            files,
        })
    }

    /// The files, in the order in which they are read.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Calls `visit` with every row in order; a row that cannot be read is handed over as its index and the reason.
    /// An error of `visit` ends the reading.
    pub fn for_each<E: From<ArtifactError>>(
        &self,
        mut visit: impl FnMut(u64, RowResult) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut index = 0;
        for file in &self.files {
            let mut row = |columns: Result<BTreeMap<String, Value>, String>| -> Result<(), E> {
                let result = columns.map(|columns| SourceRow { index, columns });
                visit(index, result)?;
                index += 1;
                Ok(())
            };
            match Format::of(file) {
                Some(Format::Parquet) => parquet::read(file, &mut row)?,
                Some(Format::Jsonl) => jsonl::read(file, &mut row)?,
                None => {
                    let reason = "the name ends neither in .parquet nor in .jsonl or .ndjson".into();
                    let path = file.clone();
                    return Err(ArtifactError::Source { path, reason }.into());
                }
            }
        }
        Ok(())
    }

    /// Bytes of a file that a row names, relative to the source's directory and never outside it.
    pub fn read_relative(&self, name: &str, max_bytes: u64) -> Result<Vec<u8>, String> {
        let relative = Path::new(name);
        if !relative
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        {
            return Err(format!("file {name} lies outside the source"));
        }
        let root = self
            .root
            .canonicalize()
            .map_err(|error| format!("open source: {error}"))?;
        let path = root
            .join(relative)
            .canonicalize()
            .map_err(|error| format!("open file {name}: {error}"))?;
        if !path.starts_with(&root) {
            return Err(format!("file {name} lies outside the source"));
        }
        let size = fs::metadata(&path)
            .map_err(|error| format!("open file {name}: {error}"))?
            .len();
        if size > max_bytes {
            return Err(format!("file {name} has {size} bytes, the limit is {max_bytes}"));
        }
        fs::read(&path).map_err(|error| format!("read file {name}: {error}"))
    }
}

/// Form of a row file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Format {
    Parquet,
    Jsonl,
}

impl Format {
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "parquet" => Some(Self::Parquet),
            "jsonl" | "ndjson" => Some(Self::Jsonl),
            _ => None,
        }
    }
}

impl Value {
    /// The value as text: text itself, UTF-8 bytes, a number's digits.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            Self::Null | Self::List(_) | Self::Struct(_) => None,
        }
    }

    /// True where there is no value.
    pub fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }
}

/// Bytes of a `data:` URL or of bare base64; None for text that is neither (a path).
pub(crate) fn inline_bytes(text: &str) -> Option<Result<Vec<u8>, String>> {
    let decode = |encoded: &str| {
        STANDARD
            .decode(encoded.trim())
            .map_err(|error| format!("decode base64: {error}"))
    };
    if let Some(rest) = text.strip_prefix("data:") {
        let Some((_, encoded)) = rest.split_once(";base64,") else {
            return Some(Err("data URL is not base64".into()));
        };
        return Some(decode(encoded));
    }
    let alphabet = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'=');
    (text.len() >= 64 && text.len().is_multiple_of(4) && text.bytes().all(alphabet)).then(|| decode(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_outside_the_source_is_refused() {
        let dir = tempfile::tempdir().expect("temp dir");
        fs::create_dir(dir.path().join("source")).expect("create");
        fs::write(dir.path().join("secret"), "x").expect("write");
        fs::write(dir.path().join("source/rows.jsonl"), "").expect("write");
        fs::write(dir.path().join("source/a.png"), "png").expect("write");
        std::os::unix::fs::symlink("../secret", dir.path().join("source/link")).expect("link");
        let source = Source::open(&dir.path().join("source")).expect("open");
        assert_eq!(source.read_relative("a.png", 10).expect("inside"), b"png");
        for name in ["../secret", "/etc/hostname", "link"] {
            let error = source.read_relative(name, 10).expect_err("outside");
            assert!(error.contains("outside"), "{error}");
        }
        assert!(
            source
                .read_relative("a.png", 2)
                .expect_err("large")
                .contains("limit is 2")
        );
    }

    #[test]
    fn a_directory_without_rows_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        let error = Source::open(dir.path()).expect_err("empty").to_string();
        assert!(error.contains("no .parquet"), "{error}");
    }

    #[test]
    fn a_path_is_not_mistaken_for_base64() {
        assert!(inline_bytes("images/000001.png").is_none());
        assert_eq!(inline_bytes("data:image/png;base64,YQ=="), Some(Ok(b"a".to_vec())));
        assert_eq!(inline_bytes(&STANDARD.encode([7; 48])), Some(Ok(vec![7; 48])));
        assert!(inline_bytes("data:text/plain,x").is_some_and(|bytes| bytes.is_err()));
    }
}

//! What can go wrong, with the file, tensor or number that was wrong.

use std::path::PathBuf;

/// Failure to read, build or run a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read or written.
    #[error("cannot access {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file was read but is not what it should be.
    #[error("cannot parse {path}: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The configuration contradicts itself or the architecture.
    #[error("model configuration: {0}")]
    Config(String),
    /// The tensors on disk are not those that the configuration asks for.
    #[error("weights in {path} do not fit the configuration: {problems}")]
    Weights {
        /// The directory or file.
        path: PathBuf,
        /// Missing, extra and mis-shaped tensors.
        problems: WeightProblems,
    },
    /// Text cannot be tokenized or detokenized.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template failed.
    #[error("chat template: {0}")]
    Template(String),
    /// Bytes are no image within the limits.
    #[error("image: {0}")]
    Image(String),
    /// Bytes or frames are no video within the limits.
    #[error("video: {0}")]
    Video(String),
    /// The messages name another number of images than were given.
    #[error("the messages have {expected} image parts but {given} images were given")]
    ImageCount {
        /// Image parts in the messages.
        expected: usize,
        /// Images given.
        given: usize,
    },
    /// The prompt has more tokens than allowed.
    #[error("the prompt has {tokens} tokens, the limit is {limit}")]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Largest number allowed.
        limit: usize,
    },
    /// The arguments of a call do not fit together.
    #[error("{0}")]
    Input(String),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl ModelError {
    /// Attaches the path to an I/O error.
    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::File {
            path: path.to_owned(),
            source,
        }
    }
}

/// How a set of tensors differs from what is expected.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct WeightProblems {
    /// Expected, not found.
    pub missing: Vec<String>,
    /// Found, not expected.
    pub extra: Vec<String>,
    /// Name, expected shape, found shape.
    pub misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl WeightProblems {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty() && self.misshaped.is_empty()
    }
}

impl std::fmt::Display for WeightProblems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 5;
        let mut parts = Vec::new();
        for (what, names) in [("missing", &self.missing), ("unexpected", &self.extra)] {
            if !names.is_empty() {
                let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
                parts.push(format!(
                    "{} {what} ({shown}{})",
                    names.len(),
                    ellipsis(names.len(), SHOWN)
                ));
            }
        }
        if !self.misshaped.is_empty() {
            let shown = self.misshaped.iter().take(SHOWN);
            let shown = shown.map(|(name, want, got)| format!("{name} is {got:?}, expected {want:?}"));
            let count = self.misshaped.len();
            let shown = shown.collect::<Vec<_>>().join(", ");
            parts.push(format!("{count} mis-shaped ({shown}{})", ellipsis(count, SHOWN)));
        }
        f.write_str(&parts.join("; "))
    }
}

fn ellipsis(count: usize, shown: usize) -> &'static str {
    if count > shown { ", ..." } else { "" }
}

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
        /// Every difference.
        problems: Box<WeightProblems>,
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
    /// The prompt has more tokens than allowed.
    #[error("the prompt has {tokens} tokens, the limit is {limit}")]
    TooLong {
        /// Tokens of the prompt; of a text that is far too long as many as it has at least.
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
    /// A directory has no weights in a form that is read.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json{}", path.display(), other_form(foreign.as_deref()))]
    NoWeights {
        /// The directory.
        path: PathBuf,
        /// A file of weights in another form, if there is one.
        foreign: Option<String>,
    },
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

/// What to do about weights in another form.
fn other_form(foreign: Option<&str>) -> String {
    match foreign {
        None => String::new(),
        Some(file) if file.ends_with(".gguf") => {
            format!(": {file} is quantized for another program; use the original checkpoint")
        }
        Some(file) => format!(
            ": {file} is a pickle, which can run code and is not read. Convert it where transformers is installed: \
             python -c \"from transformers import AutoModelForImageTextToText as M; \
             M.from_pretrained('DIR', dtype='auto').save_pretrained('OUT')\", and copy the tokenizer and processor files"
        ),
    }
}

/// How a set of tensors differs from what is expected.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct WeightProblems {
    /// Expected, not found.
    pub missing: Vec<String>,
    /// Found, not expected; names as in the file.
    pub extra: Vec<String>,
    /// Name, expected shape, found shape.
    pub misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Name, type of elements that no weights are read from.
    pub unsupported: Vec<(String, String)>,
    /// Name, every place that has it.
    pub duplicated: Vec<(String, Vec<String>)>,
    /// Tensor and shard that the index puts it in, where it is not.
    pub lacking: Vec<(String, String)>,
    /// Tensor and shard that holds it, of which the index says nothing.
    pub unindexed: Vec<(String, String)>,
    /// File that cannot be read, why; its tensors are not listed as missing.
    pub unreadable: Vec<(String, String)>,
}

impl WeightProblems {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for WeightProblems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [
            listed("unreadable", &self.unreadable, |(file, why)| format!("{file} {why}")),
            listed("missing", &self.missing, String::clone),
            listed("unexpected", &self.extra, String::clone),
            listed("mis-shaped", &self.misshaped, |(name, want, got)| {
                format!("{name} is {got:?}, expected {want:?}{}", vocabulary(name, want, got))
            }),
            listed(
                "of another type than f32, f16, bf16 and f64",
                &self.unsupported,
                |(name, dtype)| format!("{name} is {dtype}"),
            ),
            listed("named twice", &self.duplicated, |(name, places)| {
                format!("{name} is {}", places.join(" and "))
            }),
            listed("not where the index says", &self.lacking, |(name, shard)| {
                format!("{name} in {shard}")
            }),
            listed("not in the index", &self.unindexed, |(name, shard)| {
                format!("{name} in {shard}")
            }),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join("; "))
    }
}

/// How many items have a problem, and the first of them.
fn listed<T>(problem: &str, items: &[T], show: impl Fn(&T) -> String) -> Option<String> {
    const SHOWN: usize = 10;
    let shown = items.iter().take(SHOWN).map(show).collect::<Vec<_>>().join(", ");
    let more = if items.len() > SHOWN { ", ..." } else { "" };
    (!items.is_empty()).then(|| format!("{} {problem} ({shown}{more})", items.len()))
}

/// What to do about a table whose rows are not those of the vocabulary.
fn vocabulary(name: &str, want: &[usize], got: &[usize]) -> String {
    let is_table = name.ends_with("embed_tokens.weight") || name.ends_with("lm_head.weight");
    match (want, got) {
        ([asked, width], [rows, found_width]) if is_table && width == found_width => format!(
            ": vocab_size in config.json is {asked} and the table has {rows} rows, so either the number or the table was not \
             changed with the other"
        ),
        _ => String::new(),
    }
}

//! Text to token ids and back by the checkpoint's `tokenizer.json`; the ids that stop a completion.

use std::path::Path;

use serde_json::Value;

use crate::{ModelError, Result};

/// Ends a turn in the chat format of the family.
const TURN_END: &str = "<|im_end|>";
/// Pads, and ends a document.
const DOCUMENT_END: &str = "<|endoftext|>";

/// A tokenizer with its stop and padding ids.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    stop_ids: Vec<u32>,
    pad_id: u32,
}

impl Tokenizer {
    /// Reads `dir/tokenizer.json`. Stop ids are those of `generation_config.json` or `config.json` (`eos_token_id`,
    /// one or a list), else the ends of turn and document.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(ModelError::file(&path))?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| ModelError::Parse {
            path,
            reason: error.to_string(),
        })?;
        let generation = optional_json(&dir.join("generation_config.json"))?;
        let config = optional_json(&dir.join("config.json"))?;
        let read = |key: &str| {
            let configured = [&generation, &config].into_iter().flatten();
            configured.map(|file| ids(file.get(key))).find(|ids| !ids.is_empty())
        };
        let named = [TURN_END, DOCUMENT_END]
            .iter()
            .filter_map(|token| inner.token_to_id(token))
            .collect::<Vec<_>>();
        let stop_ids = read("eos_token_id").unwrap_or(named);
        let pad_id = inner
            .token_to_id(DOCUMENT_END)
            .or_else(|| read("pad_token_id")?.first().copied());
        let pad_id = pad_id.or(stop_ids.first().copied()).unwrap_or(0);
        Ok(Self {
            inner,
            stop_ids,
            pad_id,
        })
    }

    /// Ids of `text`; special tokens written in it become their ids, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, false).map_err(tokenizer_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids` without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(tokenizer_error)
    }

    /// Text of `ids` with special tokens.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(tokenizer_error)
    }

    /// The id of a token as written in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Ids that end a completion.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// The id that pads.
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// Ids, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "passed to map_err")]
fn tokenizer_error(error: tokenizers::Error) -> ModelError {
    ModelError::Tokenizer(error.to_string())
}

/// A JSON file that may be absent.
pub(crate) fn optional_json(path: &Path) -> Result<Option<Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(path).map_err(ModelError::file(path))?;
    let value = serde_json::from_slice(&bytes).map_err(|error| ModelError::Parse {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(Some(value))
}

/// One id or a list of ids.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_id_and_a_list_are_both_read() {
        assert_eq!(ids(Some(&serde_json::json!(5))), [5]);
        assert_eq!(ids(Some(&serde_json::json!([5, 6]))), [5, 6]);
        assert!(ids(Some(&Value::Null)).is_empty());
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

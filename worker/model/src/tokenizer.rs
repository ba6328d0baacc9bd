//! Text to token ids and back by the checkpoint's `tokenizer.json`; the ids that stop a completion.

use std::{collections::HashMap, path::Path};

use serde_json::Value;
use tokenizers::DecoderWrapper;

use crate::{ModelError, Result};

/// Ends a turn in the chat format of the family.
const TURN_END: &str = "<|im_end|>";
/// Pads, and ends a document.
const DOCUMENT_END: &str = "<|endoftext|>";

/// The longest token is taken to stand for so many bytes at least.
const MOST_ADDED: usize = 64;

/// A tokenizer with its stop and padding ids.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    stop_ids: Vec<u32>,
    pad_id: u32,
    /// Tokens beside the model's vocabulary, and whether they are special.
    added: HashMap<u32, bool>,
    byte_level: bool,
    /// The most bytes of a text that one token stands for.
    longest: usize,
}

/// What a token stands for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TokenBytes {
    /// Its bytes; a character may be spread over several tokens.
    pub bytes: Vec<u8>,
    /// It steers the model and is no part of a text.
    pub special: bool,
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
        let added = inner.get_added_tokens_decoder().into_iter();
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let written = inner.get_vocab(true).into_keys();
        let longest = written.map(|token| match byte_level {
            // A character for each byte, but in tokens beside the vocabulary, which are short.
            true => token.chars().count(),
            false => token.len(),
        });
        // What is written in several characters may become one, of a third of the bytes.
        let shortened = if inner.get_normalizer().is_some() { 3 } else { 1 };
        Ok(Self {
            longest: shortened * longest.max().unwrap_or(1).max(MOST_ADDED),
            byte_level,
            added: added.map(|(id, token)| (id, token.special)).collect(),
            inner,
            stop_ids,
            pad_id,
        })
    }

    /// Tokens that `text` has at least, told without encoding it.
    pub fn least_tokens(&self, text: &str) -> usize {
        text.len().div_ceil(self.longest)
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

    /// Whether the tokens of the vocabulary are sequences of bytes, each written as one character.
    pub fn is_byte_level(&self) -> bool {
        self.byte_level
    }

    /// One more than the largest id.
    pub fn id_limit(&self) -> u32 {
        let own = u32::try_from(self.inner.get_vocab_size(false)).unwrap_or(u32::MAX);
        let added = self.added.keys().map(|id| id.saturating_add(1));
        added.max().unwrap_or(0).max(own)
    }

    /// What a token stands for, None of an id that the tokenizer does not have.
    pub fn token_bytes(&self, id: u32) -> Option<TokenBytes> {
        let token = self.inner.id_to_token(id)?;
        let added = self.added.get(&id);
        let written = || token.chars().map(byte_of).collect::<Option<Vec<u8>>>();
        let bytes = if self.byte_level && added.is_none() {
            written().unwrap_or_else(|| token.clone().into_bytes())
        } else {
            token.into_bytes()
        };
        let special = added.copied().unwrap_or(false);
        Some(TokenBytes { bytes, special })
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

/// The byte that a character of a byte-level vocabulary stands for: printable ones of Latin-1 for themselves, the other 68 bytes
/// in their order from U+0100 on (`bytes_to_unicode` of GPT-2).
fn byte_of(character: char) -> Option<u8> {
    let is_printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => Some(byte).filter(is_printable),
        Err(_) => (0..=u8::MAX)
            .filter(|byte| !is_printable(byte))
            .nth(code as usize - 0x100),
    }
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
    fn the_characters_of_a_byte_level_vocabulary_are_the_256_bytes() {
        let bytes = (0..0x144).filter_map(char::from_u32).filter_map(byte_of);
        let mut bytes = bytes.collect::<Vec<_>>();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
        assert_eq!(
            [byte_of('Ġ'), byte_of('Ċ'), byte_of('Ã')],
            [Some(b' '), Some(b'\n'), Some(0xC3)]
        );
        assert_eq!([byte_of(' '), byte_of('\u{144}'), byte_of('中')], [None; 3]);
    }

    #[test]
    fn the_bytes_of_tokens_are_those_of_the_text_and_special_ones_are_marked() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/fixtures/tiny-qwen2.5-vl");
        let tokenizer = Tokenizer::load(&dir).unwrap();
        let text = "Größe 7: \u{1F600} <tool_call>";
        let ids = tokenizer.encode(text).unwrap();
        let bytes = ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap().bytes);
        assert_eq!(String::from_utf8(bytes.collect()).unwrap(), text);
        let end = tokenizer.token_id(TURN_END).unwrap();
        let end = tokenizer.token_bytes(end).unwrap();
        assert_eq!((end.bytes.as_slice(), end.special), (TURN_END.as_bytes(), true));
        assert_eq!(tokenizer.token_bytes(tokenizer.id_limit()), None);
        assert_eq!(tokenizer.id_limit(), 506);
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

//! `model.safetensors.index.json`: which shard holds which tensor.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
    path::Path,
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor},
};

use crate::{ModelError, Result};

/// Longest index that is read. That of the largest model here has 0.1 MB.
const MAX_INDEX_BYTES: u64 = 32 << 20;
/// Most shards.
const MAX_SHARDS: usize = 4096;

/// The index as it is read.
#[derive(Debug)]
pub(super) struct Index {
    /// Tensor and shard in the order of the file; tensors may repeat.
    pub entries: Vec<(String, String)>,
    /// The shards, sorted.
    pub shards: BTreeSet<String>,
}

impl Index {
    /// Reads an index; the names of its shards are plain names of safetensors files.
    pub fn read(path: &Path) -> Result<Self> {
        let invalid = |reason: String| ModelError::Parse {
            path: path.to_owned(),
            reason,
        };
        let metadata = std::fs::metadata(path).map_err(ModelError::file(path))?;
        if !metadata.is_file() {
            return Err(invalid("it is not a regular file".to_owned()));
        }
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(ModelError::file(path))?;
        file.take(MAX_INDEX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(ModelError::file(path))?;
        if bytes.len() as u64 > MAX_INDEX_BYTES {
            let size = metadata.len();
            return Err(invalid(format!("it has {size} bytes, the limit is {MAX_INDEX_BYTES}")));
        }
        let parsed: Document = serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
        let entries = parsed.weight_map.0;
        let shards = entries.iter().map(|(_, shard)| shard.clone()).collect::<BTreeSet<_>>();
        if let Some(shard) = shards.iter().find(|shard| !is_plain(shard)) {
            return Err(invalid(format!(
                "shard name {shard:?} leaves the directory: plain names of .safetensors files are allowed"
            )));
        }
        if shards.is_empty() || shards.len() > MAX_SHARDS {
            return Err(invalid(format!(
                "it names {} shards, allowed are 1 to {MAX_SHARDS}",
                shards.len()
            )));
        }
        Ok(Self { entries, shards })
    }
}

/// The index as transformers writes it: sorted keys, two spaces.
pub(super) fn to_bytes(shards: &BTreeMap<String, String>, parameters: u64, bytes: u64) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Metadata {
        total_parameters: u64,
        total_size: u64,
    }
    #[derive(Serialize)]
    struct Written<'a> {
        metadata: Metadata,
        weight_map: &'a BTreeMap<String, String>,
    }
    let document = Written {
        metadata: Metadata {
            total_parameters: parameters,
            total_size: bytes,
        },
        weight_map: shards,
    };
    let mut text = serde_json::to_vec_pretty(&document)
        .map_err(|error| ModelError::Input(format!("the index of the weights cannot be written: {error}")))?;
    text.push(b'\n');
    Ok(text)
}

/// Whether a shard's name is that of a safetensors file in the same directory.
fn is_plain(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

#[derive(Deserialize)]
struct Document {
    weight_map: Pairs,
}

/// The members of an object in their order, repeated ones included.
struct Pairs(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Vec<(String, String)>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of file names by tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }

        deserializer.deserialize_map(Members).map(Pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Index> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.json");
        std::fs::write(&path, text).unwrap();
        Index::read(&path)
    }

    #[test]
    fn a_shard_outside_the_directory_is_refused() {
        for name in [
            "../b.safetensors",
            "/b.safetensors",
            "a/b.safetensors",
            "..",
            "a\\\\b.safetensors",
            ".b.safetensors",
            "b.bin",
            "",
        ] {
            let error = read(&format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#)).unwrap_err();
            assert!(error.to_string().contains("leaves the directory"), "{name}: {error}");
        }
    }

    #[test]
    fn an_index_that_is_none_is_refused() {
        for text in [
            "",
            "{}",
            "[]",
            r#"{"weight_map":[]}"#,
            r#"{"weight_map":{"a":1}}"#,
            r#"{"weight_map":{}}"#,
        ] {
            assert!(matches!(read(text), Err(ModelError::Parse { .. })), "{text}");
        }
    }

    #[test]
    fn an_index_of_endless_length_is_refused() {
        let text = format!("{{{}", " ".repeat(MAX_INDEX_BYTES as usize));
        assert!(read(&text).unwrap_err().to_string().contains("the limit is 33554432"));
    }

    #[test]
    fn what_is_written_is_read() {
        let shards = BTreeMap::from([
            ("b".to_owned(), "2.safetensors".to_owned()),
            ("a".to_owned(), "1.safetensors".to_owned()),
        ]);
        let text = String::from_utf8(to_bytes(&shards, 3, 12).unwrap()).unwrap();
        assert_eq!(
            text,
            "{\n  \"metadata\": {\n    \"total_parameters\": 3,\n    \"total_size\": 12\n  },\n  \"weight_map\": {\n    \
             \"a\": \"1.safetensors\",\n    \"b\": \"2.safetensors\"\n  }\n}\n"
        );
        let index = read(&text).unwrap();
        assert_eq!(index.entries.into_iter().collect::<BTreeMap<_, _>>(), shards);
    }
}

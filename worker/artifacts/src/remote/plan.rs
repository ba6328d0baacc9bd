//! Which files of a source make a model: weights as safetensors, and the small files beside them. Never pickles or programs.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::error::RemoteError;
use crate::{
    manifest::{MANIFEST, Manifest, is_plain_relative},
    publish::STABLE,
};

/// Most files that a source may list.
pub(super) const MAX_FILES: usize = 10_000;
/// Largest file that is read to learn which others are needed.
pub(super) const MAX_LIST_BYTES: u64 = 32 << 20;
/// All weights in one file.
const SINGLE_FILE: &str = "model.safetensors";
/// Which shard holds which tensor.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// Small files that are fetched where they exist, besides `config*.json`.
const SMALL_FILES: [&str; 17] = [
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    INDEX_FILE,
];

/// Which file says what else to fetch.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Guide {
    /// A manifest of Flotilla's: everything that it lists.
    Manifest,
    /// An index: its shards.
    Index,
    /// None: the safetensors files are few enough to say themselves.
    None,
}

/// The file that has to be read first.
pub(super) fn guide(names: &BTreeSet<String>) -> Guide {
    if names.contains(MANIFEST) && names.contains(STABLE) {
        Guide::Manifest
    } else if names.contains(INDEX_FILE) && !names.contains(SINGLE_FILE) {
        Guide::Index
    } else {
        Guide::None
    }
}

/// Refuses a listing with a name that is no path below the model's directory.
pub(super) fn check_names<'a>(source_name: &str, names: impl IntoIterator<Item = &'a str>) -> Result<(), RemoteError> {
    let is_plain = |name: &str| is_plain_relative(name) && !name.contains(['\\', '\0']) && !name.contains("//");
    match names.into_iter().find(|name| !is_plain(name)) {
        None => Ok(()),
        Some(name) => Err(RemoteError::Invalid {
            source_name: source_name.to_owned(),
            reason: format!("it lists a file {name:?}, which is no path below the model's directory"),
        }),
    }
}

/// The files to fetch of a source without a guide, or all but the shards of one with an index.
pub(super) fn needed(names: &BTreeSet<String>, guide: Guide) -> BTreeSet<String> {
    let is_needed = |name: &&String| {
        let is_weights = name.ends_with(".safetensors") && !name.contains('/');
        match guide {
            Guide::None if names.contains(SINGLE_FILE) => *name == SINGLE_FILE || is_small(name),
            Guide::None => is_weights || is_small(name),
            Guide::Index | Guide::Manifest => is_small(name),
        }
    };
    names.iter().filter(is_needed).cloned().collect()
}

/// The shards that an index names, all of which the source must list.
pub(super) fn shards(
    source_name: &str,
    index: &[u8],
    names: &BTreeSet<String>,
) -> Result<BTreeSet<String>, RemoteError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let invalid = |reason: String| RemoteError::Invalid {
        source_name: source_name.to_owned(),
        reason: format!("{INDEX_FILE} {reason}"),
    };
    let index: Index = serde_json::from_slice(index).map_err(|error| invalid(format!("is no index: {error}")))?;
    let shards = index.weight_map.into_values().collect::<BTreeSet<_>>();
    let fits = |shard: &String| names.contains(shard) && shard.ends_with(".safetensors") && !shard.contains('/');
    match shards.iter().find(|shard| !fits(shard)) {
        Some(shard) => Err(invalid(format!("names {shard:?}, which is not there"))),
        None => Ok(shards),
    }
}

/// The manifest of a directory that Flotilla wrote; None where the file is another program's.
pub(super) fn manifest(source_name: &str, bytes: &[u8]) -> Result<Option<Manifest>, RemoteError> {
    let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) else {
        return Ok(None);
    };
    check_names(source_name, manifest.files.iter().map(|file| file.path.as_str()))?;
    Ok(Some(manifest))
}

fn is_small(name: &str) -> bool {
    let is_config = name.starts_with("config") && name.ends_with(".json") && !name.contains('/');
    is_config || SMALL_FILES.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn pickles_programs_and_subdirectories_are_left_where_they_are() {
        let listed = names(&[
            ".gitattributes",
            "README.md",
            "config.json",
            "config_sentence.json",
            "model.safetensors",
            "consolidated.safetensors",
            "modeling_custom.py",
            "onnx/model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "training_args.pt",
        ]);
        assert_eq!(guide(&listed), Guide::None);
        let expected = names(&[
            "config.json",
            "config_sentence.json",
            "model.safetensors",
            "tokenizer.json",
        ]);
        assert_eq!(needed(&listed, Guide::None), expected);
    }

    #[test]
    fn an_index_says_which_shards() {
        let listed = names(&[
            "config.json",
            INDEX_FILE,
            "a.safetensors",
            "b.safetensors",
            "other.safetensors",
        ]);
        assert_eq!(guide(&listed), Guide::Index);
        assert_eq!(needed(&listed, Guide::Index), names(&["config.json", INDEX_FILE]));
        let index = br#"{"weight_map":{"x":"a.safetensors","y":"b.safetensors","z":"a.safetensors"}}"#;
        assert_eq!(
            shards("m", index, &listed).expect("an index"),
            names(&["a.safetensors", "b.safetensors"])
        );
        for shard in ["c.safetensors", "../a.safetensors", "config.json"] {
            let index = format!(r#"{{"weight_map":{{"x":"{shard}"}}}}"#);
            let message = shards("m", index.as_bytes(), &listed).expect_err(shard).to_string();
            assert!(message.contains(shard), "{message}");
        }
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for name in ["../config.json", "/etc/passwd", "a/../../b", "a\\b", "", "a//b", "./a"] {
            assert!(check_names("m", [name]).is_err(), "{name:?}");
        }
        assert!(check_names("m", ["config.json", "trainer/optimizer.safetensors"]).is_ok());
    }

    #[test]
    fn a_manifest_of_another_program_is_no_guide() {
        assert!(manifest("m", b"{\"name\":\"app\"}").expect("not ours").is_none());
        let hostile = br#"{"version":1,"files":[{"path":"../x","bytes":1,"sha256":"00"}]}"#;
        assert!(manifest("m", hostile).is_err());
    }
}

//! What outlives a pod: checkpoints, prepared datasets, and the rule by which a directory becomes visible.
//!
//! A directory is written beside its final place, flushed, renamed and only then marked with [`publish::STABLE`]; readers look at
//! marked directories alone, so a partial one is never seen. `manifest.json` holds size and SHA-256 of every file, and the
//! digest of the manifest's bytes names the whole directory. No tensors here: this room moves bytes.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`layout`] | paths inside the directory of a run |
//! | [`digest`] | SHA-256 of bytes and files |
//! | [`manifest`] | list of a directory's files with sizes and digests |
//! | [`publish`] | temp dir, fsync, rename, `STABLE` |
//! | [`checkpoint`] | list, verify and prune the checkpoints of a run |
//! | [`source`] | rows of a user's parquet or JSONL files |
//! | [`convert`] | one source row to canonical rows, or the reason why not |
//! | [`picture`] | what an encoded image is, checked before and by decoding |
//! | [`dataset`] | canonical rows on disk |
//! | [`remote`] | models of the Hugging Face hub and of buckets, fetched into a cache |

pub mod checkpoint;
pub mod convert;
pub mod dataset;
pub mod digest;
pub mod error;
pub mod layout;
pub mod manifest;
pub mod picture;
pub mod publish;
pub mod remote;
pub mod source;

pub use error::ArtifactError;

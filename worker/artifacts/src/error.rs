//! Why an artifact could not be written or read.

use std::path::{Path, PathBuf};

/// Why an artifact could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The file system refused.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("parse {path}: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// The directory is not marked stable.
    #[error("read {path}: it has no STABLE marker, so it was never completely written")]
    NotStable {
        /// The directory.
        path: PathBuf,
    },
    /// The directory was published before.
    #[error("publish {path}: a stable directory is already there")]
    AlreadyPublished {
        /// The directory.
        path: PathBuf,
    },
    /// A digest was demanded of a directory that has none.
    #[error("verify {path}: it has no manifest.json, but digest {expected} was demanded")]
    NoManifest {
        /// The directory.
        path: PathBuf,
        /// The digest demanded.
        expected: String,
    },
    /// The manifest is another one than demanded.
    #[error("verify {path}: its digest is {found}, demanded was {expected}")]
    DigestMismatch {
        /// The directory.
        path: PathBuf,
        /// The digest demanded.
        expected: String,
        /// The digest of its manifest.
        found: String,
    },
    /// A file is not the one of the manifest.
    #[error("verify {path}: file {file} {difference}")]
    FileDiffers {
        /// The directory.
        path: PathBuf,
        /// The first file that differs.
        file: String,
        /// How it differs.
        difference: String,
    },
    /// A source has no rows in a known format.
    #[error("read rows from {path}: {reason}")]
    Source {
        /// File or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl ArtifactError {
    /// True where a new attempt would end the same way: the bytes themselves are wrong.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            _ => true,
        }
    }
}

/// Names action and path of a refused file operation.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ArtifactError {
    let path = path.to_path_buf();
    move |source| ArtifactError::Io { action, path, source }
}

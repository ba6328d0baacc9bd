//! Why a model could not be fetched, and what to do about it.

use std::path::{Path, PathBuf};

use super::plan::MAX_FILES;

/// Why a model could not be fetched. No message holds a token or a signed address.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// A URI names no model.
    #[error("{uri:?} names no model: {reason}")]
    Address {
        /// The URI.
        uri: String,
        /// What is wrong with it, and how to write it.
        reason: String,
    },
    /// The source refuses, or has no such model.
    #[error("{source_name} answers {status}: {advice}")]
    Refused {
        /// The model.
        source_name: String,
        /// What it answered.
        status: String,
        /// What to do.
        advice: String,
    },
    /// The source says what no source should.
    #[error("{source_name} cannot be used: {reason}")]
    Invalid {
        /// The model.
        source_name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is not the one that the source announced.
    #[error("{file} of {source_name} was received with {found}, announced was {expected}")]
    Differs {
        /// The model.
        source_name: String,
        /// The file.
        file: String,
        /// Size or digest announced.
        expected: String,
        /// Size or digest received.
        found: String,
    },
    /// The source cannot be reached, or breaks off again and again.
    #[error("{source_name} cannot be reached: {reason}")]
    Unreachable {
        /// The model.
        source_name: String,
        /// Why.
        reason: String,
    },
    /// The disk is too small.
    #[error("{source_name} needs {needed} bytes more and {} has {free} free: name a larger place by --cache-dir or FLOTILLA_CACHE", path.display())]
    Space {
        /// The model.
        source_name: String,
        /// Bytes that are missing.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// The cache.
        path: PathBuf,
    },
    /// There is no place to keep models.
    #[error("no directory to keep models in can be written ({tried}): name one by --cache-dir or FLOTILLA_CACHE")]
    NoCache {
        /// Directories that were tried.
        tried: String,
    },
    /// The file system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl RemoteError {
    /// True where a new attempt would end the same way.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Address { .. } | Self::Refused { .. } | Self::Invalid { .. } | Self::NoCache { .. } => true,
            Self::Differs { .. } | Self::Unreachable { .. } | Self::Space { .. } | Self::Io { .. } => false,
        }
    }
}

/// Names action and path of a refused file operation.
pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> RemoteError {
    let path = path.to_path_buf();
    move |source| RemoteError::Io { action, path, source }
}

/// More files than a model has.
pub(super) fn too_many_files(source_name: &str) -> RemoteError {
    RemoteError::Invalid {
        source_name: source_name.to_owned(),
        reason: format!("it has more than {MAX_FILES} files: name the directory of one model"),
    }
}

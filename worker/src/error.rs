//! What ends a role, and the exit code by which the operator decides whether a new attempt can help.

use std::{error::Error, fmt::Write as _, net::SocketAddr, path::PathBuf};

use flotilla_api::names::exit;

use crate::uri::UriError;

/// The cause of an error, of any library.
pub type Cause = Box<dyn Error + Send + Sync>;

/// What ends a role before its goal.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A file named on the command line cannot be read.
    #[error("failed to read {what} {}", path.display())]
    ReadFile {
        /// What the file holds.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The role config is not what this worker reads.
    #[error("role config {} is invalid", path.display())]
    InvalidConfig {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Cause,
    },
    /// The role config is of another version.
    #[error("role config has schema version {found}, this worker reads {expected}")]
    SchemaVersion {
        /// Version of the document.
        found: u32,
        /// Version of the worker.
        expected: u32,
    },
    /// A URI names nothing that this process may open.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The address of the HTTP server cannot be bound.
    #[error("failed to listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Configuration, data or weights are wrong: a new attempt would end the same way.
    #[error("{what}")]
    Permanent {
        /// What was attempted, on what.
        what: String,
        /// Why.
        source: Option<Cause>,
    },
    /// A new attempt may succeed.
    #[error("{what}")]
    Retryable {
        /// What was attempted, on what.
        what: String,
        /// Why.
        source: Option<Cause>,
    },
    /// Asked to stop; the state was saved.
    #[error("suspended after step {step}")]
    Suspended {
        /// Steps that the saved state has done.
        step: u32,
    },
}

impl WorkerError {
    /// An error that a new attempt would meet again: `what` says what was attempted and on what.
    pub fn permanent(what: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Permanent {
            what: what.into(),
            source: Some(source.into()),
        }
    }

    /// An error that a new attempt may not meet: `what` says what was attempted and on what.
    pub fn retryable(what: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Retryable {
            what: what.into(),
            source: Some(source.into()),
        }
    }

    /// A permanent error that needs no further cause.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Permanent {
            what: what.into(),
            source: None,
        }
    }

    /// The exit code of the process, one of [`exit`].
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::InvalidConfig { .. } | Self::SchemaVersion { .. } | Self::Uri(_) | Self::Permanent { .. } => {
                exit::PERMANENT
            }
            Self::ReadFile { .. } | Self::Listen { .. } | Self::Retryable { .. } => exit::RETRYABLE,
            Self::Suspended { .. } => exit::SUSPENDED,
        }
    }
}

/// The error and its causes on one line, each cause once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        // Some libraries repeat their cause in their own message.
        if !text.ends_with(&message) {
            let _ = write!(text, ": {message}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_tells_whether_a_new_attempt_can_help() {
        assert_eq!(WorkerError::invalid("no rows").exit_code(), exit::PERMANENT);
        let io = std::io::Error::other("disk is full");
        assert_eq!(
            WorkerError::retryable("write checkpoint", io).exit_code(),
            exit::RETRYABLE
        );
        assert_eq!(WorkerError::Suspended { step: 3 }.exit_code(), exit::SUSPENDED);
    }

    #[test]
    fn a_chain_names_every_cause_once() {
        let error = WorkerError::permanent("failed to read rows", std::io::Error::other("bad magic"));
        assert_eq!(chain(&error), "failed to read rows: bad magic");
    }
}

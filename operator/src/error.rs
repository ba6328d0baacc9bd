//! What can go wrong in a pass, and how soon the next one is worth it.

use std::time::Duration;

/// A failed pass. Every variant is cured by time or by another writer, so every pass is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or did not answer.
    #[error("{action}: {source}")]
    Api {
        /// What was attempted, on what.
        action: String,
        /// The answer.
        source: Box<kube::Error>,
    },
    /// The API server did not answer in time.
    #[error("{action}: no answer in time")]
    Timeout {
        /// What was attempted, on what.
        action: String,
    },
    /// Settings of the election that would break its promise.
    #[error("leader election: {0}")]
    Election(#[from] crate::leader::ElectionConfigError),
    /// This process led and does not any more. It ends: what it knows may be old.
    #[error("leadership lost: {0}")]
    Deposed(#[from] crate::leader::Lost),
    /// An object lacks a field that the API server always sets.
    #[error("{kind} {name:?} has no metadata.{field}")]
    Incomplete {
        /// Kind of the object.
        kind: String,
        /// Its name, if that is not what is missing.
        name: String,
        /// The field.
        field: &'static str,
    },
    /// A child's name is taken by an object of another owner, for example of a deleted namesake.
    #[error("{kind} {namespace}/{name} belongs to another owner; waiting until it is gone")]
    Foreign {
        /// Kind of the child.
        kind: String,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A child that was there is gone; the next pass makes it anew.
    #[error("{kind} {namespace}/{name} went while it was looked at")]
    Gone {
        /// Kind of the child.
        kind: String,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A document cannot be written as JSON.
    #[error("write {what} as JSON: {source}")]
    Serialize {
        /// What was written.
        what: String,
        /// Why it failed.
        source: serde_json::Error,
    },
    /// The address for metrics and health is taken or not ours.
    #[error("listen on {address} for metrics and health: {source}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A URI that was checked before turned out to name no place.
    #[error("mount the claims of a pod: {0}")]
    Uri(#[from] crate::volumes::UriError),
    /// The HTTP client for workers cannot be made.
    #[error("build the HTTP client for workers: {0}")]
    HttpClient(#[source] reqwest::Error),
}

/// The result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an answer of the API server with what was attempted.
    pub fn api(action: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let action = action.into();
        move |source| Self::Api {
            action,
            source: Box::new(source),
        }
    }

    /// A short class of errors: the label of the error counter, so never the text of one error.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => match status.code {
                    409 => "conflict",
                    429 => "throttled",
                    403 => "forbidden",
                    400..=499 => "refused",
                    _ => "server",
                },
                kube::Error::Service(refused) if refused.is::<crate::leader::Fenced>() => "fenced",
                _ => "connection",
            },
            Self::Timeout { .. } => "timeout",
            Self::Election(_) | Self::Deposed(_) => "leadership",
            Self::Incomplete { .. } => "incomplete",
            Self::Foreign { .. } => "foreign",
            Self::Gone { .. } => "gone",
            Self::Serialize { .. } => "serialize",
            Self::Listen { .. } => "listen",
            Self::Uri(_) => "uri",
            Self::HttpClient(_) => "http_client",
        }
    }

    /// Whether the API server said that there is no such object.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { source, .. } if matches!(source.as_ref(), kube::Error::Api(status) if status.code == 404))
    }

    /// How long to wait before the next pass, after `failures` failed ones in a row (this one included).
    ///
    /// A conflict means that the object moved: look again at once. Everything else doubles up to a minute.
    pub fn retry_after(&self, failures: u32) -> Duration {
        const LONGEST: Duration = Duration::from_secs(60);
        let first = match self.class() {
            "conflict" => return Duration::from_millis(100) * failures.clamp(1, 50),
            "foreign" => return Duration::from_secs(1),
            "throttled" => Duration::from_secs(1),
            "refused" | "forbidden" | "incomplete" | "serialize" => Duration::from_secs(2),
            _ => Duration::from_millis(250),
        };
        (first * 2_u32.saturating_pow(failures.saturating_sub(1).min(10))).min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn answered(code: u16) -> Error {
        let status = Status {
            code,
            ..Status::failure("no", "Because")
        };
        Error::api("apply Pod a/b")(kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn an_error_says_what_was_attempted() {
        assert!(answered(500).to_string().starts_with("apply Pod a/b: "));
    }

    #[test]
    fn a_conflict_is_tried_again_at_once_and_a_server_error_ever_later_up_to_a_minute() {
        assert_eq!(answered(409).retry_after(1), Duration::from_millis(100));
        assert_eq!(answered(500).retry_after(1), Duration::from_millis(250));
        assert_eq!(answered(500).retry_after(3), Duration::from_secs(1));
        assert_eq!(answered(503).retry_after(u32::MAX), Duration::from_secs(60));
        assert_eq!(answered(429).retry_after(1), Duration::from_secs(1));
    }
}

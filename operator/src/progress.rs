//! Reads `GET /progress` of a worker.

use std::time::Duration;

use flotilla_api::{names, progress::Progress};

use crate::error::{Error, Result};

/// Longest wait for an answer: a pass holds one of the controller's slots meanwhile.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Largest answer that is read; a worker is not trusted with the operator's memory.
const MAX_BYTES: usize = 1 << 20;

/// Why a worker's progress is not known.
#[derive(Debug, thiserror::Error)]
pub enum ProgressError {
    /// No answer, or a refusal.
    #[error("get {url}: {source}")]
    Http {
        /// The address.
        url: String,
        /// What happened.
        source: reqwest::Error,
    },
    /// An answer past [`MAX_BYTES`].
    #[error("get {url}: the answer has more than {MAX_BYTES} bytes")]
    TooLong {
        /// The address.
        url: String,
    },
    /// An answer that is no Progress.
    #[error("get {url}: {source}")]
    Json {
        /// The address.
        url: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// A client for workers.
#[derive(Clone, Debug)]
pub struct ProgressReader {
    http: reqwest::Client,
}

impl ProgressReader {
    /// A client that goes to pod addresses directly, whatever proxy the environment names.
    pub fn new() -> Result<Self> {
        let http = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build();
        Ok(Self {
            http: http.map_err(Error::HttpClient)?,
        })
    }

    /// What the worker at `ip` says about itself.
    pub async fn read(&self, ip: &str, token: &str) -> Result<Progress, ProgressError> {
        let url = address(ip);
        let failed = |source| ProgressError::Http {
            url: url.clone(),
            source,
        };
        let response = self.http.get(&url).bearer_auth(token).send().await.map_err(failed)?;
        let mut response = response.error_for_status().map_err(failed)?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > MAX_BYTES {
                return Err(ProgressError::TooLong { url });
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).map_err(|source| ProgressError::Json { url, source })
    }
}

fn address(ip: &str) -> String {
    // IPv6 addresses need brackets in a URL.
    let host = if ip.contains(':') {
        format!("[{ip}]")
    } else {
        ip.to_owned()
    };
    format!("http://{host}:{}/progress", names::HTTP_PORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_address_families_make_a_url() {
        assert_eq!(address("127.0.3.4"), "http://127.0.3.4:8080/progress");
        assert_eq!(address("fd00::1"), "http://[fd00::1]:8080/progress");
    }
}

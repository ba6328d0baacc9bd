//! What the operator says to workers: `GET /progress`, and to a learner `PUT /v1/rollout-pods`.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use flotilla_api::{names, names::path, progress::Progress, rollout::RolloutPods};
use reqwest::{Method, RequestBuilder, Response, StatusCode};

use crate::error::{Error, Result};

/// Longest wait for an answer: a pass holds one of the controller's slots meanwhile.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for a connection: a pod whose node is gone takes no more of a pass.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Largest answer that is read; a worker is not trusted with the operator's memory.
const MAX_BYTES: usize = 1 << 20;
/// How long a worker that did not answer is left alone: so long after the first time, then twice as long, and so on.
const FIRST_SILENCE: Duration = Duration::from_millis(500);
/// Doublings of [`FIRST_SILENCE`].
const DOUBLINGS: u32 = 5;
/// Silent workers that are remembered.
const MANY: usize = 16_384;

/// Why a worker did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No answer, or a refusal.
    #[error("{method} {url}: {source}")]
    Http {
        /// The method.
        method: Method,
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

impl WorkerError {
    /// Whether the worker has another token than the one that was presented.
    pub fn is_unauthorized(&self) -> bool {
        matches!(self, Self::Http { source, .. } if source.status() == Some(StatusCode::UNAUTHORIZED))
    }
}

/// A worker that did not answer.
#[derive(Clone, Copy, Debug)]
struct Silence {
    times: u32,
    until: Instant,
}

/// A client for workers.
#[derive(Debug)]
pub struct WorkerClient {
    http: reqwest::Client,
    /// By UID of the pod.
    silent: Mutex<HashMap<String, Silence>>,
}

impl WorkerClient {
    /// A client that goes to pod addresses directly, whatever proxy the environment names.
    pub fn new() -> Result<Self> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(TIMEOUT)
            .build();
        Ok(Self {
            http: http.map_err(Error::HttpClient)?,
            silent: Mutex::default(),
        })
    }

    /// What the worker at `ip` says about itself.
    pub async fn progress(&self, ip: &str, token: &str) -> Result<Progress, WorkerError> {
        let url = url(ip, path::PROGRESS);
        let failed = |source| http_error(Method::GET, &url, source);
        let request = self.http.get(&url).bearer_auth(token);
        let mut response = send(Method::GET, &url, request).await?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > MAX_BYTES {
                return Err(WorkerError::TooLong { url });
            }
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).map_err(|source| WorkerError::Json { url, source })
    }

    /// Tells the learner at `ip` which rollout pods there are.
    pub async fn tell(&self, ip: &str, token: &str, pods: &RolloutPods) -> Result<(), WorkerError> {
        let url = url(ip, path::ROLLOUT_PODS);
        let request = self.http.put(&url).bearer_auth(token).json(pods);
        send(Method::PUT, &url, request).await.map(drop)
    }

    /// Remembers whether the pod with this UID answered.
    pub fn answered(&self, uid: &str, answered: bool) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        if answered {
            silent.remove(uid);
            return;
        }
        if silent.len() >= MANY {
            silent.clear();
        }
        let times = silent.get(uid).map_or(0, |silence| silence.times);
        let pause = FIRST_SILENCE * 2_u32.pow(times.min(DOUBLINGS));
        let silence = Silence {
            times: times + 1,
            until: Instant::now() + pause,
        };
        silent.insert(uid.to_owned(), silence);
    }

    /// How long the pod with this UID is left alone, since it did not answer; None where it may be asked.
    pub fn silence(&self, uid: &str) -> Option<Duration> {
        let silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        let silence = silent.get(uid)?;
        let left = silence.until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

async fn send(method: Method, url: &str, request: RequestBuilder) -> Result<Response, WorkerError> {
    let response = request.send().await.and_then(Response::error_for_status);
    response.map_err(|source| http_error(method, url, source))
}

fn http_error(method: Method, url: &str, source: reqwest::Error) -> WorkerError {
    WorkerError::Http {
        method,
        url: url.to_owned(),
        // The address is in the message already.
        source: source.without_url(),
    }
}

/// `ip:port` of a worker's HTTP server.
pub fn address(ip: &str) -> String {
    // IPv6 addresses need brackets in a URL.
    let host = if ip.contains(':') {
        format!("[{ip}]")
    } else {
        ip.to_owned()
    };
    format!("{host}:{}", names::HTTP_PORT)
}

fn url(ip: &str, path: &str) -> String {
    format!("http://{}{path}", address(ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_address_families_make_a_url() {
        assert_eq!(url("127.0.3.4", path::PROGRESS), "http://127.0.3.4:8080/progress");
        assert_eq!(url("fd00::1", path::PROGRESS), "http://[fd00::1]:8080/progress");
    }

    #[test]
    fn a_silent_worker_is_left_alone_for_longer_and_longer_until_it_answers() {
        let workers = WorkerClient::new().expect("a client");
        assert_eq!(workers.silence("a"), None);
        workers.answered("a", false);
        let first = workers.silence("a").expect("silent");
        workers.answered("a", false);
        let second = workers.silence("a").expect("silent");
        assert!(first <= FIRST_SILENCE && second > FIRST_SILENCE, "{first:?} {second:?}");
        workers.answered("a", true);
        assert_eq!(workers.silence("a"), None);
    }
}

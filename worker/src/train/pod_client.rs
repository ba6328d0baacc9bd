//! One learner's requests to rollout pods: weights, then pieces.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::body::Bytes;
use flotilla_api::{names::path, rollout::RolloutPod};
use flotilla_engine::Group;
use reqwest::{Response, StatusCode, header};

use crate::rollout::wire::{Line, Piece, SAFETENSORS, WeightsAnswer};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest line that is read: one group.
const MAX_LINE_BYTES: usize = 64 << 20;
/// How much of a refusal is repeated.
const MAX_REFUSAL_CHARS: usize = 300;

/// Why a pod did not do what it was asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fault {
    /// Another pod, or the same one later, may do it.
    Lost(String),
    /// Every pod would refuse it.
    Permanent(String),
}

/// The version that a pod has loaded, as far as this learner knows; held while it is being replaced.
type Loaded = Arc<tokio::sync::Mutex<Option<String>>>;

/// Asks rollout pods.
#[derive(Debug)]
pub struct PodClient {
    http: reqwest::Client,
    /// By UID of the pod.
    loaded: Mutex<HashMap<String, Loaded>>,
}

impl PodClient {
    /// A client that presents `token` and goes to pod addresses directly, whatever proxy the environment names.
    pub fn new(token: Option<&str>) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let mut headers = header::HeaderMap::new();
        if let Some(token) = token {
            let mut value = header::HeaderValue::from_str(&format!("Bearer {token}"))?;
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(CONNECT_TIMEOUT)
            .default_headers(headers)
            .build()?;
        Ok(Self {
            http,
            loaded: Mutex::default(),
        })
    }

    /// Sends the weights unless this process has sent them to this pod.
    pub async fn prepare(&self, pod: &RolloutPod, version: &str, weights: &Bytes) -> Result<(), Fault> {
        let loaded = self.loaded(pod);
        let mut loaded = loaded.lock().await;
        if loaded.as_deref() == Some(version) {
            return Ok(());
        }
        *loaded = None;
        // A version is digits, letters and dashes: nothing to escape.
        let request = self
            .http
            .put(format!("{}?version={version}", url(pod, path::WEIGHTS)))
            .header(header::CONTENT_TYPE, SAFETENSORS)
            .body(weights.clone());
        let response = request.send().await.map_err(|error| lost(pod, error))?;
        let response = accepted(pod, response).await?;
        let answer: WeightsAnswer = response.json().await.map_err(|error| lost(pod, error))?;
        if answer.weight_version != version {
            return Err(stale(pod, version, &answer.weight_version));
        }
        *loaded = Some(version.to_owned());
        Ok(())
    }

    /// The groups of a piece, in the order of its prompts.
    pub async fn sample(&self, pod: &RolloutPod, piece: &Piece) -> Result<Vec<Group>, Fault> {
        let outcome = self.try_sample(pod, piece).await;
        if outcome.is_err() {
            // It may have been started again and hold no weights, or those of another learner.
            *self.loaded(pod).lock().await = None;
        }
        outcome
    }

    async fn try_sample(&self, pod: &RolloutPod, piece: &Piece) -> Result<Vec<Group>, Fault> {
        let request = self.http.post(url(pod, path::ROLLOUTS)).json(piece);
        let response = request.send().await.map_err(|error| lost(pod, error))?;
        let mut response = accepted(pod, response).await?;
        let mut groups: Vec<Option<Group>> = vec![None; piece.prompts.len()];
        let mut pending = Vec::new();
        let mut complete = false;
        while let Some(chunk) = response.chunk().await.map_err(|error| lost(pod, error))? {
            pending.extend_from_slice(&chunk);
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                complete = read(pod, piece, &line, &mut groups)?;
            }
            if pending.len() > MAX_LINE_BYTES {
                return Err(Fault::Lost(format!(
                    "{}: a line has more than {MAX_LINE_BYTES} bytes",
                    pod.name
                )));
            }
        }
        let groups: Option<Vec<Group>> = groups.into_iter().collect();
        match groups {
            Some(groups) if complete => Ok(groups),
            _ => Err(Fault::Lost(format!("{}: the answer was cut off", pod.name))),
        }
    }

    fn loaded(&self, pod: &RolloutPod) -> Loaded {
        let mut pods = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(pods.entry(pod.uid.clone()).or_default())
    }
}

/// Takes one line of an answer; true for the last one.
fn read(pod: &RolloutPod, piece: &Piece, line: &[u8], groups: &mut [Option<Group>]) -> Result<bool, Fault> {
    let garbled = |what: &str| Fault::Lost(format!("{}: {what}", pod.name));
    let line: Line =
        serde_json::from_slice(line).map_err(|error| garbled(&format!("an answer is no line: {error}")))?;
    match line {
        Line::Group(group) => {
            if group.weight_version != piece.weight_version {
                return Err(stale(pod, &piece.weight_version, &group.weight_version));
            }
            let index = group.index;
            let group = group.group().filter(|group| group.completions.len() == piece.n);
            let place = groups.get_mut(index);
            let (Some(group), Some(place)) = (group, place) else {
                return Err(garbled("an answer does not fit what was asked for"));
            };
            *place = Some(group);
            Ok(false)
        }
        Line::Done { .. } => Ok(true),
        Line::Error {
            message,
            permanent: true,
        } => Err(Fault::Permanent(format!("{}: {message}", pod.name))),
        Line::Error { message, .. } => Err(garbled(&message)),
    }
}

/// The answer, if it is one. What a pod refuses as wrong every pod refuses; everything else may go better elsewhere.
async fn accepted(pod: &RolloutPod, response: Response) -> Result<Response, Fault> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let text = response.text().await.unwrap_or_default();
    let message = serde_json::from_str::<serde_json::Value>(&text)
        .ok()
        .and_then(|answer| answer["error"]["message"].as_str().map(str::to_owned))
        .unwrap_or(text);
    let message: String = message.chars().take(MAX_REFUSAL_CHARS).collect();
    let message = format!("{}: {status}: {message}", pod.name);
    Err(match status {
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::UNPROCESSABLE_ENTITY => {
            Fault::Permanent(message)
        }
        _ => Fault::Lost(message),
    })
}

fn stale(pod: &RolloutPod, wanted: &str, given: &str) -> Fault {
    Fault::Lost(format!("{}: weights {given:?} in place of {wanted:?}", pod.name))
}

fn lost(pod: &RolloutPod, error: reqwest::Error) -> Fault {
    Fault::Lost(format!("{}: {}", pod.name, crate::error::chain(&error.without_url())))
}

fn url(pod: &RolloutPod, path: &str) -> String {
    format!("http://{}{path}", pod.address)
}

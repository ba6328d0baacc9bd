//! A hub of this process: its API and, on another port, the host that large files are redirected to.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, Response, StatusCode, header},
};
use futures::{StreamExt, stream};
use sha1::{Digest as _, Sha1};

use super::super::hub::{HubSettings, Secret};
use crate::digest::sha256_hex;

/// The commit of every revision that exists.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The token that the hub knows.
pub const TOKEN: &str = "hf_secret_of_this_test";
/// A repository whose licence was not accepted.
pub const GATED: &str = "gated";

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// Answer 401 without the token.
    pub private: bool,
    /// Cut so many answers of the host of large files after [`CUT`] bytes.
    pub cuts: usize,
    /// After the bytes of a cut, send nothing in place of closing.
    pub stall: bool,
    /// Answer so many questions with 503.
    pub failures: usize,
    /// Change the bytes of large files.
    pub corrupt: bool,
    /// Further names in the list of files.
    pub names: Vec<String>,
    /// A size to announce for large files.
    pub announced: Option<u64>,
    /// Ignore ranges.
    pub no_ranges: bool,
}

/// Bytes that are sent before a cut.
pub const CUT: usize = 40_000;

/// The servers.
pub struct HubServer {
    endpoint: String,
    state: Arc<Served>,
}

struct Served {
    files: BTreeMap<String, Vec<u8>>,
    store: SocketAddr,
    behaviour: Mutex<Behaviour>,
    log: Mutex<Vec<String>>,
}

impl HubServer {
    /// Serves `org/model`.
    pub async fn start(behaviour: Behaviour) -> Self {
        let store = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let hub = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let endpoint = format!("http://{}", hub.local_addr().expect("bound"));
        let state = Arc::new(Served {
            files: files(),
            store: store.local_addr().expect("bound"),
            behaviour: Mutex::new(behaviour),
            log: Mutex::default(),
        });
        let hub_app = Router::new().fallback(answer).with_state(state.clone());
        let store_app = Router::new().fallback(answer_bytes).with_state(state.clone());
        tokio::spawn(async move { axum::serve(hub, hub_app).await });
        tokio::spawn(async move { axum::serve(store, store_app).await });
        Self { endpoint, state }
    }

    /// Settings without a token.
    pub fn settings(&self) -> HubSettings {
        HubSettings {
            endpoint: self.endpoint.clone(),
            token: None,
        }
    }

    /// Settings with a token.
    pub fn settings_with(&self, token: &str) -> HubSettings {
        HubSettings {
            token: Secret::new(token),
            ..self.settings()
        }
    }

    /// What goes wrong from now on.
    pub fn behave(&self, behaviour: Behaviour) {
        *self.state.behaviour.lock().expect("not poisoned") = behaviour;
    }

    /// Requests since the last call.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.state.log.lock().expect("not poisoned"))
    }

    /// The files that a model needs.
    pub fn needed(&self) -> BTreeMap<String, Vec<u8>> {
        let needed = |name: &str| name.ends_with(".json") || (name.starts_with("model-") && !name.contains('/'));
        let files = self.state.files.iter().filter(|(name, _)| needed(name));
        files.map(|(name, bytes)| (name.clone(), bytes.clone())).collect()
    }
}

fn files() -> BTreeMap<String, Vec<u8>> {
    let shard = |seed: usize| (0..100_000).map(|index| (index * 31 + seed) as u8).collect::<Vec<_>>();
    let index = r#"{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}"#;
    let text = |text: &str| text.as_bytes().to_vec();
    [
        (".gitattributes", text("*.bin")),
        ("README.md", text("a model")),
        ("config.json", text("{}")),
        ("tokenizer.json", text("{\"a\":1}")),
        ("model.safetensors.index.json", text(index)),
        ("model-00001-of-00002.safetensors", shard(1)),
        ("model-00002-of-00002.safetensors", shard(2)),
        ("other.safetensors", text("not of the index")),
        ("pytorch_model.bin", text("pickle")),
        ("modeling.py", text("import os")),
        ("original/model-00001-of-00001.safetensors", text("elsewhere")),
    ]
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .into()
}

fn status(status: StatusCode, code: Option<&str>) -> Response<Body> {
    let builder = Response::builder().status(status);
    let builder = match code {
        Some(code) => builder.header("x-error-code", code),
        None => builder,
    };
    builder.body(Body::empty()).expect("a response")
}

async fn answer(State(state): State<Arc<Served>>, request: Request) -> Response<Body> {
    let path = request.uri().path().to_owned();
    state
        .log
        .lock()
        .expect("not poisoned")
        .push(format!("{} {path}", request.method()));
    let behaviour = {
        let mut behaviour = state.behaviour.lock().expect("not poisoned");
        let now = behaviour.clone();
        behaviour.failures = behaviour.failures.saturating_sub(1);
        now
    };
    if behaviour.failures > 0 {
        return status(StatusCode::SERVICE_UNAVAILABLE, None);
    }
    let expected = format!("Bearer {TOKEN}");
    let presented = request
        .headers()
        .get(header::AUTHORIZATION)
        .map(|value| value.as_bytes().to_vec());
    if behaviour.private && presented.as_deref() != Some(expected.as_bytes()) {
        return status(StatusCode::UNAUTHORIZED, Some("RepoNotFound"));
    }
    if path.contains(GATED) {
        return status(StatusCode::FORBIDDEN, Some("GatedRepo"));
    }
    if let Some(revision) = path.strip_prefix("/api/models/org/model/revision/") {
        if !["main", COMMIT, "refs%2Fpr%2F1"].contains(&revision) {
            return status(StatusCode::NOT_FOUND, Some("RevisionNotFound"));
        }
        let names = state.files.keys().chain(&behaviour.names);
        let siblings = names
            .map(|name| format!(r#"{{"rfilename":{name:?}}}"#))
            .collect::<Vec<_>>();
        let body = format!(r#"{{"sha":"{COMMIT}","siblings":[{}]}}"#, siblings.join(","));
        return Response::new(Body::from(body));
    }
    let name = path.strip_prefix(&format!("/org/model/resolve/{COMMIT}/"));
    let Some((name, bytes)) = name.and_then(|name| state.files.get_key_value(name)) else {
        return status(StatusCode::NOT_FOUND, Some("RepoNotFound"));
    };
    let builder = Response::builder().header("x-repo-commit", COMMIT);
    if name.ends_with(".safetensors") {
        let builder = builder.status(StatusCode::FOUND);
        let target = format!("http://{}/{name}?signature=secret-of-the-store", state.store);
        let builder = builder
            .header(header::LOCATION, target)
            .header("x-linked-size", behaviour.announced.unwrap_or(bytes.len() as u64))
            .header("x-linked-etag", format!("\"{}\"", sha256_hex(bytes)));
        return builder.body(Body::empty()).expect("a response");
    }
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    let builder = builder
        .header(header::ETAG, format!("\"{}\"", hex::encode(hasher.finalize())))
        .header(header::CONTENT_LENGTH, bytes.len());
    let body = if request.method() == Method::HEAD {
        Vec::new()
    } else {
        bytes.clone()
    };
    builder.body(Body::from(body)).expect("a response")
}

async fn answer_bytes(State(state): State<Arc<Served>>, request: Request) -> Response<Body> {
    let name = request.uri().path().trim_start_matches('/').to_owned();
    let begin = range(request.headers());
    let line = format!("store {name} from {}", begin.unwrap_or(0));
    state.log.lock().expect("not poisoned").push(line);
    // The token is for the hub alone.
    if request.headers().contains_key(header::AUTHORIZATION) {
        return status(StatusCode::BAD_REQUEST, None);
    }
    let behaviour = {
        let mut behaviour = state.behaviour.lock().expect("not poisoned");
        let now = behaviour.clone();
        behaviour.cuts = behaviour.cuts.saturating_sub(1);
        now
    };
    let mut bytes = state.files[&name].clone();
    if behaviour.corrupt {
        bytes[0] ^= 1;
    }
    let begin = begin.filter(|_| !behaviour.no_ranges);
    let rest = Bytes::from(bytes.split_off(begin.unwrap_or(0)));
    let builder = Response::builder().header(header::CONTENT_LENGTH, rest.len());
    let builder = match begin {
        Some(begin) => {
            let end = begin + rest.len();
            let range = format!("bytes {begin}-{}/{end}", end - 1);
            builder
                .status(StatusCode::PARTIAL_CONTENT)
                .header(header::CONTENT_RANGE, range)
        }
        None => builder,
    };
    let body = if behaviour.cuts > 0 {
        cut(rest.slice(..CUT.min(rest.len())), behaviour.stall)
    } else {
        Body::from(rest)
    };
    builder.body(body).expect("a response")
}

/// The bytes, and then an end of the connection, or nothing.
fn cut(bytes: Bytes, stall: bool) -> Body {
    let first = stream::once(async { Ok::<_, std::io::Error>(bytes) });
    if stall {
        return Body::from_stream(first.chain(stream::pending()));
    }
    let end = stream::once(async {
        // What was sent before arrives first.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        Err(std::io::Error::other("cut"))
    });
    Body::from_stream(first.chain(end))
}

/// First byte asked for.
pub fn range(headers: &HeaderMap) -> Option<usize> {
    let value = headers.get(header::RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes=")?.trim_end_matches('-').parse().ok()
}

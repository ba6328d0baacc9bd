//! The protocol of the Hugging Face hub and its mirrors: which files a revision has, what each is, and its bytes.
//!
//! `GET /api/models/{repo}/revision/{revision}` names commit and files; `HEAD /{repo}/resolve/{commit}/{file}` tells size and
//! digest in `X-Linked-Size` and `X-Linked-Etag` (large files) or `Content-Length` and `ETag`; `GET` of the same address
//! redirects to where the bytes lie, which is another host that never sees the token.

use std::{collections::BTreeSet, path::PathBuf};

use futures::{StreamExt, TryStreamExt};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::Deserialize;

use super::{
    error::{RemoteError, too_many_files},
    file::{Digest, Reading, RemoteFile},
    plan::{MAX_FILES, MAX_LIST_BYTES},
    transport::Transport,
};

/// The hub.
const ENDPOINT: &str = "https://huggingface.co";
/// Redirects that are followed.
const MAX_REDIRECTS: usize = 5;

/// Where the hub is and who asks.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// Address of the hub or a mirror of it, without a slash at its end.
    pub endpoint: String,
    /// Token of an account.
    pub token: Option<Secret>,
}

/// Text that is never shown.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Surrounding white space does not count; None if nothing is left.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Default for HubSettings {
    fn default() -> Self {
        Self {
            endpoint: ENDPOINT.to_owned(),
            token: None,
        }
    }
}

impl HubSettings {
    /// From HF_ENDPOINT and HF_TOKEN, or the token that `hf auth login` left in HF_TOKEN_PATH, HF_HOME or the home directory.
    pub fn from_environment() -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let file = || {
            let home = variable("HF_HOME").map(PathBuf::from);
            let usual = || Some(PathBuf::from(variable("HOME")?).join(".cache/huggingface"));
            let path = variable("HF_TOKEN_PATH").map(PathBuf::from);
            let path = path.or_else(|| Some(home.or_else(usual)?.join("token")))?;
            std::fs::read_to_string(path).ok()
        };
        let token = variable("HF_TOKEN")
            .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(file);
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.as_deref().and_then(Secret::new),
        }
    }
}

/// A revision of a repository.
#[derive(Debug)]
pub(super) struct Hub {
    transport: Transport,
    settings: HubSettings,
    repo: String,
    revision: String,
}

/// What a revision is.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// The commit.
    pub commit: String,
    /// Its files.
    pub names: BTreeSet<String>,
}

impl Hub {
    /// A revision of `repo`; nothing is asked yet.
    pub fn new(settings: HubSettings, repo: &str, revision: &str) -> Result<Self, RemoteError> {
        let hub = Self {
            transport: Transport::open().map_err(|error| RemoteError::Invalid {
                source_name: format!("hf://{repo}"),
                reason: format!("TLS: {error}"),
            })?,
            settings,
            repo: repo.to_owned(),
            revision: revision.to_owned(),
        };
        hub.uri("")?;
        Ok(hub)
    }

    /// The model as messages name it.
    pub fn name(&self) -> String {
        format!("hf://{}@{}", self.repo, self.revision)
    }

    /// The commit that the revision names, if it is one itself: then nothing can change.
    pub fn pinned(&self) -> Option<&str> {
        let is_commit = self.revision.len() == 40 && self.revision.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_commit.then_some(self.revision.as_str())
    }

    /// Asks which commit the revision is and which files it has.
    pub async fn snapshot(&self) -> Result<Snapshot, RemoteError> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let revision = escape(&self.revision).replace('/', "%2F");
        let path = format!("/api/models/{}/revision/{revision}", self.repo);
        let response = self.ask(Method::GET, &path, None).await?;
        let body = Limited::new(response.into_body(), MAX_LIST_BYTES as usize)
            .collect()
            .await;
        let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => self.invalid(format!("its list of files has more than {MAX_LIST_BYTES} bytes")),
            None => self.unreachable(&error.to_string()),
        });
        let body = body?.to_bytes();
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|error| self.invalid(format!("its list of files is none: {error}")))?;
        let is_plain = answer.sha.len() <= 64 && answer.sha.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if answer.sha.is_empty() || !is_plain {
            return Err(self.invalid(format!("its commit is {:?}", answer.sha)));
        }
        if answer.siblings.len() > MAX_FILES {
            return Err(too_many_files(&self.name()));
        }
        Ok(Snapshot {
            commit: answer.sha,
            names: answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect(),
        })
    }

    /// Asks size and digest of a file.
    pub async fn describe(&self, commit: &str, name: &str) -> Result<RemoteFile, RemoteError> {
        let response = self.ask(Method::HEAD, &self.resolve(commit, name), None).await?;
        let headers = response.headers();
        let text = |header: &str| headers.get(header).and_then(|value| value.to_str().ok());
        let size = text("x-linked-size").or_else(|| text("content-length"));
        let size = size.and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| self.invalid(format!("the size of {name} is not told")))?;
        if let Some(other) = text("x-repo-commit").filter(|found| *found != commit) {
            return Err(self.invalid(format!("{name} is of commit {other}, asked was {commit}")));
        }
        let tag = text("x-linked-etag").or_else(|| text("etag"));
        Ok(RemoteFile {
            name: name.to_owned(),
            size,
            digest: tag.and_then(Digest::of_tag),
            tag: tag.map(str::to_owned),
        })
    }

    /// Begins to read a file at `begin`.
    pub async fn read(&self, commit: &str, file: &RemoteFile, begin: u64) -> Result<Reading, RemoteError> {
        let range = (begin > 0).then_some(begin);
        let response = self.ask(Method::GET, &self.resolve(commit, &file.name), range).await?;
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        if partial && content_begin(response.headers()) != Some(begin) {
            return Err(self.invalid(format!("{} is sent from another place than asked for", file.name)));
        }
        let name = self.name();
        let broken = move |error: hyper::Error| RemoteError::Unreachable {
            source_name: name.clone(),
            reason: error.to_string(),
        };
        let data = response.into_body().into_data_stream().map_err(broken);
        Ok(Reading {
            begin: if partial { begin } else { 0 },
            stream: data.boxed(),
        })
    }

    fn resolve(&self, commit: &str, name: &str) -> String {
        format!("/{}/resolve/{commit}/{}", self.repo, escape(name))
    }

    /// Asks, follows redirects, and gives an answer of success. A HEAD is answered by the redirect to a large file: that one
    /// tells size and digest, the file itself does not.
    async fn ask(&self, method: Method, path: &str, range: Option<u64>) -> Result<Response<Incoming>, RemoteError> {
        let first = self.uri(path)?;
        let mut uri = first.clone();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Transport::request(method.clone(), uri.clone());
            let headers = request.headers_mut();
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            if let Some(begin) = range
                && let Ok(value) = HeaderValue::from_str(&format!("bytes={begin}-"))
            {
                headers.insert(header::RANGE, value);
            }
            if same_place(&uri, &first)
                && let Some(value) = self.authorization(&uri)
            {
                headers.insert(header::AUTHORIZATION, value);
            }
            let response = self.transport.send(request).await;
            let response = response.map_err(|error| self.unreachable(&error.to_string()))?;
            let status = response.status();
            let tells_file = method == Method::HEAD && response.headers().contains_key("x-linked-size");
            if status.is_success() || (status.is_redirection() && tells_file) {
                return Ok(response);
            }
            if !status.is_redirection() && same_place(&uri, &first) {
                return Err(self.refused(status, response.headers()));
            }
            if !status.is_redirection() {
                // The signature of a redirect may have run out: asking the hub again gives another.
                return Err(self.unreachable(&format!("the host that it redirects to answers {status}")));
            }
            uri = self.redirected(&uri, response.headers())?;
        }
        Err(self.invalid(format!("it redirects more than {MAX_REDIRECTS} times")))
    }

    fn uri(&self, path: &str) -> Result<Uri, RemoteError> {
        let text = format!("{}{}", self.settings.endpoint, if path.is_empty() { "/" } else { path });
        let uri = text.parse::<Uri>().ok();
        let has_scheme = |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some();
        uri.filter(has_scheme)
            .ok_or_else(|| self.invalid(format!("HF_ENDPOINT {:?} is no address", self.settings.endpoint)))
    }

    fn redirected(&self, from: &Uri, headers: &HeaderMap) -> Result<Uri, RemoteError> {
        let target = headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
        let target = target.unwrap_or_default();
        let absolute = if target.starts_with('/') && !target.starts_with("//") {
            let authority = from.authority().map(ToString::to_string).unwrap_or_default();
            format!("{}://{authority}{target}", from.scheme_str().unwrap_or("https"))
        } else {
            target.to_owned()
        };
        let uri = absolute.parse::<Uri>().ok();
        // From HTTPS to HTTP would give away what is read.
        let safe = |uri: &Uri| uri.scheme_str() == Some("https") || uri.scheme_str() == from.scheme_str();
        uri.filter(|uri| uri.host().is_some() && safe(uri))
            .ok_or_else(|| self.invalid("it redirects to no address, or from HTTPS to HTTP".to_owned()))
    }

    /// The token, for HTTPS and this machine only: anyone on the way could read it otherwise.
    fn authorization(&self, uri: &Uri) -> Option<HeaderValue> {
        let Secret(token) = self.settings.token.as_ref()?;
        let is_here = matches!(uri.host(), Some("localhost" | "127.0.0.1" | "[::1]"));
        if uri.scheme_str() != Some("https") && !is_here {
            tracing::warn!(
                endpoint = self.settings.endpoint,
                "HF_TOKEN is not sent over plain HTTP"
            );
            return None;
        }
        let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    fn refused(&self, status: StatusCode, headers: &HeaderMap) -> RemoteError {
        let code = headers.get("x-error-code").and_then(|value| value.to_str().ok());
        let (repo, endpoint) = (&self.repo, &self.settings.endpoint);
        let has_token = self.settings.token.is_some();
        let advice = match (status.as_u16(), code) {
            (_, Some("GatedRepo")) if has_token => format!(
                "accept the licence on {endpoint}/{repo} with the account of HF_TOKEN, and give a token that may read gated models"
            ),
            (_, Some("GatedRepo")) => {
                format!("accept the licence on {endpoint}/{repo}, then set HF_TOKEN to a token of that account")
            }
            (404, Some("RevisionNotFound")) => format!(
                "it has no revision {:?}: name a branch, tag or commit as hf://{repo}@REVISION",
                self.revision
            ),
            (404, Some("EntryNotFound")) => "a file that it lists is not there".to_owned(),
            (401 | 403, _) if has_token => {
                "HF_TOKEN is not valid or may not read this model: make a token with read access to it".to_owned()
            }
            (401 | 403, _) => {
                "the name is wrong or the model is private: check the name, or set HF_TOKEN to a token that may \
                               read it (in a pod by podOverrides.env from a Secret)"
                    .to_owned()
            }
            (404, _) => "there is no such model or revision: check the name, and set HF_TOKEN if the model is private"
                .to_owned(),
            (408 | 429 | 500.., _) => return self.unreachable(&format!("it answers {status}")),
            _ => "it does not speak the hub's protocol: check HF_ENDPOINT".to_owned(),
        };
        RemoteError::Refused {
            source_name: self.name(),
            status: status.to_string(),
            advice,
        }
    }

    fn unreachable(&self, reason: &str) -> RemoteError {
        RemoteError::Unreachable {
            source_name: self.name(),
            reason: reason.to_owned(),
        }
    }

    fn invalid(&self, reason: String) -> RemoteError {
        RemoteError::Invalid {
            source_name: self.name(),
            reason,
        }
    }
}

fn same_place(a: &Uri, b: &Uri) -> bool {
    a.scheme() == b.scheme() && a.authority() == b.authority()
}

/// First byte of a partial answer.
fn content_begin(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// A path with everything but letters, digits and `-_.~/` in percent form.
fn escape(path: &str) -> String {
    let mut escaped = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

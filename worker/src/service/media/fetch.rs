//! Pictures from other hosts: one GET at a time, over a connection to an address that was checked.
//!
//! There is no pool, no proxy and no cookie, and nothing follows a redirect by itself: each hop is a new URL that passes the
//! same checks.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{
        HeaderMap, Request, Response, StatusCode,
        header::{ACCEPT, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HOST, LOCATION, USER_AGENT},
    },
};
use futures::StreamExt as _;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use reqwest::Url;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Semaphore,
};
use tokio_rustls::TlsConnector;

use super::{
    LIMITS, address,
    hosts::{self, HostPattern},
    resolver::{self, Resolve, Screen, SystemResolver},
};
use crate::error::{WorkerError, chain};

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 3;
/// A picture that is not there after so long, queueing and redirects included, is given up.
const TOTAL_TIME: Duration = Duration::from_secs(15);
/// A connection that is not there after so long is given up for the host's next address.
const CONNECT_TIME: Duration = Duration::from_secs(3);
/// Addresses of a host that are tried.
const MAX_ADDRESSES: usize = 4;
/// Pictures that are fetched at once, over all requests.
const FETCHED_AT_ONCE: usize = 16;
/// Bytes that the head of an answer may have.
const MAX_HEAD_BYTES: usize = 32 << 10;
/// How this program names itself.
const AGENT: &str = concat!("flotilla-worker/", env!("CARGO_PKG_VERSION"));

/// Why a picture was not fetched.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// The server does not fetch this.
    #[error("the image is not fetched: {0}")]
    Refused(String),
    /// The other host did not give it.
    #[error("the image cannot be fetched: {0}")]
    Failed(String),
}

/// Fetches pictures from the hosts of a list.
#[derive(Debug)]
pub struct Fetcher {
    hosts: Vec<HostPattern>,
    resolver: Arc<dyn Resolve>,
    screen: Screen,
    tls: Arc<ClientConfig>,
    places: Semaphore,
    total_time: Duration,
}

/// What one hop gave.
enum Hop {
    Picture(Bytes),
    Redirect(Url),
}

impl Fetcher {
    /// From these hosts, checked with the certificates of the system.
    pub fn new(hosts: Vec<HostPattern>) -> Result<Self, WorkerError> {
        let mut roots = RootCertStore::empty();
        if !hosts.is_empty() {
            let found = rustls_native_certs::load_native_certs();
            let (added, _) = roots.add_parsable_certificates(found.certs);
            if added == 0 {
                tracing::warn!("the system has no certificates: https images cannot be fetched");
            }
        }
        let tls = client_config(roots)?;
        Ok(Self {
            hosts,
            resolver: Arc::new(SystemResolver),
            screen: address::refusal,
            tls: Arc::new(tls),
            places: Semaphore::new(FETCHED_AT_ONCE),
            total_time: TOTAL_TIME,
        })
    }

    /// Whether any host is listed.
    pub fn is_closed(&self) -> bool {
        self.hosts.is_empty()
    }

    /// The bytes of a picture.
    pub async fn fetch(&self, url: Url) -> Result<Bytes, FetchError> {
        let seconds = self.total_time.as_secs();
        let fetched = tokio::time::timeout(self.total_time, async {
            // The semaphore is never closed.
            let _place = self.places.acquire().await;
            self.follow(url).await
        });
        fetched
            .await
            .unwrap_or_else(|_| Err(FetchError::Failed(format!("it was not there after {seconds} s"))))
    }

    async fn follow(&self, mut url: Url) -> Result<Bytes, FetchError> {
        for _ in 0..=MAX_REDIRECTS {
            match self.hop(&url).await? {
                Hop::Picture(bytes) => return Ok(bytes),
                Hop::Redirect(next) => url = next,
            }
        }
        Err(FetchError::Failed(format!("more than {MAX_REDIRECTS} redirects")))
    }

    async fn hop(&self, url: &Url) -> Result<Hop, FetchError> {
        hosts::check(url, &self.hosts).map_err(FetchError::Refused)?;
        let addresses = resolver::addresses(url, self.resolver.as_ref(), self.screen).await?;
        let stream = connect(&addresses).await?;
        let response = if url.scheme() == "https" {
            let host = url.host_str().unwrap_or_default();
            let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
            let name = name.map_err(|_| FetchError::Refused(format!("{host} has no name for a certificate")))?;
            let stream = TlsConnector::from(self.tls.clone()).connect(name, stream).await;
            let stream = stream.map_err(|error| FetchError::Failed(format!("TLS: {error}")))?;
            get(stream, url).await?
        } else {
            get(stream, url).await?
        };
        read(response, url).await
    }
}

fn client_config(roots: RootCertStore) -> Result<ClientConfig, WorkerError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| WorkerError::permanent("failed to set up TLS", error))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Connects to the first address that answers.
async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, FetchError> {
    let mut last = "the connection timed out".to_owned();
    for address in addresses.iter().take(MAX_ADDRESSES) {
        match tokio::time::timeout(CONNECT_TIME, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => {}
        }
    }
    Err(FetchError::Failed(last))
}

/// Sends one request. The connection ends with the body that is returned.
async fn get<S>(stream: S, url: &Url) -> Result<Response<Incoming>, FetchError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let failed = |error: hyper::Error| FetchError::Failed(chain(&error));
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("a connection for an image ended: {}", chain(&error));
        }
    });
    let host = url.host_str().unwrap_or_default();
    let host = url
        .port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    let target = match url.query() {
        Some(query) => format!("{}?{query}", url.path()),
        None => url.path().to_owned(),
    };
    let request = Request::get(target)
        .header(HOST, host)
        .header(USER_AGENT, AGENT)
        .header(ACCEPT, "image/*")
        .body(Body::empty())
        .map_err(|error| FetchError::Refused(format!("the URL is not valid: {error}")))?;
    sender.send_request(request).await.map_err(failed)
}

async fn read(response: Response<Incoming>, url: &Url) -> Result<Hop, FetchError> {
    let (head, body) = response.into_parts();
    match head.status {
        StatusCode::OK => {}
        StatusCode::MOVED_PERMANENTLY
        | StatusCode::FOUND
        | StatusCode::SEE_OTHER
        | StatusCode::TEMPORARY_REDIRECT
        | StatusCode::PERMANENT_REDIRECT => return redirect(&head.headers, url).map(Hop::Redirect),
        status => return Err(FetchError::Failed(format!("the host answered {}", status.as_u16()))),
    }
    check_head(&head.headers)?;
    let mut bytes = Vec::new();
    let mut stream = Body::new(body).into_data_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| FetchError::Failed(format!("the answer broke off: {}", chain(&error))))?;
        if bytes.len() + chunk.len() > LIMITS.bytes {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(Hop::Picture(bytes.into()))
}

fn redirect(headers: &HeaderMap, url: &Url) -> Result<Url, FetchError> {
    let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
    let next = location.and_then(|location| url.join(location).ok());
    next.ok_or_else(|| FetchError::Failed("the host redirects to nowhere".to_owned()))
}

/// What the head of an answer says about its body: an image, not compressed, not too large.
fn check_head(headers: &HeaderMap) -> Result<(), FetchError> {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    let media = text(CONTENT_TYPE).to_ascii_lowercase();
    if !media.starts_with("image/") {
        let media = super::shorten(&media);
        return Err(FetchError::Failed(format!("the answer is {media:?}, not an image")));
    }
    let encoding = text(CONTENT_ENCODING);
    if !encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity") {
        return Err(FetchError::Failed(
            "the answer is compressed, which was not asked for".to_owned(),
        ));
    }
    match text(CONTENT_LENGTH).parse::<usize>() {
        Ok(length) if length > LIMITS.bytes => Err(too_large()),
        _ => Ok(()),
    }
}

fn too_large() -> FetchError {
    FetchError::Failed(format!("it has more than {} bytes", LIMITS.bytes))
}

#[cfg(test)]
impl Fetcher {
    /// For tests alone: loopback passes for public, names are looked up in a table, and certificates are the test's own.
    pub fn among_tests(hosts: Vec<HostPattern>, resolver: Arc<dyn Resolve>, roots: RootCertStore) -> Self {
        fn screen(address: std::net::IpAddr) -> Option<&'static str> {
            if address.is_loopback() {
                None
            } else {
                address::refusal(address)
            }
        }
        Self {
            hosts,
            resolver,
            screen,
            tls: Arc::new(client_config(roots).expect("TLS")),
            places: Semaphore::new(FETCHED_AT_ONCE),
            total_time: Duration::from_millis(700),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn a_head_that_announces_too_much_is_refused_before_the_body() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("image/png"));
        headers.insert(CONTENT_LENGTH, LIMITS.bytes.into());
        assert!(check_head(&headers).is_ok());
        headers.insert(CONTENT_LENGTH, (LIMITS.bytes + 1).into());
        assert!(check_head(&headers).is_err());
    }
}

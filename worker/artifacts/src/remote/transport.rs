//! HTTP and HTTPS for every source: one client, TLS by rustls on ring with the system's certificates, through the proxy that
//! HTTPS_PROXY and NO_PROXY name.

use std::{
    error::Error,
    future::Future,
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{HeaderValue, Request, Response, Uri, header::USER_AGENT};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::{
        legacy::{
            Client,
            connect::{HttpConnector as Tcp, proxy::Tunnel},
        },
        proxy::matcher::Matcher,
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use object_store::{
    ClientConfigKey, ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
        HttpResponseBody, HttpService,
    },
};
use rustls::crypto::ring;
use tokio::net::TcpStream;
use tower_service::Service;

/// A connection that is not there after so long is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An answer whose head is not there after so long is given up.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How this program names itself.
const AGENT: &str = concat!("flotilla-worker/", env!("CARGO_PKG_VERSION"));

/// The client. Cloning shares its connections.
#[derive(Clone, Debug)]
pub(super) struct Transport {
    client: Client<HttpsConnector<Dial>, HttpRequestBody>,
    only_https: bool,
}

impl Transport {
    /// A client that also speaks plain HTTP.
    pub fn open() -> Result<Self, rustls::Error> {
        Self::new(false, CONNECT_TIMEOUT)
    }

    /// A client that refuses plain HTTP if told so.
    pub fn new(only_https: bool, connect_timeout: Duration) -> Result<Self, rustls::Error> {
        let mut tcp = Tcp::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(connect_timeout));
        let dial = Dial {
            tcp,
            proxies: Arc::new(Matcher::from_env()),
        };
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls()?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(dial);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .build(connector);
        Ok(Self { client, only_https })
    }

    /// Sends a request and waits for the head of its answer. Redirects are answers.
    pub async fn send(&self, mut request: HttpRequest) -> Result<Response<Incoming>, HttpError> {
        if self.only_https && request.uri().scheme() != Some(&http::uri::Scheme::HTTPS) {
            let reason = "plain HTTP is not allowed: use https, or set AWS_ALLOW_HTTP=true for S3 in a private network";
            return Err(HttpError::new(HttpErrorKind::Unknown, io::Error::other(reason)));
        }
        let agent = HeaderValue::from_static(AGENT);
        request.headers_mut().entry(USER_AGENT).or_insert(agent);
        match tokio::time::timeout(ANSWER_TIMEOUT, self.client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if error.is_connect() => Err(HttpError::new(HttpErrorKind::Connect, Flat::new(&error))),
            Ok(Err(error)) => Err(HttpError::new(HttpErrorKind::Request, Flat::new(&error))),
            Err(_) => {
                let reason = format!("no answer after {} s", ANSWER_TIMEOUT.as_secs());
                Err(HttpError::new(HttpErrorKind::Timeout, io::Error::other(reason)))
            }
        }
    }

    /// A request without a body.
    pub fn request(method: http::Method, uri: Uri) -> HttpRequest {
        let mut request = Request::new(HttpRequestBody::empty());
        (*request.method_mut(), *request.uri_mut()) = (method, uri);
        request
    }
}

#[async_trait::async_trait]
impl HttpService for Transport {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (head, body) = self.send(request).await?.into_parts();
        let body = http_body_util::BodyExt::map_err(body, |error| HttpError::new(HttpErrorKind::Interrupted, error));
        Ok(HttpResponse::from_parts(head, HttpResponseBody::new(body)))
    }
}

/// Gives the object stores clients of this kind.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let option = |key| options.get_config_value(&key).unwrap_or_default();
        // Addresses that tell a pod its credentials are asked with a shorter patience than others.
        let impatient = option(ClientConfigKey::ConnectTimeout) == "1s";
        let timeout = if impatient {
            Duration::from_secs(1)
        } else {
            CONNECT_TIMEOUT
        };
        let only_https = option(ClientConfigKey::AllowHttp) != "true";
        match Transport::new(only_https, timeout) {
            Ok(transport) => Ok(HttpClient::new(transport)),
            Err(error) => Err(object_store::Error::Generic {
                store: "TLS",
                source: error.into(),
            }),
        }
    }
}

/// The system's certificates; without any, HTTPS fails by its certificate and HTTP still works.
fn tls() -> Result<rustls::ClientConfig, rustls::Error> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        tracing::warn!(
            errors = ?found.errors,
            "no certificates of authorities are installed, so that HTTPS will fail: SSL_CERT_FILE names a file of them"
        );
    }
    // Named, not the process's default: other clients of the process leave that one unset.
    Ok(
        rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth(),
    )
}

/// Why there is no connection.
type Cause = Box<dyn Error + Send + Sync>;

/// Connects to a host, through a tunnel of the proxy that the environment names for it.
#[derive(Clone, Debug)]
struct Dial {
    tcp: Tcp,
    proxies: Arc<Matcher>,
}

impl Service<Uri> for Dial {
    type Response = TokioIo<TcpStream>;
    type Error = Cause;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        // A tunnel is for HTTPS; plain HTTP is for hosts of the own network.
        let is_https = uri.scheme() == Some(&http::uri::Scheme::HTTPS);
        let Some(proxy) = self.proxies.intercept(&uri).filter(|_| is_https) else {
            return boxed(self.tcp.call(uri));
        };
        let mut tunnel = Tunnel::new(proxy.uri().clone(), self.tcp.clone());
        if let Some(authorization) = proxy.basic_auth() {
            tunnel = tunnel.with_auth(authorization.clone());
        }
        boxed(tunnel.call(uri))
    }
}

fn boxed<T, E: Into<Cause>>(
    future: impl Future<Output = Result<T, E>> + Send + 'static,
) -> BoxFuture<'static, Result<T, Cause>> {
    Box::pin(async move { future.await.map_err(Into::into) })
}

/// An error and its causes in one line: those of hyper say in their causes what happened.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Flat(String);

impl Flat {
    fn new(error: &dyn Error) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        Self(text)
    }
}

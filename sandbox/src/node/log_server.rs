//! The part of a kubelet's server that `kubectl logs` needs: `GET /containerLogs/NAMESPACE/POD/CONTAINER` over mutual TLS.
//!
//! The API server of a real cluster comes here with its client certificate. As in a kubelet, the certificate must be signed
//! by the cluster's authority, and whether its user may read the node (`nodes/proxy`, verb `get`) is asked of the API server
//! by a SubjectAccessReview. The server's own certificate is self-signed, as a kubelet's is until a cluster rotates it.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::TryStreamExt as _;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use k8s_openapi::api::{
    authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::log::LogFiles;
use crate::server::{
    log::{LogError, LogOptions, LogTarget, PodLogs as _},
    request::pairs,
};

/// Connections at a time; a log that is followed holds one.
const MAX_CONNECTIONS: usize = 256;
/// Time for a TLS handshake, and for the head of a request.
const PATIENCE: Duration = Duration::from_secs(10);

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum LogServerError {
    /// The address is taken.
    #[error("listen for log requests on {address}: {source}")]
    Listen {
        /// The address.
        address: IpAddr,
        /// Why not.
        source: io::Error,
    },
    /// The authority's certificate cannot be read.
    #[error("read the certificate of the cluster's authority: {0}")]
    Authority(String),
    /// No certificate could be made.
    #[error("make the node's serving certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// rustls refused them.
    #[error("configure TLS of the node: {0}")]
    Config(#[from] rustls::Error),
}

/// A server that listens and does not answer yet.
#[derive(Debug)]
pub struct LogServer {
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
}

/// What requests need.
struct Shared {
    client: Client,
    node: String,
    logs: LogFiles,
}

/// Who asks, by the certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Caller {
    user: String,
    groups: Vec<String>,
}

impl LogServer {
    /// Takes a port of `address`; callers must have a certificate of `authority` (DER).
    pub async fn bind(address: IpAddr, authority: &[Vec<u8>]) -> Result<Self, LogServerError> {
        let tls = Arc::new(tls(address, authority)?);
        let listener = TcpListener::bind(SocketAddr::new(address, 0)).await;
        let listener = listener.map_err(|source| LogServerError::Listen { address, source })?;
        Ok(Self { listener, tls })
    }

    /// The port, for `status.daemonEndpoints` of the Node.
    pub fn port(&self) -> Option<u16> {
        self.listener.local_addr().ok().map(|address| address.port())
    }

    /// Serves the logs of `node` until it is dropped.
    pub async fn serve(self, client: Client, node: String, logs: LogFiles) {
        let acceptor = TlsAcceptor::from(self.tls);
        let shared = Arc::new(Shared { client, node, logs });
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accept a connection for logs");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                tracing::warn!("too many connections for logs: one was closed");
                continue;
            };
            let (acceptor, shared) = (acceptor.clone(), Arc::clone(&shared));
            connections.spawn(async move {
                match tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => connection(shared, stream).await,
                    Ok(Err(error)) => tracing::debug!(%error, "TLS handshake for logs"),
                    Err(_) => {}
                }
                drop(permit);
            });
        }
    }
}

fn tls(address: IpAddr, authority: &[Vec<u8>]) -> Result<rustls::ServerConfig, LogServerError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in authority {
        roots.add(CertificateDer::from_slice(certificate))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| LogServerError::Authority(error.to_string()))?;
    let own = rcgen::generate_simple_self_signed([address.to_string()])?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()));
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![own.cert.der().clone()], key)?;
    Ok(config)
}

async fn connection(shared: Arc<Shared>, stream: tokio_rustls::server::TlsStream<tokio::net::TcpStream>) {
    let certificates = stream.get_ref().1.peer_certificates();
    let Some(caller) = certificates.and_then(|chain| chain.first()).and_then(caller) else {
        return;
    };
    let caller = Arc::new(caller);
    let service = service_fn(move |request| {
        let (shared, caller) = (Arc::clone(&shared), Arc::clone(&caller));
        async move { Ok::<_, Infallible>(answer(&shared, &caller, &request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(error, "a connection for logs ended");
    }
}

/// User and groups that a certificate stands for: common name and organisations.
fn caller(certificate: &CertificateDer<'_>) -> Option<Caller> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let subject = certificate.subject();
    let user = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|name| name.as_str().ok());
    Some(Caller {
        user,
        groups: groups.map(str::to_owned).collect(),
    })
}

async fn answer(shared: &Shared, caller: &Caller, request: &Request<Incoming>) -> Response<Body> {
    let Some(place) = place(request.uri().path()).filter(|_| request.method() == Method::GET) else {
        return text(StatusCode::NOT_FOUND, "this node serves /containerLogs only");
    };
    let options = match LogOptions::from_pairs(pairs(request.uri().query().unwrap_or_default())) {
        Ok(options) => options,
        Err(problem) => return text(StatusCode::BAD_REQUEST, &problem),
    };
    match shared.may_read(caller).await {
        Ok(true) => {}
        Ok(false) => {
            let refusal = format!("user {} may not get nodes/proxy of {}", caller.user, shared.node);
            return text(StatusCode::FORBIDDEN, &refusal);
        }
        Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, &format!("authorize: {error}")),
    }
    match shared.open(place, options).await {
        Ok(body) => body,
        Err((status, problem)) => text(status, &problem),
    }
}

/// Namespace, pod and container of `/containerLogs/NAMESPACE/POD/CONTAINER`. Names of Kubernetes need no percent-decoding.
fn place(path: &str) -> Option<[&str; 3]> {
    let mut parts = path.strip_prefix("/containerLogs/")?.split('/');
    let place = [parts.next()?, parts.next()?, parts.next()?];
    // A name begins with a letter or digit: neither `.` nor `..` is one.
    let is_name = |part: &&str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte))
    };
    (parts.next().is_none() && place.iter().all(is_name)).then_some(place)
}

impl Shared {
    async fn may_read(&self, caller: &Caller) -> Result<bool, kube::Error> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(caller.user.clone()),
                groups: Some(caller.groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some("get".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some("proxy".to_owned()),
                    name: Some(self.node.clone()),
                    version: Some("v1".to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let reviews: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = reviews.create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }

    async fn open(
        &self,
        [namespace, pod, container]: [&str; 3],
        options: LogOptions,
    ) -> Result<Response<Body>, (StatusCode, String)> {
        let internal = |error: &dyn std::fmt::Display| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let found = pods.get_opt(pod).await.map_err(|error| internal(&error))?;
        let uid = found
            .filter(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) == Some(&self.node))
            .and_then(|pod| pod.metadata.uid)
            .ok_or_else(|| {
                (
                    StatusCode::NOT_FOUND,
                    format!("pod {namespace}/{pod} is not on this node"),
                )
            })?;
        let target = LogTarget {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            uid,
            container: container.to_owned(),
        };
        let stream = self.logs.open(target, options).await.map_err(|error| {
            let status = match error {
                LogError::NotStarted(_) => StatusCode::BAD_REQUEST,
                LogError::NotFound(_) => StatusCode::NOT_FOUND,
                LogError::Read { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, error.to_string())
        })?;
        let body = StreamBody::new(stream.map_ok(Frame::data)).boxed_unsync();
        let mut response = Response::new(body);
        let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, plain);
        Ok(response)
    }
}

fn text(status: StatusCode, text: &str) -> Response<Body> {
    let body = Full::new(Bytes::from(format!("{text}\n"))).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    #[test]
    fn a_caller_is_the_common_name_and_the_organisations_of_its_certificate() {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "api");
        params
            .distinguished_name
            .push(DnType::OrganizationName, "system:masters");
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let expected = Caller {
            user: "api".to_owned(),
            groups: vec!["system:masters".to_owned()],
        };
        assert_eq!(caller(certificate.der()), Some(expected));
        assert_eq!(caller(&CertificateDer::from(b"x".to_vec())), None);
    }

    #[test]
    fn only_the_path_of_one_container_is_a_log() {
        assert_eq!(place("/containerLogs/n/p/c"), Some(["n", "p", "c"]));
        let others = [
            "/containerLogs/n/p",
            "/containerLogs/n/p/c/d",
            "/containerLogs/n/../c",
            "/containerLogs/n/%2e/c",
            "/run/n/p/c",
        ];
        for path in others {
            assert_eq!(place(path), None, "{path}");
        }
    }
}

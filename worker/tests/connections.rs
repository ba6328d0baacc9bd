//! Connections: TLS and its certificates, HTTP/1.1 and HTTP/2, and clients that keep them waiting.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use axum::{Router, body::Body, routing::get};
use flotilla_api::role::TlsFiles;
use flotilla_worker::http::{
    server::{Limits, Settings, serve},
    tls,
};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;

struct Served {
    address: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<()>,
}

async fn served(settings: Settings, app: Router) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve(listener, app, settings, stop.clone(), Duration::from_millis(300)));
    Served { address, stop, server }
}

fn hello() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

fn impatient() -> Settings {
    Settings {
        tls: None,
        limits: Limits {
            head_time: Duration::from_millis(150),
            handshake_time: Duration::from_millis(150),
            ..Limits::default()
        },
    }
}

/// Writes a certificate for `a.test` and its key; gives the certificate.
fn certify(directory: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec!["a.test".to_owned()]).expect("a certificate");
    std::fs::write(directory.join("key.pem"), made.signing_key.serialize_pem()).expect("writes");
    std::fs::write(directory.join("cert.pem"), made.cert.pem()).expect("writes");
    made.cert.der().clone()
}

fn files(directory: &Path) -> TlsFiles {
    TlsFiles {
        certificate_file: directory.join("cert.pem").display().to_string(),
        key_file: directory.join("key.pem").display().to_string(),
    }
}

async fn secure(
    address: SocketAddr,
    trusted: &CertificateDer<'static>,
    protocol: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a root");
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("a.test").expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

async fn over_http1(stream: TlsStream<TcpStream>) -> u16 {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .expect("speaks");
    tokio::spawn(connection);
    let request = Request::get("/")
        .header("host", "a.test")
        .body(Body::empty())
        .expect("a request");
    sender.send_request(request).await.expect("answers").status().as_u16()
}

#[tokio::test]
async fn both_protocols_are_spoken_over_tls_and_a_new_certificate_is_taken_without_a_restart() {
    let directory = tempfile::tempdir().expect("a directory");
    let old = certify(directory.path());
    let stop = CancellationToken::new();
    let tls = tls::acceptor(&files(directory.path()), Duration::from_millis(20), stop.clone()).expect("a certificate");
    let settings = Settings {
        tls: Some(tls),
        ..Settings::default()
    };
    let served = served(settings, hello()).await;
    let first = secure(served.address, &old, b"http/1.1").await.expect("trusted");
    assert_eq!(over_http1(first).await, 200);
    let second = secure(served.address, &old, b"h2").await.expect("trusted");
    assert_eq!(second.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(second));
    let (mut sender, connection) = handshake.await.expect("speaks");
    tokio::spawn(connection);
    let request = || Request::get("https://a.test/").body(Body::empty()).expect("a request");
    assert_eq!(sender.send_request(request()).await.expect("answers").status(), 200);

    // A key alone is no pair yet: the old one stays. The new certificate completes it.
    let other = tempfile::tempdir().expect("a directory");
    let new = certify(other.path());
    std::fs::copy(other.path().join("key.pem"), directory.path().join("key.pem")).expect("copies");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(secure(served.address, &old, b"h2").await.is_ok());
    std::fs::copy(other.path().join("cert.pem"), directory.path().join("cert.pem")).expect("copies");
    let mut taken = false;
    for _ in 0..500 {
        taken = secure(served.address, &new, b"h2").await.is_ok();
        if taken {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(taken, "the new certificate is never used");
    assert!(secure(served.address, &old, b"h2").await.is_err());
    let kept = sender
        .send_request(request())
        .await
        .expect("a connection that was there goes on");
    assert_eq!(kept.status(), 200);
    stop.cancel();
}

#[tokio::test]
async fn files_that_are_no_pair_are_refused_at_the_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let stop = CancellationToken::new();
    let open = || tls::acceptor(&files(directory.path()), Duration::from_secs(1), stop.clone()).map(|_| ());
    assert_eq!(open().expect_err("no files").exit_code(), 1);
    certify(directory.path());
    let other = tempfile::tempdir().expect("a directory");
    certify(other.path());
    std::fs::copy(other.path().join("key.pem"), directory.path().join("key.pem")).expect("copies");
    let error = open().expect_err("another key");
    assert_eq!(error.exit_code(), 78, "{error}");
}

/// What comes back over a connection on which only this was sent, until the server closes it.
async fn sent(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    stream.write_all(bytes).await.expect("writes");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    answer
}

#[tokio::test]
async fn a_client_that_sends_nothing_or_half_a_head_is_cut_off() {
    let served = served(impatient(), hello()).await;
    for half in [&b""[..], b"PRI * HT", b"GET / HTTP/1.1\r\nHost: a\r\nX-Half"] {
        let answer = tokio::time::timeout(Duration::from_secs(20), sent(served.address, half)).await;
        assert!(answer.expect("the server closes").is_empty());
    }
    let whole = sent(
        served.address,
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(whole.starts_with(b"HTTP/1.1 200 OK"));
}

#[tokio::test]
async fn a_handshake_that_never_ends_is_cut_off() {
    let directory = tempfile::tempdir().expect("a directory");
    certify(directory.path());
    let stop = CancellationToken::new();
    let tls = tls::acceptor(&files(directory.path()), Duration::from_secs(1), stop.clone()).expect("a certificate");
    let settings = Settings {
        tls: Some(tls),
        ..impatient()
    };
    let served = served(settings, hello()).await;
    let answer = tokio::time::timeout(Duration::from_secs(20), sent(served.address, b"\x16\x03\x01")).await;
    assert!(answer.expect("the server closes").is_empty());
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let served = served(Settings::default(), hello()).await;
    let head = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX-Large: {}\r\n\r\n",
        "a".repeat(Limits::default().head_bytes)
    );
    let mut stream = TcpStream::connect(served.address).await.expect("connects");
    let _ = stream.write_all(head.as_bytes()).await;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 431");
}

#[tokio::test]
async fn a_connection_waits_for_room_and_a_slow_answer_is_cut_off_when_the_patience_ends() {
    let settings = Settings {
        limits: Limits {
            connections: 1,
            ..Limits::default()
        },
        ..Settings::default()
    };
    let app = hello().route("/slow", get(std::future::pending::<()>));
    let served = served(settings, app).await;
    let mut first = TcpStream::connect(served.address).await.expect("connects");
    first
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .expect("writes");
    let mut head = [0; 12];
    first.read_exact(&mut head).await.expect("an answer");
    let second = tokio::spawn(sent(
        served.address,
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!second.is_finished(), "there is room for one");
    drop(first);
    assert!(second.await.expect("no panic").starts_with(b"HTTP/1.1 200"));

    let slow = tokio::spawn(sent(served.address, b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    served.stop.cancel();
    served.server.await.expect("ends");
    assert!(slow.await.expect("no panic").is_empty());
}

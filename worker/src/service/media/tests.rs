//! Pictures of every kind of URL, from servers that behave and servers that do not.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use base64::{Engine as _, engine::general_purpose};
use futures::future::BoxFuture;
use proptest::prelude::*;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::{resolver::Resolve, *};

fn png() -> Vec<u8> {
    let mut png = io::Cursor::new(Vec::new());
    image::GrayImage::from_pixel(3, 2, image::Luma([9]))
        .write_to(&mut png, image::ImageFormat::Png)
        .expect("encodes");
    png.into_inner()
}

/// Names to lists of addresses; each lookup of a name takes its next list, the last one again and again.
#[derive(Debug, Default)]
struct Table {
    names: HashMap<&'static str, Vec<Vec<SocketAddr>>>,
    asked: Mutex<Vec<String>>,
}

impl Table {
    fn of(names: &[(&'static str, &[&[SocketAddr]])]) -> Arc<Self> {
        let lists = |lists: &[&[SocketAddr]]| lists.iter().map(|list| list.to_vec()).collect();
        Arc::new(Self {
            names: names.iter().map(|(name, found)| (*name, lists(found))).collect(),
            asked: Mutex::default(),
        })
    }

    fn asked(&self) -> usize {
        self.asked.lock().expect("no panic").len()
    }
}

impl Resolve for Table {
    fn resolve<'a>(&'a self, host: &'a str, _: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        Box::pin(async move {
            let mut asked = self.asked.lock().expect("no panic");
            let before = asked.iter().filter(|name| *name == host).count();
            asked.push(host.to_owned());
            let lists = self.names.get(host).ok_or_else(|| io::Error::other("no such name"))?;
            Ok(lists[before.min(lists.len() - 1)].clone())
        })
    }
}

/// A server on loopback and how often it was asked.
struct Origin {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

async fn origin(routes: Router) -> Origin {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let app = routes.layer(axum::middleware::from_fn(
        move |request: axum::extract::Request, next: axum::middleware::Next| {
            count.fetch_add(1, Ordering::SeqCst);
            next.run(request)
        },
    ));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, app).await });
    Origin { address, asked }
}

fn picture() -> Response {
    ([(header::CONTENT_TYPE, "image/png")], png()).into_response()
}

/// Media that may fetch from `hosts`, by names of a table.
fn media(hosts: &[String], table: Arc<Table>) -> Media {
    let hosts = hosts.iter().map(|text| text.parse().expect("a pattern")).collect();
    let mut registry = prometheus_client::registry::Registry::default();
    Media {
        fetcher: Fetcher::among_tests(hosts, table, RootCertStore::empty()),
        root: None,
        upright: false,
        metrics: Metrics::register(&mut registry, super::super::Slot::default()),
    }
}

/// One route at `http://pictures.test`, and what fetching `path` from it gives.
async fn fetched(routes: Router, path: &str) -> Result<Bytes, String> {
    let origin = origin(routes).await;
    let port = origin.address.port();
    let media = media(
        &[format!("http://pictures.test:{port}")],
        Table::of(&[("pictures.test", &[&[origin.address]])]),
    );
    one(&media, &format!("http://pictures.test:{port}{path}")).await
}

async fn one(media: &Media, url: &str) -> Result<Bytes, String> {
    match media.collect(vec![url.to_owned()]).await {
        Ok(found) => match found.as_slice() {
            [Encoded::Bytes(bytes)] => Ok(bytes.clone()),
            other => panic!("{other:?}"),
        },
        Err(error) => Err(error.to_string()),
    }
}

#[tokio::test]
async fn a_picture_of_a_listed_host_is_fetched_and_says_who_asks() {
    let routes = Router::new().route(
        "/a.png",
        get(|headers: HeaderMap, query: axum::extract::RawQuery| async move {
            assert_eq!(query.0.as_deref(), Some("b=c"));
            assert!(headers["host"].to_str().expect("text").starts_with("pictures.test:"));
            assert!(
                headers["user-agent"]
                    .to_str()
                    .expect("text")
                    .starts_with("flotilla-worker/")
            );
            assert!(!headers.contains_key("cookie") && !headers.contains_key("authorization"));
            picture()
        }),
    );
    let bytes = fetched(routes, "/a.png?b=c#d").await.expect("fetches");
    assert_eq!(bytes, png());
}

#[tokio::test]
async fn https_is_checked_against_the_certificates() {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(vec!["pictures.test".to_owned()]).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .expect("a key");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        let app = Router::new().route("/a.png", get(|| async { picture() }));
        while let Ok((stream, _)) = listener.accept().await {
            if let Ok(stream) = acceptor.accept(stream).await {
                let service = hyper_util::service::TowerToHyperService::new(app.clone());
                let io = hyper_util::rt::TokioIo::new(stream);
                tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
            }
        }
    });
    let table = Table::of(&[("pictures.test", &[&[address]]), ("other.test", &[&[address]])]);
    let hosts = [
        format!("pictures.test:{}", address.port()),
        format!("other.test:{}", address.port()),
    ];
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).expect("a root");
    let trusting = Media {
        fetcher: Fetcher::among_tests(
            hosts.iter().map(|text| text.parse().expect("a pattern")).collect(),
            table.clone(),
            roots,
        ),
        ..media(&hosts, table.clone())
    };
    let url = |host: &str| format!("https://{host}:{}/a.png", address.port());
    assert_eq!(one(&trusting, &url("pictures.test")).await.expect("fetches"), png());
    let error = one(&trusting, &url("other.test")).await.expect_err("another name");
    assert!(error.contains("TLS"), "{error}");
    let error = one(&media(&hosts, table), &url("pictures.test"))
        .await
        .expect_err("unknown issuer");
    assert!(error.contains("TLS"), "{error}");
}

#[tokio::test]
async fn a_host_that_is_not_listed_is_not_even_looked_up() {
    let table = Table::of(&[]);
    let media = media(&["example.com".to_owned()], table.clone());
    for url in [
        "https://other.test/a.png",
        "http://example.com/a.png",
        "https://example.com:8443/a.png",
        "https://user:pass@example.com/a.png",
        "https://127.0.0.1/a.png",
        "ftp://example.com/a.png",
    ] {
        one(&media, url).await.expect_err(url);
    }
    assert_eq!(table.asked(), 0);
}

#[tokio::test]
async fn a_name_that_leads_inside_is_refused_even_if_only_one_of_its_addresses_does() {
    let outside = origin(Router::new().route("/", get(|| async { picture() }))).await;
    let inside: SocketAddr = "10.0.0.7:80".parse().expect("an address");
    let port = outside.address.port();
    let table = Table::of(&[
        ("mixed.test", &[&[outside.address, inside]]),
        ("inner.test", &[&[inside]]),
    ]);
    let media = media(&[format!("http://*.test:{port}")], table);
    for host in ["mixed.test", "inner.test"] {
        let error = one(&media, &format!("http://{host}:{port}/")).await.expect_err(host);
        assert!(error.contains("leads to a private address"), "{error}");
        assert!(!error.contains("10.0.0.7"), "what lies inside is not told: {error}");
    }
    assert_eq!(outside.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn the_address_that_was_checked_is_the_one_that_is_connected_to() {
    // The name leads to a public address when it is checked and inside ever after.
    let outside = origin(Router::new().route("/", get(|| async { picture() }))).await;
    let inside: SocketAddr = "169.254.169.254:80".parse().expect("an address");
    let port = outside.address.port();
    let table = Table::of(&[("rebinding.test", &[&[outside.address], &[inside]])]);
    let media = media(&[format!("http://rebinding.test:{port}")], table.clone());
    let url = format!("http://rebinding.test:{port}/");
    assert_eq!(one(&media, &url).await.expect("fetches"), png());
    assert_eq!(table.asked(), 1, "one lookup serves check and connection");
    let error = one(&media, &url).await.expect_err("inside now");
    assert!(error.contains("link-local"), "{error}");
    assert_eq!(outside.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn each_redirect_passes_the_same_checks() {
    let inside = "http://169.254.169.254/latest/meta-data";
    let routes = Router::new()
        .route("/near", get(|| async { Redirect::temporary("/a.png") }))
        .route("/a.png", get(|| async { picture() }))
        .route("/inside", get(move || async move { Redirect::temporary(inside) }))
        .route(
            "/elsewhere",
            get(|| async { Redirect::temporary("https://other.test/a.png") }),
        )
        .route("/file", get(|| async { Redirect::temporary("file:///etc/passwd") }))
        .route("/loop", get(|| async { Redirect::temporary("/loop") }))
        .route("/nowhere", get(|| async { StatusCode::FOUND }));
    assert_eq!(fetched(routes.clone(), "/near").await.expect("fetches"), png());
    for (path, reason) in [
        ("/inside", "link-local"),
        ("/elsewhere", "not among the hosts"),
        ("/file", "file:// is not fetched"),
        ("/loop", "more than 3 redirects"),
        ("/nowhere", "redirects to nowhere"),
    ] {
        let error = fetched(routes.clone(), path).await.expect_err(path);
        assert!(error.contains(reason), "{path}: {error}");
    }
}

#[tokio::test]
async fn a_redirect_to_a_name_that_has_moved_inside_is_refused() {
    let outside = origin(Router::new().route("/", get(|| async { Redirect::temporary("/") }))).await;
    let inside: SocketAddr = "10.1.1.1:80".parse().expect("an address");
    let port = outside.address.port();
    let table = Table::of(&[("rebinding.test", &[&[outside.address], &[inside]])]);
    let media = media(&[format!("http://rebinding.test:{port}")], table);
    let error = one(&media, &format!("http://rebinding.test:{port}/"))
        .await
        .expect_err("inside");
    assert!(error.contains("private"), "{error}");
}

#[tokio::test]
async fn answers_that_are_no_picture_of_a_bearable_size_are_refused() {
    let endless = || async {
        let chunks = futures::stream::repeat_with(|| Ok::<_, io::Error>(Bytes::from(vec![0u8; 1 << 20])));
        ([(header::CONTENT_TYPE, "image/png")], Body::from_stream(chunks)).into_response()
    };
    let packed = || async {
        let headers = [(header::CONTENT_TYPE, "image/png"), (header::CONTENT_ENCODING, "gzip")];
        (headers, png()).into_response()
    };
    let silent = || async { std::future::pending::<Response>().await };
    let routes = Router::new()
        .route("/endless", get(endless))
        .route("/packed", get(packed))
        .route("/silent", get(silent))
        .route("/text", get(|| async { "<b>" }));
    for (path, reason) in [
        ("/endless", "more than"),
        ("/packed", "compressed"),
        ("/silent", "not there after"),
        ("/text", "not an image"),
        ("/none", "answered 404"),
    ] {
        let error = fetched(routes.clone(), path).await.expect_err(path);
        assert!(error.contains(reason), "{path}: {error}");
    }
}

#[tokio::test]
async fn several_pictures_keep_their_order() {
    let routes = Router::new().route(
        "/{index}",
        get(|axum::extract::Path(index): axum::extract::Path<u64>| async move {
            // The first ones come last.
            tokio::time::sleep(std::time::Duration::from_millis(5 * (8 - index))).await;
            ([(header::CONTENT_TYPE, "image/png")], index.to_string()).into_response()
        }),
    );
    let origin = origin(routes).await;
    let port = origin.address.port();
    let media = media(
        &[format!("http://pictures.test:{port}")],
        Table::of(&[("pictures.test", &[&[origin.address]])]),
    );
    let urls = (0..8)
        .map(|index| format!("http://pictures.test:{port}/{index}"))
        .collect();
    let found = media.collect(urls).await.expect("fetches");
    let texts: Vec<String> = found
        .iter()
        .map(|found| match found {
            Encoded::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Encoded::DataUrl(rest) => rest.clone(),
        })
        .collect();
    assert_eq!(texts, ["0", "1", "2", "3", "4", "5", "6", "7"]);
}

#[tokio::test]
async fn without_a_list_and_a_root_both_flags_are_named() {
    let media = media(&[], Table::of(&[]));
    for (url, reason) in [
        ("HTTPS://example.com/a.png", "--image-host example.com"),
        ("http://169.254.169.254/latest", "--image-host example.com"),
        ("file:///etc/passwd", "--media-root"),
        ("/etc/passwd", "is not a data URL"),
        ("ftp://example.com/a.png", "is not a data URL"),
        ("", "is not a data URL"),
    ] {
        let error = one(&media, url).await.expect_err(url);
        assert!(error.contains(reason), "{url}: {error}");
    }
    let many = vec!["data:image/png;base64,".to_owned(); MAX_PICTURES + 1];
    assert!(
        media
            .collect(many)
            .await
            .expect_err("too many")
            .to_string()
            .contains("the limit is 16")
    );
}

/// What decoding a `data:` URL refuses.
fn message(rest: &str) -> String {
    let decoded = media(&[], Table::of(&[])).decode(&Encoded::DataUrl(rest.to_owned()));
    decoded.expect_err("refused").to_string()
}

#[test]
fn a_png_in_a_data_url_is_decoded() {
    let rest = format!("image/png;base64,{}", general_purpose::STANDARD.encode(png()));
    let picture = media(&[], Table::of(&[]))
        .decode(&Encoded::DataUrl(rest))
        .expect("decodes");
    assert_eq!((picture.width, picture.height), (3, 2));
}

#[test]
fn broken_data_urls_are_refused_with_what_is_broken() {
    assert!(message("image/png;base64").contains("comma"));
    assert!(message("image/png,abc").contains("base64"));
    assert!(message("text/html;base64,PGI+").contains("not an image"));
    assert!(message("image/png;base64,?").contains("not valid base64"));
    assert!(message("image/png;base64,AAAA").contains("image:"));
}

#[test]
fn a_payload_over_the_limit_is_refused_before_it_is_decoded() {
    let rest = format!("image/png;base64,{}", "?".repeat(LIMITS.bytes / 3 * 4 + 16));
    assert!(message(&rest).contains("the limit is"));
}

proptest! {
    #[test]
    fn no_url_panics(url in "(data:|https?:|file:|ftp:)?(//)?(image/)?[a-z;,:/%.]{0,12}(;base64,)?\\PC{0,40}") {
        let media = media(&["no.test".to_owned()], Table::of(&[]));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        if let Ok(found) = runtime.block_on(media.collect(vec![url])) {
            for encoded in found {
                let _ = media.decode(&encoded);
            }
        }
    }
}

//! Fetches from buckets: a server of this process that speaks S3's protocol, and objects in memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{Response, StatusCode, header},
};
use futures::{StreamExt, stream};
use object_store::{ObjectStoreExt, aws::AmazonS3Builder, memory::InMemory, path::Path as Key};

use super::{super::*, contents, hub_server::range, settings, silent};
use crate::{checkpoint::verify, digest::sha256_hex, publish::Draft};

/// Keys of one page of a list.
const PAGE: usize = 2;
/// Bytes that are sent before a cut.
const CUT: usize = 3000;

/// A bucket with the objects below `models/a/`.
#[derive(Default)]
struct Served {
    objects: BTreeMap<String, Vec<u8>>,
    cuts: Mutex<usize>,
    refuse: bool,
    log: Mutex<Vec<String>>,
}

async fn start(state: Arc<Served>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
    let app = Router::new().fallback(answer).with_state(state);
    tokio::spawn(async move { axum::serve(listener, app).await });
    endpoint
}

async fn answer(State(state): State<Arc<Served>>, request: Request) -> Response<Body> {
    let (path, query) = (request.uri().path(), request.uri().query().unwrap_or_default());
    let begin = range(request.headers());
    let line = format!("{} {path} from {}", request.method(), begin.unwrap_or(0));
    state.log.lock().expect("not poisoned").push(line);
    let signed = request.headers().get(header::AUTHORIZATION).is_some();
    if state.refuse || !signed {
        let body = "<Error><Code>AccessDenied</Code></Error>";
        return Response::builder()
            .status(StatusCode::FORBIDDEN)
            .body(Body::from(body))
            .expect("a response");
    }
    if query.contains("list-type=2") {
        return Response::new(Body::from(list(&state.objects, query)));
    }
    let key = path.trim_start_matches("/bucket/");
    let Some(bytes) = state.objects.get(key) else {
        return Response::builder()
            .status(StatusCode::NOT_FOUND)
            .body(Body::empty())
            .expect("a response");
    };
    let (size, rest) = (bytes.len(), bytes[begin.unwrap_or(0)..].to_vec());
    let builder = Response::builder()
        .header(header::ETAG, format!("\"{}\"", &sha256_hex(bytes)[..32]))
        .header(header::LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT")
        .header(header::CONTENT_LENGTH, rest.len());
    let builder = match begin {
        Some(begin) => {
            let range = format!("bytes {begin}-{}/{size}", size - 1);
            builder
                .status(StatusCode::PARTIAL_CONTENT)
                .header(header::CONTENT_RANGE, range)
        }
        None => builder,
    };
    let mut cuts = state.cuts.lock().expect("not poisoned");
    let body = if *cuts > 0 && rest.len() > CUT {
        *cuts -= 1;
        let first = stream::once(async move { Ok::<_, std::io::Error>(rest[..CUT].to_vec()) });
        let end = stream::once(async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Err(std::io::Error::other("cut"))
        });
        Body::from_stream(first.chain(end))
    } else {
        Body::from(rest)
    };
    builder.body(body).expect("a response")
}

/// One page of a list, as XML.
fn list(objects: &BTreeMap<String, Vec<u8>>, query: &str) -> String {
    let skip = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("continuation-token="));
    let skip = skip.map_or(0, |token| token.parse::<usize>().expect("a token of this server"));
    let contents = objects.iter().skip(skip).take(PAGE).map(|(key, bytes)| {
        let (tag, size) = (&sha256_hex(bytes)[..32], bytes.len());
        format!(
            "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
             <ETag>&quot;{tag}&quot;</ETag><Size>{size}</Size></Contents>"
        )
    });
    let contents = contents.collect::<String>();
    let more = skip + PAGE < objects.len();
    let next = if more {
        format!("<NextContinuationToken>{}</NextContinuationToken>", skip + PAGE)
    } else {
        String::new()
    };
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult><Name>bucket</Name><Prefix>models/a/</Prefix>\
         <KeyCount>{PAGE}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>{more}</IsTruncated>{next}{contents}</ListBucketResult>"
    )
}

fn objects() -> BTreeMap<String, Vec<u8>> {
    [
        ("config.json", b"{}".to_vec()),
        (
            "model.safetensors",
            (0..20_000).map(|index| (index * 7) as u8).collect(),
        ),
        ("pytorch_model.bin", b"pickle".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("train.py", b"import os".to_vec()),
    ]
    .map(|(name, bytes)| (format!("models/a/{name}"), bytes))
    .into()
}

fn address() -> Address {
    Address::parse("s3://bucket/models/a").expect("an address")
}

/// The bucket of a server, as the environment of a pod would describe it.
fn origin(endpoint: &str, allow_http: bool) -> Origin {
    let store = AmazonS3Builder::new()
        .with_bucket_name("bucket")
        .with_endpoint(endpoint)
        .with_access_key_id("key")
        .with_secret_access_key("secret-access-key")
        .with_allow_http(allow_http)
        .with_http_connector(transport::Connector)
        .with_retry(RetryConfig {
            max_retries: 0,
            ..RetryConfig::default()
        })
        .build()
        .expect("a store");
    let prefix = Key::parse("models/a").expect("a key");
    Origin::Bucket(Bucket::of(Arc::new(store), Service::S3, prefix, address().to_string()))
}

async fn get(origin: &Origin, cache: &std::path::Path) -> Result<PathBuf, RemoteError> {
    fetch_from(origin, &address(), &settings(cache, HubSettings::default()), &silent).await
}

#[tokio::test]
async fn a_list_of_several_pages_is_read_and_a_cut_object_is_gone_on_with() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = Arc::new(Served {
        objects: objects(),
        cuts: Mutex::new(1),
        ..Served::default()
    });
    let origin = origin(&start(state.clone()).await, true);
    let model = get(&origin, dir.path()).await.expect("fetches");
    let names = ["config.json", "model.safetensors", "tokenizer.json"];
    let expected = names.map(|name| (name.to_owned(), objects()[&format!("models/a/{name}")].clone()));
    assert_eq!(contents(&model), expected.into());
    let log = std::mem::take(&mut *state.log.lock().expect("not poisoned"));
    assert!(
        log.contains(&format!("GET /bucket/models/a/model.safetensors from {CUT}")),
        "{log:?}"
    );

    assert_eq!(get(&origin, dir.path()).await.expect("is there"), model);
    let log = state.log.lock().expect("not poisoned");
    assert!(
        log.iter().all(|line| line.starts_with("GET /bucket from")),
        "only the list is asked: {log:?}"
    );
}

#[tokio::test]
async fn an_object_that_changes_is_another_version() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = Arc::new(Served {
        objects: objects(),
        ..Served::default()
    });
    let mut changed = objects();
    changed.insert("models/a/config.json".to_owned(), b"[]".to_vec());
    let second = Arc::new(Served {
        objects: changed,
        ..Served::default()
    });
    let first = get(&origin(&start(first).await, true), dir.path())
        .await
        .expect("fetches");
    let second = get(&origin(&start(second).await, true), dir.path())
        .await
        .expect("fetches");
    assert_ne!(first, second);
    assert_eq!(std::fs::read(second.join("config.json")).expect("reads"), b"[]");
}

#[tokio::test]
async fn refusals_say_where_credentials_come_from_and_never_hold_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = Arc::new(Served {
        objects: objects(),
        refuse: true,
        ..Served::default()
    });
    let error = get(&origin(&start(state).await, true), dir.path())
        .await
        .expect_err("refused");
    let message = format!("{error} {error:?}");
    assert!(error.is_permanent(), "{message}");
    assert!(message.contains("answers 403") && message.contains("IRSA"), "{message}");
    assert!(!message.contains("secret-access-key"), "{message}");
}

#[tokio::test]
async fn plain_http_is_refused_unless_it_is_allowed() {
    let dir = tempfile::tempdir().expect("a directory");
    let state = Arc::new(Served {
        objects: objects(),
        ..Served::default()
    });
    let origin = origin(&start(state.clone()).await, false);
    let error = get(&origin, dir.path()).await.expect_err("plain HTTP");
    assert!(error.to_string().contains("AWS_ALLOW_HTTP=true"), "{error}");
    assert!(state.log.lock().expect("not poisoned").is_empty());
}

#[tokio::test]
async fn keys_that_leave_the_prefix_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut objects = objects();
    objects.insert("models/a/../../b.json".to_owned(), b"{}".to_vec());
    let state = Arc::new(Served {
        objects,
        ..Served::default()
    });
    let error = get(&origin(&start(state).await, true), dir.path())
        .await
        .expect_err("leaves");
    assert!(error.is_permanent(), "{error}");
    assert_eq!(contents(dir.path()).len(), 0);
}

/// Objects in memory with the files of a directory that Flotilla wrote.
async fn published(change: impl Fn(&str, Vec<u8>) -> Vec<u8>) -> (Origin, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let draft = Draft::begin(&dir.path().join("step")).expect("begins");
    std::fs::create_dir(draft.path().join("trainer")).expect("creates");
    for (name, text) in [
        ("config.json", "{}"),
        ("model.safetensors", "weights"),
        ("trainer/position.json", "{}"),
    ] {
        std::fs::write(draft.path().join(name), text).expect("writes");
    }
    let published = draft.publish().expect("publishes");
    let store = InMemory::new();
    for (name, bytes) in contents(&published.path) {
        let key = Key::from(format!("models/a/{name}"));
        store.put(&key, change(&name, bytes).into()).await.expect("puts");
    }
    let prefix = Key::parse("models/a").expect("a key");
    let bucket = Bucket::of(Arc::new(store), Service::S3, prefix, address().to_string());
    (Origin::Bucket(bucket), published.digest)
}

#[tokio::test]
async fn a_checkpoint_of_flotilla_comes_whole_and_has_its_digest() {
    let dir = tempfile::tempdir().expect("a directory");
    let (origin, digest) = published(|_, bytes| bytes).await;
    let model = get(&origin, dir.path()).await.expect("fetches");
    assert!(model.join("trainer/position.json").is_file());
    let verified = verify(&model, Some(&digest)).expect("as published");
    assert_eq!(verified.digest, Some(digest));
}

#[tokio::test]
async fn an_object_that_is_not_the_one_of_the_manifest_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let change = |name: &str, bytes: Vec<u8>| {
        if name == "model.safetensors" {
            b"WEIGHTS".to_vec()
        } else {
            bytes
        }
    };
    let (origin, _) = published(change).await;
    let error = get(&origin, dir.path()).await.expect_err("differs");
    assert!(
        error
            .to_string()
            .starts_with("model.safetensors of s3://bucket/models/a was received with sha256"),
        "{error}"
    );
}

#[tokio::test]
async fn an_empty_prefix_says_what_to_check() {
    let dir = tempfile::tempdir().expect("a directory");
    let bucket = Bucket::of(
        Arc::new(InMemory::new()),
        Service::Google,
        Key::default(),
        "gs://b/".to_owned(),
    );
    let error = get(&Origin::Bucket(bucket), dir.path()).await.expect_err("empty");
    assert!(error.to_string().contains("check bucket and prefix"), "{error}");
}

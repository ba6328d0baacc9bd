//! The program with models that lie elsewhere, as the environment of a pod names hub and bucket.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{Method, Response, StatusCode, header},
};
use candle_core::DType;
use flotilla_model::{Config, LoadOptions, Vlm};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The commit of `hf://org/tiny`.
const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

type Files = Arc<BTreeMap<String, Vec<u8>>>;

/// A tiny model with random weights in shards, and a file that nobody should fetch.
fn model() -> TempDir {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples/critic-digits/base");
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&base).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let model = Vlm::random(Config::load(&base).unwrap(), 1, &LoadOptions::default()).unwrap();
    model
        .weights()
        .save_sharded(dir.path(), 100_000, Some(DType::BF16))
        .unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), "pickle").unwrap();
    dir
}

fn files(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    let read = |path: PathBuf| {
        (
            path.file_name().unwrap().to_str().unwrap().to_owned(),
            fs::read(path).unwrap(),
        )
    };
    Arc::new(entries.map(|entry| read(entry.path())).collect())
}

/// Serves the files as a hub and as a bucket; gives the address.
async fn serve(files: Files) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new().fallback(answer).with_state(files);
    tokio::spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}")
}

async fn answer(State(files): State<Files>, request: Request) -> Response<Body> {
    let (path, query) = (request.uri().path(), request.uri().query().unwrap_or_default());
    if path.starts_with("/api/models/org/tiny/revision/") {
        let siblings = files
            .keys()
            .map(|name| json!({ "rfilename": name }))
            .collect::<Vec<_>>();
        return Response::new(Body::from(json!({ "sha": COMMIT, "siblings": siblings }).to_string()));
    }
    if query.contains("list-type=2") {
        return Response::new(Body::from(list(&files)));
    }
    let name = path.rsplit('/').next().unwrap_or_default();
    let Some(bytes) = files.get(name) else {
        return Response::builder()
            .status(StatusCode::NOT_FOUND)
            .body(Body::empty())
            .unwrap();
    };
    let builder = Response::builder()
        .header(header::ETAG, "\"1\"")
        .header(header::LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT")
        .header(header::CONTENT_LENGTH, bytes.len());
    let body = if request.method() == Method::HEAD {
        Vec::new()
    } else {
        bytes.clone()
    };
    builder.body(Body::from(body)).unwrap()
}

fn list(files: &BTreeMap<String, Vec<u8>>) -> String {
    let contents = files.iter().map(|(name, bytes)| {
        format!(
            "<Contents><Key>models/tiny/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
             <ETag>&quot;1&quot;</ETag><Size>{}</Size></Contents>",
            bytes.len()
        )
    });
    let contents = contents.collect::<String>();
    format!("<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>")
}

/// Runs the program with the addresses of hub and bucket in its environment.
async fn worker(endpoint: &str, cache: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flotilla-worker"));
    command
        .args(arguments)
        .env("FLOTILLA_CACHE", cache)
        .env("HF_ENDPOINT", endpoint)
        .env("HF_TOKEN_PATH", "/nowhere")
        .env("AWS_ENDPOINT_URL", endpoint)
        .env("AWS_ALLOW_HTTP", "true")
        .env("AWS_ACCESS_KEY_ID", "key")
        .env("AWS_SECRET_ACCESS_KEY", "secret-access-key");
    tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap()
}

fn document(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_reads_the_same_model_from_directory_hub_and_bucket() {
    let (dir, cache) = (model(), tempfile::tempdir().unwrap());
    let endpoint = serve(files(dir.path())).await;
    let inspect = async |model: &str| {
        let output = worker(&endpoint, cache.path(), &["inspect", "--json", "--model", model]).await;
        document(&output)
    };
    let expected = inspect(dir.path().to_str().unwrap()).await;
    assert_eq!(expected["fits"], json!(true));
    assert_eq!(inspect("hf://org/tiny").await, expected);
    assert_eq!(inspect("s3://bucket/models/tiny").await, expected);
    assert!(
        cache
            .path()
            .join(format!("hf/org--tiny/{COMMIT}/config.json"))
            .is_file()
    );
    assert!(
        !cache
            .path()
            .join(format!("hf/org--tiny/{COMMIT}/pytorch_model.bin"))
            .exists()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_fetches_its_model_and_a_refusal_is_final() {
    let (dir, cache) = (model(), tempfile::tempdir().unwrap());
    let endpoint = serve(files(dir.path())).await;
    let verify = async |uri: &str| {
        let config = dir.path().join("role.json");
        let owner = json!({ "kind": "ModelCheckpoint", "namespace": "n", "name": "m", "uid": "u" });
        let role = json!({ "verify": { "model": { "uri": uri } } });
        fs::write(
            &config,
            json!({ "schemaVersion": 1, "owner": owner, "role": role }).to_string(),
        )
        .unwrap();
        let log = dir.path().join("termination-log");
        let arguments = [
            "run",
            "--config",
            config.to_str().unwrap(),
            "--listen",
            "127.0.0.1:0",
            "--termination-log",
            log.to_str().unwrap(),
        ];
        let output = worker(&endpoint, cache.path(), &arguments).await;
        (output.status.code(), fs::read_to_string(log).unwrap())
    };
    let (code, log) = verify("hf://org/tiny").await;
    assert_eq!(code, Some(0), "{log}");
    let (code, log) = verify("hf://org/other").await;
    assert_eq!(code, Some(78), "{log}");
    assert!(
        log.contains("check the name") && !log.contains("secret-access-key"),
        "{log}"
    );
}

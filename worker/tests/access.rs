//! Who is let in, how often, and what is told about it: keys, limits, ids, traces, the document, the drain.

#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod support;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Bytes, routing::post};
use flotilla_api::{
    progress::Stage,
    role::{AccessSettings, MediaSettings, Serve},
};
use flotilla_worker::access::KeyLine;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use support::{Server, ask, png, spec, with_image};
use tokio::net::TcpListener;

const CHAT: &str = "/v1/chat/completions";

fn line(name: &str, key: &str, limits: &str) -> String {
    format!("{} {limits}\n", KeyLine::of(name, key).expect("a name"))
}

/// A spec with a key file of this text, and the file's directory.
fn keyed(text: &str) -> (Serve, tempfile::TempDir) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("keys");
    std::fs::write(&path, text).expect("writes");
    let access = AccessSettings {
        api_key_file: Some(path.display().to_string()),
        ..AccessSettings::default()
    };
    (Serve { access, ..spec() }, directory)
}

fn chat(server: &Server, body: &Value, key: &str) -> RequestBuilder {
    server.client.post(server.url(CHAT)).bearer_auth(key).json(body)
}

async fn sent(request: RequestBuilder) -> Response {
    request.send().await.expect("answers")
}

async fn code(response: Response) -> (StatusCode, String) {
    let status = response.status();
    let answer: Value = response.json().await.expect("JSON");
    (status, answer["error"]["code"].as_str().unwrap_or_default().to_owned())
}

/// Seconds of `retry-after`.
fn wait(response: &Response) -> u64 {
    let value = response.headers()["retry-after"].to_str().expect("text");
    value.parse().expect("seconds")
}

/// Until `holds` does.
async fn eventually(mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..1000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it never came to be");
}

#[tokio::test]
async fn only_known_keys_are_let_in_and_new_ones_without_a_restart() {
    let (spec, directory) = keyed(&line("alice", "one", ""));
    let server = Server::ready(spec).await;
    let path = "/v1/models";
    for request in [
        server.client.get(server.url(path)),
        server.client.get(server.url(path)).bearer_auth("two"),
        server.client.post(server.url(CHAT)).body("{broken"),
    ] {
        let response = sent(request).await;
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        assert_eq!(
            code(response).await,
            (StatusCode::UNAUTHORIZED, "invalid_api_key".to_owned())
        );
    }
    assert_eq!(sent(chat(&server, &ask("Hello"), "one")).await.status(), StatusCode::OK);
    for open in ["/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"] {
        assert_eq!(server.get(open).await.0, StatusCode::OK, "{open}");
    }
    // A file that is broken changes nothing; the next one does.
    let file = directory.path().join("keys");
    std::fs::write(&file, "alice sk-plain").expect("writes");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let with = |key: &'static str| server.client.get(server.url(path)).bearer_auth(key);
    assert_eq!(sent(with("one")).await.status(), StatusCode::OK);
    std::fs::write(directory.path().join("next"), line("bob", "two", "")).expect("writes");
    std::fs::rename(directory.path().join("next"), &file).expect("renames");
    eventually(async || sent(with("two")).await.status() == StatusCode::OK).await;
    assert_eq!(sent(with("one")).await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_key_over_its_limits_is_told_when_to_come_again() {
    let text = line("often", "one", "rate=2/h") + &line("many", "two", "concurrency=1");
    let (spec, _directory) = keyed(&text);
    let server = Server::ready(spec).await;
    for _ in 0..2 {
        assert_eq!(sent(chat(&server, &ask("a"), "one")).await.status(), StatusCode::OK);
    }
    let response = sent(chat(&server, &ask("a"), "one")).await;
    assert!((1700..=1800).contains(&wait(&response)), "{}", wait(&response));
    assert_eq!(
        code(response).await,
        (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded".to_owned())
    );

    // An answer that is still streamed holds its place.
    let mut long = ask("Hello");
    (long["max_tokens"], long["n"], long["stream"]) = (json!(400), json!(8), json!(true));
    let mut streamed = sent(chat(&server, &long, "two")).await;
    streamed.chunk().await.expect("a chunk");
    let response = sent(chat(&server, &ask("a"), "two")).await;
    assert!(wait(&response) >= 1);
    let refused = (StatusCode::TOO_MANY_REQUESTS, "concurrency_limit_exceeded".to_owned());
    assert_eq!(code(response).await, refused);
    drop(streamed);
    eventually(async || sent(chat(&server, &ask("a"), "two")).await.status() == StatusCode::OK).await;
}

#[tokio::test]
async fn every_answer_has_the_id_of_its_request() {
    let server = Server::ready(spec()).await;
    let with = |path: &str, id: &str| server.client.get(server.url(path)).header("x-request-id", id);
    for path in ["/v1/models", "/v1/nothing", "/healthz"] {
        assert_eq!(sent(with(path, "step-7")).await.headers()["x-request-id"], "step-7");
    }
    let made = sent(with("/v1/models", "not a plain id")).await;
    assert_eq!(made.headers()["x-request-id"].len(), 36);
}

#[tokio::test]
async fn bodies_are_refused_by_type_size_and_depth_in_the_shape_of_errors() {
    let server = Server::ready(spec()).await;
    let send = |kind: &'static str, body: Vec<u8>| {
        let request = server
            .client
            .post(server.url(CHAT))
            .header("content-type", kind)
            .body(body);
        async { code(sent(request).await).await }
    };
    let refused = |status: u16, code: &str| (StatusCode::from_u16(status).expect("a status"), code.to_owned());
    assert_eq!(
        send("text/plain", b"{}".to_vec()).await,
        refused(415, "unsupported_media_type")
    );
    let deep = "[".repeat(100_000).into_bytes();
    assert_eq!(send("application/json", deep).await, refused(400, "invalid_json"));
    let large = vec![b' '; (64 << 20) + 1];
    assert_eq!(send("application/json", large).await, refused(413, "body_too_large"));
    let wrong = sent(server.client.put(server.url(CHAT))).await;
    assert_eq!(wrong.headers()["allow"], "POST");
    assert_eq!(code(wrong).await, refused(405, "method_not_allowed"));
    assert_eq!(
        code(sent(server.client.get(server.url("/nothing"))).await).await,
        refused(404, "not_found")
    );
}

#[tokio::test]
async fn pictures_come_from_the_media_root_and_are_counted() {
    let root = tempfile::tempdir().expect("a directory");
    let file = root.path().join("a.png");
    std::fs::write(&file, png(8, 8)).expect("writes");
    let media = MediaSettings {
        media_root: Some(root.path().display().to_string()),
        image_hosts: vec!["pictures.invalid".to_owned()],
        ..MediaSettings::default()
    };
    let server = Server::ready(Serve { media, ..spec() }).await;
    let (status, answer) = server.chat(&with_image(&format!("file://{}", file.display()))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    for (url, reason) in [
        ("file:///etc/passwd", "no file below the media root"),
        ("https://other.invalid/a.png", "not among the hosts"),
        ("http://2130706433/a.png", "loopback"),
        ("https://[::ffff:169.254.169.254]/latest", "link-local"),
    ] {
        let message = server
            .refusal(CHAT, &with_image(url), StatusCode::BAD_REQUEST, "invalid_value")
            .await;
        assert!(message.contains(reason), "{url}: {message}");
    }
    let (_, text) = server.get("/metrics").await;
    for line in [
        "flotilla_image_fetches_total{source=\"file\",outcome=\"ok\"} 1",
        "flotilla_image_fetches_total{source=\"host\",outcome=\"refused\"} 3",
        "flotilla_http_requests_total{method=\"POST\",route=\"/v1/chat/completions\",status=\"400\"} 4",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}

#[tokio::test]
async fn a_drain_needs_the_token_refuses_new_requests_and_lets_the_others_end() {
    let server = Server::ready(spec()).await;
    let drain = |query: &str, token: &str| {
        sent(
            server
                .client
                .post(server.url(&format!("/drain{query}")))
                .bearer_auth(token),
        )
    };
    assert_eq!(drain("", "wrong").await.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(drain("?wait=601", "secret").await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(drain("?wait=x", "secret").await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(server.get("/readyz").await.0, StatusCode::OK);

    let mut long = ask("Hello");
    (long["max_tokens"], long["n"], long["stream"]) = (json!(400), json!(8), json!(true));
    let mut streamed = sent(server.client.post(server.url(CHAT)).json(&long)).await;
    streamed.chunk().await.expect("a chunk");
    let answer: Value = drain("", "secret").await.json().await.expect("JSON");
    assert_eq!(answer, json!({"status": "draining", "running": 1}));
    assert_eq!(server.progress.stage(), Stage::Stopping);
    assert_eq!(server.get("/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
    let refused = sent(server.client.post(server.url(CHAT)).json(&ask("late"))).await;
    assert!(wait(&refused) >= 1);
    assert_eq!(
        code(refused).await,
        (StatusCode::SERVICE_UNAVAILABLE, "draining".to_owned())
    );
    let rest = streamed.text().await.expect("the whole answer");
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    let answer: Value = drain("?wait=20", "secret").await.json().await.expect("JSON");
    assert_eq!(answer, json!({"status": "drained", "running": 0}));
    assert!(!server.role.is_finished(), "the process stays until it is stopped");
}

#[tokio::test]
async fn the_document_describes_this_server_and_its_page_needs_nothing_else() {
    let (keyed, _directory) = keyed(&line("alice", "one", ""));
    let server = Server::ready(keyed).await;
    let (_, text) = server.get("/openapi.json").await;
    let document: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().expect("paths");
    for path in [
        CHAT,
        "/v1/completions",
        "/v1/models",
        "/v1/critic/compare",
        "/healthz",
        "/readyz",
        "/metrics",
        "/progress",
        "/drain",
        "/openapi.json",
        "/docs",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    assert_eq!(document["paths"][CHAT]["post"]["security"], json!([{"apiKey": []}]));
    assert_eq!(
        document["paths"]["/drain"]["post"]["security"],
        json!([{"jobToken": []}])
    );
    assert!(document["components"]["schemas"]["ErrorBody"].is_object());
    references(&document, &document);
    let page = sent(server.client.get(server.url("/docs"))).await;
    let policy = page.headers()["content-security-policy"]
        .to_str()
        .expect("text")
        .to_owned();
    assert!(policy.starts_with("default-src 'none'"), "{policy}");
    let page = page.text().await.expect("a page");
    for path in paths.keys() {
        assert!(page.contains(path.as_str()), "{path}");
    }
    assert!(!page.contains("<script") && !page.contains(" src=") && page.contains("curl http://127.0.0.1:8000"));
}

/// Every reference of the document leads somewhere.
fn references(part: &Value, document: &Value) {
    match part {
        Value::Object(fields) => {
            if let Some(path) = fields.get("$ref").and_then(Value::as_str) {
                let pointer = path.strip_prefix('#').expect("a local reference");
                assert!(document.pointer(pointer).is_some(), "{path}");
            }
            fields.values().for_each(|value| references(value, document));
        }
        Value::Array(items) => items.iter().for_each(|value| references(value, document)),
        _ => {}
    }
}

#[tokio::test]
async fn a_span_with_counts_and_without_text_reaches_the_collector() {
    let received: Arc<Mutex<Vec<u8>>> = Arc::default();
    let store = received.clone();
    let collect = move |body: Bytes| {
        store.lock().expect("no panic").extend_from_slice(&body);
        async { StatusCode::OK.as_u16().to_string() }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let app = Router::new().route("/v1/traces", post(collect));
    tokio::spawn(async move { axum::serve(listener, app).await });
    let mut server = Server::ready(Serve {
        otlp_endpoint: Some(endpoint),
        ..spec()
    })
    .await;
    let request = server.client.post(server.url(CHAT)).json(&ask("a-secret-question"));
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let request = request.header("traceparent", format!("00-{trace}-00f067aa0ba902b7-01"));
    assert_eq!(sent(request).await.status(), StatusCode::OK);
    server.shutdown.cancel();
    (&mut server.role).await.expect("no panic").expect("ends well");
    let received = received.lock().expect("no panic").clone();
    let holds = |part: &[u8]| received.windows(part.len()).any(|window| window == part);
    for text in [
        "POST /v1/chat/completions",
        "gen_ai.usage.output_tokens",
        "gen_ai.latency.time_to_first_token",
        "flotilla-worker",
        "tiny",
    ] {
        assert!(holds(text.as_bytes()), "{text}");
    }
    let id: Vec<u8> = (0..16)
        .map(|at| u8::from_str_radix(&trace[2 * at..2 * at + 2], 16).expect("hexadecimal"))
        .collect();
    assert!(holds(&id), "the trace of the client goes on");
    assert!(!holds(b"a-secret-question"));
}

#[tokio::test]
async fn a_server_with_a_wrong_setting_does_not_start() {
    let wrong = |change: &dyn Fn(&mut Serve)| {
        let mut spec = spec();
        change(&mut spec);
        spec
    };
    for spec in [
        wrong(&|spec| spec.access.api_key_file = Some("/nowhere/keys".to_owned())),
        wrong(&|spec| spec.access.cors_origins = vec!["example.com".to_owned()]),
        wrong(&|spec| spec.media.image_hosts = vec!["10.0.0.1".to_owned()]),
        wrong(&|spec| spec.media.media_root = Some("/nowhere".to_owned())),
        wrong(&|spec| spec.otlp_endpoint = Some("collector:4318".to_owned())),
    ] {
        let mut server = Server::start(spec.clone()).await;
        let error = (&mut server.role).await.expect("no panic").expect_err("wrong");
        assert_eq!(error.exit_code(), 78, "{spec:?}: {error:?}");
    }
    assert!(!Path::new("/nowhere").exists());
}

#[tokio::test]
async fn only_listed_origins_may_call_from_a_browser() {
    let mut spec = spec();
    spec.access.cors_origins = vec!["https://a.example".to_owned()];
    let server = Server::ready(spec).await;
    let asked = |origin: &str| {
        let request = server.client.request(reqwest::Method::OPTIONS, server.url(CHAT));
        let request = request
            .header("origin", origin)
            .header("access-control-request-method", "POST");
        sent(request)
    };
    let answer = asked("https://a.example").await;
    assert_eq!(answer.status(), StatusCode::NO_CONTENT);
    assert_eq!(answer.headers()["access-control-allow-origin"], "https://a.example");
    assert!(
        !asked("https://b.example")
            .await
            .headers()
            .contains_key("access-control-allow-origin")
    );
    let call = server
        .client
        .get(server.url("/v1/models"))
        .header("origin", "https://a.example");
    assert_eq!(
        sent(call).await.headers()["access-control-allow-origin"],
        "https://a.example"
    );
}

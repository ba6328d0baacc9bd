//! A server over a tiny random model on a free port, for tests that see it as a client does.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::{net::SocketAddr, path::Path, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use flotilla_api::role::{AccessSettings, EngineSettings, MediaSettings, ModelSource, Owner, Purpose, Role, Serve};
use flotilla_worker::{
    WorkerError,
    context::{Context, Token},
    device::Wanted,
    progress::ProgressCell,
    role,
    uri::Volumes,
};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// A running server; dropping it stops it.
pub struct Server {
    pub address: SocketAddr,
    pub progress: ProgressCell,
    pub shutdown: CancellationToken,
    pub role: JoinHandle<Result<(), WorkerError>>,
    pub client: Client,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.role.abort();
    }
}

/// The sample's model with random weights; nothing but its defaults.
pub fn spec() -> Serve {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples/critic-digits/base");
    Serve {
        model: ModelSource {
            uri: format!("file://{}", base.canonicalize().expect("the sample's base").display()),
            digest: None,
            random_seed: Some(1),
        },
        served_model_name: "tiny".to_owned(),
        purpose: Purpose::Both,
        critic_template: None,
        critic_templates: std::collections::BTreeMap::new(),
        max_model_len: 4096,
        max_queue: 64,
        tensor_parallel: 1,
        engine: EngineSettings::default(),
        access: AccessSettings::default(),
        media: MediaSettings::default(),
        drain_seconds: None,
        otlp_endpoint: None,
    }
}

impl Server {
    /// Started; the model is being loaded.
    pub async fn start(spec: Serve) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let progress = ProgressCell::default();
        let context = Context {
            owner: Owner {
                kind: "ModelDeployment".to_owned(),
                namespace: "default".to_owned(),
                name: "tiny".to_owned(),
                uid: "u".to_owned(),
            },
            progress: progress.clone(),
            volumes: Volumes::default(),
            token: Token::parse("secret"),
            device: Wanted::Cpu,
        };
        let shutdown = CancellationToken::new();
        let role = Role::Serve(spec);
        let role = tokio::spawn(Box::pin(role::run(context, role, listener, shutdown.clone())));
        Self {
            address,
            progress,
            shutdown,
            role,
            client: Client::new(),
        }
    }

    /// Started, with the model loaded.
    pub async fn ready(spec: Serve) -> Self {
        let server = Self::start(spec).await;
        while server.get("/readyz").await.0 != StatusCode::OK {
            assert!(!server.role.is_finished(), "{:?}", server.progress.snapshot());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub async fn get(&self, path: &str) -> (StatusCode, String) {
        let response = self.client.get(self.url(path)).send().await.expect("answers");
        (response.status(), response.text().await.expect("a body"))
    }

    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let response = self
            .client
            .post(self.url(path))
            .json(body)
            .send()
            .await
            .expect("answers");
        let status = response.status();
        let text = response.text().await.expect("a body");
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub async fn chat(&self, body: &Value) -> (StatusCode, Value) {
        self.post("/v1/chat/completions", body).await
    }

    /// The message of a refusal, after its status and code were checked.
    pub async fn refusal(&self, path: &str, body: &Value, status: StatusCode, code: &str) -> String {
        let (found, answer) = self.post(path, body).await;
        assert_eq!(
            (found, answer["error"]["code"].as_str()),
            (status, Some(code)),
            "{answer}"
        );
        answer["error"]["message"].as_str().expect("a message").to_owned()
    }
}

/// A question to `/v1/chat/completions`.
pub fn ask(content: impl Into<Value>) -> Value {
    json!({"messages": [{"role": "user", "content": content.into()}], "max_tokens": 8, "seed": 3})
}

/// A grey picture.
pub fn png(width: u32, height: u32) -> Vec<u8> {
    let mut png = std::io::Cursor::new(Vec::new());
    image::GrayImage::from_fn(width, height, |x, y| image::Luma([(x * 40 + y * 20) as u8]))
        .write_to(&mut png, image::ImageFormat::Png)
        .expect("encodes");
    png.into_inner()
}

/// A picture as a client sends it.
pub fn data_url(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(bytes))
}

/// A question about a picture.
pub fn with_image(url: &str) -> Value {
    ask(json!([
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What digit is this?"},
    ]))
}

/// A question to `/v1/critic/compare`.
pub fn comparison() -> Value {
    json!({"question": "What digit is this?", "responses": ["7", "3"], "image": data_url(&png(8, 8)), "max_tokens": 24})
}

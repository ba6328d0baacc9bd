//! A rollout pod over a tiny random model, as a learner sees it, and a learner's way with several of them.

#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::{collections::BTreeMap, io::Cursor, path::PathBuf, time::Duration};

use axum::{Json, Router, routing::put};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use flotilla_api::{
    names::path,
    role::{ModelSource, Owner, Role, Rollout},
    rollout::{RolloutPod, RolloutPods},
};
use flotilla_engine::{Group, Limits, Prompt, Request, Sampling, VlmRunner, generate};
use flotilla_model::{Config, ImageLimits, LoadOptions, Medium, Message, Pass, Picture, Processor, Vlm};
use flotilla_worker::{
    context::{Context, Token},
    device::Wanted,
    progress::ProgressCell,
    role,
    rollout::{
        ROWS_PER_PIECE,
        wire::{GroupLine, Line, Piece, PieceImage, PiecePrompt, Sample, WeightsAnswer},
    },
    train::{
        error::TrainError,
        fleet::{Batch, Fleet},
    },
    uri::Volumes,
};
use reqwest::{Client, StatusCode};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

const TOKEN: &str = "secret";

fn base() -> PathBuf {
    let base = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples/critic-digits/base");
    base.canonicalize().expect("the sample's base")
}

fn model(seed: u64) -> Vlm {
    let config = Config::load(&base()).expect("a config");
    Vlm::random(config, seed, &LoadOptions::default()).expect("a model")
}

fn weights(seed: u64) -> Vec<u8> {
    model(seed).weights().to_bytes().expect("weights")
}

fn context() -> Context {
    Context {
        owner: Owner {
            kind: "TrainingJob".into(),
            namespace: "default".into(),
            name: "tiny".into(),
            uid: "u".into(),
        },
        progress: ProgressCell::default(),
        volumes: Volumes::default(),
        token: Token::parse(TOKEN),
        device: Wanted::Cpu,
    }
}

/// A running rollout pod; dropping it kills it.
struct Pod {
    listed: RolloutPod,
    role: JoinHandle<()>,
    client: Client,
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.role.abort();
    }
}

impl Pod {
    async fn ready(uid: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let listed = listed(uid, listener.local_addr().expect("an address").to_string());
        let spec = Rollout {
            model: ModelSource {
                uri: format!("file://{}", base().display()),
                digest: None,
                random_seed: Some(99),
            },
            threads: 2,
            dtype: None,
        };
        let role = role::run(context(), Role::Rollout(spec), listener, CancellationToken::new());
        let pod = Self {
            listed,
            role: tokio::spawn(async move { drop(Box::pin(role).await) }),
            client: Client::new(),
        };
        while pod
            .client
            .get(pod.url("/readyz"))
            .send()
            .await
            .expect("answers")
            .status()
            != StatusCode::OK
        {
            assert!(!pod.role.is_finished(), "the pod ended");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        pod
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.listed.address)
    }

    async fn load(&self, version: &str, bytes: Vec<u8>) -> (StatusCode, String) {
        let url = format!("{}?version={version}", self.url(path::WEIGHTS));
        let request = self.client.put(url).bearer_auth(TOKEN).body(bytes);
        let response = request.send().await.expect("answers");
        (response.status(), response.text().await.expect("a body"))
    }

    async fn sample(&self, piece: &Piece, token: &str) -> (StatusCode, String) {
        let request = self
            .client
            .post(self.url(path::ROLLOUTS))
            .bearer_auth(token)
            .json(piece);
        let response = request.send().await.expect("answers");
        (response.status(), response.text().await.expect("a body"))
    }
}

fn listed(uid: &str, address: String) -> RolloutPod {
    RolloutPod {
        name: format!("tiny-rollout-{uid}"),
        uid: uid.into(),
        address,
    }
}

fn piece(version: &str, seeds: std::ops::Range<u64>) -> Piece {
    let prompt = |seed: u64| PiecePrompt {
        token_ids: vec![5 + seed as u32, 9, 11],
        images: Vec::new(),
        seed,
    };
    Piece {
        weight_version: version.into(),
        n: 3,
        temperature: 1.0,
        top_p: 1.0,
        max_tokens: 7,
        prompts: seeds.map(prompt).collect(),
        images: BTreeMap::new(),
    }
}

/// What the engine of a colocated learner draws for the prompts.
fn colocated(model: &Vlm, piece: &Piece, prompts: Vec<Prompt>) -> Vec<Group> {
    let processor = Processor::load(&base()).expect("a processor");
    let requests: Vec<_> = prompts
        .into_iter()
        .zip(&piece.prompts)
        .map(|(prompt, asked)| {
            let sampling = Sampling {
                temperature: piece.temperature as f32,
                top_p: piece.top_p as f32,
                max_tokens: piece.max_tokens,
                seed: asked.seed,
                stop_ids: processor.tokenizer().stop_ids().to_vec(),
                ..Sampling::default()
            };
            Request::new(prompt, piece.n, sampling)
        })
        .collect();
    let limits = Limits {
        max_rows: ROWS_PER_PIECE,
        ..Limits::default()
    };
    generate(VlmRunner::new(model, &limits), &requests, limits, &|| false).expect("samples")
}

fn text_only(model: &Vlm, piece: &Piece) -> Vec<Group> {
    let row = |prompt: &PiecePrompt| Prompt::from(flotilla_model::Row::text(prompt.token_ids.clone()));
    colocated(model, piece, piece.prompts.iter().map(row).collect())
}

/// Groups of an answer by prompt, with the versions that its lines tell.
fn groups(text: &str, prompts: usize) -> (Vec<Group>, Vec<String>) {
    let mut groups = vec![Group::default(); prompts];
    let (mut versions, mut done) = (Vec::new(), false);
    for line in text.lines() {
        match serde_json::from_str(line).expect("a line") {
            Line::Group(group) => {
                versions.push(group.weight_version.clone());
                let index = group.index;
                groups[index] = group.group().expect("whole");
            }
            Line::Done { groups } => done = groups == prompts,
            Line::Error { message, .. } => panic!("{message}"),
        }
    }
    assert!(done, "the last line says that every group was sent");
    (groups, versions)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_token_neither_samples_nor_changes_weights() {
    let pod = Pod::ready("a").await;
    let (status, text) = pod.sample(&piece("v", 0..1), "guessed").await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(text.contains("the bearer token is wrong"), "{text}");
    let put = pod.client.put(pod.url(path::WEIGHTS)).send().await.expect("answers");
    assert_eq!(put.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_draws_the_tokens_of_a_colocated_learner_with_the_weights_it_was_sent() {
    let pod = Pod::ready("a").await;
    let asked = piece("7-x", 0..4);
    let (status, text) = pod.sample(&asked, TOKEN).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(text.contains("no weights are loaded"), "{text}");

    let (status, text) = pod.load("7-x", weights(7)).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let (status, text) = pod.sample(&asked, TOKEN).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let (drawn, versions) = groups(&text, 4);
    assert_eq!(drawn, text_only(&model(7), &asked));
    assert_eq!(versions, ["7-x"; 4]);

    // The next version, and the one before is stale.
    pod.load("8-x", weights(8)).await;
    let (status, text) = pod.sample(&asked, TOKEN).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(text.contains(r#"weights \"8-x\" are loaded, not \"7-x\""#), "{text}");
    let asked = piece("8-x", 0..4);
    let (_, text) = pod.sample(&asked, TOKEN).await;
    assert_eq!(groups(&text, 4).0, text_only(&model(8), &asked));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_is_seen_by_a_pod_as_by_a_learner() {
    let mut png = Vec::new();
    image::GrayImage::from_fn(8, 8, |x, y| image::Luma([(x * 20 + y * 9) as u8]))
        .write_to(&mut Cursor::new(&mut png), image::ImageFormat::Png)
        .expect("png");
    let (processor, model) = (Processor::load(&base()).expect("a processor"), model(7));
    let picture = Picture::decode(&png, ImageLimits::default()).expect("a picture");
    let message = Message::user(1, "What digit is this?");
    let prepared = processor
        .prepare(&[message], &[Medium::Picture(picture)], 512)
        .expect("a prompt");
    let visuals: Vec<_> = prepared.visuals.iter().collect();
    let features = model.encode(&visuals, Pass::Infer).expect("features");
    let row = Prompt::from(prepared.row(&features).expect("a row"));
    let asked = Piece {
        prompts: vec![PiecePrompt {
            token_ids: prepared.ids.clone(),
            images: vec!["digit".into()],
            seed: 4,
        }],
        images: BTreeMap::from([("digit".to_owned(), PieceImage::Encoded(STANDARD.encode(&png)))]),
        ..piece("v", 0..0)
    };
    let pod = Pod::ready("a").await;
    pod.load("v", weights(7)).await;
    let (_, text) = pod.sample(&asked, TOKEN).await;
    assert_eq!(groups(&text, 1).0, colocated(&model, &asked, vec![row]));

    let unsent = Piece {
        images: BTreeMap::new(),
        ..asked
    };
    let (_, text) = pod.sample(&unsent, TOKEN).await;
    let Ok(Line::Error { message, permanent }) = serde_json::from_str(text.trim()) else {
        panic!("{text}");
    };
    assert_eq!(
        (message.as_str(), permanent),
        ("prompts[0]: image digit was not sent", true)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_of_another_model_are_refused_and_change_nothing() {
    let pod = Pod::ready("a").await;
    pod.load("7-x", weights(7)).await;
    let (status, text) = pod.load("8-x", b"no safetensors".to_vec()).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{text}");
    let (status, text) = pod.load("8-x", vec![0; weights(7).len() + (32 << 20)]).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{text}");
    let asked = piece("7-x", 0..2);
    let (_, text) = pod.sample(&asked, TOKEN).await;
    assert_eq!(groups(&text, 2).0, text_only(&model(7), &asked));
}

/// A learner's fleet over pods that are listed by `told`.
fn fleet(context: &Context) -> (Fleet, watch::Sender<RolloutPods>) {
    let (told, pods) = watch::channel(RolloutPods::default());
    let runtime = tokio::runtime::Handle::current();
    (Fleet::new(context, 2, pods, runtime).expect("a fleet"), told)
}

fn list(pods: &[&RolloutPod]) -> RolloutPods {
    RolloutPods {
        revision: "r".into(),
        pods: pods.iter().map(|pod| (*pod).clone()).collect(),
    }
}

/// Samples four pieces of two prompts with the weights of seed 7.
async fn sample(fleet: Fleet) -> Result<Vec<Vec<Group>>, TrainError> {
    let sampling = move || {
        fleet.sample(Batch {
            step: 7,
            weights: &|| Ok(weights(7)),
            pieces: (0..4).map(|at| piece("", 2 * at..2 * at + 2)).collect(),
            cancelled: &|| false,
        })
    };
    tokio::task::spawn_blocking(sampling).await.expect("no panic")
}

fn expected() -> Vec<Vec<Group>> {
    let model = model(7);
    (0..4)
        .map(|at| text_only(&model, &piece("", 2 * at..2 * at + 2)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_pod_leaves_undone_another_one_does() {
    let (live, context) = (Pod::ready("live").await, context());
    let dead = listed("dead", "127.0.0.1:1".into());
    let (fleet, told) = fleet(&context);
    told.send_replace(list(&[&dead, &live.listed]));
    assert_eq!(sample(fleet).await.expect("samples"), expected());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_without_pods_waits_says_so_and_goes_on_when_one_comes() {
    let context = context();
    context.progress.update(|progress| progress.message = "training".into());
    let (fleet, told) = fleet(&context);
    let sampling = tokio::spawn(sample(fleet));
    while !context
        .progress
        .snapshot()
        .message
        .starts_with("waiting for rollout pods: none is ready")
    {
        assert!(!sampling.is_finished(), "there was nobody to ask");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let late = Pod::ready("late").await;
    told.send_replace(list(&[&late.listed]));
    assert_eq!(sampling.await.expect("no panic").expect("samples"), expected());
    assert_eq!(context.progress.snapshot().message, "training");
}

/// A pod that takes any weights and answers with those of another version.
async fn liar() -> RolloutPod {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let weights = put(|query: axum::extract::RawQuery| async move {
        let version = query.0.unwrap_or_default().replace("version=", "");
        Json(WeightsAnswer {
            weight_version: version,
        })
    });
    let rollouts = axum::routing::post(|Json(piece): Json<Piece>| async move {
        let sample = Sample {
            token_ids: vec![1],
            logprobs: vec![0.0],
            model_logprobs: vec![0.0],
            finish_reason: flotilla_engine::FinishReason::Stop,
        };
        let line = |index| {
            let group = Line::Group(GroupLine {
                index,
                weight_version: "6-old".into(),
                completions: vec![sample.clone(); piece.n],
            });
            serde_json::to_string(&group).expect("serializes") + "\n"
        };
        let done = serde_json::to_string(&Line::Done {
            groups: piece.prompts.len(),
        });
        (0..piece.prompts.len()).map(line).collect::<String>() + &done.expect("serializes") + "\n"
    });
    let app = Router::new()
        .route(path::WEIGHTS, weights)
        .route(path::ROLLOUTS, rollouts);
    tokio::spawn(async move { axum::serve(listener, app).await });
    listed("liar", address)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_takes_no_samples_of_other_weights() {
    let (honest, liar, context) = (Pod::ready("honest").await, liar().await, context());
    let (fleet, told) = fleet(&context);
    told.send_replace(list(&[&liar, &honest.listed]));
    assert_eq!(sample(fleet).await.expect("samples"), expected());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piece_that_every_pod_refuses_ends_the_run() {
    let (pod, context) = (Pod::ready("a").await, context());
    let (fleet, told) = fleet(&context);
    told.send_replace(list(&[&pod.listed]));
    let sampling = move || {
        let mut wrong = piece("", 0..1);
        wrong.prompts[0].token_ids = vec![1_000_000];
        fleet.sample(Batch {
            step: 7,
            weights: &|| Ok(weights(7)),
            pieces: vec![wrong],
            cancelled: &|| false,
        })
    };
    let error = tokio::task::spawn_blocking(sampling)
        .await
        .expect("no panic")
        .expect_err("refused");
    assert!(
        error.to_string().contains("token 1000000 is not in the vocabulary"),
        "{error}"
    );
}

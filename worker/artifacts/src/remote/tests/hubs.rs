//! Fetches from the hub.

use std::time::Duration;

use super::{
    super::*,
    contents,
    hub_server::{Behaviour, COMMIT, CUT, GATED, HubServer, TOKEN},
    settings, silent,
};

const MODEL: &str = "hf://org/model";
const SHARD: &str = "model-00001-of-00002.safetensors";

async fn get(uri: &str, settings: &Settings) -> Result<PathBuf, RemoteError> {
    fetch(&Address::parse(uri).expect("an address"), settings, &silent).await
}

#[tokio::test]
async fn what_a_checkpoint_needs_is_fetched_once_and_nothing_else() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = HubServer::start(Behaviour::default()).await;
    let settings = settings(dir.path(), server.settings());
    let model = get(MODEL, &settings).await.expect("fetches");
    assert_eq!(contents(&model), server.needed());
    server.log();

    assert_eq!(get(MODEL, &settings).await.expect("is there"), model);
    assert_eq!(server.log(), ["GET /api/models/org/model/revision/main"]);
    let pinned = format!("{MODEL}@{COMMIT}");
    assert_eq!(get(&pinned, &settings).await.expect("is there"), model);
    assert!(server.log().is_empty(), "a commit cannot have changed");
    let request = format!("{MODEL}@refs/pr/1");
    assert_eq!(get(&request, &settings).await.expect("is there"), model);
}

#[tokio::test]
async fn a_cut_connection_is_taken_up_where_it_broke() {
    let dir = tempfile::tempdir().expect("a directory");
    let behaviour = Behaviour {
        cuts: 2,
        ..Behaviour::default()
    };
    let server = HubServer::start(behaviour).await;
    let model = get(MODEL, &settings(dir.path(), server.settings()))
        .await
        .expect("fetches");
    assert_eq!(contents(&model), server.needed());
    let resumed = server
        .log()
        .iter()
        .filter(|line| line.ends_with(&format!("from {CUT}")))
        .count();
    assert!(resumed > 0);
}

#[tokio::test]
async fn a_source_without_ranges_is_read_from_the_beginning_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let behaviour = Behaviour {
        cuts: 2,
        no_ranges: true,
        ..Behaviour::default()
    };
    let server = HubServer::start(behaviour).await;
    let model = get(MODEL, &settings(dir.path(), server.settings()))
        .await
        .expect("fetches");
    assert_eq!(contents(&model), server.needed());
}

#[tokio::test]
async fn a_fetch_that_was_given_up_is_gone_on_with() {
    let dir = tempfile::tempdir().expect("a directory");
    let behaviour = Behaviour {
        cuts: 2,
        stall: true,
        ..Behaviour::default()
    };
    let server = HubServer::start(behaviour).await;
    let settings = settings(dir.path(), server.settings());
    let partial = dir.path().join(format!("hf/org--model/{COMMIT}.partial/{SHARD}.part"));
    {
        let address = Address::parse(MODEL).expect("an address");
        let fetching = fetch(&address, &settings, &silent);
        tokio::pin!(fetching);
        // Dropping the writer's buffer may lose up to a block of it, so what is on disk is only known to be no more.
        let stalled = tokio::time::timeout(Duration::from_millis(500), &mut fetching).await;
        assert!(stalled.is_err(), "it stalls");
    }
    assert!(partial.exists());
    std::fs::write(&partial, &server.needed()[SHARD][..CUT]).expect("writes");
    server.log();
    let model = get(MODEL, &settings).await.expect("fetches");
    assert_eq!(contents(&model), server.needed());
    let log = server.log();
    assert!(log.contains(&format!("store {SHARD} from {CUT}")), "{log:?}");
    assert!(
        !log.iter()
            .any(|line| line.contains("GET") && line.contains("config.json")),
        "{log:?}"
    );
}

#[tokio::test]
async fn a_damaged_part_of_an_earlier_fetch_is_fetched_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = HubServer::start(Behaviour::default()).await;
    let partial = dir.path().join(format!("hf/org--model/{COMMIT}.partial"));
    std::fs::create_dir_all(&partial).expect("creates");
    std::fs::write(partial.join(format!("{SHARD}.part")), [9; 1000]).expect("writes");
    std::fs::write(partial.join("left-by-another-rule.json"), "x").expect("writes");
    let model = get(MODEL, &settings(dir.path(), server.settings()))
        .await
        .expect("fetches");
    assert_eq!(contents(&model), server.needed());
}

#[tokio::test]
async fn bytes_of_another_digest_are_refused_and_never_visible() {
    let dir = tempfile::tempdir().expect("a directory");
    let behaviour = Behaviour {
        corrupt: true,
        ..Behaviour::default()
    };
    let server = HubServer::start(behaviour).await;
    let settings = settings(dir.path(), server.settings());
    let message = get(MODEL, &settings).await.expect_err("corrupt").to_string();
    assert!(
        message.contains("safetensors of hf://org/model@main was received with sha256"),
        "{message}"
    );
    assert!(!dir.path().join(format!("hf/org--model/{COMMIT}")).exists());
    server.behave(Behaviour::default());
    let model = get(MODEL, &settings).await.expect("fetches");
    assert_eq!(contents(&model), server.needed());
}

#[tokio::test]
async fn refusals_say_what_to_do_and_never_hold_the_token() {
    let dir = tempfile::tempdir().expect("a directory");
    let private = Behaviour {
        private: true,
        ..Behaviour::default()
    };
    let server = HubServer::start(private).await;
    let (without, with, wrong) = (
        server.settings(),
        server.settings_with(TOKEN),
        server.settings_with("hf_wrong"),
    );
    let gated = format!("hf://org/{GATED}");
    let cases = [
        (MODEL, &without, "set HF_TOKEN to a token that may read it"),
        (MODEL, &wrong, "HF_TOKEN is not valid or may not read this model"),
        (&gated, &with, "accept the licence on"),
        (
            "hf://org/model@missing",
            &with,
            "it has no revision \"missing\": name a branch, tag or commit",
        ),
        ("hf://org/other", &with, "check the name"),
    ];
    for (uri, hub, advice) in cases {
        let error = get(uri, &settings(dir.path(), hub.clone())).await.expect_err(uri);
        assert!(error.is_permanent());
        let message = format!("{error} {error:?} {hub:?}");
        assert!(message.contains(advice), "{message}");
        assert!(!message.contains(TOKEN) && !message.contains("hf_wrong"), "{message}");
    }
    // With the token every file comes, and the host of large files refuses whoever sends it one.
    let model = get(MODEL, &settings(dir.path(), with)).await.expect("fetches");
    assert_eq!(contents(&model), server.needed());
}

#[tokio::test]
async fn names_that_leave_the_directory_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().expect("a directory");
    for name in ["../config.json", "/etc/config.json", "a/../../config.json"] {
        let behaviour = Behaviour {
            names: vec![name.to_owned()],
            ..Behaviour::default()
        };
        let server = HubServer::start(behaviour).await;
        let error = get(MODEL, &settings(dir.path(), server.settings()))
            .await
            .expect_err(name);
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(contents(dir.path()).len(), 0);
    }
}

#[tokio::test]
async fn fetches_of_the_same_model_at_once_read_every_file_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = HubServer::start(Behaviour::default()).await;
    let settings = settings(dir.path(), server.settings());
    let (a, b, c) = tokio::join!(get(MODEL, &settings), get(MODEL, &settings), get(MODEL, &settings));
    assert_eq!(a.expect("fetches"), b.expect("waits"));
    assert_eq!(contents(&c.expect("waits")), server.needed());
    let log = server.log();
    let reads = log
        .iter()
        .filter(|line| line.starts_with(&format!("store {SHARD}")))
        .count();
    assert_eq!(reads, 1, "{log:?}");
}

#[tokio::test]
async fn a_hub_that_fails_for_a_while_is_asked_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let behaviour = Behaviour {
        failures: 3,
        ..Behaviour::default()
    };
    let server = HubServer::start(behaviour).await;
    let model = get(MODEL, &settings(dir.path(), server.settings()))
        .await
        .expect("fetches");
    assert_eq!(contents(&model), server.needed());
}

#[tokio::test]
async fn a_hub_that_is_down_does_not_take_away_what_was_fetched() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = HubServer::start(Behaviour::default()).await;
    let settings = settings(dir.path(), server.settings());
    let model = get(MODEL, &settings).await.expect("fetches");
    server.behave(Behaviour {
        failures: usize::MAX,
        ..Behaviour::default()
    });
    assert_eq!(get(MODEL, &settings).await.expect("was there"), model);
    let error = get("hf://org/model@refs/pr/1", &settings)
        .await
        .expect_err("never fetched");
    assert!(!error.is_permanent(), "{error}");
}

#[tokio::test]
async fn a_model_larger_than_the_disk_is_not_begun() {
    let dir = tempfile::tempdir().expect("a directory");
    let behaviour = Behaviour {
        announced: Some(1 << 60),
        ..Behaviour::default()
    };
    let server = HubServer::start(behaviour).await;
    let error = get(MODEL, &settings(dir.path(), server.settings()))
        .await
        .expect_err("too large");
    assert!(matches!(error, RemoteError::Space { .. }), "{error}");
    assert!(!server.log().iter().any(|line| line.starts_with("store")));
}

#[tokio::test]
async fn an_endpoint_that_is_no_address_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let hub = HubSettings {
        endpoint: "ftp://mirror".to_owned(),
        token: None,
    };
    let error = get(MODEL, &settings(dir.path(), hub)).await.expect_err("no address");
    assert!(error.to_string().contains("HF_ENDPOINT \"ftp://mirror\""), "{error}");
}

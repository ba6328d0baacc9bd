//! The sandbox is held to what Kubernetes does: every check that runs against the real kube-apiserver runs here.
//!
//! `CONFORMANCE=watch cargo test --test conformance` runs only the checks whose names contain `watch`.

use std::collections::BTreeSet;

use flotilla_sandbox::{
    Sandbox, Settings,
    controller::{self, ControllerConfig},
    node::address::AddressBlock,
};
use flotilla_tests::conformance::{
    TOPICS,
    server::{Kind, Server, kubectl_on_path},
    suite,
};
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn the_sandbox_does_what_kubernetes_does() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let sandbox = Sandbox::start(Settings::new(directory.path())).await?;
    let config = ControllerConfig {
        dir: directory.path().to_owned(),
        addresses: AddressBlock::claim(directory.path())?,
    };
    let shutdown = CancellationToken::new();
    let controllers = tokio::spawn(controller::run(sandbox.client().await?, config, shutdown.clone()));
    let kubectl = kubectl_on_path();
    if kubectl.is_none() {
        println!("no kubectl on this machine: its checks are skipped");
    }
    let server = Server::prepare(Kind::Sandbox, &sandbox.kubeconfig_path(), kubectl).await?;
    let report = suite::run(server, &std::env::var("CONFORMANCE").unwrap_or_default()).await?;
    println!("{report}");
    shutdown.cancel();
    controllers.await?;
    sandbox.shutdown().await?;
    report.verdict()
}

#[test]
fn every_check_has_a_name_of_its_own() {
    let mut names = BTreeSet::new();
    for check in TOPICS.iter().flat_map(|topic| topic.checks) {
        assert!(names.insert(check.name), "two checks are called {}", check.name);
    }
    assert!(names.len() >= 120, "only {} checks", names.len());
}

#[test]
fn the_differences_in_the_docs_are_those_of_the_suite() -> anyhow::Result<()> {
    let text = std::fs::read_to_string(flotilla_tests::root().join("docs/sandbox.md"))?;
    let documented: BTreeSet<(String, String)> = text
        .lines()
        .filter_map(|line| {
            let (name, reason) = line.strip_prefix("| `")?.split_once("` | ")?;
            let known = TOPICS
                .iter()
                .flat_map(|topic| topic.checks)
                .any(|check| check.name == name);
            known.then(|| (name.to_owned(), reason.trim_end_matches(" |").to_owned()))
        })
        .collect();
    let listed = TOPICS.iter().flat_map(|topic| topic.checks).filter_map(|check| {
        let reason = check.differs?;
        Some((check.name.to_owned(), reason.to_owned()))
    });
    assert_eq!(documented, listed.collect());
    Ok(())
}

//! What the conformance suite says is what Kubernetes does: the checks that the sandbox is held to, on a real cluster.
//!
//! `CONFORMANCE=watch` runs only the checks whose names contain `watch`.

use flotilla_tests::{
    cluster::Cluster,
    conformance::{
        server::{Kind, Server},
        suite,
    },
};

#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_does_what_the_suite_says() -> anyhow::Result<()> {
    let cluster = Cluster::connect().await?;
    let kubectl = cluster.programs().path("kubectl");
    let server = Server::prepare(Kind::Kubernetes, cluster.kubeconfig(), Some(kubectl)).await?;
    let report = suite::run(server, &std::env::var("CONFORMANCE").unwrap_or_default()).await?;
    println!("{report}");
    cluster.stop()?;
    report.verdict()
}

//! The real kube-apiserver does what the conformance suite says: what the sandbox is held to is Kubernetes.

use flotilla_tests::conformance::{
    server::{Kind, Server, kubectl_on_path},
    suite,
};

#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_does_what_the_suite_says() -> anyhow::Result<()> {
    let kubeconfig = std::env::var("KUBECONFIG")?;
    let server = Server::prepare(Kind::Kubernetes, kubeconfig.as_ref(), kubectl_on_path()).await?;
    let report = suite::run(server, &std::env::var("CONFORMANCE").unwrap_or_default()).await?;
    println!("{report}");
    report.verdict()
}

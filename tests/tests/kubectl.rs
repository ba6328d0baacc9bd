//! The assembled sandbox as the real kubectl sees it: pods that ran, their logs, cascading deletion, finalizers.

use std::{path::Path, process::Command};

use anyhow::{Context, bail};
use flotilla_cli::control_plane::{ControlPlane, Options};
use flotilla_tests::{
    program,
    rows::{dataset, write_rows},
};

struct Kubectl {
    kubeconfig: std::path::PathBuf,
    home: std::path::PathBuf,
}

impl Kubectl {
    /// Runs kubectl with words of `line` as arguments; its output, or what it complained about.
    async fn run(&self, line: &str) -> anyhow::Result<String> {
        let mut command = Command::new("kubectl");
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", &self.home)
            .args(line.split_whitespace());
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        if !output.status.success() {
            bail!("kubectl {line}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}

fn has_kubectl() -> bool {
    Command::new("kubectl")
        .args(["version", "--client"])
        .output()
        .is_ok_and(|output| output.status.success())
}

async fn start(folder: &Path) -> anyhow::Result<(ControlPlane, Kubectl)> {
    write_rows(folder)?;
    // A claim's seed is relative to the folder of `flotilla sandbox up`; a test has no such folder.
    let seed = folder.join("data");
    let text = dataset("pairs", 3).replace("seed-from: data", &format!("seed-from: {}", seed.display()));
    std::fs::write(folder.join("pairs.yaml"), text)?;
    let dir = folder.join("plane");
    let plane = ControlPlane::start(Options::for_tests(&dir, &program::path("flotilla-worker")?)).await?;
    let kubectl = Kubectl {
        kubeconfig: plane.sandbox().kubeconfig_path(),
        home: folder.to_owned(),
    };
    Ok((plane, kubectl))
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_waits_reads_logs_and_deletes_with_everything_below() -> anyhow::Result<()> {
    if !has_kubectl() {
        println!("skipped: no kubectl on this machine");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (plane, kubectl) = start(folder.path()).await?;
    let file = folder.path().join("pairs.yaml");
    let apply = format!("apply -f {}", file.display());

    kubectl.run(&format!("{apply} --dry-run=server")).await?;
    assert!(kubectl.run("get dset").await?.is_empty(), "a dry run leaves nothing");
    kubectl.run(&apply).await?;
    kubectl
        .run("wait dset/pairs --for=condition=Ready --timeout=120s")
        .await?;
    let wide = kubectl.run("get dset -o wide").await?;
    let columns: Vec<&str> = wide.lines().nth(1).context("a row")?.split_whitespace().collect();
    assert_eq!(columns[..4], ["pairs", "Ready", "2", "3"], "{wide}");

    let logs = kubectl.run("logs -f pairs-prepare-1").await?;
    assert!(logs.contains("INFO"), "logs -f ends with the container: {logs}");
    assert!(kubectl.run("events --for=dataset/pairs").await?.contains("PodsCreated"));
    assert!(
        kubectl.run("describe dset pairs").await?.contains("Corrupt Image"),
        "kubectl spells the keys of maps out"
    );

    let finalizer = r#"patch dset pairs --type=merge -p {"metadata":{"finalizers":["example.dev/hold"]}}"#;
    kubectl.run(finalizer).await?;
    kubectl
        .run("delete dset pairs --cascade=foreground --wait=false")
        .await?;
    let held = kubectl
        .run("get dset pairs -o jsonpath={.metadata.deletionTimestamp}")
        .await?;
    assert!(!held.is_empty(), "a finalizer holds the object");
    kubectl
        .run(r#"patch dset pairs --type=json -p [{"op":"remove","path":"/metadata/finalizers/0"}]"#)
        .await?;
    kubectl.run("wait dset/pairs --for=delete --timeout=60s").await?;
    kubectl
        .run("wait pod/pairs-prepare-1 --for=delete --timeout=60s")
        .await?;
    plane.stop().await;
    Ok(())
}

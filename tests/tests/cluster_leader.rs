//! Two operators of the chart on a real API server: one leads, and what a deposed one would like to write never arrives.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context, ensure};
use flotilla_api::Dataset;
use flotilla_tests::{
    chart::{Chart, OPERATOR, start_operator},
    cluster::Cluster,
    eventually,
    program::Running,
    rbac::{Request, requests},
};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client, api::PostParams};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// What the issue promises; the lease itself runs out after 15 s.
const TAKEOVER: Duration = Duration::from_secs(20);
const NAMESPACE: &str = "default";

/// An installed chart whose operators are processes of this test.
struct Stage {
    cluster: Cluster,
    chart: Chart,
    objects: Vec<Value>,
    folder: TempDir,
}

impl Stage {
    async fn set() -> anyhow::Result<Self> {
        let cluster = Cluster::alone().await?;
        let chart = Chart::new("flotilla-system");
        // No Deployment pods: the operators of this test are the only ones.
        let values = ["replicas=0"];
        chart.helm(&cluster, "install", &values).await?;
        let objects = chart.render(&cluster, &values).await?;
        let folder = tempfile::tempdir()?;
        chart
            .operator_kubeconfig(&cluster, &folder.path().join("kubeconfig"))
            .await?;
        Ok(Self {
            cluster,
            chart,
            objects,
            folder,
        })
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.log"))
    }

    fn start(&self, name: &str) -> anyhow::Result<Running> {
        let kubeconfig = self.folder.path().join("kubeconfig");
        start_operator(
            &self.objects,
            &kubeconfig,
            (self.chart.namespace(), name),
            &self.log(name),
        )
    }

    async fn holder(&self, client: &Client) -> anyhow::Result<Option<String>> {
        let leases: Api<Lease> = Api::namespaced(client.clone(), self.chart.namespace());
        let lease = leases.get_opt(OPERATOR).await?;
        Ok(lease.and_then(|lease| lease.spec?.holder_identity))
    }

    /// Waits until the operator `name` holds the lease.
    async fn leads(&self, client: &Client, name: &str, limit: Duration) -> anyhow::Result<Duration> {
        let begun = std::time::Instant::now();
        let prefix = format!("{name}_");
        eventually(&format!("{name} leads"), limit, || async {
            Ok(self.holder(client).await?.filter(|holder| holder.starts_with(&prefix)))
        })
        .await?;
        Ok(begun.elapsed())
    }

    /// Waits until the operator `name` has listed everything and waits for its turn.
    async fn stands_by(&self, name: &str) -> anyhow::Result<()> {
        eventually(&format!("{name} is a standby"), Duration::from_secs(30), || async {
            Ok(std::fs::read_to_string(self.log(name))?
                .contains("waiting as a standby")
                .then_some(()))
        })
        .await
    }

    fn requests(&self) -> anyhow::Result<Vec<Request>> {
        let log = self.cluster.audit_log().context("the audit log")?;
        requests(&std::fs::read_to_string(log)?, &self.chart.user())
    }

    /// Waits until the operator `name` has made a pod.
    async fn makes_pods(&self, name: &str) -> anyhow::Result<()> {
        eventually(&format!("{name} makes pods"), Duration::from_secs(30), || async {
            let made = self
                .requests()?
                .iter()
                .any(|request| by(request, name) && makes_a_pod(request));
            Ok(made.then_some(()))
        })
        .await
    }
}

fn by(request: &Request, name: &str) -> bool {
    request.user_agent.contains(&format!("({name}_"))
}

fn makes_a_pod(request: &Request) -> bool {
    request.permission.resource == "pods" && request.code == 201
}

/// Makes a Dataset five times a second, so that a leader always has something to write.
fn demand(client: Client) -> JoinHandle<()> {
    let datasets: Api<Dataset> = Api::namespaced(client, NAMESPACE);
    tokio::spawn(async move {
        for number in 0_u32.. {
            let dataset = json!({
                "apiVersion": "flotilla.dev/v1alpha1", "kind": "Dataset", "metadata": {"name": format!("rows-{number}")},
                "spec": {
                    "source": {"uri": "pvc://data/rows.jsonl"},
                    "conversion": {"format": {"instruction": {}}},
                    "storage": {"claimName": "data"},
                },
            });
            if let Ok(dataset) = serde_json::from_value(dataset) {
                let _ = datasets.create(&PostParams::default(), &dataset).await;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_or_killed_leader_is_replaced_in_time_writes_nothing_more_and_no_pod_is_made_twice()
-> anyhow::Result<()> {
    let stage = Stage::set().await?;
    let client = stage.cluster.client().await?;
    let demand = demand(client.clone());
    let first = stage.start("first")?;
    stage.leads(&client, "first", Duration::from_secs(30)).await?;
    let second = stage.start("second")?;
    stage.stands_by("second").await?;
    stage.makes_pods("first").await?;

    first.signal(Signal::STOP)?;
    let frozen = stage.leads(&client, "second", TAKEOVER).await?;
    stage.makes_pods("second").await?;
    first.signal(Signal::CONT)?;
    let code = first.ended(Duration::from_secs(10)).await?;
    assert_eq!(code, Some(1), "a deposed leader ends, and says so with its exit code");
    ensure!(
        std::fs::read_to_string(stage.log("first"))?.contains("leadership lost"),
        "the deposed leader does not say why it ended"
    );

    let third = stage.start("third")?;
    stage.stands_by("third").await?;
    second.kill()?;
    let killed = stage.leads(&client, "third", TAKEOVER).await?;
    stage.makes_pods("third").await?;

    // A leader that is asked to stop lets go: the next one need not wait for the end of the lease.
    let fourth = stage.start("fourth")?;
    stage.stands_by("fourth").await?;
    third.terminate(Duration::from_secs(30))?;
    let released = stage.leads(&client, "fourth", Duration::from_secs(8)).await?;
    stage.makes_pods("fourth").await?;
    demand.abort();
    fourth.terminate(Duration::from_secs(30))?;
    println!("takeover: frozen {frozen:.1?}, killed {killed:.1?}, released {released:.1?}");

    let all = stage.requests()?;
    nothing_after_the_successor(&all, "first", "second")?;
    nothing_after_the_successor(&all, "second", "third")?;
    nothing_after_the_successor(&all, "third", "fourth")?;
    let mut made: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for request in all.iter().filter(|request| makes_a_pod(request)) {
        *made.entry((&request.namespace, &request.name)).or_default() += 1;
    }
    let twice: Vec<_> = made.iter().filter(|(_, times)| **times > 1).collect();
    ensure!(twice.is_empty(), "made more than once: {twice:?}");
    println!("{} pods, each made once", made.len());
    stage.cluster.stop()
}

/// Not even the Lease: after the successor's first successful write there is none of its predecessor's.
fn nothing_after_the_successor(all: &[Request], before: &str, after: &str) -> anyhow::Result<()> {
    let begun = all
        .iter()
        .filter(|request| by(request, after) && request.writes() && (200..300).contains(&request.code))
        .map(|request| request.received.as_str())
        .min()
        .with_context(|| format!("{after} wrote something"))?;
    let written = all.iter().filter(|request| by(request, before) && request.writes());
    ensure!(
        written.clone().count() > 0,
        "{before} never wrote: the test saw no leader"
    );
    let late: Vec<_> = written.filter(|request| request.received.as_str() > begun).collect();
    ensure!(
        late.is_empty(),
        "{before} wrote after {after} took over at {begun}: {late:#?}"
    );
    Ok(())
}

//! What the experiments run on: the control plane, the hollow nodes, the operator, and the objects that jobs refer to.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use flotilla_tests::{
    control_plane::ControlPlane,
    eventually,
    program::{self, Running},
};
use k8s_openapi::{
    api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim, ServiceAccount},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    arguments::Arguments,
    load, objects,
    process::{self, Memory},
    scrape::Scrape,
};

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(120);
/// Programs of the control plane whose processor time is told.
const PROGRAMS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// Everything that runs.
pub struct Stage {
    /// An administrator's client.
    pub client: Client,
    plane: ControlPlane,
    hollow: Running,
    operator: Option<Running>,
    operator_binary: PathBuf,
    operator_arguments: Vec<String>,
    metrics: String,
    http: reqwest::Client,
    dir: PathBuf,
    // Last, so that it goes after what writes into it has ended.
    _temporary: Option<TempDir>,
}

impl Stage {
    /// Starts all of it and waits until jobs can be applied.
    pub async fn start(arguments: &Arguments) -> anyhow::Result<Self> {
        let temporary = match &arguments.dir {
            Some(_) => None,
            None => Some(tempfile::tempdir().context("a temporary directory")?),
        };
        let dir = match (&arguments.dir, &temporary) {
            (Some(dir), _) => dir.clone(),
            (None, Some(temporary)) => temporary.path().to_owned(),
            (None, None) => std::env::temp_dir(),
        };
        eprintln!("starting the control plane in {}", dir.display());
        let plane = ControlPlane::start(&dir).await?;
        let client = plane.client().await?;
        define(&client).await?;
        eprintln!("registering {} hollow nodes", arguments.nodes);
        let hollow = hollow(&plane.kubeconfig(), &dir, arguments)?;
        let operator_binary = match &arguments.operator {
            Some(path) => path.clone(),
            None => program::path("flotilla-operator")?,
        };
        let port = free_port()?;
        let mut stage = Self {
            client,
            plane,
            hollow,
            operator: None,
            operator_binary,
            operator_arguments: operator_arguments(port, arguments),
            metrics: format!("http://127.0.0.1:{port}"),
            http: reqwest::Client::builder().no_proxy().build()?,
            dir,
            _temporary: temporary,
        };
        stage.furnish().await?;
        stage.wait_for_nodes(arguments.nodes).await?;
        stage.start_operator().await?;
        Ok(stage)
    }

    /// Starts the operator; returns the time until every kind was listed.
    pub async fn start_operator(&mut self) -> anyhow::Result<Duration> {
        let kubeconfig = self.plane.kubeconfig().display().to_string();
        let environment = [("KUBECONFIG", kubeconfig.as_str()), ("RUST_LOG", "warn")];
        let log = self.dir.join("operator.log");
        let begun = Instant::now();
        let operator = Running::start_binary(&self.operator_binary, &self.operator_arguments, &environment, &log);
        self.operator = Some(operator?);
        let url = format!("{}/readyz", self.metrics);
        while !self.answers(&url).await {
            self.check()?;
            anyhow::ensure!(
                begun.elapsed() < LIMIT,
                "the operator is not ready: see {}",
                log.display()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(begun.elapsed())
    }

    /// `kill -9` of the operator.
    pub fn kill_operator(&mut self) -> anyhow::Result<()> {
        self.operator.take().context("the operator runs")?.kill()
    }

    /// The operator's metrics now.
    pub async fn scrape(&self) -> anyhow::Result<Scrape> {
        let url = format!("{}/metrics", self.metrics);
        let answer = self.http.get(&url).send().await?.error_for_status()?;
        Ok(Scrape::parse(&answer.text().await?))
    }

    /// Memory of the operator.
    pub fn operator_memory(&self) -> anyhow::Result<Memory> {
        process::memory(self.operator.as_ref().context("the operator runs")?.pid())
    }

    /// Processor seconds by program, so far.
    pub fn processor_seconds(&self) -> anyhow::Result<Vec<(String, f64)>> {
        let mut seconds = Vec::new();
        for program in PROGRAMS {
            let pid = self.plane.pid(program).with_context(|| format!("{program} runs"))?;
            seconds.push((program.to_owned(), process::processor_seconds(pid)?));
        }
        let hollow = process::processor_seconds(self.hollow.pid())?;
        seconds.push(("hollow nodes".to_owned(), hollow));
        if let Some(operator) = &self.operator {
            seconds.push(("operator".to_owned(), process::processor_seconds(operator.pid())?));
        }
        Ok(seconds)
    }

    /// The API server's audit log.
    pub fn audit_log(&self) -> PathBuf {
        self.plane.audit_log()
    }

    /// An error that names what ended before its time.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.plane.check()?;
        let log = |name: &str| self.dir.join(name).display().to_string();
        let hollow = self.hollow.check();
        hollow.with_context(|| format!("hollow nodes: see {}", log("hollow.log")))?;
        let operator = self.operator.as_mut().map_or(Ok(()), Running::check);
        operator.with_context(|| format!("the operator: see {}", log("operator.log")))
    }

    /// Stops all of it.
    pub fn stop(mut self) -> anyhow::Result<()> {
        if let Some(operator) = self.operator.take() {
            operator.kill()?;
        }
        self.hollow.kill()?;
        self.plane.stop()
    }

    async fn answers(&self, url: &str) -> bool {
        let answer = self.http.get(url).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Namespaces, claims, a Dataset and a checkpoint, ready to be used.
    async fn furnish(&self) -> anyhow::Result<()> {
        for namespace in [objects::NAMESPACE, objects::BARE_NAMESPACE] {
            self.furnish_namespace(namespace).await?;
        }
        let (dataset, status) = objects::dataset();
        load::create_with_status::<flotilla_api::Dataset>(&self.client, dataset, status).await?;
        let (checkpoint, status) = objects::checkpoint();
        load::create_with_status::<flotilla_api::ModelCheckpoint>(&self.client, checkpoint, status).await
    }

    async fn furnish_namespace(&self, namespace: &str) -> anyhow::Result<()> {
        let params = PostParams::default();
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        namespaces.create(&params, &serde_json::from_value(object)?).await?;
        let (volume, claim) = objects::volume(namespace);
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        volumes.create(&params, &serde_json::from_value(volume)?).await?;
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        claims.create(&params, &serde_json::from_value(claim)?).await?;
        eventually("the claim is bound", LIMIT, async || {
            let claim = claims.get(objects::NAME).await?;
            let phase = claim.status.and_then(|status| status.phase);
            Ok((phase.as_deref() == Some("Bound")).then_some(()))
        })
        .await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        eventually("the default service account", LIMIT, async || {
            Ok(accounts.get_opt("default").await?.map(drop))
        })
        .await
    }

    async fn wait_for_nodes(&self, count: u32) -> anyhow::Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        eventually("every hollow node takes pods", LIMIT, async || {
            let list = nodes.list(&ListParams::default()).await?;
            let open = |node: &&Node| {
                let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
                taints.is_none_or(Vec::is_empty) && node.status.as_ref().is_some_and(|status| status.capacity.is_some())
            };
            let open = list.items.iter().filter(open).count();
            Ok((open >= usize::try_from(count)?).then_some(()))
        })
        .await
    }
}

/// Installs the definitions and waits until they are served.
async fn define(client: &Client) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for (_, definition) in flotilla_api::crd::all() {
        let name = definition.metadata.name.clone().context("a definition has a name")?;
        let params = PatchParams::apply("bench-operator").force();
        api.patch(&name, &params, &Patch::Apply(&definition)).await?;
        eventually(&format!("{name} is served"), LIMIT, async || {
            let status = serde_json::to_value(api.get(&name).await?.status)?;
            let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
            let served = |condition: &Value| condition["type"] == "Established" && condition["status"] == "True";
            Ok(conditions.iter().any(served).then_some(()))
        })
        .await?;
    }
    Ok(())
}

fn hollow(kubeconfig: &Path, dir: &Path, arguments: &Arguments) -> anyhow::Result<Running> {
    let (nodes, gpus) = (arguments.nodes.to_string(), arguments.gpus.to_string());
    let kubeconfig = kubeconfig.display().to_string();
    let flags = [
        "sandbox",
        "hollow",
        "--kubeconfig",
        &kubeconfig,
        "--nodes",
        &nodes,
        "--gpus",
        &gpus,
        "--prefix",
        "bench",
    ];
    let environment = [("RUST_LOG", "warn")];
    Running::start(
        "flotilla",
        &flags.map(str::to_owned),
        &environment,
        &dir.join("hollow.log"),
    )
}

fn operator_arguments(port: u16, arguments: &Arguments) -> Vec<String> {
    let listen = format!("127.0.0.1:{port}");
    let interval = arguments.progress_interval.to_string();
    let own = ["run", "--listen", &listen, "--progress-interval", &interval].map(str::to_owned);
    own.into_iter()
        .chain(arguments.operator_flags.iter().cloned())
        .collect()
}

fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?.port())
}

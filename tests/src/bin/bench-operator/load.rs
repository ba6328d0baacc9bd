//! Applying objects and counting pods.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use flotilla_api::TrainingJob;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::{
    NamespaceResourceScope,
    serde::{Serialize, de::DeserializeOwned},
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::{objects, stage::Stage};

/// Jobs that are applied at the same time.
const APPLIED_AT_ONCE: usize = 8;
/// Longest wait without a new pod.
const PATIENCE: Duration = Duration::from_secs(180);

/// Creates an object and sets its status.
pub async fn create_with_status<K>(client: &Client, object: Value, status: Value) -> anyhow::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned + Serialize,
{
    let api: Api<K> = Api::namespaced(client.clone(), objects::NAMESPACE);
    let object: K = serde_json::from_value(object)?;
    api.create(&PostParams::default(), &object).await?;
    let patch = json!({ "status": status });
    let (name, params) = (objects::NAME, PatchParams::default());
    api.patch_status(name, &params, &Patch::Merge(&patch)).await?;
    Ok(())
}

/// Creates the jobs `names`, each of `pods` pods.
pub async fn apply_jobs(client: &Client, names: impl Iterator<Item = String>, pods: u32) -> anyhow::Result<()> {
    let api: Api<TrainingJob> = Api::namespaced(client.clone(), objects::NAMESPACE);
    let writes = stream::iter(names).map(|name| {
        let api = api.clone();
        async move {
            let job: TrainingJob = serde_json::from_value(objects::job(&name, pods))?;
            let created = api.create(&PostParams::default(), &job).await;
            created.map(drop).with_context(|| format!("create TrainingJob {name}"))
        }
    });
    writes.buffer_unordered(APPLIED_AT_ONCE).try_collect().await
}

/// Number of pods in a namespace; asks for one and is told how many more there are.
pub async fn count_pods(client: &Client, namespace: &str) -> anyhow::Result<u64> {
    let path = format!("/api/v1/namespaces/{namespace}/pods?limit=1");
    let list: Value = client.request(http::Request::get(path).body(Vec::new())?).await?;
    let shown = list["items"].as_array().map_or(0, Vec::len);
    let more = list["metadata"]["remainingItemCount"].as_u64().unwrap_or(0);
    Ok(u64::try_from(shown)? + more)
}

/// Waits until the namespace has exactly `wanted` pods, looking every `pause`.
pub async fn wait_for_pods(stage: &mut Stage, namespace: &str, wanted: u64, pause: Duration) -> anyhow::Result<()> {
    let (mut known, mut changed) = (0, Instant::now());
    loop {
        let count = count_pods(&stage.client, namespace).await?;
        if count == wanted {
            return Ok(());
        }
        if count != known {
            (known, changed) = (count, Instant::now());
        }
        if changed.elapsed() > PATIENCE {
            stage.check()?;
            anyhow::bail!("{count} of {wanted} pods in {namespace}, and no change for {PATIENCE:?}");
        }
        tokio::time::sleep(pause).await;
    }
}

/// Waits until the operator says that this many jobs run.
pub async fn wait_for_running_jobs(stage: &mut Stage, wanted: u32) -> anyhow::Result<()> {
    let (mut known, mut changed) = (0.0, Instant::now());
    loop {
        let running = stage.scrape().await?.jobs_in("Running");
        if running >= f64::from(wanted) {
            return Ok(());
        }
        if running > known {
            (known, changed) = (running, Instant::now());
        }
        if changed.elapsed() > PATIENCE {
            stage.check()?;
            anyhow::bail!("{running} of {wanted} jobs run, and no change for {PATIENCE:?}");
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

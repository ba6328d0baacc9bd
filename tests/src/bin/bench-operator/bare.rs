//! The API server's own ceiling: the operator's pods, created by a client that does nothing else.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams},
};

use crate::{load, objects, stage::Stage};

/// Creates `count` pods like `model` with `in_flight` requests at a time, removes them, and returns pods per second.
pub async fn ceiling(stage: &mut Stage, model: &Pod, count: u32, in_flight: usize) -> anyhow::Result<f64> {
    let api: Api<Pod> = Api::namespaced(stage.client.clone(), objects::BARE_NAMESPACE);
    let params = PostParams {
        field_manager: Some("bench-operator".to_owned()),
        ..PostParams::default()
    };
    let begun = Instant::now();
    let (api_ref, params_ref) = (&api, &params);
    let writes = stream::iter(0..count).map(|index| async move {
        let pod = objects::bare_pod(model, &format!("bare-{index}"));
        let created = api_ref.create(params_ref, &pod).await;
        created.map(drop).context("create a bare pod")
    });
    let () = writes.buffer_unordered(in_flight).try_collect().await?;
    let rate = f64::from(count) / begun.elapsed().as_secs_f64();
    let now = DeleteParams::default().grace_period(0);
    api.delete_collection(&now, &ListParams::default()).await?;
    load::wait_for_pods(stage, objects::BARE_NAMESPACE, 0, Duration::from_millis(500)).await?;
    Ok(rate)
}

//! Writes the Nodes and Leases of a fleet.

use std::{net::Ipv4Addr, time::Duration};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1::Node},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::MissedTickBehavior;

use super::{FleetConfig, HollowError, node};

/// Field manager of Nodes and Leases.
const MANAGER: &str = "flotilla-hollow";

/// Creates every Node and Lease or brings it up to date.
pub async fn register_all(client: &Client, config: &FleetConfig, host: Ipv4Addr) -> Result<(), HollowError> {
    let writes = stream::iter(node::names(config)).map(|name| async move {
        let outcome = register(client, config, &name, host).await;
        outcome.map_err(|source| HollowError::Register { node: name, source })
    });
    let concurrency = usize::from(config.concurrency.get());
    writes.buffer_unordered(concurrency).try_collect().await
}

async fn register(client: &Client, config: &FleetConfig, name: &str, host: Ipv4Addr) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let params = PatchParams::apply(MANAGER).force();
    let written = nodes
        .patch(name, &params, &Patch::Apply(&node::node(config, name)))
        .await?;
    let now = Timestamp::now();
    let status = json!({ "status": node::status(config, name, host, now) });
    nodes
        .patch_status(name, &PatchParams::default(), &Patch::Strategic(&status))
        .await?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), node::LEASE_NAMESPACE);
    let lease = node::lease(name, written.metadata.uid, now);
    leases.patch(name, &params, &Patch::Apply(&lease)).await?;
    Ok(())
}

/// Renews all Leases for ever, spread evenly over the time between two renewals, one small write each.
pub async fn keep_alive(client: Client, config: FleetConfig, host: Ipv4Addr) {
    let pause = (config.renew / config.nodes.max(1)).max(Duration::from_millis(1));
    let mut ticks = tokio::time::interval(pause);
    // After a stall the missed renewals are not sent in one burst.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let turns = stream::unfold(ticks, |mut ticks| async {
        ticks.tick().await;
        Some(((), ticks))
    });
    let names: Vec<String> = node::names(&config).collect();
    turns
        .zip(stream::iter(names.iter().cycle()))
        .for_each_concurrent(usize::from(config.concurrency.get()), |((), name)| {
            beat(&client, &config, name, host)
        })
        .await;
}

async fn beat(client: &Client, config: &FleetConfig, name: &str, host: Ipv4Addr) {
    let leases: Api<Lease> = Api::namespaced(client.clone(), node::LEASE_NAMESPACE);
    let renewal = json!({"spec": {"renewTime": MicroTime(Timestamp::now())}});
    let outcome = leases
        .patch_metadata(name, &PatchParams::default(), &Patch::Merge(&renewal))
        .await;
    let outcome = match outcome {
        // The Lease goes with its Node: somebody deleted that.
        Err(kube::Error::Api(status)) if status.code == 404 => register(client, config, name, host).await,
        outcome => outcome.map(drop),
    };
    if let Err(error) = outcome {
        tracing::warn!(node = name, %error, "a hollow node's heartbeat failed");
    }
}

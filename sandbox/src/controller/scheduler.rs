//! Gives each pending pod the node with the fewest pods among those where it fits, and says why when there is none.

use std::{collections::HashMap, sync::Arc};

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    runtime::{reflector::Store, watcher},
};
use serde_json::json;
use tokio::task::JoinSet;

use super::{
    RESYNC, RETRY,
    fit::{self, Amounts},
    mirror::{Bell, mirror},
};
use crate::node::event::{EventRecorder, Severity, reference};

/// The scheduler that pods name by default; others are left to themselves.
const NAME: &str = "default-scheduler";

/// Watches pods and nodes; binds for ever.
pub async fn run(client: Client, events: EventRecorder) {
    let (bell, mut tasks) = (Bell::default(), JoinSet::new());
    let pods = mirror(
        Api::<Pod>::all(client.clone()),
        watcher::Config::default(),
        &bell,
        &mut tasks,
    );
    let nodes = mirror(
        Api::<Node>::all(client.clone()),
        watcher::Config::default(),
        &bell,
        &mut tasks,
    );
    let mut scheduler = Scheduler {
        client,
        events,
        pods,
        nodes,
        assumed: HashMap::new(),
    };
    loop {
        let pause = if scheduler.pass().await { RESYNC } else { RETRY };
        bell.wait(pause).await;
    }
}

struct Scheduler {
    client: Client,
    events: EventRecorder,
    pods: Store<Pod>,
    nodes: Store<Node>,
    /// Pods that were bound here and whose binding the watch has not shown yet: uid to node.
    assumed: HashMap<String, String>,
}

impl Scheduler {
    /// One look at everything. False when something failed and is to be tried again.
    async fn pass(&mut self) -> bool {
        let (pods, nodes) = (self.pods.state(), self.nodes.state());
        self.assumed.retain(|uid, _| {
            pods.iter()
                .any(|pod| pod.metadata.uid.as_ref() == Some(uid) && node_of(pod).is_none())
        });
        let mut pending: Vec<&Arc<Pod>> = pods.iter().filter(|pod| self.is_pending(pod)).collect();
        pending.sort_by_key(|pod| (pod.metadata.creation_timestamp.clone(), pod.metadata.name.clone()));
        let mut well = true;
        for pod in pending {
            let free = self.free(&pods, &nodes);
            well &= match choose(pod, &nodes, &free) {
                Ok(node) => self.bind(pod, node).await,
                Err(message) => self.report(pod, message).await,
            };
        }
        well
    }

    fn is_pending(&self, pod: &Pod) -> bool {
        let spec = pod.spec.as_ref();
        let ours = spec
            .and_then(|spec| spec.scheduler_name.as_deref())
            .is_none_or(|name| name.is_empty() || name == NAME);
        let gated = spec
            .and_then(|spec| spec.scheduling_gates.as_ref())
            .is_some_and(|gates| !gates.is_empty());
        let assumed = pod
            .metadata
            .uid
            .as_ref()
            .is_some_and(|uid| self.assumed.contains_key(uid));
        ours && !gated && !assumed && node_of(pod).is_none() && pod.metadata.deletion_timestamp.is_none()
    }

    /// Free resources and number of pods by node.
    fn free(&self, pods: &[Arc<Pod>], nodes: &[Arc<Node>]) -> HashMap<String, (Amounts, usize)> {
        let holder = |pod: &Pod| -> Option<String> {
            let assumed = pod.metadata.uid.as_ref().and_then(|uid| self.assumed.get(uid)).cloned();
            node_of(pod).map(str::to_owned).or(assumed)
        };
        let mut by_node: HashMap<String, Vec<&PodSpec>> = HashMap::new();
        for pod in pods.iter().filter(|pod| !is_terminal(pod)) {
            if let (Some(node), Some(spec)) = (holder(pod), &pod.spec) {
                by_node.entry(node).or_default().push(spec);
            }
        }
        nodes
            .iter()
            .map(|node| {
                let name = node.metadata.name.clone().unwrap_or_default();
                let specs = by_node.remove(&name).unwrap_or_default();
                let count = specs.len();
                (name, (fit::free(node, specs.into_iter()), count))
            })
            .collect()
    }

    async fn bind(&mut self, pod: &Pod, node: String) -> bool {
        let (Some(name), Some(namespace)) = (pod.metadata.name.as_deref(), pod.metadata.namespace.as_deref()) else {
            return true;
        };
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding",
            "metadata": {"name": name, "namespace": namespace, "uid": pod.metadata.uid},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node}
        });
        let params = PostParams::default();
        match api
            .create_subresource::<_, serde_json::Value>("binding", name, &params, &binding)
            .await
        {
            Ok(_) => {
                let text = format!("Successfully assigned {namespace}/{name} to {node}");
                self.events.record(reference(pod), Severity::Normal, "Scheduled", text);
                self.assumed.extend(pod.metadata.uid.clone().map(|uid| (uid, node)));
                true
            }
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => true,
            Err(error) => {
                tracing::warn!(pod = name, namespace, %error, "a pod was not bound");
                false
            }
        }
    }

    /// Says that no node fits, once for each message.
    async fn report(&self, pod: &Pod, message: String) -> bool {
        let conditions = pod
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_deref())
            .unwrap_or_default();
        let known = conditions
            .iter()
            .any(|c| c.type_ == "PodScheduled" && c.message.as_ref() == Some(&message));
        let (Some(name), Some(namespace)) = (pod.metadata.name.as_deref(), pod.metadata.namespace.as_deref()) else {
            return true;
        };
        if known {
            return true;
        }
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now());
        let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": message, "lastTransitionTime": now
        }]}});
        self.events
            .record(reference(pod), Severity::Warning, "FailedScheduling", message);
        match api
            .patch_status(name, &PatchParams::default(), &Patch::Strategic(&patch))
            .await
        {
            Ok(_) => true,
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => true,
            Err(error) => {
                tracing::warn!(pod = name, namespace, %error, "an unschedulable pod was not marked");
                false
            }
        }
    }
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

fn is_terminal(pod: &Pod) -> bool {
    matches!(
        pod.status.as_ref().and_then(|status| status.phase.as_deref()),
        Some("Succeeded" | "Failed")
    )
}

/// The node with the fewest pods among those where `pod` fits, or the scheduler's message.
fn choose(pod: &Pod, nodes: &[Arc<Node>], free: &HashMap<String, (Amounts, usize)>) -> Result<String, String> {
    let mut reasons: std::collections::BTreeMap<String, usize> = std::collections::BTreeMap::new();
    let mut best: Option<(usize, &str)> = None;
    for node in nodes {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let Some((amounts, count)) = free.get(name) else {
            continue;
        };
        let obstacles = fit::obstacles(pod, node, amounts);
        if obstacles.is_empty() {
            best = Some(best.map_or((*count, name), |best| best.min((*count, name))));
        }
        for obstacle in obstacles {
            *reasons.entry(obstacle).or_default() += 1;
        }
    }
    if let Some((_, name)) = best {
        return Ok(name.to_owned());
    }
    if nodes.is_empty() {
        return Err("no nodes available to schedule pods".to_owned());
    }
    let reasons: Vec<String> = reasons
        .into_iter()
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    Err(format!(
        "0/{} nodes are available: {}.",
        nodes.len(),
        reasons.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, gpus: &str) -> Arc<Node> {
        let node = json!({
            "metadata": {"name": name}, "status": {"allocatable": {"pods": "10", "nvidia.com/gpu": gpus}}
        });
        Arc::new(serde_json::from_value(node).unwrap())
    }

    fn pod(gpus: &str) -> Pod {
        let spec = json!({"spec": {"containers": [{"name": "c", "resources": {"limits": {"nvidia.com/gpu": gpus}}}]}});
        serde_json::from_value(spec).unwrap()
    }

    fn free(nodes: &[Arc<Node>], counts: &[usize]) -> HashMap<String, (Amounts, usize)> {
        let entry = |(node, count): (&Arc<Node>, &usize)| {
            (
                node.metadata.name.clone().unwrap(),
                (fit::free(node, std::iter::empty()), *count),
            )
        };
        nodes.iter().zip(counts).map(entry).collect()
    }

    #[test]
    fn the_emptiest_node_that_fits_is_chosen() {
        let nodes = [node("a", "1"), node("b", "1"), node("c", "0")];
        assert_eq!(choose(&pod("1"), &nodes, &free(&nodes, &[3, 2, 0])), Ok("b".to_owned()));
    }

    #[test]
    fn the_message_counts_the_reasons() {
        let nodes = [node("a", "1"), node("b", "1")];
        assert_eq!(
            choose(&pod("2"), &nodes, &free(&nodes, &[0, 0])),
            Err("0/2 nodes are available: 2 Insufficient nvidia.com/gpu.".to_owned())
        );
        assert_eq!(
            choose(&pod("2"), &[], &HashMap::new()),
            Err("no nodes available to schedule pods".to_owned())
        );
    }
}

//! Pods, as far as the API server and the controllers go: no check needs a node.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::conformance::{
    check::checks,
    ground::{Ground, PatchKind, pod},
};

checks![
    a_pod_gets_its_defaults,
    a_pod_is_of_a_class_of_service,
    a_pod_needs_a_container,
    containers_of_a_pod_are_valid,
    a_volume_that_is_mounted_has_to_be_there,
    a_pod_changes_its_images_and_little_else,
    a_binding_gives_a_pod_its_node,
    a_pod_is_bound_once,
    a_pod_without_a_node_goes_at_once,
    a_pod_on_a_node_ends_gracefully,
    a_grace_period_can_be_shortened,
    a_pod_that_ended_goes_at_once,
    an_eviction_deletes_a_pod,
    an_eviction_of_nothing_is_not_found,
    an_eviction_obeys_a_budget,
    a_pod_runs_as_the_default_account,
    a_pod_mounts_its_accounts_token_unless_told_not_to differs "accounts have no tokens, and a pod of the sandbox gets no access to its API",
    a_pod_tolerates_lost_nodes_for_a_while,
    a_pod_that_fits_nowhere_says_so,
    a_limit_is_a_request_too,
    a_log_of_no_container_is_refused,
    a_restricted_namespace_refuses_a_careless_pod differs "no PodSecurity: a pod is a process of whoever runs the sandbox",
];

/// A pod that the scheduler leaves alone, made.
async fn gated(at: &Ground, name: &str) -> anyhow::Result<Value> {
    at.takes_pods().await?;
    let mut gated = pod(name);
    gated["spec"]["schedulingGates"] = json!([{"name": "example.dev/wait"}]);
    at.post("pods", &gated).await?.created()
}

/// A pod on a node that is not there, made.
async fn bound(at: &Ground, name: &str) -> anyhow::Result<Value> {
    at.takes_pods().await?;
    let mut bound = pod(name);
    bound["spec"]["nodeName"] = json!("nowhere");
    at.post("pods", &bound).await?.created()
}

async fn a_pod_gets_its_defaults(at: &Ground) -> anyhow::Result<()> {
    let made = gated(at, "a").await?;
    let (spec, container) = (&made["spec"], &made["spec"]["containers"][0]);
    ensure!(spec["restartPolicy"] == "Always" && spec["dnsPolicy"] == "ClusterFirst");
    ensure!(spec["terminationGracePeriodSeconds"] == 30 && spec["securityContext"] == json!({}));
    ensure!(spec["schedulerName"] == "default-scheduler" && spec["enableServiceLinks"] == true);
    ensure!(spec["priority"] == 0 && spec["preemptionPolicy"] == "PreemptLowerPriority");
    ensure!(container["imagePullPolicy"] == "IfNotPresent" && container["resources"] == json!({}));
    ensure!(container["terminationMessagePath"] == "/dev/termination-log");
    ensure!(container["terminationMessagePolicy"] == "File");
    ensure!(made["status"]["phase"] == "Pending" && made["metadata"]["generation"] == 1);
    Ok(())
}

async fn a_pod_is_of_a_class_of_service(at: &Ground) -> anyhow::Result<()> {
    ensure!(gated(at, "a").await?["status"]["qosClass"] == "BestEffort");
    let mut sized = pod("b");
    sized["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "100m"}});
    ensure!(at.post("pods", &sized).await?.created()?["status"]["qosClass"] == "Burstable");
    let mut sized = pod("c");
    sized["spec"]["containers"][0]["resources"] = json!({"limits": {"cpu": "100m", "memory": "1Mi"}});
    ensure!(at.post("pods", &sized).await?.created()?["status"]["qosClass"] == "Guaranteed");
    Ok(())
}

async fn a_pod_needs_a_container(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut empty = pod("a");
    empty["spec"]["containers"] = json!([]);
    at.post("pods", &empty)
        .await?
        .refused(422, "Invalid")?
        .says("Pod \"a\" is invalid: spec.containers: Required value")?
        .cause("spec.containers", "FieldValueRequired", "Required value")?;
    Ok(())
}

async fn containers_of_a_pod_are_valid(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let with = |container: Value| {
        let mut pod = pod("a");
        pod["spec"]["containers"] = json!([container]);
        pod
    };
    at.post("pods", &with(json!({"name": "c"})))
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.containers[0].image: Required value")?;
    at.post("pods", &with(json!({"name": "C_", "image": "i"})))
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.containers[0].name: Invalid value: \"C_\": a lowercase RFC 1123 label must consist of")?;
    at.post(
        "pods",
        &with(json!({"name": "c", "image": "i", "imagePullPolicy": "Some"})),
    )
    .await?
    .refused(422, "Invalid")?
    .mentions(
        "spec.containers[0].imagePullPolicy: Unsupported value: \"Some\": supported values: \"Always\", \
             \"IfNotPresent\", \"Never\"",
    )?;
    let mut two = pod("a");
    two["spec"]["containers"] = json!([{"name": "c", "image": "i"}, {"name": "c", "image": "i"}]);
    at.post("pods", &two)
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.containers[1].name: Duplicate value: \"c\"")?;
    let over = json!({"name": "c", "image": "i", "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}});
    at.post("pods", &with(over)).await?.refused(422, "Invalid")?.mentions(
        "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
    )?;
    let mut restarts = pod("a");
    restarts["spec"]["restartPolicy"] = json!("Sometimes");
    at.post("pods", &restarts).await?.refused(422, "Invalid")?.mentions(
        "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"OnFailure\", \"Never\"",
    )?;
    Ok(())
}

async fn a_volume_that_is_mounted_has_to_be_there(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut mounts = pod("a");
    mounts["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
    at.post("pods", &mounts)
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.containers[0].volumeMounts[0].name: Not found: \"v\"")?;
    Ok(())
}

async fn a_pod_changes_its_images_and_little_else(at: &Ground) -> anyhow::Result<()> {
    gated(at, "a").await?;
    let image = json!([{"op": "replace", "path": "/spec/containers/0/image", "value": "other:1"}]);
    at.patch(PatchKind::Json, "pods/a", &image).await?.ok()?;
    at.merge("pods/a", &json!({"spec": {"activeDeadlineSeconds": 5}}))
        .await?
        .ok()?;
    at.merge("pods/a", &json!({"spec": {"hostNetwork": true}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`")?;
    Ok(())
}

fn binding(node: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "a"}, "target": {"kind": "Node", "name": node}})
}

async fn unscheduled(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut own = pod("a");
    // No scheduler of this name runs.
    own["spec"]["schedulerName"] = json!("none");
    at.post("pods", &own).await?.created()?;
    Ok(())
}

async fn a_binding_gives_a_pod_its_node(at: &Ground) -> anyhow::Result<()> {
    unscheduled(at).await?;
    let done = at.post("pods/a/binding", &binding("nowhere")).await?.created()?;
    ensure!(done["kind"] == "Status" && done["status"] == "Success" && done["code"] == 201);
    let after = at.get("pods/a").await?.ok()?;
    ensure!(after["spec"]["nodeName"] == "nowhere");
    let conditions = after["status"]["conditions"].as_array().context("conditions")?;
    ensure!(
        conditions
            .iter()
            .any(|found| found["type"] == "PodScheduled" && found["status"] == "True")
    );
    Ok(())
}

async fn a_pod_is_bound_once(at: &Ground) -> anyhow::Result<()> {
    unscheduled(at).await?;
    at.post("pods/a/binding", &binding("nowhere")).await?.created()?;
    at.post("pods/a/binding", &binding("elsewhere"))
        .await?
        .refused(409, "Conflict")?
        .says("Operation cannot be fulfilled on pods/binding \"a\": pod a is already assigned to node \"nowhere\"")?;
    Ok(())
}

async fn a_pod_without_a_node_goes_at_once(at: &Ground) -> anyhow::Result<()> {
    gated(at, "a").await?;
    let last = at.delete("pods/a").await?.ok()?;
    ensure!(last["kind"] == "Pod" && at.get("pods/a").await?.code == 404);
    Ok(())
}

async fn a_pod_on_a_node_ends_gracefully(at: &Ground) -> anyhow::Result<()> {
    bound(at, "a").await?;
    let marked = at.delete("pods/a").await?.ok()?;
    ensure!(
        marked["metadata"]["deletionGracePeriodSeconds"] == 30 && marked["metadata"]["deletionTimestamp"].is_string()
    );
    ensure!(at.get("pods/a").await?.code == 200);
    at.delete_with("pods/a", &json!({"gracePeriodSeconds": 0}))
        .await?
        .ok()?;
    ensure!(at.get("pods/a").await?.code == 404);
    Ok(())
}

async fn a_grace_period_can_be_shortened(at: &Ground) -> anyhow::Result<()> {
    bound(at, "a").await?;
    at.delete("pods/a").await?.ok()?;
    let shorter = at.delete("pods/a?gracePeriodSeconds=5").await?.ok()?;
    ensure!(shorter["metadata"]["deletionGracePeriodSeconds"] == 5);
    let longer = at.delete("pods/a?gracePeriodSeconds=60").await?.ok()?;
    ensure!(longer["metadata"]["deletionGracePeriodSeconds"] == 5);
    at.delete("pods/a?gracePeriodSeconds=0").await?.ok()?;
    Ok(())
}

async fn a_pod_that_ended_goes_at_once(at: &Ground) -> anyhow::Result<()> {
    bound(at, "a").await?;
    at.merge("pods/a/status", &json!({"status": {"phase": "Succeeded"}}))
        .await?
        .ok()?;
    at.delete("pods/a").await?.ok()?;
    ensure!(at.get("pods/a").await?.code == 404);
    Ok(())
}

fn eviction() -> Value {
    json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "a"}})
}

async fn an_eviction_deletes_a_pod(at: &Ground) -> anyhow::Result<()> {
    bound(at, "a").await?;
    let done = at.post("pods/a/eviction", &eviction()).await?.created()?;
    ensure!(done["kind"] == "Status" && done["status"] == "Success");
    let marked = at.get("pods/a").await?.ok()?;
    ensure!(marked["metadata"]["deletionGracePeriodSeconds"] == 30);
    at.delete("pods/a?gracePeriodSeconds=0").await?.ok()?;
    Ok(())
}

async fn an_eviction_of_nothing_is_not_found(at: &Ground) -> anyhow::Result<()> {
    at.post("pods/a/eviction", &eviction())
        .await?
        .refused(404, "NotFound")?
        .says("pods \"a\" not found")?;
    Ok(())
}

async fn an_eviction_obeys_a_budget(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut labelled = pod("a");
    labelled["metadata"]["labels"] = json!({"app": "a"});
    labelled["spec"]["nodeName"] = json!("nowhere");
    at.post("pods", &labelled).await?.created()?;
    at.merge(
        "pods/a/status",
        &json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}),
    )
    .await?
    .ok()?;
    let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "b"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "a"}}}});
    at.post("poddisruptionbudgets", &budget).await?.created()?;
    at.until("poddisruptionbudgets/b", |budget| {
        budget["status"]["currentHealthy"] == 1
    })
    .await?;
    at.post("pods/a/eviction", &eviction())
        .await?
        .refused(429, "TooManyRequests")?
        .mentions("Cannot evict pod as it would violate the pod's disruption budget.")?;
    at.delete("pods/a?gracePeriodSeconds=0").await?.ok()?;
    Ok(())
}

async fn a_pod_runs_as_the_default_account(at: &Ground) -> anyhow::Result<()> {
    let made = gated(at, "a").await?;
    ensure!(made["spec"]["serviceAccountName"] == "default" && made["spec"]["serviceAccount"] == "default");
    let mut other = pod("b");
    other["spec"]["serviceAccountName"] = json!("nobody");
    at.post("pods", &other)
        .await?
        .refused(403, "Forbidden")?
        .says(&format!(
            "pods \"b\" is forbidden: error looking up service account {}/nobody: serviceaccount \"nobody\" not found",
            at.namespace
        ))?;
    Ok(())
}

async fn a_pod_mounts_its_accounts_token_unless_told_not_to(at: &Ground) -> anyhow::Result<()> {
    let made = gated(at, "a").await?;
    let mount = &made["spec"]["containers"][0]["volumeMounts"][0];
    ensure!(mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount" && mount["readOnly"] == true);
    ensure!(made["spec"]["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"]["path"] == "token");
    let mut without = pod("b");
    without["spec"]["automountServiceAccountToken"] = json!(false);
    let made = at.post("pods", &without).await?.created()?;
    ensure!(made["spec"]["volumes"].is_null() && made["spec"]["containers"][0]["volumeMounts"].is_null());
    Ok(())
}

async fn a_pod_tolerates_lost_nodes_for_a_while(at: &Ground) -> anyhow::Result<()> {
    let made = gated(at, "a").await?;
    let toleration =
        |key: &str| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300});
    ensure!(
        made["spec"]["tolerations"]
            == json!([
                toleration("node.kubernetes.io/not-ready"),
                toleration("node.kubernetes.io/unreachable")
            ])
    );
    Ok(())
}

async fn a_pod_that_fits_nowhere_says_so(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut picky = pod("a");
    picky["spec"]["nodeSelector"] = json!({"example.dev/none": at.namespace});
    at.post("pods", &picky).await?.created()?;
    let pending = at
        .until("pods/a", |pod| {
            pod["status"]["conditions"][0]["reason"] == "Unschedulable"
        })
        .await?;
    let condition = &pending["status"]["conditions"][0];
    ensure!(condition["type"] == "PodScheduled" && condition["status"] == "False");
    Ok(())
}

async fn a_limit_is_a_request_too(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let mut sized = pod("a");
    sized["spec"]["schedulingGates"] = json!([{"name": "example.dev/wait"}]);
    sized["spec"]["containers"][0]["resources"] = json!({"limits": {"nvidia.com/gpu": 1, "memory": "1Gi"}});
    let made = at.post("pods", &sized).await?.created()?;
    let resources = &made["spec"]["containers"][0]["resources"];
    ensure!(
        resources["requests"] == json!({"nvidia.com/gpu": "1", "memory": "1Gi"}),
        "{resources}"
    );
    ensure!(resources["limits"] == resources["requests"]);
    let mut half = pod("b");
    half["spec"]["containers"][0]["resources"] = json!({"requests": {"nvidia.com/gpu": 1}});
    at.post("pods", &half).await?.refused(422, "Invalid")?.mentions(
        "spec.containers[0].resources.limits: Required value: Limit must be set for non overcommitable resources",
    )?;
    Ok(())
}

async fn a_log_of_no_container_is_refused(at: &Ground) -> anyhow::Result<()> {
    gated(at, "a").await?;
    at.get("pods/a/log?container=other")
        .await?
        .refused(400, "BadRequest")?
        .says("container other is not valid for pod a")?;
    at.get("pods/none/log")
        .await?
        .refused(404, "NotFound")?
        .says("pods \"none\" not found")?;
    Ok(())
}

async fn a_restricted_namespace_refuses_a_careless_pod(at: &Ground) -> anyhow::Result<()> {
    at.takes_pods().await?;
    let label = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    at.merge(&format!("namespaces/{}", at.namespace), &label).await?.ok()?;
    at.post("pods", &pod("a")).await?.refused(403, "Forbidden")?.mentions(
        "pods \"a\" is forbidden: violates PodSecurity \"restricted:latest\": allowPrivilegeEscalation != false",
    )?;
    let mut careful = pod("b");
    careful["spec"]["securityContext"] = json!({"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}});
    careful["spec"]["containers"][0]["securityContext"] =
        json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
    at.post("pods", &careful).await?.created()?;
    Ok(())
}

//! What the built-in kinds do beyond their schema: Secrets, ConfigMaps, Leases, Events, Services, accounts, reviews.

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::conformance::{
    check::checks,
    ground::{Ground, config_map},
};

checks![
    plain_text_of_a_secret_is_stored_encoded,
    a_secret_keeps_its_type,
    data_of_a_secret_has_to_be_encoded,
    an_immutable_config_map_does_not_change,
    a_key_of_a_config_map_has_a_shape,
    a_config_map_has_a_size,
    a_lease_keeps_microseconds,
    a_lease_has_a_sane_duration,
    an_event_is_seen_by_both_apis,
    an_event_names_something_in_its_namespace,
    a_service_gets_an_address,
    a_headless_service_has_none,
    a_service_needs_ports,
    a_service_account_gives_tokens differs "the sandbox has one token, which may do everything; accounts have none",
    a_role_binding_keeps_its_role,
    a_claim_cannot_grow_before_it_is_bound,
    a_budget_has_one_limit,
    an_administrator_may_do_everything,
    who_asks_is_told,
];

async fn plain_text_of_a_secret_is_stored_encoded(at: &Ground) -> anyhow::Result<()> {
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"},
        "data": {"k": "b2xk", "l": "bA=="}, "stringData": {"k": "new"}});
    let made = at.post("secrets", &secret).await?.created()?;
    ensure!(made["data"] == json!({"k": "bmV3", "l": "bA=="}) && made["stringData"].is_null());
    ensure!(made["type"] == "Opaque");
    Ok(())
}

async fn a_secret_keeps_its_type(at: &Ground) -> anyhow::Result<()> {
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}});
    at.post("secrets", &secret).await?.created()?;
    at.merge("secrets/a", &json!({"type": "example.dev/x"}))
        .await?
        .refused(422, "Invalid")?
        .mentions("type: Invalid value: \"example.dev/x\": field is immutable")?;
    let tls = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "b"}, "type": "kubernetes.io/tls"});
    at.post("secrets", &tls)
        .await?
        .refused(422, "Invalid")?
        .mentions("data[tls.crt]: Required value")?;
    Ok(())
}

async fn data_of_a_secret_has_to_be_encoded(at: &Ground) -> anyhow::Result<()> {
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}, "data": {"k": "plain text"}});
    at.post("secrets", &secret)
        .await?
        .refused(400, "BadRequest")?
        .mentions("Secret in version \"v1\" cannot be handled as a Secret: illegal base64 data at input byte 5")?;
    Ok(())
}

async fn an_immutable_config_map_does_not_change(at: &Ground) -> anyhow::Result<()> {
    let mut map = config_map("a", &json!({"k": "1"}));
    map["immutable"] = json!(true);
    at.post("configmaps", &map).await?.created()?;
    at.merge("configmaps/a", &json!({"data": {"k": "2"}}))
        .await?
        .refused(422, "Invalid")?
        .says("ConfigMap \"a\" is invalid: data: Forbidden: field is immutable when `immutable` is set")?;
    at.merge("configmaps/a", &json!({"immutable": false}))
        .await?
        .refused(422, "Invalid")?
        .says("ConfigMap \"a\" is invalid: immutable: Forbidden: field is immutable when `immutable` is set")?;
    at.merge("configmaps/a", &json!({"metadata": {"labels": {"x": "y"}}}))
        .await?
        .ok()?;
    Ok(())
}

async fn a_key_of_a_config_map_has_a_shape(at: &Ground) -> anyhow::Result<()> {
    at.post("configmaps", &config_map("a", &json!({"a b": "1"})))
        .await?
        .refused(422, "Invalid")?
        .mentions("data[a b]: Invalid value: \"a b\": a valid config key must consist of alphanumeric characters, '-', '_' or '.'")?;
    let mut map = config_map("a", &json!({"k": "1"}));
    map["binaryData"] = json!({"k": "MQ=="});
    at.post("configmaps", &map)
        .await?
        .refused(422, "Invalid")?
        .mentions("data[k]: Invalid value: \"k\": duplicate of key present in binaryData")?;
    Ok(())
}

async fn a_config_map_has_a_size(at: &Ground) -> anyhow::Result<()> {
    at.post("configmaps", &config_map("a", &json!({"k": "x".repeat(1 << 20)})))
        .await?
        .created()?;
    at.post("configmaps", &config_map("b", &json!({"k": "x".repeat((1 << 20) + 1)})))
        .await?
        .refused(422, "Invalid")?
        .mentions("Too long: may not be more than 1048576 bytes")?;
    // Just over the limit of a request: of one far larger a server may close the connection before its client has sent it.
    at.post("configmaps", &config_map("c", &json!({"k": "x".repeat(3 << 20)})))
        .await?
        .refused(413, "RequestEntityTooLarge")?;
    Ok(())
}

fn lease(spec: &Value) -> Value {
    json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "a"}, "spec": spec})
}

async fn a_lease_keeps_microseconds(at: &Ground) -> anyhow::Result<()> {
    let spec = json!({"holderIdentity": "me", "leaseDurationSeconds": 15, "leaseTransitions": 1,
        "renewTime": "2026-01-02T03:04:05.678901Z", "acquireTime": "2026-01-02T03:04:05.000000Z"});
    let made = at.post("leases", &lease(&spec)).await?.created()?;
    ensure!(made["spec"]["renewTime"] == "2026-01-02T03:04:05.678901Z");
    ensure!(made["spec"]["acquireTime"] == "2026-01-02T03:04:05.000000Z");
    let mut coarse = lease(&json!({"renewTime": "2026-01-02T03:04:05Z"}));
    coarse["metadata"]["name"] = json!("b");
    at.post("leases", &coarse)
        .await?
        .refused(400, "BadRequest")?
        .mentions("Lease in version \"v1\" cannot be handled as a Lease: parsing time \"2026-01-02T03:04:05Z\"")?;
    Ok(())
}

async fn a_lease_has_a_sane_duration(at: &Ground) -> anyhow::Result<()> {
    at.post(
        "leases",
        &lease(&json!({"leaseDurationSeconds": 0, "leaseTransitions": -1})),
    )
    .await?
    .refused(422, "Invalid")?
    .mentions("spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0")?
    .mentions("spec.leaseTransitions: Invalid value: -1: must be greater than or equal to 0")?;
    Ok(())
}

async fn an_event_is_seen_by_both_apis(at: &Ground) -> anyhow::Result<()> {
    let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "a"}, "type": "Normal",
        "note": "a note", "reason": "Checked", "action": "Check", "eventTime": "2026-01-02T03:04:05.678901Z",
        "reportingController": "flotilla.dev/conformance", "reportingInstance": "one",
        "regarding": {"apiVersion": "v1", "kind": "ConfigMap", "name": "m", "namespace": at.namespace}});
    let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events", at.namespace);
    at.post(&path, &event).await?.created()?;
    let core = at
        .get("events?fieldSelector=involvedObject.name%3Dm,reason%3DChecked")
        .await?
        .ok()?;
    let seen = &core["items"][0];
    ensure!(seen["message"] == "a note" && seen["involvedObject"]["kind"] == "ConfigMap");
    ensure!(seen["reportingComponent"] == "flotilla.dev/conformance" && seen["reportingInstance"] == "one");
    ensure!(seen["eventTime"] == "2026-01-02T03:04:05.678901Z");
    Ok(())
}

async fn an_event_names_something_in_its_namespace(at: &Ground) -> anyhow::Result<()> {
    let event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "a"}, "type": "Normal",
        "message": "x", "reason": "Checked", "involvedObject": {"kind": "Pod", "name": "p", "namespace": "elsewhere"}});
    at.post("events", &event)
        .await?
        .refused(422, "Invalid")?
        .mentions("involvedObject.namespace: Invalid value: \"elsewhere\": does not match event.namespace")?;
    Ok(())
}

fn service(spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": spec})
}

async fn a_service_gets_an_address(at: &Ground) -> anyhow::Result<()> {
    at.post("services", &service(&json!({"ports": [{"port": 80}]})))
        .await?
        .created()?;
    let made = at
        .until("services/a", |made| made["spec"]["clusterIP"].is_string())
        .await?;
    ensure!(made["spec"]["clusterIPs"][0] == made["spec"]["clusterIP"] && made["spec"]["type"] == "ClusterIP");
    ensure!(made["spec"]["sessionAffinity"] == "None" && made["spec"]["internalTrafficPolicy"] == "Cluster");
    ensure!(made["spec"]["ports"] == json!([{"port": 80, "protocol": "TCP", "targetPort": 80}]));
    at.merge("services/a", &json!({"spec": {"clusterIP": "10.0.0.254"}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.clusterIPs[0]: Invalid value: [\"10.0.0.254\"]: may not change once set")?;
    Ok(())
}

async fn a_headless_service_has_none(at: &Ground) -> anyhow::Result<()> {
    let spec = json!({"clusterIP": "None", "selector": {"app": "a"}, "ports": [{"port": 80, "targetPort": "http"}]});
    let made = at.post("services", &service(&spec)).await?.created()?;
    ensure!(made["spec"]["clusterIP"] == "None" && made["spec"]["clusterIPs"] == json!(["None"]));
    Ok(())
}

async fn a_service_needs_ports(at: &Ground) -> anyhow::Result<()> {
    at.post("services", &service(&json!({"selector": {"app": "a"}})))
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.ports: Required value")?;
    let two = json!({"ports": [{"port": 80}, {"port": 81}]});
    at.post("services", &service(&two))
        .await?
        .refused(422, "Invalid")?
        .mentions("spec.ports[0].name: Required value")?;
    Ok(())
}

async fn a_service_account_gives_tokens(at: &Ground) -> anyhow::Result<()> {
    at.until("serviceaccounts/default", |_| true).await?;
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"audiences": [], "expirationSeconds": 600}});
    let made = at.post("serviceaccounts/default/token", &request).await?.created()?;
    let token = made["status"]["token"].as_str().context("a token")?;
    ensure!(token.split('.').count() == 3 && made["status"]["expirationTimestamp"].is_string());
    Ok(())
}

async fn a_role_binding_keeps_its_role(at: &Ground) -> anyhow::Result<()> {
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "a"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"},
        "subjects": [{"kind": "ServiceAccount", "name": "default"}]});
    at.post("rolebindings", &binding).await?.created()?;
    at.merge("rolebindings/a", &json!({"roleRef": {"name": "other"}}))
        .await?
        .refused(422, "Invalid")?
        .mentions("roleRef: Invalid value: ")?
        .mentions("field is immutable")?;
    Ok(())
}

async fn a_claim_cannot_grow_before_it_is_bound(at: &Ground) -> anyhow::Result<()> {
    let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "a"}, "spec": {
        "accessModes": ["ReadWriteOnce"], "storageClassName": "none", "resources": {"requests": {"storage": "1Gi"}}}});
    let made = at.post("persistentvolumeclaims", &claim).await?.created()?;
    ensure!(made["status"]["phase"] == "Pending" && made["spec"]["volumeMode"] == "Filesystem");
    at.merge(
        "persistentvolumeclaims/a",
        &json!({"spec": {"accessModes": ["ReadWriteMany"]}}),
    )
    .await?
    .refused(422, "Invalid")?
    .mentions("spec: Forbidden: spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims")?;
    Ok(())
}

async fn a_budget_has_one_limit(at: &Ground) -> anyhow::Result<()> {
    let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "a"},
        "spec": {"minAvailable": 1, "maxUnavailable": 1, "selector": {"matchLabels": {"app": "a"}}}});
    at.post("poddisruptionbudgets", &budget)
        .await?
        .refused(422, "Invalid")?
        .mentions("minAvailable and maxUnavailable cannot be both set")?;
    Ok(())
}

async fn an_administrator_may_do_everything(at: &Ground) -> anyhow::Result<()> {
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {"verb": "delete", "resource": "nodes"}}});
    let answer = at
        .post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review)
        .await?
        .created()?;
    ensure!(answer["status"]["allowed"] == true);
    Ok(())
}

async fn who_asks_is_told(at: &Ground) -> anyhow::Result<()> {
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let answer = at
        .post("/apis/authentication.k8s.io/v1/selfsubjectreviews", &review)
        .await?
        .created()?;
    ensure!(answer["status"]["userInfo"]["username"].is_string());
    let groups = answer["status"]["userInfo"]["groups"].as_array().context("groups")?;
    ensure!(groups.contains(&json!("system:authenticated")) && groups.contains(&json!("system:masters")));
    Ok(())
}

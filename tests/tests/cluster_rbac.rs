//! The chart's roles are as small as the operator's calls: what a whole life of every kind asked for is exactly what they
//! grant, and the API server's authorizer refuses some of it as soon as any one verb is taken away.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context, ensure};
use flotilla_api::{Dataset, ModelCheckpoint, ModelDeployment, TrainingJob, names::label};
use flotilla_tests::{
    chart::{Chart, OPERATOR, start_operator},
    cluster::{Cluster, TestNamespace},
    eventually,
    kubelet_by_hand::{DIGEST, Kubelet},
    rbac::{BoundRole, Difference, Permission, Request, granted, permissions, requests, roles_of, without},
};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
        core::v1::{ConfigMap, Pod, Secret, Service},
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    },
};
use kube::{
    Api, Client, Resource,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn the_roles_grant_what_the_stories_use_and_not_one_verb_more() -> anyhow::Result<()> {
    let cluster = Cluster::alone().await?;
    let chart = Chart::new("flotilla-system");
    chart.helm(&cluster, "install", &[]).await?;
    let objects = chart.render(&cluster, &[]).await?;
    let folder = tempfile::tempdir()?;
    let (kubeconfig, log) = (folder.path().join("kubeconfig"), folder.path().join("operator.log"));
    chart.operator_kubeconfig(&cluster, &kubeconfig).await?;
    let start = |name| start_operator(&objects, &kubeconfig, (chart.namespace(), name), &log);
    let client = cluster.client().await?;
    let namespace = TestNamespace::create(&client).await?;
    let kubelet = Kubelet::play(client.clone(), namespace.name());

    let first = start("first")?;
    let played = until_a_learner_runs(&client, namespace.name()).await;
    played.with_context(|| said(&log))?;
    first.terminate(Duration::from_secs(30))?;
    // What the first one had in mind, like the token of a running learner, the second one reads.
    let second = start("second")?;
    let played = serving(&client, namespace.name()).await;
    played.with_context(|| said(&log))?;
    drop(kubelet);
    no_worker_has_an_api_token(&client, namespace.name()).await?;
    second.terminate(Duration::from_secs(30))?;
    namespace.delete(&client).await?;

    let audit = cluster.audit_log().context("the audit log")?;
    let used = requests(&std::fs::read_to_string(audit)?, &chart.user())?;
    let roles = roles_of(&objects, OPERATOR)?;
    Difference::between(&used, &roles).none()?;
    every_verb_is_needed(&client, &roles, &used).await?;
    println!("{} verbs, {} requests", granted(&roles).len(), used.len());
    cluster.stop()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_for_one_namespace_has_the_same_verbs_there_and_nothing_elsewhere() -> anyhow::Result<()> {
    let cluster = Cluster::connect().await?;
    let chart = Chart::new("flotilla-system");
    let everywhere = roles_of(&chart.render(&cluster, &[]).await?, OPERATOR)?;
    let in_one = roles_of(&chart.render(&cluster, &["watchNamespace=lab"]).await?, OPERATOR)?;
    ensure!(granted(&everywhere) == granted(&in_one));
    let places: BTreeMap<_, _> = in_one
        .iter()
        .map(|role| (role.name.as_str(), role.namespace.as_deref()))
        .collect();
    assert_eq!(
        places,
        [
            (OPERATOR, Some("lab")),
            ("flotilla-operator-election", Some("flotilla-system"))
        ]
        .into()
    );
    let secrets = |permission: &&Permission| permission.resource == "secrets";
    let verbs: Vec<_> = granted(&in_one)
        .iter()
        .filter(secrets)
        .map(|found| found.verb.clone())
        .collect();
    assert_eq!(verbs, ["create", "get"], "no secret is listed, watched or changed");
    cluster.stop()
}

fn said(log: &Path) -> String {
    format!(
        "the operator said:\n{}",
        std::fs::read_to_string(log).unwrap_or_default()
    )
}

/// The life of every kind, with all that the operator ever does to anything, in a namespace that enforces `restricted`.
async fn until_a_learner_runs(client: &Client, ns: &str) -> anyhow::Result<()> {
    data_and_imported_weights(client, ns).await?;
    training(client, ns).await?;
    suspension(client, ns).await
}

async fn no_worker_has_an_api_token(client: &Client, ns: &str) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), ns);
    let pods = pods.list(&ListParams::default().labels(label::ROLE)).await?;
    ensure!(!pods.items.is_empty(), "there is no worker pod");
    for pod in pods {
        let spec = pod.spec.context("a spec")?;
        ensure!(
            spec.automount_service_account_token == Some(false),
            "a worker pod has an API token"
        );
    }
    Ok(())
}

async fn data_and_imported_weights(client: &Client, ns: &str) -> anyhow::Result<()> {
    let rows = json!({
        "source": {"uri": "pvc://data/rows.jsonl"},
        "conversion": {"format": {"instruction": {}}},
        "storage": {"claimName": "data"},
    });
    create::<Dataset>(client, ns, "rows", &rows).await?;
    let weights = json!({"uri": "pvc://data/weights", "digest": DIGEST});
    create::<ModelCheckpoint>(client, ns, "weights", &weights).await?;
    reach::<Dataset>(client, ns, "rows", "Ready").await?;
    reach::<ModelCheckpoint>(client, ns, "weights", "Available").await
}

fn job(ttl: Option<u32>) -> Value {
    let mut spec = json!({
        "model": {"uri": "pvc://data/base", "randomSeed": 0},
        "datasets": [{"datasetRef": {"name": "rows"}}],
        "algorithm": {"sft": {"steps": 2, "batchSize": 1}},
        "checkpoint": {"storage": {"claimName": "data"}, "onSuspendTimeoutSeconds": 0},
    });
    if let Some(ttl) = ttl {
        spec["ttlSecondsAfterFinished"] = json!(ttl);
    }
    spec
}

/// A learner that was stopped continues, its first checkpoint is forgotten, and the job goes when its time is over.
async fn training(client: &Client, ns: &str) -> anyhow::Result<()> {
    create::<TrainingJob>(client, ns, "short", &job(Some(0))).await?;
    let checkpoints: Api<ModelCheckpoint> = Api::namespaced(client.clone(), ns);
    eventually("the second checkpoint is registered", LIMIT, || async {
        Ok(checkpoints.get_opt("short-step-2").await?)
    })
    .await?;
    let jobs: Api<TrainingJob> = Api::namespaced(client.clone(), ns);
    eventually("the job is past its time to live", LIMIT, || async {
        Ok(jobs.get_opt("short").await?.is_none().then_some(()))
    })
    .await?;
    ensure!(
        checkpoints.get_opt("short-step-1").await?.is_none(),
        "the first checkpoint was not forgotten"
    );
    Ok(())
}

/// Twice, so that the second event is counted in the first.
async fn suspension(client: &Client, ns: &str) -> anyhow::Result<()> {
    create::<TrainingJob>(client, ns, "steady", &job(None)).await?;
    for threads in [3, 4] {
        learns(client, ns, "steady").await?;
        merge::<TrainingJob>(client, ns, "steady", json!({"suspend": true})).await?;
        reach::<TrainingJob>(client, ns, "steady", "Suspended").await?;
        merge::<TrainingJob>(client, ns, "steady", resumed(threads)).await?;
    }
    learns(client, ns, "steady").await
}

/// With other threads, so that the role in the ConfigMap changes.
fn resumed(threads: u32) -> Value {
    json!({"suspend": false, "roles": {"learner": {"threads": threads}}})
}

/// Waits for a running learner. Nobody answers for its progress, so the job itself only says that it starts.
async fn learns(client: &Client, ns: &str, job: &str) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), ns);
    let own = ListParams::default().labels(&format!("flotilla.dev/owner={job}"));
    eventually(&format!("the learner of {job} runs"), LIMIT, || async {
        let phases = pods
            .list(&own)
            .await?
            .items
            .into_iter()
            .filter_map(|pod| pod.status?.phase);
        Ok(phases.into_iter().any(|phase| phase == "Running").then_some(()))
    })
    .await
}

/// A new revision replaces the pods and their ConfigMap, then the deployment is made smaller.
async fn serving(client: &Client, ns: &str) -> anyhow::Result<()> {
    let spec = json!({"model": {"checkpointRef": {"name": "weights"}}, "replicas": 2});
    create::<ModelDeployment>(client, ns, "critic", &spec).await?;
    reach::<ModelDeployment>(client, ns, "critic", "Available").await?;
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), ns);
    let serving = ListParams::default().labels("flotilla.dev/owner=critic");
    let before = names(&configs, &serving).await?;
    merge::<ModelDeployment>(client, ns, "critic", json!({"maxQueue": 7})).await?;
    eventually("the role of the old revision is dropped", LIMIT, || async {
        let now = names(&configs, &serving).await?;
        Ok((now.len() == 1 && now != before).then_some(()))
    })
    .await?;
    merge::<ModelDeployment>(client, ns, "critic", json!({"replicas": 0})).await?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), ns);
    eventually("no server is left", LIMIT, || async {
        Ok(names(&pods, &serving).await?.is_empty().then_some(()))
    })
    .await?;
    let services: Api<Service> = Api::namespaced(client.clone(), ns);
    let secrets: Api<Secret> = Api::namespaced(client.clone(), ns);
    ensure!(!names(&services, &serving).await?.is_empty() && !names(&secrets, &serving).await?.is_empty());
    Ok(())
}

async fn names<K>(api: &Api<K>, which: &ListParams) -> anyhow::Result<Vec<String>>
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned,
{
    let found = api.list(which).await?;
    Ok(found.items.iter().map(kube::ResourceExt::name_any).collect())
}

async fn create<K>(client: &Client, ns: &str, name: &str, spec: &Value) -> anyhow::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Serialize,
{
    let object = json!({
        "apiVersion": K::api_version(&()), "kind": K::kind(&()), "metadata": {"name": name}, "spec": spec,
    });
    let api: Api<K> = Api::namespaced(client.clone(), ns);
    let object = serde_json::from_value(object).with_context(|| format!("{} {name}", K::kind(&())))?;
    api.create(&PostParams::default(), &object).await?;
    Ok(())
}

async fn merge<K>(client: &Client, ns: &str, name: &str, spec: Value) -> anyhow::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), ns);
    api.patch(name, &PatchParams::default(), &Patch::Merge(json!({"spec": spec})))
        .await?;
    Ok(())
}

async fn reach<K>(client: &Client, ns: &str, name: &str, phase: &str) -> anyhow::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Serialize,
{
    let api: Api<K> = Api::namespaced(client.clone(), ns);
    eventually(&format!("{} {name} is {phase}", K::kind(&())), LIMIT, || async {
        let object = serde_json::to_value(api.get(name).await?)?;
        Ok((object.pointer("/status/phase") == Some(&json!(phase))).then_some(()))
    })
    .await
}

/// For each verb: with roles that lack only this one, the authorizer refuses a request that the operator made.
async fn every_verb_is_needed(client: &Client, roles: &[BoundRole], used: &[Request]) -> anyhow::Result<()> {
    for (number, removed) in granted(roles).iter().enumerate() {
        let user = format!("probe-{number}");
        let smaller = without(roles, removed);
        bind(client, &user, &smaller).await?;
        // The authorizer's copies are as new as these roles once it allows what they still grant.
        for role in &smaller {
            let kept: Vec<_> = role.rules.iter().flat_map(permissions).collect();
            let request = used
                .iter()
                .find(|request| kept.contains(&request.permission) && !request.needs().contains(removed));
            if let Some(request) = request {
                eventually(&format!("{user} may {}", request.permission), LIMIT, || async {
                    Ok(allows(client, &user, request, &request.permission).await?.then_some(()))
                })
                .await?;
            }
        }
        let request = used.iter().find(|request| request.needs().contains(removed));
        let request = request.with_context(|| format!("no request needed {removed}"))?;
        ensure!(
            !allows(client, &user, request, removed).await?,
            "{removed} is granted twice: without it the operator could do the same"
        );
    }
    Ok(())
}

async fn bind(client: &Client, user: &str, roles: &[BoundRole]) -> anyhow::Result<()> {
    for role in roles {
        let name = format!("{user}-{}", role.name);
        let kind = if role.namespace.is_some() {
            "Role"
        } else {
            "ClusterRole"
        };
        let definition = json!({"metadata": {"name": name}, "rules": role.rules});
        let binding = json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        });
        match &role.namespace {
            Some(ns) => {
                post::<Role>(&Api::namespaced(client.clone(), ns), definition).await?;
                post::<RoleBinding>(&Api::namespaced(client.clone(), ns), binding).await?;
            }
            None => {
                post::<ClusterRole>(&Api::all(client.clone()), definition).await?;
                post::<ClusterRoleBinding>(&Api::all(client.clone()), binding).await?;
            }
        }
    }
    Ok(())
}

async fn post<K>(api: &Api<K>, object: Value) -> anyhow::Result<()>
where
    K: Clone + std::fmt::Debug + DeserializeOwned + Serialize,
{
    api.create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    Ok(())
}

async fn allows(client: &Client, user: &str, request: &Request, permission: &Permission) -> anyhow::Result<bool> {
    let (resource, subresource) = match permission.resource.split_once('/') {
        Some((resource, subresource)) => (resource, Some(subresource.to_owned())),
        None => (permission.resource.as_str(), None),
    };
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user.to_owned()),
            resource_attributes: Some(ResourceAttributes {
                group: Some(permission.group.clone()),
                resource: Some(resource.to_owned()),
                subresource,
                verb: Some(permission.verb.clone()),
                namespace: some(&request.namespace),
                name: some(&request.name),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
    let answer = reviews.create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

//! The chart on a real API server: what it refuses, what it renders, and its life from install to uninstall.

use std::{path::Path, time::Duration};

use anyhow::{Context, bail, ensure};
use flotilla_api::Dataset;
use flotilla_tests::{
    chart::{Chart, OPERATOR, RELEASE, folder, object, operator_arguments},
    cluster::Cluster,
    eventually, root,
};
use k8s_openapi::{
    api::{apps::v1::Deployment, core::v1::Pod},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use serde_json::json;

const NAMESPACE: &str = "flotilla-system";
const DATASETS: &str = "datasets.flotilla.dev";
const SHA: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

#[tokio::test(flavor = "multi_thread")]
async fn what_the_schema_does_not_know_or_allow_is_refused_with_its_name() -> anyhow::Result<()> {
    let cluster = Cluster::connect().await?;
    cluster
        .run("helm", &["lint", "--strict", &folder().display().to_string()])
        .await?;
    let chart = Chart::new(NAMESPACE);
    for (value, named) in [
        ("replica=3", "replica"),
        ("replicas=many", "replicas"),
        ("image.digest=sha256:abc", "digest"),
        ("image.repository=flotilla@sha256", "repository"),
        ("operator.logFormat=xml", "logFormat"),
        ("operator.concurrency=0", "concurrency"),
        ("watchNamespace=Not_A_Namespace", "watchNamespace"),
        ("networkPolicy.apiServerCIDRs={everywhere}", "apiServerCIDRs"),
        ("metrics.port=80", "port"),
        ("leaderElection.leaseDuration=15", "leaseDuration"),
    ] {
        let Err(error) = chart.render(&cluster, &[value]).await else {
            bail!("--set {value} is accepted");
        };
        ensure!(
            format!("{error:#}").contains(named),
            "--set {value}: the error does not name {named}: {error:#}"
        );
    }
    // Timing that the schema cannot judge is refused by the templates, before an operator refuses to start.
    let error = chart
        .render(&cluster, &["leaderElection.renewDeadlineSeconds=15"])
        .await
        .expect_err("refused");
    ensure!(format!("{error:#}").contains("leaseDurationSeconds"), "{error:#}");
    let orphan = ["metrics.serviceMonitor.enabled=true", "metrics.service.enabled=false"];
    let error = chart.render(&cluster, &orphan).await.expect_err("refused");
    ensure!(format!("{error:#}").contains("metrics.service.enabled"), "{error:#}");
    cluster.stop()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_takes_every_combination_and_a_release_lives_from_install_to_uninstall() -> anyhow::Result<()> {
    let cluster = Cluster::alone().await?;
    cluster.run("kubectl", &["create", "namespace", NAMESPACE]).await?;
    cluster.run("kubectl", &["create", "namespace", "lab"]).await?;
    install_monitoring_kinds(&cluster).await?;
    every_combination_passes_a_dry_run(&cluster).await?;
    from_install_to_uninstall(&cluster).await?;
    the_bundle_makes_pods_where_restricted_is_enforced(&cluster).await?;
    cluster.stop()
}

async fn every_combination_passes_a_dry_run(cluster: &Cluster) -> anyhow::Result<()> {
    let (by_digest, worker) = (format!("image.digest={SHA}"), format!("worker.image.digest={SHA}"));
    let combinations: [&[&str]; 6] = [
        &[],
        &[
            "watchNamespace=lab",
            "crds.install=false",
            "rbac.aggregateToUserRoles=false",
        ],
        &[
            &by_digest,
            &worker,
            "imagePullSecrets[0].name=registry",
            "commonLabels.team=fleet",
            "podAnnotations.a=b",
            "nodeSelector.pool=system",
            "priorityClassName=system-cluster-critical",
            "extraEnv[0].name=A",
            "extraEnv[0].value=b",
        ],
        &[
            "metrics.serviceMonitor.enabled=true",
            "metrics.prometheusRule.enabled=true",
        ],
        &[
            "networkPolicy.apiServerCIDRs={10.0.0.0/8,fd00::/8}",
            "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.team=monitoring",
            "watchNamespace=lab",
        ],
        &[
            "replicas=1",
            "networkPolicy.enabled=false",
            "metrics.service.enabled=false",
            "topologySpread.enabled=false",
            "rbac.ownerReferencesPermissionEnforcement=true",
            "fullnameOverride=fleet",
        ],
    ];
    let folder = tempfile::tempdir()?;
    for values in combinations {
        let rendered = Chart::new(NAMESPACE).helm(cluster, "template", values).await?;
        let file = folder.path().join("rendered.yaml");
        std::fs::write(&file, rendered)?;
        let applied = apply(cluster, &file, &["--dry-run=server"]).await;
        applied.with_context(|| format!("values {values:?}"))?;
    }
    let objects = Chart::new(NAMESPACE).render(cluster, &[&by_digest, &worker]).await?;
    let deployment = object(&objects, "Deployment", OPERATOR)?;
    assert_eq!(
        deployment["spec"]["template"]["spec"]["containers"][0]["image"],
        json!(format!("flotilla-operator@{SHA}"))
    );
    let arguments = operator_arguments(&objects)?;
    ensure!(
        arguments.contains(&format!("--worker-image=flotilla-worker@{SHA}")),
        "{arguments:?}"
    );
    Ok(())
}

async fn from_install_to_uninstall(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.client().await?;
    let before = tempfile::tempdir()?;
    older_chart(before.path())?;
    Chart::of(before.path(), NAMESPACE)
        .helm(cluster, "install", &[])
        .await?;
    ensure!(
        !has_field(&client, "storage").await?,
        "the older definition has the newer field"
    );

    let chart = Chart::new(NAMESPACE);
    chart
        .helm(cluster, "upgrade", &["replicas=3", "operator.concurrency=2"])
        .await?;
    eventually("the definition is upgraded", Duration::from_secs(20), || async {
        Ok(has_field(&client, "storage").await?.then_some(()))
    })
    .await?;
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), NAMESPACE);
    let spec = deployments.get(OPERATOR).await?.spec;
    assert_eq!(spec.replicas, Some(3));
    let arguments = spec
        .template
        .spec
        .and_then(|spec| spec.containers.into_iter().next()?.args)
        .context("arguments")?;
    ensure!(arguments.contains(&"--concurrency=2".to_owned()), "{arguments:?}");

    let datasets: Api<Dataset> = Api::namespaced(client.clone(), "lab");
    let dataset = json!({
        "apiVersion": "flotilla.dev/v1alpha1", "kind": "Dataset", "metadata": {"name": "rows"},
        "spec": {
            "source": {"uri": "pvc://data/rows.jsonl"},
            "conversion": {"format": {"instruction": {}}},
            "storage": {"claimName": "data"},
        },
    });
    datasets
        .create(&PostParams::default(), &serde_json::from_value(dataset)?)
        .await?;
    chart.uninstall(cluster).await?;
    ensure!(
        deployments.get_opt(OPERATOR).await?.is_none(),
        "the Deployment outlived its release"
    );
    ensure!(
        datasets.get_opt("rows").await?.is_some(),
        "uninstall took an object of the user with it"
    );
    // A release of the same name finds its definitions again.
    chart.helm(cluster, "install", &[]).await?;
    chart.uninstall(cluster).await?;
    Ok(())
}

/// This chart with an older definition of Dataset, which lacks a field of today's.
fn older_chart(to: &Path) -> anyhow::Result<()> {
    copy(&folder(), to)?;
    let file = to.join("definitions/flotilla.dev_datasets.yaml");
    let mut definition: serde_json::Value = serde_yaml::from_str(&std::fs::read_to_string(&file)?)?;
    let spec = definition
        .pointer_mut("/spec/versions/0/schema/openAPIV3Schema/properties/spec")
        .context("the schema of the spec")?;
    spec["properties"]
        .as_object_mut()
        .context("properties")?
        .remove("storage");
    spec["required"] = json!([]);
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("x-kubernetes-validations");
    }
    // As in crds/: a comment first, then plain top-level keys.
    Ok(std::fs::write(
        file,
        format!("# older\n{}", serde_yaml::to_string(&definition)?),
    )?)
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Whether Dataset's spec has this field on the API server.
async fn has_field(client: &Client, field: &str) -> anyhow::Result<bool> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let definition = serde_json::to_value(definitions.get(DATASETS).await?)?;
    let path = format!("/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/{field}");
    Ok(definition.pointer(&path).is_some())
}

/// install.yaml is the chart's, its namespace enforces `restricted`, and the operator's pods are admitted there.
async fn the_bundle_makes_pods_where_restricted_is_enforced(cluster: &Cluster) -> anyhow::Result<()> {
    let committed = root().join("manifests/install.yaml");
    let helm = cluster.programs().path("helm");
    let script = root().join("scripts/install-manifest.sh");
    let rendered = tokio::process::Command::new(script).arg(helm).output().await?;
    ensure!(
        rendered.status.success(),
        "{}",
        String::from_utf8_lossy(&rendered.stderr)
    );
    ensure!(
        rendered.stdout == std::fs::read(&committed)?,
        "manifests/install.yaml is stale: run `make install-manifest`"
    );
    apply(cluster, &committed, &["--force-conflicts"]).await?;
    let client = cluster.client().await?;
    let pods: Api<Pod> = Api::namespaced(client, NAMESPACE);
    let ours = ListParams::default().labels(&format!("app.kubernetes.io/instance={RELEASE}"));
    eventually("both operator pods are admitted", Duration::from_secs(30), || async {
        Ok((pods.list(&ours).await?.items.len() == 2).then_some(()))
    })
    .await?;
    let said = cluster
        .run(
            "kubectl",
            &[
                "get",
                "namespace",
                NAMESPACE,
                "-o",
                "jsonpath={.metadata.labels.pod-security\\.kubernetes\\.io/enforce}",
            ],
        )
        .await?;
    assert_eq!(said, "restricted");
    Ok(())
}

async fn apply(cluster: &Cluster, file: &Path, flags: &[&str]) -> anyhow::Result<()> {
    let file = file.display().to_string();
    let mut arguments = vec!["apply", "--server-side", "-f", &file];
    arguments.extend(flags);
    let said = cluster.run("kubectl", &arguments).await?;
    ensure!(said.contains("deployment.apps/"), "{said}");
    Ok(())
}

/// The two kinds of the Prometheus operator, without their schemas.
async fn install_monitoring_kinds(cluster: &Cluster) -> anyhow::Result<()> {
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client().await?);
    for (kind, plural) in [
        ("ServiceMonitor", "servicemonitors"),
        ("PrometheusRule", "prometheusrules"),
    ] {
        let name = format!("{plural}.monitoring.coreos.com");
        let definition = json!({
            "metadata": {"name": name},
            "spec": {
                "group": "monitoring.coreos.com",
                "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true,
                }}}],
            },
        });
        definitions
            .create(&PostParams::default(), &serde_json::from_value(definition)?)
            .await?;
        eventually(&format!("{name} is served"), Duration::from_secs(20), || async {
            let conditions = definitions
                .get(&name)
                .await?
                .status
                .and_then(|status| status.conditions);
            let mut conditions = conditions.unwrap_or_default().into_iter();
            Ok(conditions
                .any(|condition| condition.type_ == "Established" && condition.status == "True")
                .then_some(()))
        })
        .await?;
    }
    Ok(())
}

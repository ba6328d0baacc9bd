//! Starting, ending and restarting containers; environments, volumes and logs.

use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolumeClaim, Pod, Secret};
use kube::{Api, api::LogParams};
use serde_json::json;

use crate::cluster::{Cluster, condition, container, eventually, pod_ip, restarts};

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_decide_the_phase_and_the_last_words_reach_the_status() {
    let cluster = Cluster::start().await;
    cluster
        .run("good", "echo out; echo words > /dev/termination-log", json!({}))
        .await;
    cluster
        .run(
            "bad",
            "echo why >&2; exit 3",
            json!({"container": {
                "terminationMessagePolicy": "FallbackToLogsOnError"
            }}),
        )
        .await;

    let good = cluster.wait_for_phase("good", "Succeeded").await;
    let ended = container(&good).state.clone().unwrap().terminated.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_deref()), (0, Some("Completed")));
    assert_eq!(ended.message.as_deref(), Some("words\n"));
    assert_eq!(condition(&good, "Ready"), Some("False"));
    assert_eq!(condition(&good, "Initialized"), Some("True"));
    assert_eq!(condition(&good, "PodScheduled"), Some("True"));

    let bad = cluster.wait_for_phase("bad", "Failed").await;
    let ended = container(&bad).state.clone().unwrap().terminated.unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_deref()), (3, Some("Error")));
    assert_eq!(ended.message.as_deref(), Some("why\n"));

    assert_ne!(pod_ip(&good), pod_ip(&bad));
    let log = cluster.api::<Pod>().logs("good", &LogParams::default()).await.unwrap();
    assert_eq!(log, "out\n");
    assert_eq!(
        cluster.event("good", "Scheduled").await,
        "Successfully assigned default/good to node-1"
    );
    assert_eq!(cluster.event("good", "Started").await, "Started container main");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_container_is_restarted_with_growing_delays() {
    let cluster = Cluster::start().await;
    let script = "echo run >> /scratch/runs; echo run $(wc -l < /scratch/runs); test $(wc -l < /scratch/runs) -gt 3";
    cluster
        .run(
            "again",
            script,
            json!({
                "restartPolicy": "OnFailure",
                "volumes": [{"name": "work", "emptyDir": {}}],
                "container": {"volumeMounts": [{"name": "work", "mountPath": "/scratch"}]}
            }),
        )
        .await;
    let waiting = |pod: &Pod| {
        let state = pod
            .status
            .as_ref()
            .and_then(|s| s.container_statuses.as_ref())
            .and_then(|s| s[0].state.clone());
        state.and_then(|state| state.waiting).and_then(|waiting| waiting.reason)
    };
    let held = cluster
        .wait_for("again", "CrashLoopBackOff", |pod| {
            waiting(pod).as_deref() == Some("CrashLoopBackOff")
        })
        .await;
    assert_eq!(held.status.as_ref().unwrap().phase.as_deref(), Some("Running"));
    assert_eq!(
        container(&held)
            .last_state
            .as_ref()
            .unwrap()
            .terminated
            .as_ref()
            .unwrap()
            .exit_code,
        1
    );

    let done = cluster.wait_for_phase("again", "Succeeded").await;
    assert_eq!(restarts(&done), 3);
    let api = cluster.api::<Pod>();
    assert_eq!(api.logs("again", &LogParams::default()).await.unwrap(), "run 4\n");
    let previous = LogParams {
        previous: true,
        ..LogParams::default()
    };
    assert_eq!(api.logs("again", &previous).await.unwrap(), "run 3\n");
    assert!(
        cluster
            .event("again", "BackOff")
            .await
            .starts_with("Back-off restarting failed container main")
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_environment_and_init_containers_are_as_the_spec_says() {
    let cluster = Cluster::start().await;
    let seed = cluster.path().join("seed");
    std::fs::create_dir_all(&seed).unwrap();
    std::fs::write(seed.join("given"), "seeded").unwrap();
    cluster
        .create::<ConfigMap>(json!({"metadata": {"name": "settings"}, "data": {"role.json": "{}", "K": "v"}}))
        .await;
    cluster
        .create::<Secret>(json!({"metadata": {"name": "key"}, "stringData": {"token": "t0"}}))
        .await;
    cluster
        .create::<PersistentVolumeClaim>(json!({
            "metadata": {"name": "data", "annotations": {"sandbox.flotilla.dev/seed-from": seed}},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        }))
        .await;
    let mounts = json!([
        {"name": "config", "mountPath": "/etc/app"}, {"name": "key", "mountPath": "/etc/key"},
        {"name": "data", "mountPath": "/data"}
    ]);
    let script = "cat /data/given /data/prepared /etc/key/token; ls /etc/app | tr '\\n' ' '; \
                  echo \"$K $NAME $POD_IP $HOSTNAME $WHERE\"; echo $0";
    let pod = cluster
        .run(
            "full",
            script,
            json!({
                "volumes": [
                    {"name": "config", "configMap": {"name": "settings", "items": [{"key": "role.json", "path": "role.json"}]}},
                    {"name": "key", "secret": {"secretName": "key", "defaultMode": 0o400}},
                    {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
                ],
                "initContainers": [{
                    "name": "first", "image": "sh", "args": ["-c", "echo -n prepared > /data/prepared"],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}]
                }],
                "container": {
                    "args": ["-c", script, "--volume=data=/data"],
                    "volumeMounts": mounts,
                    "envFrom": [{"configMapRef": {"name": "settings"}}],
                    "env": [
                        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                        {"name": "WHERE", "value": "/data/x"}
                    ]
                }
            }),
        )
        .await;
    assert_eq!(pod.metadata.name.as_deref(), Some("full"));
    let done = cluster.wait_for_phase("full", "Succeeded").await;
    let log = cluster.api::<Pod>().logs("full", &LogParams::default()).await.unwrap();
    let volume = cluster.volume("data").display().to_string();
    let expected = format!(
        "seededpreparedt0role.json v full {} full {volume}/x\n--volume=data={volume}\n",
        pod_ip(&done)
    );
    assert_eq!(log, expected);
    let init = &done.status.as_ref().unwrap().init_container_statuses.as_ref().unwrap()[0];
    assert!(init.ready && init.state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code == 0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_said_and_waited_for() {
    let cluster = Cluster::start().await;
    cluster
        .run(
            "patient",
            "cat /etc/app/k",
            json!({
                "volumes": [{"name": "config", "configMap": {"name": "later"}}],
                "container": {"volumeMounts": [{"name": "config", "mountPath": "/etc/app"}]}
            }),
        )
        .await;
    let why = cluster.event("patient", "FailedMount").await;
    assert_eq!(
        why,
        "MountVolume.SetUp failed for volume \"config\" : configmap \"later\" not found"
    );
    cluster
        .create::<ConfigMap>(json!({"metadata": {"name": "later"}, "data": {"k": "here"}}))
        .await;
    cluster.wait_for_phase("patient", "Succeeded").await;

    cluster
        .run("imageless", "true", json!({"container": {"image": "nowhere/none:v1"}}))
        .await;
    let pod = cluster
        .wait_for("imageless", "ErrImagePull", |pod| {
            let statuses = pod
                .status
                .as_ref()
                .and_then(|s| s.container_statuses.as_deref())
                .unwrap_or_default();
            statuses.iter().any(|s| {
                s.state
                    .as_ref()
                    .and_then(|s| s.waiting.as_ref())
                    .and_then(|w| w.reason.as_deref())
                    == Some("ErrImagePull")
            })
        })
        .await;
    let message = container(&pod)
        .state
        .as_ref()
        .unwrap()
        .waiting
        .as_ref()
        .unwrap()
        .message
        .clone()
        .unwrap();
    assert!(message.contains("nowhere/none:v1"), "{message}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_config_map_follows_its_object() {
    let cluster = Cluster::start().await;
    cluster
        .create::<ConfigMap>(json!({"metadata": {"name": "live"}, "data": {"k": "old"}}))
        .await;
    cluster
        .run(
            "reader",
            "until grep -q new /etc/app/k; do sleep 0.1; done",
            json!({
                "volumes": [{"name": "config", "configMap": {"name": "live"}}],
                "container": {"volumeMounts": [{"name": "config", "mountPath": "/etc/app"}]}
            }),
        )
        .await;
    cluster.wait_for_phase("reader", "Running").await;
    let patch = kube::api::Patch::Merge(json!({"data": {"k": "new"}}));
    cluster
        .api::<ConfigMap>()
        .patch("live", &kube::api::PatchParams::default(), &patch)
        .await
        .unwrap();
    cluster.wait_for_phase("reader", "Succeeded").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gpus_are_counted_and_shown_as_what_they_are() {
    let cluster = Cluster::start().await;
    let gpus = |count: &str| json!({"container": {"resources": {"limits": {"nvidia.com/gpu": count}}}});
    cluster
        .run("two", "echo \"[$CUDA_VISIBLE_DEVICES]\"; sleep 600", gpus("2"))
        .await;
    cluster.wait_for_phase("two", "Running").await;
    cluster.run("more", "true", gpus("1")).await;
    let why = cluster.event("more", "FailedScheduling").await;
    assert_eq!(why, "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.");
    let pending = cluster
        .wait_for("more", "PodScheduled=False", |pod| {
            condition(pod, "PodScheduled").is_some()
        })
        .await;
    assert_eq!(condition(&pending, "PodScheduled"), Some("False"));
    let log = cluster.api::<Pod>().logs("two", &LogParams::default()).await.unwrap();
    assert_eq!(log, "[]\n");

    cluster
        .api::<Pod>()
        .delete("two", &kube::api::DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    cluster.wait_for_phase("more", "Succeeded").await;

    let node = Api::<Node>::all(cluster.client.clone()).get("node-1").await.unwrap();
    let conditions = node.status.unwrap().conditions.unwrap();
    let emulated = conditions
        .iter()
        .find(|condition| condition.type_ == "AcceleratorEmulated")
        .unwrap();
    assert_eq!(emulated.status, "True");
    assert!(
        emulated
            .message
            .as_deref()
            .unwrap()
            .ends_with("processes run on the CPU")
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_the_pod() {
    let cluster = Cluster::start().await;
    cluster
        .run(
            "slow",
            "sleep 600",
            json!({"activeDeadlineSeconds": 1, "terminationGracePeriodSeconds": 1}),
        )
        .await;
    let failed = cluster.wait_for_phase("slow", "Failed").await;
    assert_eq!(
        failed.status.as_ref().unwrap().reason.as_deref(),
        Some("DeadlineExceeded")
    );
    eventually("no process is left", async || crate::cluster::processes(&failed) == 0).await;
    cluster.stop().await;
}

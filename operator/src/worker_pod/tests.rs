use flotilla_api::{
    conversion::Conversion,
    pod::PodOverrides,
    role::{AccessSettings, EngineSettings, MediaSettings, ModelSource, Prepare, Purpose, SCHEMA_VERSION, Serve},
};

use super::*;

fn owner() -> Owner {
    Owner {
        kind: "Dataset".into(),
        api_version: "flotilla.dev/v1alpha1".into(),
        namespace: "lab".into(),
        name: "pairs".into(),
        uid: "0123456789".into(),
    }
}

fn config(role: Role) -> RoleConfig {
    RoleConfig {
        schema_version: SCHEMA_VERSION,
        owner: owner().role_owner(),
        role,
    }
}

fn prepare() -> RoleConfig {
    config(Role::Prepare(Prepare {
        source_uri: "pvc://raw.data/pairs".into(),
        output_uri: "pvc://digits/datasets/lab/pairs-1".into(),
        conversion: Conversion::default(),
    }))
}

fn serve() -> RoleConfig {
    config(Role::Serve(Serve {
        model: ModelSource {
            uri: "pvc://digits/models/base".into(),
            digest: None,
            random_seed: None,
        },
        served_model_name: "critic".into(),
        purpose: Purpose::Both,
        critic_template: None,
        critic_templates: std::collections::BTreeMap::new(),
        max_model_len: 512,
        max_queue: 16,
        tensor_parallel: 1,
        engine: EngineSettings::default(),
        access: AccessSettings::default(),
        media: MediaSettings::default(),
        drain_seconds: None,
        otlp_endpoint: None,
    }))
}

fn build(config: &RoleConfig, settings: &PodSettings, attempt: Option<u32>) -> Pod {
    WorkerPod {
        owner: &owner(),
        name: "pairs-prepare-1".into(),
        config,
        config_map: "pairs-prepare",
        token: "pairs-prepare-token",
        settings,
        default_image: "flotilla-worker",
        attempt,
        index: None,
        revision: None,
        grace_seconds: 30,
    }
    .build()
    .expect("valid URIs")
}

fn container(pod: &Pod) -> Container {
    pod.spec.clone().expect("spec").containers.remove(0)
}

#[test]
fn a_pod_meets_pod_security_restricted() {
    let pod = build(&prepare(), &PodSettings::default(), Some(1));
    let spec = pod.spec.clone().expect("spec");
    let security = spec.security_context.expect("pod security context");
    assert_eq!(security.run_as_non_root, Some(true));
    assert_ne!(security.run_as_user, Some(0));
    assert_eq!(
        security.seccomp_profile.map(|profile| profile.type_).as_deref(),
        Some("RuntimeDefault")
    );
    let container = container(&pod);
    let security = container.security_context.expect("container security context");
    assert_eq!(security.allow_privilege_escalation, Some(false));
    assert_eq!(security.read_only_root_filesystem, Some(true));
    let capabilities = security.capabilities.expect("capabilities");
    assert_eq!((capabilities.drop, capabilities.add), (Some(vec!["ALL".into()]), None));
    assert!(spec.host_network.is_none() && spec.host_pid.is_none() && spec.host_ipc.is_none());
    let allowed = |volume: &Volume| {
        volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.empty_dir.is_some()
            || volume.persistent_volume_claim.is_some()
    };
    assert!(spec.volumes.expect("volumes").iter().all(allowed));
}

fn shared_memory(pod: &Pod) -> Vec<String> {
    let mounts = container(pod).volume_mounts.expect("mounts");
    let there = mounts.into_iter().filter(|mount| mount.mount_path == "/dev/shm");
    there.map(|mount| mount.name).collect()
}

#[test]
fn gpus_that_share_a_model_share_memory_too() {
    let mut shared = serve();
    if let Role::Serve(serve) = &mut shared.role {
        serve.tensor_parallel = 4;
    }
    assert_eq!(shared_memory(&build(&serve(), &PodSettings::default(), None)), [""; 0]);
    let pod = build(&shared, &PodSettings::default(), None);
    assert_eq!(shared_memory(&pod), ["shared-memory"]);
    let volumes = pod.spec.expect("spec").volumes.expect("volumes");
    let volume = volumes.iter().find(|volume| volume.name == "shared-memory");
    let in_memory = volume.and_then(|volume| volume.empty_dir.as_ref());
    assert_eq!(in_memory.and_then(|volume| volume.medium.as_deref()), Some("Memory"));
    // What users mount there takes its place.
    let own = PodSettings {
        pod_overrides: PodOverrides {
            volumes: vec![Volume {
                name: "mine".into(),
                ..Volume::default()
            }],
            volume_mounts: vec![VolumeMount {
                name: "mine".into(),
                mount_path: "/dev/shm".into(),
                ..VolumeMount::default()
            }],
            ..PodOverrides::default()
        },
        ..PodSettings::default()
    };
    assert_eq!(shared_memory(&build(&shared, &own, None)), ["mine"]);
}

#[test]
fn a_pod_holds_no_kubernetes_credentials() {
    let spec = build(&prepare(), &PodSettings::default(), Some(1)).spec.expect("spec");
    assert_eq!(spec.automount_service_account_token, Some(false));
    assert_eq!(spec.enable_service_links, Some(false));
}

#[test]
fn the_worker_is_told_where_each_claim_is_mounted() {
    let pod = build(&prepare(), &PodSettings::default(), Some(1));
    let args = container(&pod).args.expect("args").join(" ");
    assert_eq!(
        args,
        "run --config /etc/flotilla/config/role.json \
         --volume digits=/var/lib/flotilla/volumes/digits --volume raw.data=/var/lib/flotilla/volumes/raw.data \
         --token-file /etc/flotilla/token/token --termination-log /dev/termination-log"
    );
}

#[test]
fn a_claim_that_is_only_read_is_mounted_read_only() {
    let pod = build(&prepare(), &PodSettings::default(), Some(1));
    let mounts = container(&pod).volume_mounts.expect("mounts");
    let mode = |path: &str| {
        mounts
            .iter()
            .find(|mount| mount.mount_path.ends_with(path))
            .map(|mount| mount.read_only)
    };
    assert_eq!(mode("/raw.data"), Some(Some(true)));
    assert_eq!(mode("/digits"), Some(None));
}

#[test]
fn a_run_never_restarts_in_place_and_a_server_always_does() {
    let policy = |pod: Pod| pod.spec.expect("spec").restart_policy;
    assert_eq!(
        policy(build(&prepare(), &PodSettings::default(), Some(3))).as_deref(),
        Some("Never")
    );
    assert_eq!(
        policy(build(&serve(), &PodSettings::default(), None)).as_deref(),
        Some("Always")
    );
}

#[test]
fn a_server_takes_requests_only_when_its_model_is_loaded() {
    let path = |pod: &Pod| {
        let probe = container(pod).readiness_probe.expect("readiness");
        probe.http_get.expect("http").path
    };
    assert_eq!(
        path(&build(&serve(), &PodSettings::default(), None)).as_deref(),
        Some("/readyz")
    );
    assert_eq!(
        path(&build(&prepare(), &PodSettings::default(), Some(1))).as_deref(),
        Some("/healthz")
    );
}

#[test]
fn what_users_set_reaches_the_pod() {
    let settings = PodSettings {
        image: Some("registry.example/worker:2".into()),
        resources: Resources {
            limits: BTreeMap::from([("nvidia.com/gpu".into(), "1".into())]),
            ..Resources::default()
        },
        pod_overrides: PodOverrides {
            node_selector: BTreeMap::from([("gpu".into(), "h200".into())]),
            priority_class_name: Some("low".into()),
            ..PodOverrides::default()
        },
    };
    let pod = build(&prepare(), &settings, Some(1));
    let container = container(&pod);
    assert_eq!(container.image.as_deref(), Some("registry.example/worker:2"));
    let limits = container.resources.expect("resources").limits.expect("limits");
    assert_eq!(limits.get("nvidia.com/gpu"), Some(&Quantity("1".into())));
    let spec = pod.spec.expect("spec");
    assert_eq!(
        spec.node_selector,
        Some(BTreeMap::from([("gpu".into(), "h200".into())]))
    );
    assert_eq!(spec.priority_class_name.as_deref(), Some("low"));
}

#[test]
fn the_attempt_is_a_label() {
    let labels = build(&prepare(), &PodSettings::default(), Some(7))
        .metadata
        .labels
        .expect("labels");
    assert_eq!(labels.get(label::ATTEMPT).map(String::as_str), Some("7"));
    assert_eq!(labels.get(label::ROLE).map(String::as_str), Some("prepare"));
    assert_eq!(labels.get(label::OWNER_NAME).map(String::as_str), Some("pairs"));
}

//! The command lines of the control plane, and the two files that no flag replaces.

use std::path::Path;

use anyhow::Context;
use serde_json::json;

use super::{access, audit_log, certificates::Subject};

/// Ports on 127.0.0.1.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    /// etcd for clients.
    pub etcd_client: u16,
    /// etcd for members; there are no others.
    pub etcd_peer: u16,
    /// The API server.
    pub api_server: u16,
}

/// etcd: one member, nothing is synced to disk, since nothing has to survive the machine.
pub fn etcd(dir: &Path, ports: Ports) -> Vec<String> {
    let client = format!("https://127.0.0.1:{}", ports.etcd_client);
    let peer = format!("http://127.0.0.1:{}", ports.etcd_peer);
    vec![
        "--name=default".to_owned(),
        flag("--data-dir", dir, "etcd"),
        "--unsafe-no-fsync".to_owned(),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        flag("--cert-file", dir, "server.crt"),
        flag("--key-file", dir, "server.key"),
        flag("--trusted-ca-file", dir, "ca.crt"),
        "--client-cert-auth".to_owned(),
        "--quota-backend-bytes=4294967296".to_owned(),
        "--log-level=warn".to_owned(),
    ]
}

/// The API server.
pub fn api_server(dir: &Path, ports: Ports) -> Vec<String> {
    vec![
        format!("--etcd-servers=https://127.0.0.1:{}", ports.etcd_client),
        flag("--etcd-cafile", dir, "ca.crt"),
        flag("--etcd-certfile", dir, "etcd-client.crt"),
        flag("--etcd-keyfile", dir, "etcd-client.key"),
        "--bind-address=127.0.0.1".to_owned(),
        format!("--secure-port={}", ports.api_server),
        flag("--tls-cert-file", dir, "server.crt"),
        flag("--tls-private-key-file", dir, "server.key"),
        flag("--client-ca-file", dir, "ca.crt"),
        // As kubeadm leaves it: the serving certificates of nodes are their own.
        flag("--kubelet-client-certificate", dir, "kubelet-client.crt"),
        flag("--kubelet-client-key", dir, "kubelet-client.key"),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--anonymous-auth=false".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        flag("--service-account-key-file", dir, "service-account.pub"),
        flag("--service-account-signing-key-file", dir, "service-account.key"),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        // The endpoints of the service `kubernetes` may not be a loopback address, and nothing here goes through it.
        "--endpoint-reconciler-type=none".to_owned(),
        "--advertise-address=127.0.0.1".to_owned(),
        format!("--audit-log-path={}", audit_log(dir).display()),
        flag("--audit-policy-file", dir, "audit-policy.yaml"),
        "--profiling=false".to_owned(),
    ]
}

/// The controller manager: every controller that a default cluster runs.
pub fn controller_manager(dir: &Path) -> Vec<String> {
    let kubeconfig = access::path(dir, Subject::ControllerManager);
    vec![
        format!("--kubeconfig={}", kubeconfig.display()),
        "--secure-port=0".to_owned(),
        "--leader-elect=false".to_owned(),
        "--use-service-account-credentials=true".to_owned(),
        flag("--service-account-private-key-file", dir, "service-account.key"),
        flag("--root-ca-file", dir, "ca.crt"),
        flag("--cluster-signing-cert-file", dir, "ca.crt"),
        flag("--cluster-signing-key-file", dir, "ca.key"),
        "--kube-api-qps=200".to_owned(),
        "--kube-api-burst=400".to_owned(),
    ]
}

/// The scheduler, with the default profile.
pub fn scheduler(dir: &Path) -> Vec<String> {
    vec![flag("--config", dir, "scheduler.yaml"), "--secure-port=0".to_owned()]
}

/// Writes the audit policy and the scheduler's configuration.
pub fn write_files(dir: &Path) -> anyhow::Result<()> {
    // Who asks all the time and is no subject of a test stays out, or the log would be mostly theirs.
    let silent = json!([
        {"level": "None", "users": ["system:apiserver", "system:kube-controller-manager", "system:kube-scheduler"]},
        {"level": "None", "userGroups": ["system:nodes", "system:serviceaccounts:kube-system"]},
        {"level": "None", "nonResourceURLs": ["/healthz*", "/readyz*", "/livez*"]},
        {"level": "Metadata"},
    ]);
    let policy = json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": silent,
    });
    let scheduler = json!({
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": false},
        "clientConnection": {
            "kubeconfig": access::path(dir, Subject::Scheduler).display().to_string(), "qps": 1000, "burst": 2000},
    });
    for (name, value) in [("audit-policy.yaml", policy), ("scheduler.yaml", scheduler)] {
        let path = dir.join(name);
        std::fs::write(&path, serde_yaml::to_string(&value)?).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn flag(name: &str, dir: &Path, file: &str) -> String {
    format!("{name}={}", dir.join(file).display())
}

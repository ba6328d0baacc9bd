//! The command line, with its help.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use k8s_openapi::api::core::v1::Taint;

/// Train and serve fleets of vision-language critics and policies.
#[derive(Debug, Parser)]
#[command(
    name = "flotilla",
    version,
    after_help = "Examples:\n  \
        Train a tiny critic on scanned digits and ask it something:\n    \
        flotilla demo\n  \
        The same manifests, without the question:\n    \
        flotilla run manifests/samples/critic-digits\n  \
        A control plane for kubectl:\n    \
        flotilla sandbox up --dir .flotilla\n    \
        kubectl --kubeconfig .flotilla/kubeconfig get tj -w"
)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Apply manifests to a sandbox of their own and follow them until every object reached its goal.
    #[command(
        after_help = "Goals: a Dataset is Ready, a TrainingJob Complete, a ModelCheckpoint Available, a ModelDeployment \
        Available. The exit code is 0 only if every object reached its goal. Data that a claim begins with are named by the \
        annotation sandbox.flotilla.dev/seed-from: a folder beside the manifest or in a folder above it."
    )]
    Run(Run),
    /// Train the sample critic on scanned digits (a few minutes on two cores) and ask it to compare two answers.
    Demo(Demo),
    /// An embedded control plane for this machine: Kubernetes API, node and operator in one process.
    #[command(subcommand)]
    Sandbox(Sandbox),
}

/// `flotilla run`.
#[derive(Args, Debug)]
pub struct Run {
    /// Manifests: YAML files, or folders whose .yaml and .yml files are applied in the order of their names.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// The sandbox.
    #[command(flatten)]
    pub plane: Plane,
    /// Give up when the goals are not reached after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value = "86400", value_parser = seconds)]
    pub timeout: Duration,
    /// Stay up after the goals are reached, until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
}

/// `flotilla demo`.
#[derive(Args, Debug)]
pub struct Demo {
    /// Folder of the sample's manifests.
    #[arg(long, value_name = "DIR", default_value = "manifests/samples/critic-digits")]
    pub sample: PathBuf,
    /// Seed of the initial weights and of both runs; the manifests' own if absent.
    #[arg(long)]
    pub seed: Option<u32>,
    /// Held-out critic accuracy below which the demo fails.
    #[arg(long, value_name = "SHARE", default_value_t = 0.85)]
    pub gate: f64,
    /// The sandbox.
    #[command(flatten)]
    pub plane: Plane,
    /// Give up after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value = "1800", value_parser = seconds)]
    pub timeout: Duration,
    /// Stay up after the question, until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
}

/// `flotilla sandbox`.
#[derive(Debug, Subcommand)]
pub enum Sandbox {
    /// Run the control plane in the foreground until SIGINT or SIGTERM; write DIR/kubeconfig.
    #[command(after_help = "Then, in another terminal:\n  \
        export KUBECONFIG=DIR/kubeconfig\n  \
        kubectl apply -f job.yaml && kubectl get tj -w\n\
        State survives in DIR: the same DIR continues where it was left.")]
    Up(Up),
    /// Only the node: runs the pods of an API server that runs elsewhere, the sandbox's or a real one, as processes here.
    #[command(
        after_help = "On a real cluster the kubeconfig must be that of the node: user system:node:NAME in group \
        system:nodes, as a signed CertificateSigningRequest gives it. Claims come from 'flotilla sandbox volumes' with the \
        same --dir, or are bound by hand. With --taint only pods that tolerate it come here:\n  \
        flotilla sandbox node --dir /var/tmp/n --kubeconfig n.kubeconfig --name n --taint example.dev/lab=n:NoSchedule"
    )]
    Node(Agent),
    /// Many GPU nodes that exist only in the API: their pods become Running and finish without a process.
    #[command(after_help = crate::hollow::EXAMPLES)]
    Hollow(Box<crate::hollow::Hollow>),
    /// Only claims: serves a StorageClass of a real cluster with directories of this machine, for 'flotilla sandbox node'.
    #[command(
        after_help = "Needs to read and change PersistentVolumeClaims, PersistentVolumes, StorageClasses and Events. \
        Whoever may make claims of the class can have directories of this machine copied into them (annotation \
        sandbox.flotilla.dev/seed-from): for clusters whose users are trusted with the machine."
    )]
    Volumes(Volumes),
}

/// `flotilla sandbox volumes`.
#[derive(Args, Debug)]
pub struct Volumes {
    /// Directory of the node that mounts the claims.
    #[arg(long, value_name = "DIR", default_value = ".flotilla")]
    pub dir: PathBuf,
    /// Kubeconfig of the API server; DIR/kubeconfig if absent.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Name of the StorageClass, made at the start.
    #[arg(long, value_name = "NAME", default_value = "flotilla-sandbox")]
    pub class: String,
}

/// `flotilla sandbox node`.
#[derive(Args, Debug)]
pub struct Agent {
    /// Directory of volumes and logs, shared with the API server.
    #[arg(long, value_name = "DIR", default_value = ".flotilla")]
    pub dir: PathBuf,
    /// Kubeconfig of the API server; DIR/kubeconfig if absent.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Name of the Node.
    #[arg(long, value_name = "NAME", default_value = "sandbox")]
    pub name: String,
    /// Taint of the Node, KEY=VALUE:EFFECT; only pods that tolerate it come here. May be given several times.
    #[arg(long = "taint", value_name = "TAINT", value_parser = taint)]
    pub taints: Vec<Taint>,
    /// What the node runs.
    #[command(flatten)]
    pub node: Node,
}

/// `flotilla sandbox up`.
#[derive(Args, Debug)]
pub struct Up {
    /// Directory of the control plane's state, volumes and logs.
    #[arg(long, value_name = "DIR", default_value = ".flotilla")]
    pub dir: PathBuf,
    /// Port of the API server on 127.0.0.1 (0: any that is free).
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// What the node runs.
    #[command(flatten)]
    pub node: Node,
    /// Leave the operator out: for running `flotilla-operator` by hand.
    #[arg(long)]
    pub without_operator: bool,
    /// Leave the node out: for running `flotilla sandbox node` by hand.
    #[arg(long)]
    pub without_node: bool,
}

/// Where a sandbox lives and what its node runs.
#[derive(Args, Debug)]
pub struct Plane {
    /// Directory of state, volumes and logs; a new one below .flotilla/ if absent.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// What the node runs.
    #[command(flatten)]
    pub node: Node,
}

/// What the sandbox's node runs.
#[derive(Args, Clone, Debug)]
pub struct Node {
    /// The worker's binary; by default flotilla-worker beside this program, else from PATH.
    #[arg(long, value_name = "PATH", env = "FLOTILLA_WORKER")]
    pub worker: Option<PathBuf>,
    /// GPUs that the node offers as nvidia.com/gpu; pods that ask for one run on the CPU where the machine has none.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub gpus: u32,
}

fn taint(text: &str) -> Result<Taint, String> {
    let (pair, effect) = text.rsplit_once(':').ok_or("a taint is KEY=VALUE:EFFECT")?;
    if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
        return Err(format!(
            "{effect:?} is no effect: NoSchedule, PreferNoSchedule and NoExecute are"
        ));
    }
    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
    Ok(Taint {
        key: key.to_owned(),
        value: (!value.is_empty()).then(|| value.to_owned()),
        effect: effect.to_owned(),
        time_added: None,
    })
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse::<u64>()
        .map(Duration::from_secs)
        .map_err(|error| format!("{text:?} is not a number of seconds: {error}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn a_taint_has_a_key_and_an_effect_that_kubernetes_knows() {
        let taint = super::taint("example.dev/lab=n:NoSchedule").expect("a taint");
        assert_eq!(
            (taint.key.as_str(), taint.value.as_deref()),
            ("example.dev/lab", Some("n"))
        );
        assert!(
            super::taint("lab:Never")
                .expect_err("no effect")
                .contains("PreferNoSchedule")
        );
        assert!(super::taint("lab").is_err());
    }

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}

//! `flotilla sandbox`: the embedded control plane in the foreground, or only its node.

use anyhow::Context;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio_util::sync::CancellationToken;

use crate::{
    arguments::{Agent, Sandbox, Up},
    control_plane::{self, ControlPlane, Options, interrupted},
    hollow,
};

/// Runs the command until SIGINT or SIGTERM; no process of a pod survives it.
pub async fn command(arguments: Sandbox) -> anyhow::Result<()> {
    match arguments {
        Sandbox::Up(arguments) => up(arguments).await,
        Sandbox::Node(arguments) => node(arguments).await,
        Sandbox::Hollow(arguments) => hollow::command(arguments).await,
    }
}

async fn up(arguments: Up) -> anyhow::Result<()> {
    let options = Options {
        port: arguments.port,
        with_operator: !arguments.without_operator,
        with_node: !arguments.without_node,
        log_to_terminal: true,
        ..Options::new(&arguments.dir, &arguments.node)?
    };
    let plane = ControlPlane::start(options).await?;
    plane.announce();
    interrupted().await;
    eprintln!("stopping");
    plane.stop().await;
    Ok(())
}

async fn node(arguments: Agent) -> anyhow::Result<()> {
    let path = arguments.kubeconfig.unwrap_or_else(|| arguments.dir.join("kubeconfig"));
    let kubeconfig = Kubeconfig::read_from(&path).with_context(|| format!("read {}", path.display()))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let stop = CancellationToken::new();
    let running = control_plane::node_alone(Client::try_from(config)?, &arguments.dir, &arguments.node, stop.clone());
    tokio::pin!(running);
    tokio::select! {
        outcome = &mut running => return outcome,
        () = interrupted() => stop.cancel(),
    }
    running.await
}

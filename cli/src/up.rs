//! `flotilla sandbox`: the embedded control plane in the foreground, or only its node or its claims.

use std::path::Path;

use anyhow::Context;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio_util::sync::CancellationToken;

use crate::{
    arguments::{Agent, Sandbox, Up, Volumes},
    control_plane::{self, ControlPlane, Options, interrupted},
    hollow,
};

/// Runs the command until SIGINT or SIGTERM; no process of a pod survives it.
pub async fn command(arguments: Sandbox) -> anyhow::Result<()> {
    match arguments {
        Sandbox::Up(arguments) => up(arguments).await,
        Sandbox::Node(arguments) => node(arguments).await,
        Sandbox::Hollow(arguments) => hollow::command(*arguments).await,
        Sandbox::Volumes(arguments) => volumes(arguments).await,
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
    let config = config(arguments.kubeconfig.as_deref(), &arguments.dir).await?;
    // The authority that vouches for the server also signs the client certificate with which it asks for logs.
    let authority = config.root_cert.clone();
    let client = Client::try_from(config)?;
    until_interrupted(|stop| control_plane::node_alone(client, arguments, authority, stop)).await
}

async fn volumes(arguments: Volumes) -> anyhow::Result<()> {
    let client = Client::try_from(config(arguments.kubeconfig.as_deref(), &arguments.dir).await?)?;
    until_interrupted(|stop| control_plane::volumes_alone(client, arguments, stop)).await
}

/// The kubeconfig at `path`, or else that of the sandbox in `dir`.
async fn config(path: Option<&Path>, dir: &Path) -> anyhow::Result<Config> {
    let path = path.map_or_else(|| dir.join("kubeconfig"), Path::to_owned);
    let kubeconfig = Kubeconfig::read_from(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
}

/// Runs until SIGINT or SIGTERM, then until what was started has stopped.
async fn until_interrupted<F>(start: impl FnOnce(CancellationToken) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let stop = CancellationToken::new();
    let running = start(stop.clone());
    tokio::pin!(running);
    tokio::select! {
        outcome = &mut running => return outcome,
        () = interrupted() => stop.cancel(),
    }
    running.await
}

//! `flotilla sandbox up`: the embedded control plane in the foreground.

use crate::{
    arguments::{Sandbox, Up},
    control_plane::{ControlPlane, Options, interrupted},
};

/// Runs the command until SIGINT or SIGTERM; no process of a pod survives it.
pub async fn command(arguments: Sandbox) -> anyhow::Result<()> {
    let Sandbox::Up(up) = arguments;
    let plane = ControlPlane::start(options(&up)?).await?;
    plane.announce();
    interrupted().await;
    eprintln!("stopping");
    plane.stop().await;
    Ok(())
}

fn options(up: &Up) -> anyhow::Result<Options> {
    let mut options = Options::new(&up.dir, &up.node)?;
    options.port = up.port;
    options.with_operator = !up.without_operator;
    options.log_to_terminal = true;
    Ok(options)
}

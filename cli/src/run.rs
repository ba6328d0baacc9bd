//! `flotilla run`: apply manifests to a sandbox of their own and follow them to their goals.

use console::style;

use crate::{
    apply,
    arguments::Run,
    control_plane::{ControlPlane, Options, interrupted},
    follow, manifest,
};

/// Runs the command; the sandbox ends with it.
pub async fn command(arguments: Run) -> anyhow::Result<()> {
    let manifests = manifest::load(&arguments.files)?;
    let plane = ControlPlane::start(Options::for_one_run(&arguments.plane)?).await?;
    let outcome = tokio::select! {
        outcome = reach_goals(&plane, &manifests, &arguments) => outcome,
        () = interrupted() => Err(anyhow::anyhow!("interrupted; the state is kept in {}", plane.dir().display())),
    };
    plane.stop().await;
    outcome
}

async fn reach_goals(plane: &ControlPlane, manifests: &[manifest::Manifest], arguments: &Run) -> anyhow::Result<()> {
    plane.announce();
    apply::apply(plane.client(), manifests).await?;
    follow::follow(plane.client(), manifests, arguments.timeout).await?;
    eprintln!("{} every object reached its goal", style("done:").green().bold());
    if arguments.keep {
        eprintln!("staying up; Ctrl-C ends the sandbox");
        interrupted().await;
    }
    Ok(())
}

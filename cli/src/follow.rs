//! Live progress of what was applied: bars on a terminal, one line per change elsewhere.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use console::style;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use kube::{Api, Client, core::DynamicObject};

use crate::{
    apply,
    goal::{self, Outcome, Standing},
    manifest::Manifest,
};

/// How often objects are read.
const PERIOD: Duration = Duration::from_millis(300);
/// Steps between two lines of one object where there is no terminal.
const LINES_PER_RUN: u64 = 20;

struct Followed {
    label: String,
    api: Api<DynamicObject>,
    name: String,
    bar: ProgressBar,
    standing: Standing,
}

/// Waits until every manifest reached its goal; an error names each that did not and why.
pub async fn follow(client: &Client, manifests: &[Manifest], timeout: Duration) -> anyhow::Result<()> {
    let bars = MultiProgress::new();
    let is_terminal = console::user_attended_stderr();
    let width = manifests
        .iter()
        .map(|manifest| manifest.label().len())
        .max()
        .unwrap_or_default();
    let mut followed = Vec::new();
    for manifest in manifests {
        let bar = if is_terminal {
            bars.add(ProgressBar::new(0))
        } else {
            ProgressBar::hidden()
        };
        bar.set_style(plain_style()?);
        bar.set_prefix(format!("{:width$}", manifest.label()));
        followed.push(Followed {
            label: manifest.label(),
            api: apply::api_of(client, manifest).await?,
            name: manifest.object.metadata.name.clone().unwrap_or_default(),
            bar,
            standing: Standing::default(),
        });
    }
    let begun = Instant::now();
    loop {
        for one in &mut followed {
            refresh(one, is_terminal).await?;
        }
        if followed
            .iter()
            .all(|one| one.standing.outcome == Some(Outcome::Reached))
        {
            return Ok(());
        }
        let missed = describe(&followed, |one| one.standing.outcome == Some(Outcome::Missed));
        if !missed.is_empty() {
            bail!("not every object reached its goal:\n{missed}");
        }
        if begun.elapsed() > timeout {
            let open = describe(&followed, |one| one.standing.outcome.is_none());
            bail!(
                "after {} s these have not reached their goals:\n{open}",
                timeout.as_secs()
            );
        }
        tokio::time::sleep(PERIOD).await;
    }
}

fn describe(followed: &[Followed], choose: impl Fn(&Followed) -> bool) -> String {
    let line = |one: &Followed| format!("  {}: {} {}", one.label, one.standing.phase, one.standing.detail);
    followed
        .iter()
        .filter(|one| choose(one))
        .map(line)
        .collect::<Vec<_>>()
        .join("\n")
}

async fn refresh(one: &mut Followed, is_terminal: bool) -> anyhow::Result<()> {
    if one.standing.outcome.is_some() {
        return Ok(());
    }
    let object = match one.api.get_opt(&one.name).await {
        Ok(Some(object)) => object,
        Ok(None) => bail!("{} was deleted", one.label),
        // The API server may be under injected faults or restarting; the overall timeout bounds the wait.
        Err(error) => {
            tracing::warn!(object = one.label, %error, "cannot read");
            return Ok(());
        }
    };
    let standing = goal::standing(&object);
    if standing == one.standing {
        return Ok(());
    }
    if !is_terminal && is_worth_a_line(&one.standing, &standing) {
        let steps = standing
            .steps
            .map(|(step, total)| format!(" {step}/{total}"))
            .unwrap_or_default();
        eprintln!("{}  {}{steps}  {}", one.label, standing.phase, standing.detail);
    }
    draw(&one.bar, &standing)?;
    one.standing = standing;
    Ok(())
}

fn is_worth_a_line(old: &Standing, new: &Standing) -> bool {
    let part = |standing: &Standing| standing.steps.map(|(step, total)| step * LINES_PER_RUN / total.max(1));
    old.phase != new.phase || part(old) != part(new) || new.outcome.is_some()
}

fn draw(bar: &ProgressBar, standing: &Standing) -> anyhow::Result<()> {
    if let Some((step, total)) = standing.steps {
        bar.set_style(bar_style()?);
        bar.set_length(total);
        bar.set_position(step);
    }
    let phase = match standing.outcome {
        Some(Outcome::Reached) => style(&standing.phase).green(),
        Some(Outcome::Missed) => style(&standing.phase).red(),
        None => style(&standing.phase).cyan(),
    };
    bar.set_message(format!("{phase}  {}", standing.detail));
    if standing.outcome.is_some() {
        bar.abandon();
    }
    bar.tick();
    Ok(())
}

fn plain_style() -> anyhow::Result<ProgressStyle> {
    ProgressStyle::with_template("{prefix}  {wide_msg}").context("style of a line")
}

fn bar_style() -> anyhow::Result<ProgressStyle> {
    let style = ProgressStyle::with_template("{prefix}  {bar:24.cyan/dim} {pos:>3}/{len}  {wide_msg}")
        .context("style of a bar")?;
    Ok(style.progress_chars("━━─"))
}

//! An API server that conflicts, throttles, fails and drops its watches: the operator and the node converge all the same.

use std::time::Duration;

use flotilla_cli::{
    apply,
    control_plane::{ControlPlane, Options},
    follow,
};
use flotilla_sandbox::fault::{Failure, Rule};
use flotilla_tests::{program, sample};

const LIMIT: Duration = Duration::from_secs(300);

fn rule(failure: Failure, verbs: &[&str], probability: f64) -> Rule {
    let verbs = verbs.iter().map(|&verb| verb.to_owned()).collect();
    Rule {
        verbs,
        resources: Vec::new(),
        failure,
        probability,
        remaining: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sample_converges_under_conflicts_throttling_errors_and_dropped_watches() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let plane = ControlPlane::start(Options::for_tests(folder.path(), &program::path("flotilla-worker")?)).await?;
    let faults = plane.sandbox().faults();
    faults.set(
        7,
        vec![
            rule(Failure::Conflict, &["patch", "update"], 0.1),
            rule(Failure::TooManyRequests, &["create", "patch", "list"], 0.05),
            rule(Failure::Internal, &[], 0.05),
        ],
    );
    let manifests = sample::small()?;
    apply::apply(plane.client(), &manifests).await?;
    let dropping = async {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            plane.sandbox().drop_watches();
            plane.sandbox().compact();
        }
    };
    tokio::select! {
        outcome = follow::follow(plane.client(), &manifests, LIMIT) => outcome?,
        () = dropping => {}
    }
    assert!(
        faults.injected() > 50,
        "only {} requests were made to fail",
        faults.injected()
    );
    plane.stop().await;
    Ok(())
}

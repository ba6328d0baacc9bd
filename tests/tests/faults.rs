//! Worker, operator and node killed with `kill -9` at random points of a job in the sandbox: it completes all the same, and
//! on the CPU its weights are those of a run that nobody touched, bit for bit.

use flotilla_tests::{
    fleet::Fleet,
    story::{self, Kill, Outcome},
};

const KILLS: u32 = 3;

async fn run(kills: &[Kill]) -> anyhow::Result<Outcome> {
    let mut fleet = Fleet::in_sandbox().await?;
    let outcome = story::kills(&mut fleet, kills).await?;
    fleet.stop().await?;
    Ok(outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_kills_of_worker_operator_and_node_and_ends_bit_identical() -> anyhow::Result<()> {
    let untouched = run(&[]).await?;
    assert_eq!(untouched.restarts, 0);
    for (kill, restarts) in [
        (Kill::Workers, Some(KILLS)),
        (Kill::Operator, Some(0)),
        (Kill::Node, None),
    ] {
        let outcome = run(&[kill; KILLS as usize]).await?;
        assert!(
            outcome.weights == untouched.weights,
            "killing {kill:?} changed the weights"
        );
        if let Some(restarts) = restarts {
            assert_eq!(outcome.restarts, restarts, "restarts after killing {kill:?}");
        }
    }
    Ok(())
}

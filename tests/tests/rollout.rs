//! GRPO with rollout pods in the sandbox: the weights are those of a colocated run bit for bit, whatever befalls the pods.

use flotilla_tests::{fleet::Fleet, story};

#[tokio::test(flavor = "multi_thread")]
async fn rollout_pods_come_and_go_and_the_weights_are_those_of_a_colocated_run() -> anyhow::Result<()> {
    let mut fleet = Fleet::in_sandbox().await?;
    let colocated = story::kills(&mut fleet, &[]).await?;
    fleet.stop().await?;
    for disturbed in [false, true] {
        let fleet = Fleet::in_sandbox().await?;
        let separate = story::rollout_pods(&fleet, disturbed).await?;
        fleet.stop().await?;
        assert!(separate.weights == colocated.weights, "disturbed: {disturbed}");
        assert_eq!(separate.restarts, 0, "the learner never restarts");
    }
    Ok(())
}

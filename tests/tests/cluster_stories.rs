//! The stories on a real cluster (`make test-cluster`).

use flotilla_tests::{
    cluster::Cluster,
    fleet::Fleet,
    story::{self, Kill},
};

#[tokio::test(flavor = "multi_thread")]
async fn the_sample_goes_from_manifests_to_a_served_critic() -> anyhow::Result<()> {
    let cluster = Cluster::connect().await?;
    let fleet = Fleet::on(&cluster).await?;
    story::first_light(&fleet).await?;
    fleet.stop().await?;
    cluster.stop()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_rows_refused_weights_suspension_expiry_and_invalid_input() -> anyhow::Result<()> {
    let cluster = Cluster::connect().await?;
    let fleet = Fleet::on(&cluster).await?;
    story::invalid_input(&fleet).await?;
    story::bad_rows(&fleet).await?;
    fleet.stop().await?;
    // The two that follow use the same names of the sample.
    let fleet = Fleet::on(&cluster).await?;
    story::refused_weights(&fleet).await?;
    fleet.stop().await?;
    let fleet = Fleet::on(&cluster).await?;
    story::suspension(&fleet).await?;
    fleet.stop().await?;
    cluster.stop()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_kills_of_worker_operator_and_node_and_ends_bit_identical() -> anyhow::Result<()> {
    let cluster = Cluster::connect().await?;
    let mut fleet = Fleet::on(&cluster).await?;
    let untouched = story::kills(&mut fleet, &[]).await?;
    fleet.stop().await?;
    let mut fleet = Fleet::on(&cluster).await?;
    let killed = story::kills(&mut fleet, &[Kill::Workers, Kill::Operator, Kill::Node]).await?;
    fleet.stop().await?;
    assert!(killed.weights == untouched.weights, "kills changed the weights");
    assert_eq!(untouched.restarts, 0);
    let fleet = Fleet::on(&cluster).await?;
    let separate = story::rollout_pods(&fleet, true).await?;
    fleet.stop().await?;
    assert!(
        separate.weights == untouched.weights,
        "rollout pods changed the weights"
    );
    assert_eq!(separate.restarts, 0, "the learner never restarts");
    cluster.stop()
}

//! From `kubectl apply` to a served critic, in the sandbox.

use flotilla_tests::{fleet::Fleet, story};

#[tokio::test(flavor = "multi_thread")]
async fn the_sample_goes_from_manifests_to_a_served_critic() -> anyhow::Result<()> {
    let fleet = Fleet::in_sandbox().await?;
    story::first_light(&fleet).await?;
    fleet.stop().await
}

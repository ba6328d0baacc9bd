//! What befalls objects besides success, in the sandbox: bad rows, refused weights, suspension, expiry, invalid input.

use flotilla_tests::{fleet::Fleet, story};

#[tokio::test(flavor = "multi_thread")]
async fn bad_rows_are_counted_by_reason_and_too_many_fail_the_dataset() -> anyhow::Result<()> {
    let fleet = Fleet::in_sandbox().await?;
    story::bad_rows(&fleet).await?;
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_whose_digest_does_not_match_are_refused() -> anyhow::Result<()> {
    let fleet = Fleet::in_sandbox().await?;
    story::refused_weights(&fleet).await?;
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_job_frees_its_pod_and_resumes_where_it_was_and_expires() -> anyhow::Result<()> {
    let fleet = Fleet::in_sandbox().await?;
    story::suspension(&fleet).await?;
    fleet.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_input_is_refused_with_words_that_say_what_to_do() -> anyhow::Result<()> {
    let fleet = Fleet::in_sandbox().await?;
    story::invalid_input(&fleet).await?;
    fleet.stop().await
}

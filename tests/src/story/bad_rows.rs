//! Bad rows are counted by reason; too many fail the dataset for good.

use anyhow::Context;
use flotilla_api::{Dataset, dataset::DatasetPhase};
use flotilla_cli::manifest;
use kube::Api;

use super::LIMIT;
use crate::{
    fleet::Fleet,
    rows::{dataset, write_rows},
};

/// The same five rows twice: under a limit that three bad ones keep, and under one that they pass.
pub async fn bad_rows(fleet: &Fleet) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    write_rows(folder.path())?;
    let file = folder.path().join("story.yaml");
    let datasets: Api<Dataset> = Api::default_namespaced(fleet.client().await?);

    let tolerant = fleet.adapt(manifest::parse(&file, &dataset("tolerant", 3))?);
    fleet.reach(&tolerant, LIMIT).await?;
    let report = datasets
        .get("tolerant")
        .await?
        .status
        .and_then(|status| status.report)
        .context("report")?;
    assert_eq!((report.rows_in, report.rows_out, report.bad_records), (5, 2, 3));
    let reasons: Vec<_> = report
        .bad_by_reason
        .iter()
        .map(|(reason, count)| (reason.as_str(), *count))
        .collect();
    assert_eq!(reasons, [("corruptImage", 1), ("emptyText", 1), ("unknownLabel", 1)]);

    let strict = fleet.adapt(manifest::parse(&file, &dataset("strict", 2))?);
    let refusal = fleet.reach(&strict, LIMIT).await;
    let error = refusal.err().context("too many bad rows are an error")?;
    let status = datasets.get("strict").await?.status.context("status")?;
    assert_eq!(
        (status.phase, status.restarts),
        (DatasetPhase::Failed, 0),
        "another attempt would end the same way"
    );
    assert!(
        status.message.contains("row 1"),
        "the message names the first rows: {}",
        status.message
    );
    assert!(
        error.to_string().contains(&status.message),
        "the follower shows it: {error:#}"
    );
    Ok(())
}

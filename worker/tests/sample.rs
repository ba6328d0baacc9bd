//! The sample's data and the worker's templates say the same.

#![allow(clippy::expect_used, reason = "helpers of tests")]

use std::path::Path;

use flotilla_artifacts::{ArtifactError, source::Source};
use flotilla_worker::prompt::PromptTemplate;

/// The warm-up teaches the form of a verdict on rows that hold the finished text; GRPO renders the template.
#[test]
fn warm_up_rows_of_the_digits_hold_exactly_what_critic_short_renders() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples/critic-digits/data");
    let source = Source::open(&data.join("instruction-train.parquet")).expect("the sample's data");
    let template = PromptTemplate::builtin("critic-short").expect("a shipped template");
    let mut compared = 0;
    source
        .for_each::<ArtifactError>(|_, row| {
            let columns = row.expect("a sound row").columns;
            let text = columns["question"].as_text().expect("text");
            let Some((question, rest)) = text.split_once("\nResponse 1: ") else {
                return Ok(());
            };
            let first = rest.lines().next().expect("a first response");
            let second = rest
                .lines()
                .find_map(|line| line.strip_prefix("Response 2: "))
                .expect("a second response");
            assert_eq!(text, template.render(question, Some([first, second])).expect("renders"));
            compared += 1;
            Ok(())
        })
        .expect("readable data");
    assert_eq!(compared, 1317, "half of the rows are critic rows");
}

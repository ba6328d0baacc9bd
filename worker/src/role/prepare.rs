//! Role `prepare`: rows on a user's disk to a verified dataset of canonical rows.
//!
//! Bad rows are counted by reason and left out; one more than `maxBadRecords` fails the dataset for good, with a message
//! that names the first of them. A dataset that an earlier attempt published from the same conversion is taken as it is.

use std::{collections::HashSet, path::Path};

use flotilla_api::{
    conversion::{Conversion, Format, ResponseOrder, Template},
    progress::{BadRecord, ConversionReport, Stage},
    role::Prepare,
};
use flotilla_artifacts::{
    ArtifactError,
    convert::{Converted, Order, Reason, Rules, Task, convert, expand, shuffle_labels},
    dataset::{Dataset, DatasetWriter, Row, read_description},
    digest::digest,
    picture::Picture,
    publish::{is_stable, remove_published},
    source::{RowResult, Source},
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{context::Context, error::WorkerError, prompt::PromptTemplate};

/// Bad rows that the report names.
const NAMED_BAD_RECORDS: usize = 10;
/// Bad rows that the message of a failed dataset names.
const QUOTED_BAD_RECORDS: usize = 3;
/// Rows between two updates of the progress.
const REPORT_EVERY: u64 = 64;

/// Why a dataset cannot be prepared.
#[derive(Debug, thiserror::Error)]
enum PrepareError {
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error("{0}")]
    Invalid(String),
    #[error("stopped after {0} rows")]
    Stopped(u64),
}

impl From<PrepareError> for WorkerError {
    fn from(error: PrepareError) -> Self {
        let permanent = match &error {
            PrepareError::Artifact(artifact) => artifact.is_permanent(),
            PrepareError::Invalid(_) => true,
            PrepareError::Stopped(_) => return Self::Suspended { step: 0 },
        };
        match error {
            PrepareError::Invalid(what) => Self::invalid(what),
            other if permanent => Self::permanent("failed to prepare the dataset", other),
            other => Self::retryable("failed to prepare the dataset", other),
        }
    }
}

/// What is stored beside the rows: how they were made and what was counted.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Description {
    /// `sha256:<hex>` of source and conversion as the role config names them.
    made_from: String,
    duplicates: u64,
    report: ConversionReport,
}

/// Runs the role to its end.
pub async fn run(context: Context, spec: Prepare, shutdown: CancellationToken) -> Result<(), WorkerError> {
    tokio::task::spawn_blocking(move || prepare(&context, &spec, &shutdown))
        .await
        .map_err(|error| WorkerError::retryable("the conversion thread ended", error))?
}

fn prepare(context: &Context, spec: &Prepare, shutdown: &CancellationToken) -> Result<(), WorkerError> {
    let source = context.volumes.resolve(&spec.source_uri)?;
    let output = context.volumes.resolve(&spec.output_uri)?;
    let made_from = digest(format!("{} {}", spec.source_uri, json(&spec.conversion)).as_bytes());
    if let Some(description) = published_before(&output, &made_from)? {
        return complete(context, spec, &output, description);
    }
    context
        .progress
        .enter(Stage::Running, format!("converting {}", spec.source_uri));
    let template = spec
        .conversion
        .template
        .clone()
        .unwrap_or_else(|| default_template(&spec.conversion.format));
    let job = Job {
        context,
        rules: rules(&spec.conversion)?,
        max_bad_records: spec.conversion.max_bad_records,
        template: PromptTemplate::load(&template, &context.volumes)?,
        shutdown,
    };
    let description = job.write(&source, &output, made_from)?;
    complete(context, spec, &output, description)
}

/// The description of a stable dataset made from the same source and conversion; any other is removed.
fn published_before(output: &Path, made_from: &str) -> Result<Option<Description>, PrepareError> {
    if !is_stable(output) {
        return Ok(None);
    }
    if let Ok(description) = read_description::<Description>(output)
        && description.made_from == made_from
    {
        return Ok(Some(description));
    }
    remove_published(output)?;
    Ok(None)
}

/// Verifies what lies on disk and tells its digest.
fn complete(context: &Context, spec: &Prepare, output: &Path, description: Description) -> Result<(), WorkerError> {
    let dataset = Dataset::open(output, None).map_err(PrepareError::from)?;
    let Description { duplicates, report, .. } = description;
    let report = ConversionReport {
        digest: dataset.digest,
        uri: spec.output_uri.clone(),
        ..report
    };
    let message = format!(
        "{} rows read, {} prompts written, {} rows left out",
        report.rows_in, report.rows_out, report.bad_records
    );
    context.progress.update(|progress| {
        progress.step = u32::try_from(report.rows_in).unwrap_or(u32::MAX);
        progress.total_steps = progress.step;
        progress.metrics.insert("data/duplicates".into(), duplicates as f64);
        progress.metrics.insert("data/bytes".into(), dataset.bytes as f64);
        progress.conversion = Some(report);
    });
    context.progress.enter(Stage::Completed, message);
    Ok(())
}

/// One conversion.
struct Job<'a> {
    context: &'a Context,
    rules: Rules,
    max_bad_records: u64,
    template: PromptTemplate,
    shutdown: &'a CancellationToken,
}

impl Job<'_> {
    fn write(&self, source: &Path, output: &Path, made_from: String) -> Result<Description, PrepareError> {
        let mut writer = DatasetWriter::begin(output)?;
        let mut report = ConversionReport::default();
        let mut rows = self.read(source, &writer, &mut report)?;
        if let Task::Preference {
            shuffle_labels: true, ..
        } = self.rules.task
        {
            shuffle_labels(&mut rows, self.rules.seed);
        }
        let mut seen = HashSet::new();
        let mut duplicates = 0;
        for converted in &rows {
            match expand(converted, self.rules.task, &|question, responses| {
                self.render(question, responses)
            }) {
                Ok(prompts) => {
                    duplicates += u64::from(!prompts.first().is_none_or(|row| seen.insert(identity(row))));
                    for row in &prompts {
                        writer.push(row)?;
                        count(&mut report, row);
                    }
                }
                Err(reason) => bad(&mut report, converted.source_row, &reason),
            }
        }
        self.refuse_too_many(&report)?;
        if report.rows_out == 0 {
            let rows_in = report.rows_in;
            return Err(PrepareError::Invalid(format!(
                "none of the {rows_in} source rows gives a prompt"
            )));
        }
        report.images = writer.image_count()?;
        let description = Description {
            made_from,
            duplicates,
            report,
        };
        writer.publish(&description)?;
        Ok(description)
    }

    /// Understands every row of the source and stores its images.
    fn read(
        &self,
        path: &Path,
        writer: &DatasetWriter,
        report: &mut ConversionReport,
    ) -> Result<Vec<Converted>, PrepareError> {
        let source = Source::open(path)?;
        let mut rows = Vec::new();
        source.for_each(|index, row| {
            match self.understand(&source, row, writer) {
                Ok(row) => rows.push(row),
                Err(Failure::Row(reason)) => bad(report, index, &reason),
                Err(Failure::Disk(error)) => return Err(PrepareError::from(error)),
            }
            report.rows_in = index + 1;
            if report.rows_in.is_multiple_of(REPORT_EVERY) {
                self.tell(report, rows.len());
            }
            if self.shutdown.is_cancelled() {
                return Err(PrepareError::Stopped(report.rows_in));
            }
            // Far above the limit nothing more is learnt from the rest of a source that may be long.
            if report.bad_records > self.max_bad_records.saturating_add(1000) {
                self.refuse_too_many(report)?;
            }
            Ok(())
        })?;
        Ok(rows)
    }

    fn understand(&self, source: &Source, row: RowResult, writer: &DatasetWriter) -> Result<Converted, Failure> {
        let row = row.map_err(|reason| Failure::Row(Reason::Unreadable(reason)))?;
        let load = |name: &str| source.read_relative(name, self.rules.max_image_bytes);
        let mut stored: Result<(), ArtifactError> = Ok(());
        let mut keep = |picture: &Picture, bytes: &[u8]| {
            if stored.is_ok() {
                stored = writer.add_image(picture, bytes);
            }
        };
        let converted = convert(&row, &self.rules, &load, &mut keep).map_err(Failure::Row)?;
        stored.map_err(Failure::Disk)?;
        Ok(converted)
    }

    fn render(&self, question: &str, responses: &[String; 2]) -> Result<String, String> {
        let pair = match self.rules.task {
            Task::Preference { .. } => Some([responses[0].as_str(), responses[1].as_str()]),
            Task::ExactMatch | Task::Instruction => None,
        };
        self.template
            .render(question, pair)
            .map_err(|error| crate::error::chain(&error))
    }

    fn tell(&self, report: &ConversionReport, understood: usize) {
        self.context.progress.update(|progress| {
            progress.step = u32::try_from(report.rows_in).unwrap_or(u32::MAX);
            progress.metrics.insert("data/rows".into(), understood as f64);
            progress.conversion = Some(report.clone());
        });
    }

    fn refuse_too_many(&self, report: &ConversionReport) -> Result<(), PrepareError> {
        if report.bad_records <= self.max_bad_records {
            return Ok(());
        }
        self.tell(report, 0);
        let first: Vec<String> = report
            .first_bad
            .iter()
            .take(QUOTED_BAD_RECORDS)
            .map(|bad| format!("row {}: {}", bad.row, bad.reason))
            .collect();
        Err(PrepareError::Invalid(format!(
            "{} of {} rows are bad, maxBadRecords is {}; first: {}",
            report.bad_records,
            report.rows_in,
            self.max_bad_records,
            first.join("; ")
        )))
    }
}

/// Why a row did not become a canonical one.
enum Failure {
    Row(Reason),
    Disk(ArtifactError),
}

fn bad(report: &mut ConversionReport, row: u64, reason: &Reason) {
    report.bad_records += 1;
    *report.bad_by_reason.entry(reason.kind().to_owned()).or_default() += 1;
    if report.first_bad.len() < NAMED_BAD_RECORDS {
        let reason = reason.to_string();
        report.first_bad.push(BadRecord { row, reason });
    }
}

fn count(report: &mut ConversionReport, row: &Row) {
    report.rows_out += 1;
    if let Some(label) = row.label {
        *report.labels.entry(label.as_str().to_owned()).or_default() += 1;
    }
}

/// What makes two rows the same: everything but their names.
fn identity(row: &Row) -> String {
    let responses = row.responses.clone().map(|mut pair| {
        pair.sort();
        pair
    });
    json(&(&row.images, &row.question, responses, &row.answer, &row.response))
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn default_template(format: &Format) -> Template {
    let name = if format.preference.is_some() {
        "critic-short"
    } else {
        "plain"
    };
    Template {
        builtin: Some(name.to_owned()),
        ..Template::default()
    }
}

fn rules(conversion: &Conversion) -> Result<Rules, PrepareError> {
    let format = &conversion.format;
    let task = match (&format.preference, &format.exact_match, &format.instruction) {
        (Some(preference), None, None) => Task::Preference {
            order: match preference.order {
                ResponseOrder::Seeded => Order::Seeded,
                ResponseOrder::Both => Order::Both,
                ResponseOrder::ChosenFirst => Order::ChosenFirst,
            },
            shuffle_labels: preference.shuffle_labels,
        },
        (None, Some(_), None) => Task::ExactMatch,
        (None, None, Some(_)) => Task::Instruction,
        _ => {
            let what = "conversion.format takes exactly one of preference, exactMatch and instruction";
            return Err(PrepareError::Invalid(what.into()));
        }
    };
    Ok(Rules {
        task,
        columns: conversion.columns.clone(),
        seed: conversion.seed,
        max_image_bytes: conversion.limits.max_image_bytes,
        max_image_pixels: conversion.limits.max_image_pixels,
        max_text_characters: conversion.limits.max_text_characters,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Cursor, path::PathBuf};

    use flotilla_api::{
        conversion::{ExactMatch, Preference},
        names::exit,
        role::Owner,
    };

    use super::*;
    use crate::{device::Wanted, progress::ProgressCell, uri::Volumes};

    fn png(shade: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        image::RgbImage::from_pixel(4, 4, image::Rgb([shade; 3]))
            .write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png)
            .expect("png");
        bytes
    }

    struct Case {
        dir: tempfile::TempDir,
        context: Context,
        spec: Prepare,
    }

    /// Three good pairs, then a corrupt image, an empty response and an unknown label.
    fn case(max_bad_records: u64) -> Case {
        let dir = tempfile::tempdir().expect("temp dir");
        let source = dir.path().join("source");
        fs::create_dir(&source).expect("create");
        fs::write(source.join("broken.png"), &png(0)[..30]).expect("write");
        let mut lines = String::new();
        for shade in 1..4 {
            fs::write(source.join(format!("{shade}.png")), png(shade)).expect("write");
            let row =
                serde_json::json!({"image": format!("{shade}.png"), "question": "q?", "chosen": "a", "rejected": "b"});
            lines.push_str(&format!("{row}\n"));
        }
        for row in [
            serde_json::json!({"image": "broken.png", "question": "q?", "chosen": "a", "rejected": "b"}),
            serde_json::json!({"image": "1.png", "question": "q?", "chosen": "", "rejected": "b"}),
            serde_json::json!({"image": "1.png", "question": "q?", "responses": ["a", "b"], "label": "3"}),
        ] {
            lines.push_str(&format!("{row}\n"));
        }
        fs::write(source.join("rows.jsonl"), lines).expect("write");
        let context = Context {
            owner: Owner {
                kind: "Dataset".into(),
                namespace: "n".into(),
                name: "d".into(),
                uid: "u".into(),
            },
            progress: ProgressCell::default(),
            volumes: Volumes::parse(&[format!("data={}", dir.path().display())]).expect("volumes"),
            token: None,
            device: Wanted::Cpu,
        };
        let format = Format {
            preference: Some(Preference {
                order: ResponseOrder::Both,
                shuffle_labels: false,
            }),
            ..Format::default()
        };
        let spec = Prepare {
            source_uri: "pvc://data/source".into(),
            output_uri: "pvc://data/out/d-1".into(),
            conversion: Conversion {
                format,
                max_bad_records,
                ..Conversion::default()
            },
        };
        Case { dir, context, spec }
    }

    fn run_case(case: &Case) -> Result<(), WorkerError> {
        prepare(&case.context, &case.spec, &CancellationToken::new())
    }

    fn output(case: &Case) -> PathBuf {
        case.dir.path().join("out/d-1")
    }

    #[test]
    fn bad_rows_up_to_the_limit_are_counted_by_reason_and_left_out() {
        let case = case(3);
        run_case(&case).expect("prepared");
        let report = case.context.progress.snapshot().conversion.expect("report");
        assert_eq!((report.rows_in, report.rows_out, report.bad_records), (6, 6, 3));
        let reasons: Vec<_> = report.bad_by_reason.keys().map(String::as_str).collect();
        assert_eq!(reasons, vec!["corruptImage", "emptyText", "unknownLabel"]);
        assert_eq!(
            report.first_bad.iter().map(|bad| bad.row).collect::<Vec<_>>(),
            vec![3, 4, 5]
        );
        assert_eq!((report.labels["1"], report.labels["2"], report.images), (3, 3, 3));
        let dataset = Dataset::open(&output(&case), Some(&report.digest)).expect("open");
        assert_eq!(dataset.rows.len(), 6);
        assert!(
            dataset.rows[0].prompt.contains("Response 1: "),
            "{}",
            dataset.rows[0].prompt
        );
    }

    #[test]
    fn one_bad_row_more_fails_for_good_and_names_the_first_rows() {
        let case = case(2);
        let error = run_case(&case).expect_err("too many");
        assert_eq!(error.exit_code(), exit::PERMANENT);
        let message = error.to_string();
        assert!(message.contains("3 of 6 rows are bad, maxBadRecords is 2"), "{message}");
        assert!(message.contains("row 3: image cannot be decoded"), "{message}");
        assert!(message.contains("row 4: chosen is empty"), "{message}");
        assert!(!output(&case).exists());
        assert_eq!(
            case.context.progress.snapshot().conversion.expect("report").bad_records,
            3
        );
    }

    #[test]
    fn a_second_attempt_takes_what_the_first_published() {
        let case = case(3);
        run_case(&case).expect("first");
        let first = case.context.progress.snapshot().conversion;
        fs::remove_dir_all(case.dir.path().join("source")).expect("remove");
        run_case(&case).expect("second");
        assert_eq!(case.context.progress.snapshot().conversion, first);
    }

    #[test]
    fn another_conversion_replaces_what_was_published() {
        let mut case = case(3);
        run_case(&case).expect("first");
        case.spec.conversion.format.preference = Some(Preference::default());
        run_case(&case).expect("second");
        let report = case.context.progress.snapshot().conversion.expect("report");
        assert_eq!(report.rows_out, 3);
    }

    #[test]
    fn a_source_without_a_single_good_row_fails_for_good() {
        let mut case = case(9);
        case.spec.conversion.format = Format {
            exact_match: Some(ExactMatch {}),
            ..Format::default()
        };
        let error = run_case(&case).expect_err("no rows");
        assert!(error.to_string().contains("none of the 6 source rows"), "{error}");
    }

    #[test]
    fn a_source_that_is_not_there_is_named() {
        let mut case = case(0);
        case.spec.source_uri = "pvc://data/nowhere.parquet".into();
        let error = crate::error::chain(&run_case(&case).expect_err("missing"));
        assert!(error.contains("nowhere.parquet"), "{error}");
    }
}

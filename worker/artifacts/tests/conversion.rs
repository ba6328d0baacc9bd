//! From rows on a user's disk to a verified dataset.

#![allow(clippy::expect_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::{collections::BTreeMap, fs, io::Cursor, path::Path};

use base64::{Engine, engine::general_purpose::STANDARD};
use flotilla_artifacts::{
    ArtifactError,
    convert::{Body, Converted, Order, Reason, Rules, Task, convert, expand, shuffle_labels},
    dataset::{Dataset, DatasetWriter, Label},
    source::{Source, SourceRow, Value},
};

fn png(shade: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let image = image::RgbImage::from_pixel(4, 4, image::Rgb([shade; 3]));
    image
        .write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png)
        .expect("png");
    bytes
}

fn rules(task: Task) -> Rules {
    Rules {
        task,
        columns: BTreeMap::new(),
        seed: 7,
        max_image_bytes: 10_000,
        max_image_pixels: 100,
        max_text_characters: 20,
    }
}

fn preference(order: Order) -> Task {
    Task::Preference {
        order,
        shuffle_labels: false,
    }
}

fn row(index: u64, columns: &[(&str, Value)]) -> SourceRow {
    SourceRow {
        index,
        columns: columns
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect(),
    }
}

fn text(text: &str) -> Value {
    Value::Text(text.into())
}

fn pair(index: u64) -> SourceRow {
    row(
        index,
        &[
            ("image", Value::Bytes(png(1))),
            ("question", text("q?")),
            ("chosen", text("good")),
            ("rejected", text("bad")),
        ],
    )
}

fn convert_one(row: &SourceRow, rules: &Rules) -> Result<Converted, Reason> {
    convert(row, rules, &|name| Err(format!("no file {name}")), &mut |_, _| {})
}

fn render(question: &str, responses: &[String; 2]) -> Result<String, String> {
    Ok(format!("{question}|{}|{}", responses[0], responses[1]))
}

fn with(column: &str, value: Value) -> SourceRow {
    let mut row = pair(3);
    row.columns.insert(column.into(), value);
    row
}

#[test]
fn every_kind_of_bad_row_is_named() {
    let rules = rules(preference(Order::Seeded));
    let large = {
        let mut bytes = Vec::new();
        image::RgbImage::new(11, 10)
            .write_to(&mut Cursor::new(&mut bytes), image::ImageFormat::Png)
            .expect("png");
        bytes
    };
    let cases = [
        (with("image", Value::Null), "missingImage"),
        (with("image", text("no/such.png")), "missingImage"),
        (with("image", Value::Bytes(b"not an image".to_vec())), "corruptImage"),
        (with("image", text("data:image/png;base64,???")), "corruptImage"),
        (with("image", Value::Bytes(large)), "imageTooLarge"),
        (with("chosen", text(" ")), "emptyText"),
        (with("chosen", Value::Null), "missingColumn"),
        (with("rejected", text("good ")), "equalResponses"),
        (with("rejected", text(&"x".repeat(21))), "textTooLong"),
    ];
    for (row, kind) in cases {
        let reason = convert_one(&row, &rules).expect_err(kind);
        assert_eq!(reason.kind(), kind, "{reason}");
    }
    assert!(convert_one(&pair(0), &rules).is_ok());
}

#[test]
fn a_label_may_stand_for_chosen_and_rejected() {
    let labelled = |label: &str| {
        row(
            0,
            &[
                ("image", Value::Bytes(png(1))),
                ("question", text("q?")),
                ("responses", Value::List(vec![text("x"), text("y")])),
                ("label", text(label)),
            ],
        )
    };
    let rules = rules(preference(Order::ChosenFirst));
    let body = |label: &str| convert_one(&labelled(label), &rules).map(|row| row.body);
    let expect = |responses: [&str; 2], label| {
        Ok(Body::Preference {
            responses: responses.map(str::to_owned),
            label,
        })
    };
    assert_eq!(body("1"), expect(["x", "y"], Label::First));
    assert_eq!(body("2"), expect(["y", "x"], Label::First));
    assert_eq!(body("tie"), expect(["x", "y"], Label::Tie));
    assert_eq!(body("3"), Err(Reason::UnknownLabel("3".into())));
}

#[test]
fn a_drawn_order_depends_on_seed_and_row_alone_and_is_balanced() {
    let rules = rules(preference(Order::Seeded));
    let label = |index: u64| match convert_one(&pair(index), &rules).expect("row").body {
        Body::Preference { responses, label } => {
            assert_eq!(responses[usize::from(label == Label::Second)], "good");
            label
        }
        other => panic!("{other:?}"),
    };
    let labels: Vec<_> = (0..400).map(label).collect();
    let first = labels.iter().filter(|label| **label == Label::First).count();
    assert!((150..250).contains(&first), "{first} of 400 have the better one first");
    assert_eq!(label(399), labels[399]);
}

#[test]
fn both_orders_are_two_prompts_of_one_pair_with_opposite_labels() {
    let task = preference(Order::Both);
    let converted = convert_one(&pair(5), &rules(task)).expect("row");
    let rows = expand(&converted, task, &render).expect("rows");
    let [first, second] = rows.as_slice() else {
        panic!("{rows:?}")
    };
    assert_eq!(first.source_row, second.source_row);
    assert_eq!(first.label.map(Label::swapped), second.label);
    for row in &rows {
        let better = usize::from(row.label == Some(Label::Second));
        assert_eq!(row.responses.as_ref().expect("responses")[better], "good");
    }
    assert_ne!(first.prompt, second.prompt);
}

#[test]
fn shuffled_labels_keep_their_counts_and_say_nothing_about_the_pair() {
    let rules = rules(preference(Order::Seeded));
    let mut rows: Vec<_> = (0..400)
        .map(|index| convert_one(&pair(index), &rules).expect("row"))
        .collect();
    let labels = |rows: &[Converted]| -> Vec<Label> {
        rows.iter()
            .map(|row| match row.body {
                Body::Preference { label, .. } => label,
                _ => panic!("not a pair"),
            })
            .collect()
    };
    let before = labels(&rows);
    shuffle_labels(&mut rows, 7);
    let after = labels(&rows);
    let count = |labels: &[Label]| labels.iter().filter(|label| **label == Label::First).count();
    assert_eq!(count(&before), count(&after));
    let same = before.iter().zip(&after).filter(|(a, b)| a == b).count();
    assert!((150..250).contains(&same), "{same} of 400 labels are still right");
}

#[test]
fn columns_may_have_other_names_in_the_source() {
    let mut rules = rules(Task::ExactMatch);
    rules.columns = [("answer".to_owned(), "gold".to_owned())].into();
    let row = row(
        0,
        &[
            ("image", Value::List(vec![Value::Bytes(png(1)), Value::Bytes(png(2))])),
            ("question", text("q?")),
            ("gold", text("7")),
        ],
    );
    let converted = convert_one(&row, &rules).expect("row");
    assert_eq!(converted.body, Body::ExactMatch("7".into()));
    assert_eq!(converted.images.len(), 2);
}

#[test]
fn every_way_to_write_an_image_gives_the_same_picture() {
    let dir = tempfile::tempdir().expect("temp dir");
    fs::write(dir.path().join("a.png"), png(9)).expect("write");
    let base64 = STANDARD.encode(png(9));
    let lines = [
        serde_json::json!({"image": "a.png"}),
        serde_json::json!({"image": {"bytes": base64, "path": null}}),
        serde_json::json!({"image": {"bytes": null, "path": "a.png"}}),
        serde_json::json!({"image": format!("data:image/png;base64,{base64}")}),
        serde_json::json!({"image": [base64]}),
    ];
    let mut file = String::new();
    for mut line in lines {
        line["question"] = "q".into();
        line["response"] = "r".into();
        file.push_str(&format!("{line}\n"));
    }
    fs::write(dir.path().join("rows.jsonl"), file).expect("write");
    let source = Source::open(dir.path()).expect("open");
    let mut names = Vec::new();
    source
        .for_each::<ArtifactError>(|_, row| {
            let load = |name: &str| source.read_relative(name, 10_000);
            let row = convert(&row.expect("row"), &rules(Task::Instruction), &load, &mut |_, _| {}).expect("converts");
            names.extend(row.images);
            Ok(())
        })
        .expect("read");
    assert_eq!(names.len(), 5);
    assert!(names.iter().all(|name| *name == names[0]), "{names:?}");
}

fn write_dataset(target: &Path) -> String {
    let task = preference(Order::Both);
    let mut writer = DatasetWriter::begin(target).expect("begin");
    for index in 0..3 {
        let mut pictures = Vec::new();
        let row = convert(
            &pair(index),
            &rules(task),
            &|_| Err(String::new()),
            &mut |picture, bytes| {
                pictures.push((picture.clone(), bytes.to_vec()));
            },
        )
        .expect("row");
        for (picture, bytes) in &pictures {
            writer.add_image(picture, bytes).expect("image");
        }
        for row in expand(&row, task, &render).expect("rows") {
            writer.push(&row).expect("push");
        }
    }
    assert_eq!(writer.image_count().expect("count"), 1);
    writer.publish(&serde_json::json!({"rows": 6})).expect("publish").digest
}

#[test]
fn a_dataset_is_read_back_as_it_was_written_and_the_same_rows_have_the_same_digest() {
    let dir = tempfile::tempdir().expect("temp dir");
    let digest = write_dataset(&dir.path().join("a"));
    assert_eq!(digest, write_dataset(&dir.path().join("b")));
    let dataset = Dataset::open(&dir.path().join("a"), Some(&digest)).expect("open");
    assert_eq!(dataset.rows.len(), 6);
    assert_eq!(dataset.image(&dataset.rows[0].images[0]).expect("image"), png(1));
    assert_eq!(dataset.rows[0].target(), dataset.rows[0].label.map(Label::as_str));
}

#[test]
fn a_dataset_with_a_changed_row_is_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("a");
    let digest = write_dataset(&path);
    let rows = fs::read_to_string(path.join("rows.jsonl")).expect("read");
    fs::write(path.join("rows.jsonl"), rows.replacen("\"1\"", "\"2\"", 1)).expect("write");
    let error = Dataset::open(&path, Some(&digest)).expect_err("changed").to_string();
    assert!(error.contains("rows.jsonl has sha256"), "{error}");
    assert!(matches!(
        Dataset::open(dir.path(), Some(&digest)),
        Err(ArtifactError::NotStable { .. })
    ));
}

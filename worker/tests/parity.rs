//! The commands for people on tiny checkpoints, against what transformers and peft compute for the same files.
//!
//! `tests/parity/README.md` says where the fixtures come from; the model crate's own tests look inside the model.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "../model/tests/parity/stored.rs"]
mod stored;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Command,
};

use candle_core::{Device, Tensor};
use serde_json::Value;
use stored::{check, copy_of, fixtures, read_json, worst};

/// Largest difference of a normalized pixel that was made of the byte that the reference has.
const PIXEL: f32 = 2e-6;

type Tensors = HashMap<String, Tensor>;

struct Family {
    name: &'static str,
    mean: [f64; 3],
    std: [f64; 3],
}

const FAMILIES: [Family; 2] = [
    Family {
        name: "qwen2.5-vl",
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
    },
    Family {
        name: "llava-onevision",
        mean: [0.5; 3],
        std: [0.5; 3],
    },
];

impl Family {
    fn checkpoint(&self) -> PathBuf {
        fixtures().join(format!("tiny-{}", self.name))
    }

    fn document(&self) -> Value {
        read_json(&fixtures().join(format!("cases/{}.json", self.name)))
    }

    fn stored(&self, case: &Value) -> Tensors {
        let name = case["name"].as_str().unwrap();
        load(&fixtures().join(format!("cases/{}.{name}.safetensors", self.name)))
    }

    /// The checkpoint with the template of a case.
    fn prepared(&self, case: &Value) -> tempfile::TempDir {
        let dir = copy_of(&self.checkpoint());
        if case["template"] == "older" {
            std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
            let template = fixtures().join("llava-onevision-older.chat_template.json");
            std::fs::copy(template, dir.path().join("chat_template.json")).unwrap();
        }
        dir
    }

    /// Normalized values of stored bytes, `[.., 3, .., side, side]` with the channels on axis 1.
    fn normalized(&self, bytes: &Tensor) -> Vec<f32> {
        let plane = bytes.dims()[2..].iter().product::<usize>();
        let bytes: Vec<u8> = bytes.flatten_all().unwrap().to_vec1().unwrap();
        let value = |(at, byte): (usize, &u8)| {
            let channel = at / plane % 3;
            ((f64::from(*byte) / 255.0 - self.mean[channel]) / self.std[channel]) as f32
        };
        bytes.iter().enumerate().map(value).collect()
    }
}

fn load(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn messages(case: &Value) -> PathBuf {
    fixtures().join("cases").join(case["messages"].as_str().unwrap())
}

/// What the command prints; it must succeed.
fn worker(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_flotilla-worker"))
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// The file that `logits` writes.
fn logits(model: &Path, messages: &Path, more: &[&str]) -> Tensors {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let (model, messages, path) = (
        model.to_str().unwrap(),
        messages.to_str().unwrap(),
        out.to_str().unwrap(),
    );
    let mut arguments = vec![
        "logits",
        "--model",
        model,
        "--messages",
        messages,
        "--out",
        path,
        "--dtype",
        "f32",
    ];
    arguments.extend(more);
    worker(&arguments);
    load(&out)
}

fn integers(tensor: &Tensor) -> Vec<i64> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn logits_and_inputs_of_every_conversation_are_those_of_the_reference() {
    for family in &FAMILIES {
        for case in family.document()["cases"].as_array().unwrap() {
            let (stored, name) = (family.stored(case), format!("{} {}", family.name, case["name"]));
            let found = logits(family.prepared(case).path(), &messages(case), &[]);
            for key in [
                "input_ids",
                "position_ids",
                "image_grid_thw",
                "video_grid_thw",
                "image_sizes",
            ] {
                let of = |tensors: &Tensors| {
                    tensors
                        .get(key)
                        .map(|tensor| (tensor.dims().to_vec(), integers(tensor)))
                };
                assert_eq!(of(&found), of(&stored), "{name}: {key}");
            }
            let seconds = found
                .get("second_per_grid_ts")
                .map(|tensor| tensor.to_vec1::<f32>().unwrap());
            let expected = case["second_per_grid_ts"].as_array();
            let expected = expected.map(|list| list.iter().map(|v| v.as_f64().unwrap() as f32).collect());
            assert_eq!(seconds, expected, "{name}");
            compare_pixels(family, case, &stored, &found);
            check(&stored, "logits", &found["logits"], &name);
        }
    }
}

/// Each visual's values, however the file lays the visuals of a kind together.
fn compare_pixels(family: &Family, case: &Value, stored: &Tensors, found: &Tensors) {
    let mut parts = HashMap::from([("pixel_values", 0), ("pixel_values_videos", 0)]);
    for (number, visual) in case["visuals"].as_array().unwrap().iter().enumerate() {
        let video = matches!(visual["kind"].as_str().unwrap(), "video" | "frames");
        let key = if video { "pixel_values_videos" } else { "pixel_values" };
        let mut bytes = stored[&format!("pixels.{number}")].clone();
        if visual["kind"] == "image" {
            bytes = Tensor::cat(&[&bytes, &bytes], 2).unwrap();
        }
        let expected = family.normalized(&bytes);
        let all: Vec<f32> = found[key].flatten_all().unwrap().to_vec1().unwrap();
        // LLaVA-OneVision fills each visual up to the most squares of one; Qwen2.5-VL lays patches end to end.
        let stride = match found[key].dims() {
            [_, most, rest @ ..] if rest.len() == 3 => most * rest.iter().product::<usize>(),
            _ => expected.len(),
        };
        let start = parts.get_mut(key).unwrap();
        let own = &all[*start..*start + expected.len()];
        *start += stride;
        let device = &Device::Cpu;
        let difference = worst(
            &Tensor::new(own, device).unwrap(),
            &Tensor::new(expected, device).unwrap(),
        );
        assert!(
            difference <= PIXEL,
            "{} {}: visual {number}: {difference}",
            family.name,
            case["name"]
        );
    }
    for (key, end) in parts {
        let size = found.get(key).map_or(0, Tensor::elem_count);
        assert_eq!(size, end, "{} {}: {key}", family.name, case["name"]);
    }
}

#[test]
fn times_cut_to_whole_seconds_are_those_of_the_release_that_cuts_them() {
    let family = &FAMILIES[0];
    let mut compared = 0;
    for case in family.document()["cases"].as_array().unwrap() {
        let stored = family.stored(case);
        let Some(positions) = stored.get("position_ids.integer") else {
            continue;
        };
        let found = logits(&family.checkpoint(), &messages(case), &["--integer-seconds"]);
        assert_eq!(
            integers(&found["position_ids"]),
            integers(positions),
            "{}",
            case["name"]
        );
        check(&stored, "logits.integer", &found["logits"], "whole seconds");
        compared += 1;
    }
    assert_eq!(compared, 3);
}

#[test]
fn greedy_continuations_of_every_conversation_are_those_of_the_reference() {
    for family in &FAMILIES {
        for case in family.document()["cases"].as_array().unwrap() {
            let (dir, messages) = (family.prepared(case), messages(case));
            let (model, messages) = (dir.path().to_str().unwrap(), messages.to_str().unwrap());
            let printed = worker(&[
                "generate",
                "--model",
                model,
                "--messages",
                messages,
                "--temperature",
                "0",
                "--max-tokens",
                "24",
                "--ignore-eos",
                "--json",
            ]);
            let printed: Value = serde_json::from_str(&printed).unwrap();
            let ids: Vec<i64> = serde_json::from_value(printed["completions"][0]["token_ids"].clone()).unwrap();
            assert_eq!(
                ids,
                integers(&family.stored(case)["greedy"]),
                "{} {}",
                family.name,
                case["name"]
            );
        }
    }
}

#[test]
fn sizes_are_counted_from_the_configuration() {
    for family in &FAMILIES {
        let printed = worker(&["inspect", "--model", family.checkpoint().to_str().unwrap(), "--json"]);
        let printed: Value = serde_json::from_str(&printed).unwrap();
        let document = family.document();
        let parameters = document["parameters"].as_object().unwrap();
        let count = |shape: &Value| {
            shape
                .as_array()
                .unwrap()
                .iter()
                .map(|n| n.as_u64().unwrap())
                .product::<u64>()
        };
        assert_eq!(printed["parameters"], parameters.values().map(count).sum::<u64>());
        assert_eq!(printed["tensors_on_disk"], parameters.len());
        assert_eq!(printed["fits"], true);
        // Two layers, keys and values of two heads of 16, four bytes.
        assert_eq!(printed["kv_bytes_per_token"], 2 * 2 * 2 * 16 * 4);
    }
}

#[test]
fn an_adapter_by_peft_leads_to_its_logits_whether_added_or_merged() {
    let (family, adapter) = (&FAMILIES[0], fixtures().join("lora"));
    let expected = load(&adapter.join("logits.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    let merged = dir.path().join("merged");
    let (model, adapter) = (family.checkpoint(), adapter.to_str().unwrap());
    let (from, to) = (model.to_str().unwrap(), merged.to_str().unwrap());
    worker(&[
        "convert",
        "--model",
        from,
        "--adapter",
        adapter,
        "--dtype",
        "f32",
        "--out",
        to,
    ]);
    for name in ["text", "two_images"] {
        let messages = fixtures().join(format!("cases/{}.{name}.messages.json", family.name));
        let added = logits(&model, &messages, &["--adapter", adapter]);
        check(&expected, &format!("{name}.adapted"), &added["logits"], "added");
        check(
            &expected,
            &format!("{name}.merged"),
            &logits(&merged, &messages, &[])["logits"],
            "merged",
        );
    }
}

#[test]
fn a_checkpoint_written_in_any_precision_has_the_logits_of_its_source() {
    for family in &FAMILIES {
        for dtype in ["f32", "bf16", "f16"] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out");
            let model = family.checkpoint();
            worker(&[
                "convert",
                "--model",
                model.to_str().unwrap(),
                "--dtype",
                dtype,
                "--out",
                out.to_str().unwrap(),
            ]);
            let document = family.document();
            let case = document["cases"]
                .as_array()
                .unwrap()
                .iter()
                .find(|case| case["name"] == "interleaved");
            let found = logits(&out, &messages(case.unwrap()), &[]);
            check(&family.stored(case.unwrap()), "logits", &found["logits"], dtype);
        }
    }
}

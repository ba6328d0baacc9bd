//! Windows and angles of Qwen2.5-VL's tower, its times, and adapters by peft.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use flotilla_model::{
    Lora, Pass,
    qwen2_5_vl::window::{Windows, patch_coordinates},
    rope::frequencies,
};

use crate::{
    facts::{logits, row},
    fixture::{Case, Family, Suite},
    stored::{check, fixtures},
};

/// Tokens along a side of a window: 112 pixels.
const SIDE: usize = 4;
const MERGE: usize = 2;

fn suite() -> Suite {
    Suite::of(Family::Qwen25Vl)
}

/// Kind and grids of the cases that hold tables.
fn grids(suite: &Suite) -> Vec<(&Case, &'static str, Vec<[usize; 3]>)> {
    let kinds = suite.cases.iter().flat_map(|case| [(case, "image"), (case, "video")]);
    let stored = kinds.filter(|(case, kind)| case.tensors.contains_key(&format!("window_index.{kind}")));
    let grids = stored.map(|(case, kind)| {
        let flat = case.integers(&format!("{kind}_grid_thw"));
        let grids = flat
            .chunks(3)
            .map(|grid| [grid[0] as usize, grid[1] as usize, grid[2] as usize]);
        (case, kind, grids.collect())
    });
    let grids = grids.collect::<Vec<_>>();
    assert!(grids.len() > 4);
    grids
}

#[test]
fn windows_are_those_of_the_reference() {
    for (case, kind, grids) in grids(&suite()) {
        let windows = Windows::new(&grids, MERGE, SIDE);
        let order = windows.order.iter().map(|token| *token as i64).collect::<Vec<_>>();
        assert_eq!(
            order,
            case.integers(&format!("window_index.{kind}")),
            "{} {kind}",
            case.name
        );
        let mut ends = vec![0];
        for length in &windows.window_lengths {
            ends.push(ends[ends.len() - 1] + *length as i64);
        }
        assert_eq!(
            ends,
            case.integers(&format!("window_ends.{kind}")),
            "{} {kind}",
            case.name
        );
    }
}

#[test]
fn angles_of_patches_are_those_of_the_reference() {
    for (case, kind, grids) in grids(&suite()) {
        let expected: Vec<Vec<f32>> = case.tensors[&format!("vision_angles.{kind}")].to_vec2().unwrap();
        let frequencies = frequencies(10_000.0, expected[0].len());
        let mut found = Vec::new();
        for [slices, height, width] in grids {
            for _ in 0..slices {
                let patches = patch_coordinates(height, width, MERGE).into_iter();
                found.extend(patches.map(|(row, column)| {
                    let turn = |place: usize| frequencies.iter().map(move |f| place as f32 * f);
                    turn(row).chain(turn(column)).collect::<Vec<_>>()
                }));
            }
        }
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!(
                (found - expected).abs() < 1e-5,
                "{} {kind}: {found} {expected}",
                case.name
            );
        }
    }
}

#[test]
fn logits_at_times_cut_to_whole_seconds_are_those_of_the_reference_too() {
    let suite = suite();
    let model = suite.model(DType::F32);
    let mut compared = 0;
    for case in &suite.cases {
        if !case.tensors.contains_key("position_ids.integer") {
            continue;
        }
        let flat = case.integers("position_ids.integer");
        let mut row = row(&model, &suite.prompt(case), Pass::Infer);
        let tokens = row.ids.len();
        row.positions = (0..tokens)
            .map(|at| [0, 1, 2].map(|axis| flat[axis * tokens + at] as u32))
            .collect();
        case.check("logits.integer", &logits(&model, &row, Pass::Infer));
        compared += 1;
    }
    assert_eq!(compared, 3);
}

#[test]
fn an_adapter_by_peft_leads_to_its_logits_before_and_after_merging() {
    let (suite, dir) = (suite(), fixtures().join("lora"));
    let expected = candle_core::safetensors::load(dir.join("logits.safetensors"), &Device::Cpu).unwrap();
    let mut model = suite.model(DType::F32);
    let adapter = Lora::load(&dir, model.config(), DType::F32, model.device()).unwrap();
    model.attach(adapter).unwrap();
    let compare = |model: &flotilla_model::Vlm, state: &str| {
        for name in ["text", "two_images"] {
            let row = row(model, &suite.prompt(suite.case(name)), Pass::Infer);
            check(
                &expected,
                &format!("{name}.{state}"),
                &logits(model, &row, Pass::Infer),
                state,
            );
        }
    };
    compare(&model, "adapted");
    model.merge_adapter().unwrap();
    compare(&model, "merged");
}

#[test]
fn a_saved_adapter_has_the_tensors_of_peft_under_its_names() {
    let (suite, dir) = (suite(), fixtures().join("lora"));
    let model = suite.model(DType::F32);
    let adapter = Lora::load(&dir, model.config(), DType::F32, model.device()).unwrap();
    let saved = tempfile::tempdir().unwrap();
    adapter
        .save(saved.path(), model.config(), Some("tiny-qwen2.5-vl"))
        .unwrap();
    let read = |dir: &std::path::Path| {
        let tensors = candle_core::safetensors::load(dir.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
        let values = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        tensors
            .into_iter()
            .map(|(name, tensor)| (name, values(tensor)))
            .collect::<BTreeMap<_, _>>()
    };
    assert_eq!(read(saved.path()), read(&dir));
}

//! Loading, saving and comparing of whole directories.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::*;
use crate::WeightProblems;

const NAMES: Names = Names::QWEN2_5_VL;

fn parameter(name: &str, shape: &[usize], init: Init) -> Parameter {
    Parameter {
        name: name.into(),
        shape: shape.into(),
        init,
    }
}

fn parameters() -> Vec<Parameter> {
    vec![
        parameter("model.norm.weight", &[4], Init::Ones),
        parameter("visual.a.weight", &[2, 3], Init::Normal(0.5)),
    ]
}

fn drawn() -> Weights {
    Weights::random(&parameters(), 7, DType::F32, &Device::Cpu).unwrap()
}

fn load(dir: &Path) -> Result<Weights> {
    Weights::load(dir, &parameters(), &NAMES, DType::F32, &Device::Cpu)
}

fn ones(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::ones(shape, dtype, &Device::Cpu).unwrap()
}

/// Writes a file of such tensors.
fn put(dir: &Path, file: &str, tensors: &[(&str, Tensor)]) {
    let tensors = tensors
        .iter()
        .map(|(name, tensor)| ((*name).to_owned(), tensor.clone()));
    candle_core::safetensors::save(&tensors.collect::<HashMap<_, _>>(), dir.join(file)).unwrap();
}

/// Writes an index.
fn put_index(dir: &Path, map: &[(&str, &str)]) {
    let members = map.iter().map(|(tensor, file)| format!("{tensor:?}:{file:?}"));
    let text = format!(r#"{{"weight_map":{{{}}}}}"#, members.collect::<Vec<_>>().join(","));
    std::fs::write(dir.join(INDEX_FILE), text).unwrap();
}

fn problems(dir: &Path) -> WeightProblems {
    match load(dir).unwrap_err() {
        ModelError::Weights { problems, .. } => *problems,
        other => panic!("{other}"),
    }
}

fn values(weights: &Weights, name: &str) -> Vec<f32> {
    let flat = weights.get(name).unwrap().flatten_all().unwrap();
    flat.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

#[test]
fn saved_weights_load_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    drawn().save(&dir.path().join(SINGLE_FILE)).unwrap();
    let loaded = load(dir.path()).unwrap();
    assert_eq!(
        std::fs::read(dir.path().join(SINGLE_FILE)).unwrap(),
        loaded.to_bytes().unwrap()
    );
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "nothing temporary stays"
    );
}

#[test]
fn a_file_is_what_the_formats_own_library_writes() {
    let weights = drawn();
    let tensors = weights.iter().map(|(name, var)| (name, var.as_tensor()));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let expected = safetensors::serialize(tensors, Some(metadata)).unwrap();
    assert_eq!(weights.to_bytes().unwrap(), expected);
}

#[test]
fn shards_with_later_names_load() {
    let dir = tempfile::tempdir().unwrap();
    let (norm, visual) = ("model.language_model.norm.weight", "model.visual.a.weight");
    put(dir.path(), "a.safetensors", &[(norm, ones(&[4], DType::F32))]);
    put(dir.path(), "b.safetensors", &[(visual, ones(&[2, 3], DType::F32))]);
    put_index(dir.path(), &[(norm, "a.safetensors"), (visual, "b.safetensors")]);
    let loaded = load(dir.path()).unwrap();
    assert_eq!(
        loaded.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        ["model.norm.weight", "visual.a.weight"]
    );
}

#[test]
fn every_floating_point_type_on_disk_becomes_the_one_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for on_disk in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let norm = Tensor::new(&[0.5f32, -1.0, 2.0, 0.0], &Device::Cpu).unwrap();
        put(
            dir.path(),
            SINGLE_FILE,
            &[
                ("model.norm.weight", norm.to_dtype(on_disk).unwrap()),
                ("visual.a.weight", ones(&[2, 3], on_disk)),
            ],
        );
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let loaded = Weights::load(dir.path(), &parameters(), &NAMES, dtype, &Device::Cpu).unwrap();
            assert_eq!(loaded.get("model.norm.weight").unwrap().dtype(), dtype);
            assert_eq!(values(&loaded, "model.norm.weight"), [0.5, -1.0, 2.0, 0.0]);
        }
    }
}

#[test]
fn integers_are_no_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [
        ("model.norm.weight", ones(&[4], DType::I64)),
        ("visual.a.weight", ones(&[2, 3], DType::F32)),
    ];
    put(dir.path(), SINGLE_FILE, &tensors);
    let message = load(dir.path()).unwrap_err().to_string();
    assert!(message.contains("(model.norm.weight is I64)"), "{message}");
}

#[test]
fn differences_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [
        ("model.norm.weight", ones(&[5], DType::F32)),
        ("other", ones(&[1], DType::F32)),
    ];
    put(dir.path(), SINGLE_FILE, &tensors);
    let message = load(dir.path()).unwrap_err().to_string();
    let expected = "do not fit the configuration: 1 missing (visual.a.weight); 1 unexpected (other); \
                    1 mis-shaped (model.norm.weight is [5], expected [4])";
    assert!(message.ends_with(expected), "{message}");
}

#[test]
fn a_table_of_another_vocabulary_says_what_to_look_at() {
    let dir = tempfile::tempdir().unwrap();
    put(
        dir.path(),
        SINGLE_FILE,
        &[("model.embed_tokens.weight", ones(&[3, 2], DType::F32))],
    );
    let asked = [parameter("model.embed_tokens.weight", &[4, 2], Init::Ones)];
    let problems = compare(&asked, &NAMES, &scan(dir.path(), &NAMES).unwrap());
    let message = problems.to_string();
    assert!(
        message.contains("vocab_size in config.json is 4 and the table has 3 rows"),
        "{message}"
    );
}

#[test]
fn two_tensors_of_one_name_are_both_named() {
    let dir = tempfile::tempdir().unwrap();
    let norm = ones(&[4], DType::F32);
    put(
        dir.path(),
        SINGLE_FILE,
        &[
            ("model.norm.weight", norm.clone()),
            ("model.language_model.norm.weight", norm),
            ("visual.a.weight", ones(&[2, 3], DType::F32)),
        ],
    );
    let [(name, places)] = problems(dir.path()).duplicated.try_into().unwrap();
    assert_eq!(name, "model.norm.weight");
    assert_eq!(places.len(), 2);
    assert!(places.contains(&format!("model.language_model.norm.weight in {SINGLE_FILE}")));
}

#[test]
fn a_name_that_a_header_repeats_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let entry =
        |offsets: &str| format!(r#""model.norm.weight":{{"dtype":"F32","shape":[4],"data_offsets":{offsets}}}"#);
    let header = format!("{{{},{}}}", entry("[0,16]"), entry("[16,32]"));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend([0; 32]);
    std::fs::write(dir.path().join(SINGLE_FILE), file).unwrap();
    let message = load(dir.path()).unwrap_err().to_string();
    assert!(message.contains("1 named twice (model.norm.weight is"), "{message}");
}

#[test]
fn shards_and_index_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let (norm, visual) = ("model.norm.weight", "visual.a.weight");
    put(dir.path(), "a.safetensors", &[(norm, ones(&[4], DType::F32))]);
    put(dir.path(), "b.safetensors", &[(visual, ones(&[2, 3], DType::F32))]);
    put_index(dir.path(), &[(norm, "b.safetensors"), (visual, "b.safetensors")]);
    assert_eq!(
        problems(dir.path()).lacking,
        [(norm.to_owned(), "b.safetensors".to_owned())]
    );
    put_index(dir.path(), &[("x", "a.safetensors"), (visual, "b.safetensors")]);
    let found = problems(dir.path());
    assert_eq!(found.lacking, [("x".to_owned(), "a.safetensors".to_owned())]);
    assert_eq!(found.unindexed, [(norm.to_owned(), "a.safetensors".to_owned())]);
}

#[test]
fn a_tensor_that_the_index_names_twice_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let norm = ones(&[4], DType::F32);
    put(dir.path(), "a.safetensors", &[("model.norm.weight", norm)]);
    put_index(
        dir.path(),
        &[
            ("model.norm.weight", "b.safetensors"),
            ("model.norm.weight", "a.safetensors"),
        ],
    );
    assert_eq!(problems(dir.path()).duplicated.len(), 1);
}

#[test]
fn shards_that_cannot_be_read_are_listed_and_their_tensors_are_not_missing() {
    let dir = tempfile::tempdir().unwrap();
    let (norm, visual) = ("model.norm.weight", "visual.a.weight");
    put_index(dir.path(), &[(norm, "a.safetensors"), (visual, "b.safetensors")]);
    put(dir.path(), "b.safetensors", &[(visual, ones(&[2, 3], DType::F32))]);
    let whole = std::fs::read(dir.path().join("b.safetensors")).unwrap();
    std::fs::write(dir.path().join("b.safetensors"), &whole[..whole.len() - 4]).unwrap();
    let found = problems(dir.path());
    assert_eq!(
        found.unreadable[0],
        ("a.safetensors".to_owned(), "is not there".to_owned())
    );
    assert!(
        found.unreadable[1]
            .1
            .contains(&format!("at least {} bytes and has {}", whole.len(), whole.len() - 4))
    );
    assert!(found.missing.is_empty(), "{found}");
}

#[test]
fn weights_in_another_form_say_how_to_convert_them() {
    let dir = tempfile::tempdir().unwrap();
    let message = load(dir.path()).unwrap_err().to_string();
    assert!(message.ends_with("model.safetensors.index.json"), "{message}");
    std::fs::write(dir.path().join("pytorch_model.bin"), []).unwrap();
    let message = load(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("pytorch_model.bin is a pickle") && message.contains("save_pretrained('OUT')"),
        "{message}"
    );
}

#[cfg(unix)]
#[test]
fn links_of_a_download_cache_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshots/main"));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    drawn().save(&blobs.join("abc")).unwrap();
    std::os::unix::fs::symlink("../../blobs/abc", snapshot.join(SINGLE_FILE)).unwrap();
    assert!(load(&snapshot).is_ok());
}

#[test]
fn what_may_be_absent_has_its_initial_value_and_what_is_there_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let asked = |init| [parameter("vision_tower.vision_model.post_layernorm.weight", &[2], init)];
    let load = |init| {
        Weights::load(
            dir.path(),
            &asked(init),
            &Names::LLAVA_ONEVISION,
            DType::F32,
            &Device::Cpu,
        )
    };
    put(dir.path(), SINGLE_FILE, &[]);
    let name = "vision_tower.vision_model.post_layernorm.weight";
    assert_eq!(values(&load(Init::Ones).unwrap(), name), [1.0, 1.0]);
    assert!(load(Init::Normal(1.0)).is_err());
    let found = format!("model.{name}");
    put(
        dir.path(),
        SINGLE_FILE,
        &[(&found, ones(&[2], DType::F16).affine(3.0, 0.0).unwrap())],
    );
    assert_eq!(values(&load(Init::Ones).unwrap(), name), [3.0, 3.0]);
}

#[test]
fn a_scan_gives_names_types_and_files_without_a_configuration() {
    let dir = tempfile::tempdir().unwrap();
    put(
        dir.path(),
        SINGLE_FILE,
        &[("model.visual.a.weight", ones(&[2, 3], DType::BF16))],
    );
    let scan = scan(dir.path(), &NAMES).unwrap();
    let expected = TensorInfo {
        name: "model.visual.a.weight".into(),
        hub: "visual.a.weight".into(),
        shape: vec![2, 3],
        dtype: ElementType::Float(DType::BF16),
        file: SINGLE_FILE.into(),
        bytes: 12,
    };
    assert_eq!(scan.tensors, [expected]);
    assert_eq!(compare(&parameters(), &NAMES, &scan).missing, ["model.norm.weight"]);
}

#[test]
fn shards_fill_in_the_order_of_names_and_a_large_tensor_is_alone() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = [("a", 2), ("b", 2), ("c", 9), ("d", 1)];
    let asked = sizes.map(|(name, size)| parameter(name, &[size], Init::Normal(1.0)));
    let weights = Weights::random(&asked, 1, DType::F32, &Device::Cpu).unwrap();
    std::fs::write(dir.path().join("model-00001-of-00009.safetensors"), "old").unwrap();
    std::fs::write(dir.path().join(SINGLE_FILE), "old").unwrap();
    std::fs::write(dir.path().join("other.safetensors"), "not ours").unwrap();
    weights.save_sharded(dir.path(), 20, None).unwrap();
    let index = index::Index::read(&dir.path().join(INDEX_FILE)).unwrap();
    let shard = |number: u32| format!("model-{number:05}-of-00002.safetensors");
    let expected = [("a", 2), ("b", 2), ("c", 1), ("d", 2)];
    assert_eq!(
        index.entries,
        expected.map(|(name, number)| (name.to_owned(), shard(number)))
    );
    let mut files = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect::<Vec<_>>();
    files.sort();
    assert_eq!(files, [&shard(1), &shard(2), INDEX_FILE, "other.safetensors"]);
    weights.save_sharded(dir.path(), 1 << 20, None).unwrap();
    assert!(!dir.path().join(INDEX_FILE).exists() && dir.path().join(SINGLE_FILE).exists());
}

#[test]
fn the_type_on_disk_can_be_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(SINGLE_FILE);
    drawn().save_as(&path, DType::BF16).unwrap();
    let scan = scan(dir.path(), &NAMES).unwrap();
    assert!(
        scan.tensors
            .iter()
            .all(|tensor| tensor.dtype == ElementType::Float(DType::BF16))
    );
    let rounded = drawn().get("visual.a.weight").unwrap().to_dtype(DType::BF16).unwrap();
    let rounded = rounded.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    assert_eq!(
        values(&load(dir.path()).unwrap(), "visual.a.weight"),
        rounded.to_vec1::<f32>().unwrap()
    );
    assert!(drawn().save_as(&path, DType::U32).is_err());
}

#[test]
fn a_value_that_f16_does_not_hold_is_not_written_as_infinity() {
    let dir = tempfile::tempdir().unwrap();
    let weights = drawn();
    let large = Tensor::full(1e5f32, 4, &Device::Cpu).unwrap();
    weights.get("model.norm.weight").unwrap().set(&large).unwrap();
    let path = dir.path().join(SINGLE_FILE);
    let message = weights.save_as(&path, DType::F16).unwrap_err().to_string();
    assert!(
        message.contains("model.norm.weight has values beyond 65504"),
        "{message}"
    );
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing temporary stays"
    );
}

#[test]
fn the_seed_alone_decides_the_draw() {
    let draw = |seed| {
        let weights = Weights::random(&parameters(), seed, DType::F32, &Device::Cpu).unwrap();
        values(&weights, "visual.a.weight")
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn a_deep_copy_does_not_follow_its_source() {
    let source = drawn();
    let copy = source.deep_copy().unwrap();
    let zeros = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
    source.get("model.norm.weight").unwrap().set(&zeros).unwrap();
    assert_eq!(values(&copy, "model.norm.weight"), [1.0; 4]);
    copy.assign(&source).unwrap();
    assert_eq!(values(&copy, "model.norm.weight"), [0.0; 4]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_tensors_survive_shards_of_any_size(
        shapes in proptest::collection::vec(proptest::collection::vec(0_usize..5, 0..4), 1..6),
        max_bytes in 0_u64..200,
        dtype in proptest::sample::select(vec![DType::F32, DType::BF16, DType::F16, DType::F64]),
    ) {
        let asked = shapes
            .iter()
            .enumerate()
            .map(|(number, shape)| parameter(&format!("t{number}"), shape, Init::Normal(1.0)))
            .collect::<Vec<_>>();
        let weights = Weights::random(&asked, 3, dtype, &Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        weights.save_sharded(dir.path(), max_bytes, None).unwrap();
        let loaded = Weights::load(dir.path(), &asked, &NAMES, dtype, &Device::Cpu).unwrap();
        prop_assert_eq!(loaded.to_bytes().unwrap(), weights.to_bytes().unwrap());
    }

    #[test]
    fn a_damaged_file_is_an_error_or_other_values(place in 0_usize..300, value: u8) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SINGLE_FILE);
        let mut bytes = drawn().to_bytes().unwrap();
        let place = place % bytes.len();
        bytes[place] = value;
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(loaded) = load(dir.path()) {
            prop_assert_eq!(loaded.size_in_bytes(), drawn().size_in_bytes());
        }
    }
}

/// Portions of a source, as numbers of f32.
fn portion(source: &dyn TensorSource, name: &str, portion: &Portion) -> Vec<f32> {
    let tensor = source.tensor(name, portion).unwrap().unwrap();
    let flat = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

#[test]
fn portions_of_files_are_those_of_weights_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let weights = drawn();
    weights.save(&dir.path().join(SINGLE_FILE)).unwrap();
    let stored = StoredWeights::open(dir.path(), &parameters(), &NAMES).unwrap();
    let matrix = [
        Portion::Whole,
        Portion::Rows(1..2),
        Portion::Columns(1..3),
        Portion::Rows(0..0),
    ];
    for wanted in matrix {
        let name = "visual.a.weight";
        assert_eq!(
            portion(&stored, name, &wanted),
            portion(&weights, name, &wanted),
            "{wanted:?}"
        );
    }
    let name = "model.norm.weight";
    assert_eq!(portion(&stored, name, &Portion::Rows(1..3)), [1.0; 2]);
    assert!(stored.tensor("model.other", &Portion::Whole).unwrap().is_none());
}

#[test]
fn rows_and_columns_that_a_file_does_not_have_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    drawn().save(&dir.path().join(SINGLE_FILE)).unwrap();
    let stored = StoredWeights::open(dir.path(), &parameters(), &NAMES).unwrap();
    for (name, wanted) in [
        ("visual.a.weight", Portion::Rows(1..3)),
        ("visual.a.weight", Portion::Columns(0..4)),
        ("model.norm.weight", Portion::Columns(0..1)),
    ] {
        let error = stored.tensor(name, &wanted).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_checkpoint_that_lacks_a_tensor_is_refused_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    put(
        dir.path(),
        SINGLE_FILE,
        &[("visual.a.weight", ones(&[2, 3], DType::F32))],
    );
    let error = StoredWeights::open(dir.path(), &parameters(), &NAMES).unwrap_err();
    assert!(matches!(error, ModelError::Weights { .. }), "{error}");
}

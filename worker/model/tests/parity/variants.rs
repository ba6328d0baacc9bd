//! A checkpoint in every layout that loads, and what is written again: the logits do not change by a bit.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use flotilla_model::{LoadOptions, Pass, Vlm};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    facts::{logits, row},
    fixture::{Family, Suite},
    stored::{copy_of, read_json},
};

const FILE: &str = "model.safetensors";

type Tensors = HashMap<String, Tensor>;

struct Variant {
    suite: Suite,
    dir: TempDir,
}

impl Variant {
    fn of(family: Family) -> Self {
        Self {
            dir: copy_of(&family.checkpoint()),
            suite: Suite::of(family),
        }
    }

    fn tensors(&self) -> Tensors {
        candle_core::safetensors::load(self.dir.path().join(FILE), &Device::Cpu).unwrap()
    }

    /// The same checkpoint with other tensors in its file.
    fn with_tensors(self, change: impl FnOnce(Tensors) -> Tensors) -> Self {
        let tensors = change(self.tensors());
        candle_core::safetensors::save(&tensors, self.dir.path().join(FILE)).unwrap();
        self
    }

    fn renamed(self, rename: impl Fn(&str) -> String) -> Self {
        self.with_tensors(|tensors| {
            tensors
                .into_iter()
                .map(|(name, tensor)| (rename(&name), tensor))
                .collect()
        })
    }

    fn with_config(self, change: impl FnOnce(&mut Value)) -> Self {
        let path = self.dir.path().join("config.json");
        let mut config = read_json(&path);
        change(&mut config);
        std::fs::write(path, config.to_string()).unwrap();
        self
    }

    fn logits(&self, dir: &Path) -> Vec<Vec<f32>> {
        let model = Vlm::load(dir, &LoadOptions::default()).unwrap();
        let row = row(&model, &self.suite.prompt(self.suite.case("interleaved")), Pass::Infer);
        logits(&model, &row, Pass::Infer).to_vec2().unwrap()
    }

    fn assert_unchanged(&self) {
        assert!(self.logits(self.dir.path()) == self.logits(&self.suite.family.checkpoint()));
    }
}

/// The first prefix that fits, replaced.
fn replaced(name: &str, prefixes: &[(&str, &str)]) -> String {
    let fits = prefixes
        .iter()
        .find_map(|(from, to)| Some((name.strip_prefix(from)?, to)));
    fits.map_or_else(|| name.to_owned(), |(rest, to)| format!("{to}{rest}"))
}

#[test]
fn qwen_names_of_a_loaded_model() {
    let later = [("visual.", "model.visual."), ("model.", "model.language_model.")];
    Variant::of(Family::Qwen25Vl)
        .renamed(|name| replaced(name, &later))
        .assert_unchanged();
}

#[test]
fn onevision_names_of_a_loaded_model() {
    let later = [
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("", "model."),
    ];
    Variant::of(Family::LlavaOneVision)
        .renamed(|name| replaced(name, &later))
        .assert_unchanged();
}

#[test]
fn onevision_names_of_its_authors() {
    let original = [
        ("language_model.model.", "model."),
        ("vision_tower.", "model.vision_tower.vision_tower."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("image_newline", "model.image_newline"),
    ];
    Variant::of(Family::LlavaOneVision)
        .renamed(|name| replaced(name, &original))
        .assert_unchanged();
}

#[test]
fn elements_of_other_types() {
    for family in [Family::Qwen25Vl, Family::LlavaOneVision] {
        for dtype in [DType::F32, DType::F16] {
            let cast = |tensors: Tensors| {
                let cast = |(name, tensor): (String, Tensor)| (name, tensor.to_dtype(dtype).unwrap());
                tensors.into_iter().map(cast).collect()
            };
            Variant::of(family).with_tensors(cast).assert_unchanged();
        }
    }
}

#[test]
fn shards_with_an_index() {
    for family in [Family::Qwen25Vl, Family::LlavaOneVision] {
        let variant = Variant::of(family);
        let (mut shards, mut map) = (vec![Tensors::new(); 3], serde_json::Map::new());
        let mut tensors = variant.tensors().into_iter().collect::<Vec<_>>();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        for (number, (name, tensor)) in tensors.into_iter().enumerate() {
            let shard = number % 3;
            map.insert(
                name.clone(),
                json!(format!("model-{:05}-of-00003.safetensors", shard + 1)),
            );
            shards[shard].insert(name, tensor);
        }
        let dir = variant.dir.path();
        for (number, shard) in shards.iter().enumerate() {
            let path = dir.join(format!("model-{:05}-of-00003.safetensors", number + 1));
            candle_core::safetensors::save(shard, path).unwrap();
        }
        std::fs::remove_file(dir.join(FILE)).unwrap();
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
        variant.assert_unchanged();
    }
}

/// The language model's fields at the top, as on the hub.
fn flattened(config: &mut Value) {
    let text = config["text_config"].take();
    config.as_object_mut().unwrap().remove("text_config");
    for (key, value) in text.as_object().unwrap() {
        if key != "model_type" {
            config[key] = value.clone();
        }
    }
}

#[test]
fn qwen_config_of_the_hub() {
    let flat = |config: &mut Value| {
        flattened(config);
        config["rope_scaling"] = json!({"type": "mrope", "mrope_section": [2, 3, 3]});
        config["sliding_window"] = json!(32768);
        let vision = config["vision_config"].as_object_mut().unwrap();
        for (from, to) in [("in_channels", "in_chans"), ("patch_size", "spatial_patch_size")] {
            let value = vision.remove(from).unwrap();
            vision.insert(to.to_owned(), value);
        }
    };
    Variant::of(Family::Qwen25Vl).with_config(flat).assert_unchanged();
}

#[test]
fn qwen_config_without_what_the_reference_class_has_anyway() {
    let short = |config: &mut Value| {
        let vision = config["vision_config"].as_object_mut().unwrap();
        for key in [
            "in_channels",
            "patch_size",
            "spatial_merge_size",
            "temporal_patch_size",
            "window_size",
            "hidden_act",
            "model_type",
            "initializer_range",
        ] {
            vision.remove(key).unwrap();
        }
    };
    Variant::of(Family::Qwen25Vl).with_config(short).assert_unchanged();
}

#[test]
fn rope_parameters_in_place_of_theta_and_scaling() {
    for (family, parameters) in [
        (
            Family::Qwen25Vl,
            json!({"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}),
        ),
        (
            Family::LlavaOneVision,
            json!({"rope_type": "default", "rope_theta": 1e6}),
        ),
    ] {
        let later = |config: &mut Value| {
            let text = config["text_config"].as_object_mut().unwrap();
            text.remove("rope_theta").unwrap();
            text.remove("rope_scaling");
            text.insert("rope_parameters".to_owned(), parameters);
        };
        Variant::of(family).with_config(later).assert_unchanged();
    }
}

#[test]
fn a_tied_head_that_is_stored_all_the_same() {
    let with_head = |mut tensors: Tensors| {
        let table = tensors["language_model.model.embed_tokens.weight"].clone();
        tensors.insert("language_model.lm_head.weight".to_owned(), table);
        tensors
    };
    Variant::of(Family::LlavaOneVision)
        .with_tensors(with_head)
        .assert_unchanged();
}

#[test]
fn an_untied_head_of_the_table_s_values() {
    let with_head = |mut tensors: Tensors| {
        let table = tensors["language_model.model.embed_tokens.weight"].clone();
        tensors.insert("language_model.lm_head.weight".to_owned(), table);
        tensors
    };
    let untied = |config: &mut Value| {
        config["tie_word_embeddings"] = json!(false);
        config["text_config"]["tie_word_embeddings"] = json!(false);
    };
    Variant::of(Family::LlavaOneVision)
        .with_tensors(with_head)
        .with_config(untied)
        .assert_unchanged();
}

#[test]
fn a_tower_with_the_layer_that_its_feature_does_not_pass() {
    let layer = "vision_tower.vision_model.encoder.layers.";
    let longer = |mut tensors: Tensors| {
        let last = tensors.iter().filter_map(|(name, tensor)| {
            let rest = name.strip_prefix(&format!("{layer}1."))?;
            Some((format!("{layer}2.{rest}"), tensor.clone()))
        });
        let last = last.collect::<Vec<_>>();
        tensors.extend(last);
        tensors
    };
    let deeper = |config: &mut Value| {
        config["vision_config"]["num_hidden_layers"] = json!(3);
        config["vision_feature_layer"] = json!(-2);
    };
    Variant::of(Family::LlavaOneVision)
        .with_tensors(longer)
        .with_config(deeper)
        .assert_unchanged();
}

#[test]
fn shards_that_are_written_load_again_and_repeat_their_bytes() {
    for family in [Family::Qwen25Vl, Family::LlavaOneVision] {
        let variant = Variant::of(family);
        let dir = variant.dir.path();
        let model = Vlm::load(dir, &LoadOptions::default()).unwrap();
        let written = || {
            model.weights().save_sharded(dir, 200_000, Some(DType::BF16)).unwrap();
            let files = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
            let mut files = files
                .filter(|path| path.to_string_lossy().contains(".safetensors"))
                .collect::<Vec<_>>();
            files.sort();
            let contents = files.into_iter().map(|path| (std::fs::read(&path).unwrap(), path));
            contents.collect::<Vec<_>>()
        };
        let once = written();
        assert!(once.len() > 2);
        assert!(once == written());
        variant.assert_unchanged();
    }
}

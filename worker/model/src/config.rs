//! `config.json`: which family a checkpoint is of, its sizes and ids.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    ModelError, Result, llava_onevision,
    parameter::{Parameter, ParameterList},
    qwen2_5_vl,
    text::{TextConfig, TextDefaults, parse},
    weights::Names,
};

/// Sizes and ids of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Language model.
    pub text: TextConfig,
    /// What stands before it.
    pub vision: Vision,
    /// Stands for an image in token ids.
    pub image_token_id: u32,
    /// Stands for a video in token ids.
    pub video_token_id: u32,
}

/// The part of a model that is peculiar to its family.
#[derive(Clone, Debug, PartialEq)]
pub enum Vision {
    /// Qwen2.5-VL and its fine-tunes (ThinkLite-VL, MiMo-VL, LLaVA-Critic-R1).
    Qwen25Vl(qwen2_5_vl::VisionConfig),
    /// LLaVA-OneVision.
    LlavaOneVision(llava_onevision::VisionConfig),
}

/// An architecture that this crate has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Family {
    Qwen25Vl,
    LlavaOneVision,
}

impl Family {
    /// By `model_type`, else by `architectures`; a file with neither and a vision section of its own is Qwen2.5-VL.
    fn of(top: &Map<String, Value>) -> Result<Self> {
        let architecture = || top.get("architectures")?.as_array()?.first()?.as_str();
        let kind = top.get("model_type").and_then(Value::as_str).or_else(architecture);
        match kind {
            Some("qwen2_5_vl" | "Qwen2_5_VLForConditionalGeneration") => Ok(Self::Qwen25Vl),
            Some(
                "llava_onevision" | "LlavaOnevisionForConditionalGeneration" | "llava_qwen" | "LlavaQwenForCausalLM",
            ) => Ok(Self::LlavaOneVision),
            None if top.contains_key("vision_config") => Ok(Self::Qwen25Vl),
            kind => Err(ModelError::Config(format!(
                "model_type {:?} is not supported: qwen2_5_vl and llava_onevision are",
                kind.unwrap_or_default()
            ))),
        }
    }

    fn text(self) -> TextDefaults {
        match self {
            Self::Qwen25Vl => qwen2_5_vl::TEXT,
            Self::LlavaOneVision => llava_onevision::TEXT,
        }
    }
}

impl Config {
    /// Reads `dir/config.json`.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let bytes = std::fs::read(&path).map_err(ModelError::file(&path))?;
        let value = serde_json::from_slice(&bytes).map_err(|error| ModelError::Parse {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        Self::from_json(&value)
    }

    /// Decides the family and reads its sizes, in every layout that checkpoints in use have.
    pub fn from_json(value: &Value) -> Result<Self> {
        let top = value
            .as_object()
            .ok_or_else(|| ModelError::Config("config.json is not an object".into()))?;
        let family = Family::of(top)?;
        let text = TextConfig::from_json(top, family.text())?;
        let (vision, image, video) = match family {
            Family::Qwen25Vl => {
                let vision = qwen2_5_vl::VisionConfig::from_json(top.get("vision_config"))?;
                if vision.out_hidden_size != text.hidden_size {
                    return Err(ModelError::Config(format!(
                        "vision_config: out_hidden_size {} is not the text hidden_size {}",
                        vision.out_hidden_size, text.hidden_size
                    )));
                }
                (Vision::Qwen25Vl(vision), 151_655, 151_656)
            }
            Family::LlavaOneVision => {
                let vision = llava_onevision::VisionConfig::from_json(top, text.hidden_size)?;
                (Vision::LlavaOneVision(vision), 151_646, 151_647)
            }
        };
        Ok(Self {
            image_token_id: id(top, ["image_token_id", "image_token_index"], image)?,
            video_token_id: id(top, ["video_token_id", "video_token_index"], video)?,
            text,
            vision,
        })
    }

    /// Every parameter of the model under its name on the hub. Nothing is allocated but names.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut list = ParameterList::default();
        match &self.vision {
            Vision::Qwen25Vl(vision) => vision.declare(&mut list),
            Vision::LlavaOneVision(vision) => vision.declare(&mut list),
        }
        self.text.declare(&mut list);
        list.0
    }

    /// Names under which checkpoints of the family store these parameters.
    pub fn names(&self) -> &'static Names {
        match &self.vision {
            Vision::Qwen25Vl(_) => &Names::QWEN2_5_VL,
            Vision::LlavaOneVision(_) => &Names::LLAVA_ONEVISION,
        }
    }

    /// `model_type` of the family.
    pub fn model_type(&self) -> &'static str {
        match &self.vision {
            Vision::Qwen25Vl(_) => "qwen2_5_vl",
            Vision::LlavaOneVision(_) => "llava_onevision",
        }
    }

    /// Whether the parameter of this name belongs to what stands before the language model.
    pub fn is_vision(&self, name: &str) -> bool {
        !name.starts_with(self.text.names.model) && name != self.text.names.head
    }
}

fn id(fields: &Map<String, Value>, keys: [&str; 2], default: u32) -> Result<u32> {
    match keys.iter().find_map(|key| Some((key, fields.get(*key)?))) {
        None | Some((_, Value::Null)) => Ok(default),
        Some((key, value)) => parse(key, value.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hub_3b() -> Value {
        json!({
            "model_type": "qwen2_5_vl",
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": true, "max_position_embeddings": 128000,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "in_chans": 3, "spatial_patch_size": 14,
                "tokens_per_second": 2, "intermediate_size": 3420}
        })
    }

    /// All parameters, and those before the language model.
    fn count(value: &Value) -> (usize, usize) {
        let config = Config::from_json(value).unwrap();
        let parameters = config.parameters();
        let vision = parameters.iter().filter(|p| config.is_vision(&p.name));
        (
            parameters.iter().map(Parameter::count).sum(),
            vision.map(Parameter::count).sum(),
        )
    }

    #[test]
    fn the_3b_has_the_published_number_of_parameters() {
        assert_eq!(count(&hub_3b()), (3_754_622_976, 668_684_288));
    }

    #[test]
    fn the_7b_in_nested_layout_has_the_published_number_of_parameters() {
        let value = json!({
            "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
            "tie_word_embeddings": false
        });
        assert_eq!(count(&value), (8_292_166_656, 676_550_144));
    }

    #[test]
    fn the_72b_has_the_published_number_of_parameters() {
        let mut value = hub_3b();
        for (key, number) in [
            ("hidden_size", 8192),
            ("intermediate_size", 29568),
            ("num_hidden_layers", 80),
            ("num_attention_heads", 64),
            ("num_key_value_heads", 8),
            ("vocab_size", 152_064),
        ] {
            value[key] = json!(number);
        }
        value["tie_word_embeddings"] = json!(false);
        value["vision_config"]["out_hidden_size"] = json!(8192);
        value["vision_config"]["intermediate_size"] = json!(3456);
        assert_eq!(count(&value), (73_410_777_344, 704_573_696));
    }

    #[test]
    fn a_nested_section_leaves_out_what_equals_the_reference_class() {
        let value = json!({
            "model_type": "qwen2_5_vl", "tie_word_embeddings": false,
            "text_config": {"rms_norm_eps": 1e-6, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 8192, "intermediate_size": 3456}
        });
        assert_eq!(count(&value), (73_410_777_344, 704_573_696));
    }

    fn onevision(hidden: usize, layers: usize, heads: usize, kv: usize, mlp: usize, vocab: usize, tied: bool) -> Value {
        json!({
            "model_type": "llava_onevision", "tie_word_embeddings": false,
            "text_config": {"model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": mlp,
                "vocab_size": vocab, "rope_theta": 1e6, "tie_word_embeddings": tied},
            "vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
                "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 26,
                "patch_size": 14, "vision_use_head": false}
        })
    }

    #[test]
    fn the_onevision_sizes_have_the_published_numbers_of_parameters() {
        let millions = |value: Value| (count(&value).0 as f64 / 1e5).round() / 10.0;
        assert_eq!(millions(onevision(896, 24, 14, 2, 4864, 152_000, true)), 893.7);
        assert_eq!(millions(onevision(896, 24, 14, 2, 4864, 152_000, false)), 1029.9);
        assert_eq!(millions(onevision(3584, 28, 28, 4, 18944, 152_128, false)), 8030.8);
        assert_eq!(millions(onevision(8192, 80, 64, 8, 29568, 152_128, false)), 73_181.6);
    }

    #[test]
    fn sections_that_do_not_fill_half_a_head_are_refused() {
        let mut value = hub_3b();
        value["rope_scaling"]["mrope_section"] = json!([16, 24, 23]);
        let error = Config::from_json(&value).unwrap_err();
        assert!(error.to_string().contains("does not sum to half a head, 64"), "{error}");
    }

    #[test]
    fn a_missing_size_is_named() {
        let mut value = hub_3b();
        value.as_object_mut().unwrap().remove("num_hidden_layers");
        let error = Config::from_json(&value).unwrap_err();
        assert!(
            error.to_string().contains("missing field `num_hidden_layers`"),
            "{error}"
        );
    }

    #[test]
    fn what_the_architecture_does_not_have_is_refused_by_name() {
        let refused = |key: &str, with: Value| {
            let mut value = hub_3b();
            value[key] = with;
            Config::from_json(&value).unwrap_err().to_string()
        };
        assert!(refused("model_type", json!("qwen3_vl")).contains("\"qwen3_vl\" is not supported"));
        assert!(refused("hidden_act", json!("gelu")).contains("hidden_act \"gelu\""));
        assert!(refused("use_sliding_window", json!(true)).contains("use_sliding_window"));
        let yarn = json!({"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]});
        assert!(refused("rope_scaling", yarn).contains("rotary scaling \"yarn\""));
        assert!(refused("vision_config", json!({"hidden_size": 1280})).contains("out_hidden_size 3584"));
    }
}

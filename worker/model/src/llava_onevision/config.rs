//! Sizes of the vision tower, the projector and the tiling of pictures.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::anyres::{Anyres, pinpoints, released_pinpoints};
use crate::{
    ModelError, Result,
    parameter::{Init, ParameterList},
    text::{TextDefaults, TextNames, parse},
};

/// The language model's names and defaults.
///
/// Source: `Qwen2Config` of transformers.
pub(crate) const TEXT: TextDefaults = TextDefaults {
    names: TextNames {
        model: "language_model.model.",
        head: "language_model.lm_head.weight",
    },
    sizes: text_sizes,
    multimodal_positions: false,
    nested_ties: true,
};

fn text_sizes() -> Map<String, Value> {
    let sizes = json!({
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0
    });
    sizes.as_object().cloned().unwrap_or_default()
}

/// The vision tower of checkpoints in the original layout, which name it instead of describing it.
const ORIGINAL_TOWER: &str = "siglip-so400m-patch14-384";

/// Sizes of what stands before the language model.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// The vision tower.
    pub tower: SiglipConfig,
    /// Layers of the tower whose output is used; the rest, and the last normalization, are not computed.
    pub used_layers: usize,
    /// Whether the projector's maps have biases.
    pub projector_bias: bool,
    /// Width of the language model.
    pub text_hidden_size: usize,
    /// How a picture alone is cut into squares, and how many of its tokens are kept.
    pub anyres: Anyres,
}

/// Sizes of a SigLIP vision tower. Keys that a checkpoint leaves out have the defaults of the reference class.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default)]
pub struct SiglipConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Layers on disk.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Colour channels.
    pub num_channels: usize,
    /// Side of the square that the tower sees, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Added to the variance of a normalization.
    pub layer_norm_eps: f64,
    /// The MLP's activation.
    pub hidden_act: String,
}

impl Default for SiglipConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            layer_norm_eps: 1e-6,
            hidden_act: "gelu_pytorch_tanh".to_owned(),
        }
    }
}

impl SiglipConfig {
    /// The tower of every released checkpoint: SigLIP so400m, 384 pixels, without its last layer.
    fn released() -> Self {
        Self {
            hidden_size: 1152,
            intermediate_size: 4304,
            num_hidden_layers: 26,
            num_attention_heads: 16,
            image_size: 384,
            patch_size: 14,
            ..Self::default()
        }
    }

    /// Patches per side of the square; what a patch does not fill is not looked at.
    pub fn side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens of one square.
    pub fn tokens(&self) -> usize {
        self.side() * self.side()
    }
}

/// The configuration's own fields, in the layout of transformers.
#[derive(Deserialize)]
#[serde(default)]
struct Fields {
    vision_feature_layer: i64,
    vision_feature_select_strategy: String,
    projector_hidden_act: String,
    multimodal_projector_bias: bool,
    vision_aspect_ratio: String,
    image_grid_pinpoints: Option<Value>,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            vision_feature_layer: -1,
            vision_feature_select_strategy: "full".to_owned(),
            projector_hidden_act: "gelu".to_owned(),
            multimodal_projector_bias: true,
            vision_aspect_ratio: "anyres_max_9".to_owned(),
            image_grid_pinpoints: None,
        }
    }
}

impl VisionConfig {
    /// Reads the vision sections of `config.json`, in the layout of transformers or in the original one.
    pub(crate) fn from_json(top: &Map<String, Value>, text_hidden_size: usize) -> Result<Self> {
        let config = if top.contains_key("mm_vision_tower") {
            Self::original(top, text_hidden_size)?
        } else {
            Self::converted(top, text_hidden_size)?
        };
        config.validate()?;
        Ok(config)
    }

    fn converted(top: &Map<String, Value>, text_hidden_size: usize) -> Result<Self> {
        let known = top.iter().filter(|(_, value)| !value.is_null());
        let known = known.map(|(key, value)| (key.clone(), value.clone())).collect();
        let fields: Fields = parse("config.json", Value::Object(known))?;
        if fields.vision_feature_select_strategy != "full" {
            let strategy = fields.vision_feature_select_strategy;
            return Err(ModelError::Config(format!(
                "vision_feature_select_strategy {strategy:?} is not supported, only \"full\" is"
            )));
        }
        if fields.projector_hidden_act != "gelu" {
            let act = fields.projector_hidden_act;
            return Err(ModelError::Config(format!(
                "projector_hidden_act {act:?} is not supported, only \"gelu\" is"
            )));
        }
        let tower = match top.get("vision_config") {
            None | Some(Value::Null) => SiglipConfig::released(),
            Some(section) => {
                let kind = section.get("model_type").and_then(Value::as_str);
                if let Some(kind) = kind.filter(|kind| *kind != "siglip_vision_model") {
                    return Err(ModelError::Config(format!(
                        "vision_config: model_type {kind:?} is not supported, only \"siglip_vision_model\" is"
                    )));
                }
                parse("vision_config", section.clone())?
            }
        };
        Ok(Self {
            used_layers: used_layers(tower.num_hidden_layers, fields.vision_feature_layer)?,
            anyres: tiling(
                fields.image_grid_pinpoints.as_ref(),
                &fields.vision_aspect_ratio,
                &tower,
            )?,
            projector_bias: fields.multimodal_projector_bias,
            text_hidden_size,
            tower,
        })
    }

    /// The layout of the original repository: the tower is named, the rest are `mm_` keys.
    fn original(top: &Map<String, Value>, text_hidden_size: usize) -> Result<Self> {
        let read = |key: &str| top.get(key).and_then(Value::as_str).unwrap_or_default();
        let rules = [
            (
                "mm_vision_tower",
                ORIGINAL_TOWER,
                read("mm_vision_tower").ends_with(ORIGINAL_TOWER),
            ),
            (
                "mm_projector_type",
                "mlp2x_gelu",
                read("mm_projector_type") == "mlp2x_gelu",
            ),
            (
                "mm_patch_merge_type",
                "spatial_unpad",
                read("mm_patch_merge_type") == "spatial_unpad",
            ),
        ];
        if let Some((key, supported, _)) = rules.iter().find(|(_, _, holds)| !holds) {
            let given = read(key);
            return Err(ModelError::Config(format!(
                "{key} {given:?} is not supported, only {supported:?} is"
            )));
        }
        let tower = SiglipConfig::released();
        Ok(Self {
            used_layers: tower.num_hidden_layers,
            anyres: tiling(top.get("image_grid_pinpoints"), read("image_aspect_ratio"), &tower)?,
            projector_bias: true,
            text_hidden_size,
            tower,
        })
    }

    fn validate(&self) -> Result<()> {
        let tower = &self.tower;
        let heads = tower.num_attention_heads;
        let rules = [
            (
                heads > 0 && tower.hidden_size > 0 && tower.hidden_size.is_multiple_of(heads),
                "hidden_size is no multiple of num_attention_heads",
            ),
            (tower.num_channels == 3, "num_channels is not 3"),
            (
                tower.patch_size > 0 && tower.image_size >= tower.patch_size,
                "image_size is smaller than a patch",
            ),
            (
                tower.hidden_act == "gelu_pytorch_tanh",
                "hidden_act is not \"gelu_pytorch_tanh\"",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, problem)) => Err(ModelError::Config(format!("vision_config: {problem}"))),
            None => Ok(()),
        }
    }

    /// Every parameter before the language model, those of layers that are not used included.
    pub(crate) fn declare(&self, list: &mut ParameterList) {
        let tower = &self.tower;
        let (hidden, patch, mlp) = (tower.hidden_size, tower.patch_size, tower.intermediate_size);
        let std = 1.0 / (self.text_hidden_size as f64).sqrt();
        list.push("image_newline", &[self.text_hidden_size], Init::Normal(std));
        list.linear(
            "multi_modal_projector.linear_1",
            hidden,
            self.text_hidden_size,
            self.projector_bias,
        );
        list.linear(
            "multi_modal_projector.linear_2",
            self.text_hidden_size,
            self.text_hidden_size,
            self.projector_bias,
        );
        let at = "vision_tower.vision_model";
        let fan_in = (tower.num_channels * patch * patch) as f64;
        list.push(
            &format!("{at}.embeddings.patch_embedding.weight"),
            &[hidden, tower.num_channels, patch, patch],
            Init::Normal(fan_in.sqrt().recip()),
        );
        list.push(&format!("{at}.embeddings.patch_embedding.bias"), &[hidden], Init::Zeros);
        list.push(
            &format!("{at}.embeddings.position_embedding.weight"),
            &[tower.tokens(), hidden],
            Init::Normal((hidden as f64).sqrt().recip()),
        );
        for layer in 0..tower.num_hidden_layers {
            let at = format!("{at}.encoder.layers.{layer}");
            list.layer_norm(&format!("{at}.layer_norm1"), hidden);
            list.layer_norm(&format!("{at}.layer_norm2"), hidden);
            for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                list.linear(&format!("{at}.self_attn.{name}"), hidden, hidden, true);
            }
            list.linear(&format!("{at}.mlp.fc1"), hidden, mlp, true);
            list.linear(&format!("{at}.mlp.fc2"), mlp, hidden, true);
        }
        list.layer_norm(&format!("{at}.post_layernorm"), hidden);
    }
}

fn tiling(sizes: Option<&Value>, rule: &str, tower: &SiglipConfig) -> Result<Anyres> {
    if tower.patch_size == 0 {
        return Err(ModelError::Config("vision_config: patch_size is 0".to_owned()));
    }
    let sizes = match sizes {
        None | Some(Value::Null) => released_pinpoints(),
        Some(sizes) => pinpoints(sizes, tower.image_size)?,
    };
    Anyres::new(sizes, rule, tower.image_size, tower.side())
}

/// Layers that are computed for `vision_feature_layer`, which counts hidden states: 0 before the first layer, -1 after
/// the last.
fn used_layers(layers: usize, feature_layer: i64) -> Result<usize> {
    let states = layers as i64 + 1;
    let index = if feature_layer < 0 {
        states + feature_layer
    } else {
        feature_layer
    };
    match usize::try_from(index) {
        Ok(index) if index <= layers => Ok(index),
        _ => Err(ModelError::Config(format!(
            "vision_feature_layer {feature_layer} does not exist in a tower of {layers} layers"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_layers_count_from_both_ends() {
        assert_eq!(used_layers(26, -1).unwrap(), 26);
        assert_eq!(used_layers(27, -2).unwrap(), 26);
        assert_eq!(used_layers(27, 3).unwrap(), 3);
        assert!(used_layers(3, -5).is_err());
        assert!(used_layers(3, 4).is_err());
    }
}

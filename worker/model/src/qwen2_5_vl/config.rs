//! Sizes of the vision tower, and what the family's language model has where a file leaves it out.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    ModelError, Result,
    parameter::{Init, ParameterList},
    text::{TextDefaults, TextNames, parse},
};

/// The language model's names and defaults.
///
/// Source: `Qwen2_5_VLTextConfig` of transformers.
pub(crate) const TEXT: TextDefaults = TextDefaults {
    names: TextNames {
        model: "model.",
        head: "lm_head.weight",
    },
    sizes: text_sizes,
    multimodal_positions: true,
    nested_ties: false,
};

fn text_sizes() -> Map<String, Value> {
    let sizes = json!({
        "vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0
    });
    sizes.as_object().cloned().unwrap_or_default()
}

/// Sizes of the vision tower. Keys that a checkpoint leaves out have the defaults of the reference class.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Heads.
    pub num_heads: usize,
    /// Colour channels.
    #[serde(alias = "in_chans")]
    pub in_channels: usize,
    /// Side of a patch, in pixels.
    #[serde(alias = "spatial_patch_size")]
    pub patch_size: usize,
    /// Side of a group of patches that becomes one token.
    pub spatial_merge_size: usize,
    /// Frames of a patch.
    pub temporal_patch_size: usize,
    /// Video time steps per second.
    pub tokens_per_second: f64,
    /// Side of an attention window, in pixels.
    pub window_size: usize,
    /// Width of the output: the language model's.
    pub out_hidden_size: usize,
    /// Blocks that attend over a whole frame.
    pub fullatt_block_indexes: Vec<usize>,
    /// The gate's activation.
    pub hidden_act: String,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            depth: 32,
            hidden_size: 3584,
            intermediate_size: 3420,
            num_heads: 16,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            tokens_per_second: 4.0,
            window_size: 112,
            out_hidden_size: 3584,
            fullatt_block_indexes: vec![7, 15, 23, 31],
            hidden_act: "silu".to_owned(),
        }
    }
}

/// Epsilon of every normalization of the vision tower (fixed in the reference).
pub const VISION_NORM_EPS: f64 = 1e-6;
/// Base of the vision tower's rotary frequencies (fixed in the reference).
pub const VISION_ROPE_THETA: f64 = 10_000.0;

impl VisionConfig {
    /// Reads `vision_config`.
    pub(crate) fn from_json(section: Option<&Value>) -> Result<Self> {
        let config: Self = parse("vision_config", Value::Object(vision_fields(section)))?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        let merge = self.spatial_merge_size;
        let rules = [
            (
                self.num_heads > 0 && self.hidden_size.is_multiple_of(4 * self.num_heads),
                "hidden_size is no multiple of four times num_heads",
            ),
            (
                merge > 0 && self.patch_size > 0 && self.window_size >= merge * self.patch_size,
                "window_size is smaller than a token",
            ),
            (self.in_channels == 3, "in_channels is not 3"),
            (self.temporal_patch_size > 0, "temporal_patch_size is 0"),
            (self.hidden_act == "silu", "hidden_act is not \"silu\""),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, problem)) => Err(ModelError::Config(format!("vision_config: {problem}"))),
            None => Ok(()),
        }
    }

    /// Values of one patch: channels x frames x side x side.
    pub fn patch_values(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches that become one token.
    pub fn merge_unit(&self) -> usize {
        self.spatial_merge_size * self.spatial_merge_size
    }

    /// Pixels per side of a token: images are resized to multiples of it.
    pub fn token_pixels(&self) -> usize {
        self.patch_size * self.spatial_merge_size
    }

    /// Side of an attention window, in tokens.
    pub fn window_tokens(&self) -> usize {
        self.window_size / self.spatial_merge_size / self.patch_size
    }

    pub(crate) fn declare(&self, list: &mut ParameterList) {
        let (hidden, patch) = (self.hidden_size, self.patch_size);
        let fan_in = self.patch_values() as f64;
        let shape = [hidden, self.in_channels, self.temporal_patch_size, patch, patch];
        list.push(
            "visual.patch_embed.proj.weight",
            &shape,
            Init::Normal(fan_in.sqrt().recip()),
        );
        for block in 0..self.depth {
            let at = format!("visual.blocks.{block}");
            list.push(&format!("{at}.norm1.weight"), &[hidden], Init::Ones);
            list.push(&format!("{at}.norm2.weight"), &[hidden], Init::Ones);
            list.linear(&format!("{at}.attn.qkv"), hidden, 3 * hidden, true);
            list.linear(&format!("{at}.attn.proj"), hidden, hidden, true);
            list.linear(&format!("{at}.mlp.gate_proj"), hidden, self.intermediate_size, true);
            list.linear(&format!("{at}.mlp.up_proj"), hidden, self.intermediate_size, true);
            list.linear(&format!("{at}.mlp.down_proj"), self.intermediate_size, hidden, true);
        }
        let merged = hidden * self.merge_unit();
        list.push("visual.merger.ln_q.weight", &[hidden], Init::Ones);
        list.linear("visual.merger.mlp.0", merged, merged, true);
        list.linear("visual.merger.mlp.2", merged, self.out_hidden_size, true);
    }
}

/// The vision keys without duplicates: hub files carry `in_chans` and `spatial_patch_size` beside the class's names.
fn vision_fields(value: Option<&Value>) -> Map<String, Value> {
    let mut fields = value.and_then(Value::as_object).cloned().unwrap_or_default();
    for (alias, name) in [("in_chans", "in_channels"), ("spatial_patch_size", "patch_size")] {
        if fields.contains_key(name) {
            fields.remove(alias);
        }
    }
    fields
}

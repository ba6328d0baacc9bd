//! `config.json` of the family: sizes and ids, in every layout that checkpoints in use have.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    ModelError, Result,
    weights::{Init, Parameter},
};

/// Sizes and ids of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Language model.
    pub text: TextConfig,
    /// Vision tower.
    pub vision: VisionConfig,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// `<|image_pad|>`.
    pub image_token_id: u32,
    /// `<|video_pad|>`.
    pub video_token_id: u32,
    /// `<|vision_start|>`.
    pub vision_start_token_id: u32,
}

/// Sizes of the language model.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct TextConfig {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Added to the mean square of a normalization.
    #[serde(default = "rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
    /// Longest sequence the model was made for.
    #[serde(default = "max_position_embeddings")]
    pub max_position_embeddings: usize,
    /// Frequencies per axis (time, height, width); they sum to half a head.
    #[serde(skip)]
    pub mrope_section: [usize; 3],
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
        }
    }
}

/// Epsilon of every normalization of the vision tower (fixed in the reference).
pub const VISION_NORM_EPS: f64 = 1e-6;
/// Base of the vision tower's rotary frequencies (fixed in the reference).
pub const VISION_ROPE_THETA: f64 = 10_000.0;

const fn rms_norm_eps() -> f64 {
    1e-6
}

const fn rope_theta() -> f64 {
    1_000_000.0
}

const fn max_position_embeddings() -> usize {
    32_768
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

    /// Reads the fields of the language model from the top level or from `text_config`, the rotary sections from
    /// `rope_scaling` or `rope_parameters` of either.
    pub fn from_json(value: &Value) -> Result<Self> {
        let top = value
            .as_object()
            .ok_or_else(|| ModelError::Config("config.json is not an object".into()))?;
        let nested = top.get("text_config").and_then(Value::as_object);
        let mut fields = top.clone();
        if let Some(nested) = nested {
            fields.extend(nested.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        let rope = ["rope_parameters", "rope_scaling"]
            .iter()
            .find_map(|key| fields.get(*key)?.as_object().cloned());
        if let Some(theta) = rope.as_ref().and_then(|rope| rope.get("rope_theta")) {
            fields.insert("rope_theta".into(), theta.clone());
        }
        let vision_fields = vision_fields(top.get("vision_config"));
        let mut text: TextConfig = parse("text", Value::Object(fields.clone()))?;
        text.mrope_section = mrope_section(&text, rope.as_ref())?;
        let config = Self {
            text,
            vision: parse("vision_config", Value::Object(vision_fields))?,
            tie_word_embeddings: tied(top, nested),
            image_token_id: id(&fields, "image_token_id", 151_655)?,
            video_token_id: id(&fields, "video_token_id", 151_656)?,
            vision_start_token_id: id(&fields, "vision_start_token_id", 151_652)?,
        };
        config.validate()?;
        Ok(config)
    }

    /// Pixels per side of a token: images are resized to multiples of it.
    pub fn token_pixels(&self) -> usize {
        self.vision.patch_size * self.vision.spatial_merge_size
    }

    fn validate(&self) -> Result<()> {
        let (text, vision) = (&self.text, &self.vision);
        let merge = vision.spatial_merge_size;
        let rules = [
            (
                text.num_hidden_layers > 0 && text.vocab_size > 0,
                "the language model is empty",
            ),
            (
                text.num_attention_heads > 0 && text.hidden_size.is_multiple_of(2 * text.num_attention_heads),
                "hidden_size is no even multiple of num_attention_heads",
            ),
            (
                text.num_key_value_heads > 0 && text.num_attention_heads.is_multiple_of(text.num_key_value_heads),
                "num_attention_heads is no multiple of num_key_value_heads",
            ),
            (
                vision.num_heads > 0 && vision.hidden_size.is_multiple_of(4 * vision.num_heads),
                "vision hidden_size is no multiple of four times num_heads",
            ),
            (
                vision.out_hidden_size == text.hidden_size,
                "vision out_hidden_size is not the text hidden_size",
            ),
            (
                merge > 0 && vision.patch_size > 0 && vision.window_size >= merge * vision.patch_size,
                "vision window_size is smaller than a token",
            ),
            (vision.in_channels == 3, "vision in_channels is not 3"),
            (vision.temporal_patch_size > 0, "vision temporal_patch_size is 0"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, problem)) => Err(ModelError::Config((*problem).to_owned())),
            None => Ok(()),
        }
    }

    /// Every parameter of the model under its name on the hub.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut list = ParameterList::default();
        self.vision.declare(&mut list);
        self.text.declare(&mut list);
        if !self.tie_word_embeddings {
            list.linear("lm_head", self.text.hidden_size, self.text.vocab_size, false);
        }
        list.0
    }
}

impl TextConfig {
    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Width of all key heads together.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim()
    }

    fn declare(&self, list: &mut ParameterList) {
        let (hidden, mlp, kv) = (self.hidden_size, self.intermediate_size, self.kv_size());
        // Logits of a tied head then start with a deviation of about one whatever the width.
        let std = (1.0 / (hidden as f64).sqrt()).min(0.08);
        list.push(
            "model.embed_tokens.weight",
            &[self.vocab_size, hidden],
            Init::Normal(std),
        );
        for layer in 0..self.num_hidden_layers {
            let at = format!("model.layers.{layer}");
            for (name, out) in [("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)] {
                list.linear(&format!("{at}.self_attn.{name}"), hidden, out, true);
            }
            list.linear(&format!("{at}.self_attn.o_proj"), hidden, hidden, false);
            list.linear(&format!("{at}.mlp.gate_proj"), hidden, mlp, false);
            list.linear(&format!("{at}.mlp.up_proj"), hidden, mlp, false);
            list.linear(&format!("{at}.mlp.down_proj"), mlp, hidden, false);
            list.push(&format!("{at}.input_layernorm.weight"), &[hidden], Init::Ones);
            list.push(&format!("{at}.post_attention_layernorm.weight"), &[hidden], Init::Ones);
        }
        list.push("model.norm.weight", &[hidden], Init::Ones);
    }
}

impl VisionConfig {
    /// Values of one patch: channels x frames x side x side.
    pub fn patch_values(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches that become one token.
    pub fn merge_unit(&self) -> usize {
        self.spatial_merge_size * self.spatial_merge_size
    }

    /// Side of an attention window, in tokens.
    pub fn window_tokens(&self) -> usize {
        self.window_size / self.spatial_merge_size / self.patch_size
    }

    fn declare(&self, list: &mut ParameterList) {
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

#[derive(Default)]
struct ParameterList(Vec<Parameter>);

impl ParameterList {
    fn push(&mut self, name: &str, shape: &[usize], init: Init) {
        self.0.push(Parameter {
            name: name.to_owned(),
            shape: shape.to_vec(),
            init,
        });
    }

    fn linear(&mut self, name: &str, input: usize, output: usize, bias: bool) {
        let std = (input as f64).sqrt().recip();
        self.push(&format!("{name}.weight"), &[output, input], Init::Normal(std));
        if bias {
            self.push(&format!("{name}.bias"), &[output], Init::Zeros);
        }
    }
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| ModelError::Config(format!("{what}: {error}")))
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

fn mrope_section(text: &TextConfig, rope: Option<&Map<String, Value>>) -> Result<[usize; 3]> {
    if text.num_attention_heads == 0 {
        return Err(ModelError::Config("num_attention_heads is 0".into()));
    }
    let section: [usize; 3] = match rope.and_then(|rope| rope.get("mrope_section")) {
        Some(value) => parse("mrope_section", value.clone())?,
        None => return Err(ModelError::Config("rope_scaling has no mrope_section".into())),
    };
    let half = text.head_dim() / 2;
    if section.iter().sum::<usize>() == half {
        return Ok(section);
    }
    Err(ModelError::Config(format!(
        "mrope_section {section:?} does not sum to half a head, {half}"
    )))
}

fn tied(top: &Map<String, Value>, nested: Option<&Map<String, Value>>) -> bool {
    let read = |fields: &Map<String, Value>| fields.get("tie_word_embeddings").and_then(Value::as_bool);
    read(top).or_else(|| nested.and_then(read)).unwrap_or(false)
}

fn id(fields: &Map<String, Value>, key: &str, default: u32) -> Result<u32> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => parse(key, value.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hub_3b() -> Value {
        json!({
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": true, "max_position_embeddings": 128000,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "in_chans": 3, "spatial_patch_size": 14,
                "tokens_per_second": 2, "intermediate_size": 3420}
        })
    }

    fn count(value: &Value) -> (usize, usize) {
        let parameters = Config::from_json(value).unwrap().parameters();
        let size = |p: &&Parameter| p.shape.iter().product::<usize>();
        let vision = parameters
            .iter()
            .filter(|p| p.name.starts_with("visual."))
            .collect::<Vec<_>>();
        (parameters.iter().map(|p| size(&p)).sum(), vision.iter().map(size).sum())
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
}

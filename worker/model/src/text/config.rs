//! Sizes of the language model (Qwen2), from the layouts that checkpoints in use have.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    ModelError, Result,
    parameter::{Init, ParameterList},
};

/// Sizes of the language model.
#[derive(Clone, Debug, PartialEq)]
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
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square of a normalization.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Frequencies per axis (time, height, width); they sum to half a head. All on the first axis where positions are
    /// plain.
    pub mrope_section: [usize; 3],
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Names of its tensors on the hub.
    pub names: TextNames,
}

/// Names of the language model's tensors on the hub.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TextNames {
    /// Precedes `embed_tokens`, `layers` and `norm`.
    pub model: &'static str,
    /// The output head's weight.
    pub head: &'static str,
}

/// What a family's language model has in common with others of the family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TextDefaults {
    pub names: TextNames,
    /// Sizes that the reference class has where a nested `text_config` leaves them out.
    pub sizes: fn() -> Map<String, Value>,
    /// Whether positions have three axes.
    pub multimodal_positions: bool,
    /// Which file level says whether the head is tied, if both do.
    pub nested_ties: bool,
}

#[derive(Deserialize)]
struct Fields {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    rope_theta: f64,
    max_position_embeddings: usize,
    #[serde(default)]
    hidden_act: Option<String>,
    #[serde(default)]
    use_sliding_window: bool,
}

impl TextConfig {
    /// Reads the language model's fields from the top level of `config.json` or from its `text_config`.
    ///
    /// A nested section leaves out what equals the reference class's defaults (transformers writes only differences), so
    /// they are filled in; at the top level a missing size is an error.
    pub(crate) fn from_json(top: &Map<String, Value>, defaults: TextDefaults) -> Result<Self> {
        let nested = top.get("text_config").and_then(Value::as_object);
        let mut fields = match nested {
            Some(_) => (defaults.sizes)(),
            None => constants(&(defaults.sizes)()),
        };
        let present = |source: &Map<String, Value>| {
            let entries = source.iter().filter(|(_, value)| !value.is_null());
            entries
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect::<Vec<_>>()
        };
        fields.extend(present(top));
        if let Some(nested) = nested {
            fields.extend(present(nested));
        }
        let rope = rope_fields(&fields)?;
        if let Some(theta) = rope.as_ref().and_then(|rope| rope.get("rope_theta")) {
            fields.insert("rope_theta".into(), theta.clone());
        }
        let sizes: Fields = parse("text", Value::Object(fields))?;
        let mut config = sizes.into_config(defaults.names)?;
        let half = config.head_dim / 2;
        config.mrope_section = if defaults.multimodal_positions {
            mrope_section(half, rope.as_ref())?
        } else {
            [half, 0, 0]
        };
        let tied = |fields: &Map<String, Value>| fields.get("tie_word_embeddings").and_then(Value::as_bool);
        let (top, nested) = (tied(top), nested.and_then(tied));
        config.tie_word_embeddings = if defaults.nested_ties {
            nested.or(top)
        } else {
            top.or(nested)
        }
        .unwrap_or(false);
        Ok(config)
    }

    /// The parameter that gives logits: the head, or the embedding table where it is tied.
    pub fn head_name(&self) -> String {
        if self.tie_word_embeddings {
            format!("{}embed_tokens.weight", self.names.model)
        } else {
            self.names.head.to_owned()
        }
    }

    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key heads together.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Values of keys and values that one token of one sequence leaves in the cache, over all layers.
    pub fn kv_values_per_token(&self) -> usize {
        2 * self.num_hidden_layers * self.kv_size()
    }

    /// Every parameter of the language model, the head included where it is not tied.
    pub(crate) fn declare(&self, list: &mut ParameterList) {
        let (hidden, mlp) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.q_size(), self.kv_size());
        let model = self.names.model;
        // Logits of a tied head then start with a deviation of about one whatever the width.
        let std = (1.0 / (hidden as f64).sqrt()).min(0.08);
        list.push(
            &format!("{model}embed_tokens.weight"),
            &[self.vocab_size, hidden],
            Init::Normal(std),
        );
        for layer in 0..self.num_hidden_layers {
            let at = format!("{model}layers.{layer}");
            for (name, out) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                list.linear(&format!("{at}.self_attn.{name}"), hidden, out, true);
            }
            list.linear(&format!("{at}.self_attn.o_proj"), q, hidden, false);
            list.linear(&format!("{at}.mlp.gate_proj"), hidden, mlp, false);
            list.linear(&format!("{at}.mlp.up_proj"), hidden, mlp, false);
            list.linear(&format!("{at}.mlp.down_proj"), mlp, hidden, false);
            list.push(&format!("{at}.input_layernorm.weight"), &[hidden], Init::Ones);
            list.push(&format!("{at}.post_attention_layernorm.weight"), &[hidden], Init::Ones);
        }
        list.push(&format!("{model}norm.weight"), &[hidden], Init::Ones);
        if !self.tie_word_embeddings {
            list.linear(
                self.names.head.trim_end_matches(".weight"),
                hidden,
                self.vocab_size,
                false,
            );
        }
    }
}

impl Fields {
    fn into_config(self, names: TextNames) -> Result<TextConfig> {
        let heads = self.num_attention_heads;
        let kv_heads = self.num_key_value_heads.unwrap_or(heads);
        let refuse = |problem: String| Err(ModelError::Config(format!("text: {problem}")));
        if let Some(act) = self.hidden_act.filter(|act| act != "silu") {
            return refuse(format!("hidden_act {act:?} is not supported, only \"silu\" is"));
        }
        if self.use_sliding_window {
            return refuse("use_sliding_window is not supported".to_owned());
        }
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return refuse(format!(
                "num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            ));
        }
        let head_dim = match self.head_dim {
            Some(width) => width,
            None if self.hidden_size.is_multiple_of(heads) => self.hidden_size / heads,
            None => {
                let hidden = self.hidden_size;
                return refuse(format!(
                    "hidden_size {hidden} is no multiple of num_attention_heads {heads}"
                ));
            }
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return refuse(format!("a head of width {head_dim} cannot be rotated"));
        }
        let counts = [self.num_hidden_layers, self.vocab_size, self.intermediate_size];
        if counts.contains(&0) {
            return refuse("a size is 0".to_owned());
        }
        Ok(TextConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rope_theta,
            max_position_embeddings: self.max_position_embeddings,
            mrope_section: [head_dim / 2, 0, 0],
            tie_word_embeddings: false,
            names,
        })
    }
}

/// The defaults that are no sizes: a file at whose top level these are missing is complete.
fn constants(defaults: &Map<String, Value>) -> Map<String, Value> {
    let names = ["rms_norm_eps", "rope_theta", "max_position_embeddings"];
    let entries = names
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), defaults.get(*name)?.clone())));
    entries.collect()
}

/// The rotary section under its old or new name; kinds of scaling that change the angles are refused.
fn rope_fields(fields: &Map<String, Value>) -> Result<Option<Map<String, Value>>> {
    let names = ["rope_parameters", "rope_scaling"];
    let Some(rope) = names.iter().find_map(|name| fields.get(*name)?.as_object().cloned()) else {
        return Ok(None);
    };
    let kind = ["rope_type", "type"].iter().find_map(|key| rope.get(*key)?.as_str());
    match kind {
        None | Some("default" | "mrope") => Ok(Some(rope)),
        Some(kind) => Err(ModelError::Config(format!(
            "text: rotary scaling {kind:?} is not supported (default and mrope are): remove rope_scaling to use the model \
             within its trained length"
        ))),
    }
}

fn mrope_section(half: usize, rope: Option<&Map<String, Value>>) -> Result<[usize; 3]> {
    let section: [usize; 3] = match rope.and_then(|rope| rope.get("mrope_section")) {
        Some(value) => parse("mrope_section", value.clone())?,
        None => return Err(ModelError::Config("rope_scaling has no mrope_section".into())),
    };
    if section.iter().sum::<usize>() == half {
        return Ok(section);
    }
    Err(ModelError::Config(format!(
        "mrope_section {section:?} does not sum to half a head, {half}"
    )))
}

/// A section of the configuration as a type, with the section's name in the error.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(what: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| ModelError::Config(format!("{what}: {error}")))
}

//! Low-rank adapters: chosen by module name, trained, merged, read and written as PEFT does.
//!
//! Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section 4.1; files and names of PEFT
//! (`adapter_config.json`, `adapter_model.safetensors`).

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor, Var};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    ModelError, Result,
    config::Config,
    ops::Kernels,
    parameter::{Init, Parameter},
    weights::Weights,
};

/// Says how an adapter was made.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Holds the adapter's tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Precedes a module's name in the file.
const PREFIX: &str = "base_model.model.";

/// Which linear maps get an adapter.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Targets {
    /// Ends of module names (`q_proj`, `mlp.up_proj`); each must be a whole name or stand behind a dot.
    Names(Vec<String>),
    /// A regular expression that a whole module name must match, or `all-linear` for every map but the output head.
    Pattern(String),
}

/// Rank, scale and place of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank of the product.
    pub r: usize,
    /// The product is multiplied by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Divide by the square root of the rank instead (rank-stabilized).
    pub use_rslora: bool,
    /// Which maps.
    pub target_modules: Targets,
}

impl Default for LoraConfig {
    /// Rank 16, scale 2, every linear map.
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: 32.0,
            use_rslora: false,
            target_modules: Targets::Pattern("all-linear".to_owned()),
        }
    }
}

/// An adapter for one model.
#[derive(Clone, Debug)]
pub struct Lora {
    config: LoraConfig,
    /// `<module>.lora_A.weight` `[r, in]` and `<module>.lora_B.weight` `[out, r]`, modules named as on the hub.
    weights: Weights,
}

/// The two factors of one map, and what their product is multiplied by.
#[derive(Clone, Debug)]
pub(crate) struct Factors {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl Factors {
    /// What the adapter adds: `[rows, in]` to `[rows, out]`.
    pub(crate) fn forward(&self, x: &Tensor, kernels: Kernels) -> Result<Tensor> {
        let low = kernels.linear(x, &self.a, None)?;
        Ok((kernels.linear(&low, &self.b, None)? * self.scale)?)
    }
}

/// Whether a module is adapted, by its name in memory and its name on the hub.
type Matcher = Box<dyn Fn(&str, &str, &Config) -> bool>;

impl LoraConfig {
    fn scale(&self) -> f64 {
        let rank = self.r as f64;
        self.lora_alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// Parameters of the adapter that this configuration means for a model.
    fn parameters(&self, model: &Config) -> Result<Vec<Parameter>> {
        if self.r == 0 {
            return Err(ModelError::Config("an adapter of rank 0 has no parameters".to_owned()));
        }
        let accepts = self.matcher()?;
        let mut list = Vec::new();
        for (module, [output, input]) in linear_modules(model) {
            if !accepts(&in_memory(model, &module), &module, model) {
                continue;
            }
            list.push(Parameter {
                name: format!("{module}.lora_A.weight"),
                shape: vec![self.r, input],
                // The variance of PEFT's uniform draw.
                init: Init::Normal((3.0 * input as f64).sqrt().recip()),
            });
            list.push(Parameter {
                name: format!("{module}.lora_B.weight"),
                shape: vec![output, self.r],
                init: Init::Zeros,
            });
        }
        if list.is_empty() {
            let targets = serde_json::to_string(&self.target_modules).unwrap_or_default();
            return Err(ModelError::Config(format!(
                "target_modules {targets} names no linear map of a {}",
                model.model_type()
            )));
        }
        Ok(list)
    }

    fn matcher(&self) -> Result<Matcher> {
        match &self.target_modules {
            Targets::Names(names) => {
                let names = names.clone();
                Ok(Box::new(move |module, _, _| {
                    names.iter().any(|name| {
                        module
                            .strip_suffix(name.as_str())
                            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
                    })
                }))
            }
            Targets::Pattern(all) if all == "all-linear" => Ok(Box::new(|_, hub, model| {
                model.text.names.head.strip_suffix(".weight") != Some(hub)
            })),
            Targets::Pattern(pattern) => {
                let whole = Regex::new(&format!("^(?:{pattern})$"))
                    .map_err(|error| ModelError::Config(format!("target_modules {pattern:?}: {error}")))?;
                Ok(Box::new(move |module, _, _| whole.is_match(module)))
            }
        }
    }
}

/// Linear maps of a model by hub name, with their shapes `[out, in]`. Tables and convolutions are none.
fn linear_modules(model: &Config) -> Vec<(String, [usize; 2])> {
    let parameters = model.parameters().into_iter();
    let linear = parameters.filter_map(|parameter| {
        let module = parameter.name.strip_suffix(".weight")?;
        let is_table = module.ends_with("embed_tokens") || module.ends_with("position_embedding");
        match parameter.shape[..] {
            [output, input] if !is_table => Some((module.to_owned(), [output, input])),
            _ => None,
        }
    });
    linear.collect()
}

/// A module's name in a model that transformers has loaded, from its name on the hub.
fn in_memory(model: &Config, hub: &str) -> String {
    let text = model.text.names;
    if let Some(rest) = hub.strip_prefix(text.model) {
        format!("model.language_model.{rest}")
    } else if text.head.strip_suffix(".weight") == Some(hub) {
        "lm_head".to_owned()
    } else {
        format!("model.{hub}")
    }
}

impl Lora {
    /// A new adapter that changes nothing yet: the first factor is drawn from `seed`, the second is zero.
    pub fn new(config: LoraConfig, model: &Config, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let weights = Weights::random(&config.parameters(model)?, seed, dtype, device)?;
        Ok(Self { config, weights })
    }

    /// Reads an adapter that PEFT or [`Self::save`] wrote. Kinds that this crate does not have are refused by name.
    pub fn load(dir: &Path, model: &Config, dtype: DType, device: &Device) -> Result<Self> {
        let config = read_config(&dir.join(CONFIG_FILE))?;
        let path = dir.join(WEIGHTS_FILE);
        let found = candle_core::safetensors::load(&path, device).map_err(|error| parse_error(&path, error))?;
        // In the order of their names, so that the same file is always refused for the same tensor.
        let found = found.into_iter().collect::<BTreeMap<_, _>>();
        let mut wanted = BTreeMap::new();
        for parameter in config.parameters(model)? {
            wanted.insert(parameter.name, parameter.shape);
        }
        let mut vars = BTreeMap::new();
        for (name, tensor) in found {
            let hub = hub_name(model, &name);
            match wanted.get(&hub) {
                Some(shape) if tensor.dims() == shape => {}
                Some(shape) => {
                    let dims = tensor.dims();
                    return Err(parse_error(&path, format!("{name} is {dims:?}, expected {shape:?}")));
                }
                None => return Err(parse_error(&path, format!("{name} adapts no module that is targeted"))),
            }
            vars.insert(hub, Var::from_tensor(&tensor.to_dtype(dtype)?)?);
        }
        // A pattern may accept more than was adapted when it was saved; a module that is adapted has both factors.
        let other = |name: &str| match name.strip_suffix(".lora_A.weight") {
            Some(module) => format!("{module}.lora_B.weight"),
            None => name.replace(".lora_B.weight", ".lora_A.weight"),
        };
        if let Some(alone) = vars.keys().find(|name| !vars.contains_key(&other(name))) {
            return Err(parse_error(&path, format!("{alone} has no second factor")));
        }
        if vars.is_empty() {
            return Err(parse_error(&path, "it adapts no module"));
        }
        Ok(Self {
            config,
            weights: Weights::from_vars(vars),
        })
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` under the names that PEFT gives them. `base` is what
    /// `base_model_name_or_path` says. `model` must be the one that the adapter was made for.
    pub fn save(&self, dir: &Path, model: &Config, base: Option<&str>) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(ModelError::file(dir))?;
        let targets = match &self.config.target_modules {
            Targets::Pattern(all) if all == "all-linear" => Targets::Names(self.module_names(model)),
            other => other.clone(),
        };
        let document = json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": self.config.r, "lora_alpha": self.config.lora_alpha, "lora_dropout": 0.0,
            "use_rslora": self.config.use_rslora, "use_dora": false, "bias": "none", "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": true, "modules_to_save": null,
            "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": null, "layers_pattern": null,
            "target_modules": targets
        });
        let path = dir.join(CONFIG_FILE);
        let text = serde_json::to_string_pretty(&document).map_err(|error| parse_error(&path, error))?;
        std::fs::write(&path, text + "\n").map_err(ModelError::file(&path))?;
        let renamed = self.weights.iter().map(|(name, var)| {
            let (module, factor) = split_factor(name);
            (format!("{PREFIX}{}{factor}", in_memory(model, module)), var.clone())
        });
        Weights::from_vars(renamed.collect()).save(&dir.join(WEIGHTS_FILE))
    }

    fn module_names(&self, model: &Config) -> Vec<String> {
        let modules = self
            .weights
            .iter()
            .filter_map(|(name, _)| name.strip_suffix(".lora_A.weight"));
        modules.map(|module| in_memory(model, module)).collect()
    }

    /// Rank, scale and place.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Every variable of the adapter, sorted by name. They are shared: [`Var::set`] changes the model.
    pub fn named_vars(&self) -> Vec<(String, Var)> {
        let vars = self.weights.iter();
        vars.map(|(name, var)| (name.to_owned(), var.clone())).collect()
    }

    pub(crate) fn factors(&self, module: &str, trainable: &dyn Fn(&str) -> bool) -> Option<Factors> {
        let tensor = |factor: &str| {
            let name = format!("{module}.{factor}.weight");
            let var = self.weights.get(&name)?;
            Some(if trainable(&name) {
                var.as_tensor().clone()
            } else {
                var.as_detached_tensor()
            })
        };
        Some(Factors {
            a: tensor("lora_A")?,
            b: tensor("lora_B")?,
            scale: self.config.scale(),
        })
    }

    /// Adds the products to the weights of the maps that they adapt.
    pub(crate) fn merge_into(&self, weights: &Weights) -> Result<()> {
        for (name, a) in self.weights.iter() {
            let Some(module) = name.strip_suffix(".lora_A.weight") else {
                continue;
            };
            let lacks = |name: &str| ModelError::Input(format!("no parameter {name} to merge into"));
            let b = format!("{module}.lora_B.weight");
            let b = self.weights.get(&b).ok_or_else(|| lacks(&b))?;
            let target = format!("{module}.weight");
            let target = weights.get(&target).ok_or_else(|| lacks(&target))?;
            let wide = |var: &Var| var.as_detached_tensor().to_dtype(DType::F32);
            let product = (wide(b)?.matmul(&wide(a)?)? * self.config.scale())?;
            target.set(&(wide(target)? + product)?.to_dtype(target.dtype())?)?;
        }
        Ok(())
    }
}

/// Module and `.lora_A.weight` or `.lora_B.weight`.
fn split_factor(name: &str) -> (&str, &str) {
    name.split_at(name.rfind(".lora_").unwrap_or(name.len()))
}

/// The hub's name of an adapter tensor, from whichever layout of names the adapter was saved under.
fn hub_name(model: &Config, name: &str) -> String {
    let name = name
        .strip_prefix(PREFIX)
        .unwrap_or(name)
        .replace(".default.weight", ".weight");
    let (module, factor) = split_factor(&name);
    // The rules are for tensors: a module's name ends in a dot for them.
    let hub = model.names().hub(&format!("{module}."));
    format!("{}{factor}", hub.trim_end_matches('.'))
}

#[derive(Deserialize)]
struct File {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    target_modules: Targets,
    #[serde(default)]
    use_rslora: bool,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

fn read_config(path: &Path) -> Result<LoraConfig> {
    let bytes = std::fs::read(path).map_err(ModelError::file(path))?;
    let file: File = serde_json::from_slice(&bytes).map_err(|error| parse_error(path, error))?;
    if file.peft_type != "LORA" {
        return Err(parse_error(path, format!("peft_type {:?} is not LORA", file.peft_type)));
    }
    let neutral = |key: &str| match file.rest.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(value) => key == "bias" && value == "none",
    };
    let keys = [
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "layers_to_transform",
        "fan_in_fan_out",
        "bias",
        "trainable_token_indices",
    ];
    if let Some(key) = keys.iter().find(|key| !neutral(key)) {
        return Err(parse_error(path, format!("{key} {} is not supported", file.rest[*key])));
    }
    Ok(LoraConfig {
        r: file.r,
        lora_alpha: file.lora_alpha,
        use_rslora: file.use_rslora,
        target_modules: file.target_modules,
    })
}

#[expect(clippy::needless_pass_by_value, reason = "passed to map_err")]
fn parse_error(path: &Path, reason: impl ToString) -> ModelError {
    ModelError::Parse {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LoadOptions, Pass, Row, TextBatch, Vlm};

    fn config() -> Config {
        Config::from_json(&json!({
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
                "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
        }))
        .unwrap()
    }

    fn targets(names: &[&str]) -> Targets {
        Targets::Names(names.iter().map(|name| (*name).to_owned()).collect())
    }

    fn adapter(targets: Targets) -> Lora {
        let lora = LoraConfig {
            r: 3,
            lora_alpha: 6.0,
            target_modules: targets,
            ..LoraConfig::default()
        };
        Lora::new(lora, &config(), 1, DType::F32, &Device::Cpu).unwrap()
    }

    /// An adapter that changes something: its second factors are not zero.
    fn trained(targets: Targets) -> Lora {
        let lora = adapter(targets);
        for (index, (name, var)) in lora.named_vars().into_iter().enumerate() {
            if name.contains("lora_B") {
                let values = (0..var.elem_count()).map(|i| ((i * 7 + index) % 11) as f32 / 40.0 - 0.1);
                let values = Tensor::from_vec(values.collect::<Vec<_>>(), var.shape(), &Device::Cpu);
                var.set(&values.unwrap()).unwrap();
            }
        }
        lora
    }

    fn logits(model: &Vlm, pass: Pass) -> Tensor {
        let batch = TextBatch::new(&[Row::text(vec![1, 9, 7, 5])]).unwrap();
        model.logits(&model.forward(&batch, pass).unwrap(), pass).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        let pairs = values(a).into_iter().zip(values(b));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    fn modules(lora: &Lora) -> Vec<String> {
        lora.module_names(&config())
    }

    #[test]
    fn modules_are_chosen_by_the_end_of_their_name_or_by_a_pattern() {
        let layers = |name: &str| [0, 1].map(|layer| format!("model.language_model.layers.{layer}.{name}"));
        assert_eq!(modules(&adapter(targets(&["q_proj"]))), layers("self_attn.q_proj"));
        assert_eq!(modules(&adapter(targets(&["mlp.up_proj"]))).len(), 3, "text and vision");
        let pattern = r"model\.language_model\..*\.(gate|up)_proj".to_owned();
        assert_eq!(modules(&adapter(Targets::Pattern(pattern))).len(), 4);
        let all = modules(&adapter(LoraConfig::default().target_modules));
        assert_eq!(all.len(), 2 * 7 + 5 + 2, "layers, vision block, merger");
        assert!(!all.contains(&"lm_head".to_owned()));
    }

    #[test]
    fn a_name_that_no_module_has_is_refused() {
        let lora = LoraConfig {
            target_modules: targets(&["proj_q"]),
            ..LoraConfig::default()
        };
        let error = Lora::new(lora, &config(), 1, DType::F32, &Device::Cpu).unwrap_err();
        assert!(
            error.to_string().contains("[\"proj_q\"] names no linear map"),
            "{error}"
        );
    }

    #[test]
    fn a_new_adapter_changes_nothing_and_a_merged_one_computes_the_same() {
        let base = Vlm::random(config(), 5, &LoadOptions::default()).unwrap();
        let before = logits(&base, Pass::Infer);
        let mut model = base.deep_copy().unwrap();
        model.attach(adapter(targets(&["q_proj", "down_proj"]))).unwrap();
        assert!(distance(&logits(&model, Pass::Infer), &before) == 0.0);
        model.attach(trained(targets(&["q_proj", "down_proj"]))).unwrap();
        let adapted = logits(&model, Pass::Infer);
        assert!(distance(&adapted, &before) > 1e-2);
        assert!(distance(&logits(&model, Pass::Train), &adapted) < 1e-5);
        model.merge_adapter().unwrap();
        assert!(model.adapter().is_none());
        assert!(distance(&logits(&model, Pass::Infer), &adapted) < 1e-5);
    }

    #[test]
    fn training_reaches_the_adapter_and_nothing_else() {
        let mut model = Vlm::random(config(), 5, &LoadOptions::default()).unwrap();
        model.attach(trained(targets(&["v_proj"]))).unwrap();
        let gradients = logits(&model, Pass::Train)
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        for (name, var) in model.adapter().unwrap().named_vars() {
            let gradient = gradients.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
            assert!(values(gradient).iter().any(|value| *value != 0.0), "{name}");
        }
        for (name, var) in model.named_vars() {
            assert!(gradients.get(&var).is_none(), "{name}");
        }
    }

    #[test]
    fn what_is_saved_loads_to_the_same_values() {
        let dir = tempfile::tempdir().unwrap();
        let saved = trained(LoraConfig::default().target_modules);
        saved.save(dir.path(), &config(), Some("base")).unwrap();
        let loaded = Lora::load(dir.path(), &config(), DType::F32, &Device::Cpu).unwrap();
        let pairs = saved.named_vars().into_iter().zip(loaded.named_vars());
        for ((name, a), (other, b)) in pairs {
            assert_eq!(name, other);
            assert_eq!(values(&a), values(&b), "{name}");
        }
        assert_eq!(saved.named_vars().len(), loaded.named_vars().len());
    }

    #[test]
    fn kinds_that_are_not_supported_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        adapter(targets(&["q_proj"])).save(dir.path(), &config(), None).unwrap();
        let path = dir.path().join(CONFIG_FILE);
        let document: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for (key, value, says) in [
            ("peft_type", json!("IA3"), "peft_type \"IA3\""),
            ("use_dora", json!(true), "use_dora true"),
            ("bias", json!("all"), "bias \"all\""),
            ("rank_pattern", json!({"q_proj": 8}), "rank_pattern"),
            ("target_modules", json!(["k_proj"]), "adapts no module that is targeted"),
            ("r", json!(4), "is [3, 32], expected [4, 32]"),
        ] {
            let mut changed = document.clone();
            changed[key] = value;
            std::fs::write(&path, changed.to_string()).unwrap();
            let error = Lora::load(dir.path(), &config(), DType::F32, &Device::Cpu).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}

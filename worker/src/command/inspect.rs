//! What a checkpoint is, and whether its tensors fit.

use std::collections::BTreeMap;

use clap::Args;
use flotilla_model::{
    Config, ModelError, Parameter, Vision, WeightProblems,
    weights::{self, TensorInfo},
};
use serde_json::{Value, json};

use super::{arguments::ModelArguments, bytes, grouped};
use crate::error::WorkerError;

/// Arguments of `inspect`.
#[derive(Args, Debug)]
pub struct InspectArguments {
    /// Which model; `--dtype` is the precision that memory is computed for.
    #[command(flatten)]
    pub model: ModelArguments,
    /// Print one JSON document instead of text.
    #[arg(long)]
    pub json: bool,
}

/// What is known of a checkpoint.
#[derive(Debug)]
struct Report {
    config: Config,
    parameters: Vec<Parameter>,
    /// Tensors on disk; None where the directory has no weights.
    found: Option<Vec<TensorInfo>>,
    problems: WeightProblems,
    bytes_per_value: u64,
}

/// Prints the report. Tensors that do not fit are an error after it.
pub fn run(arguments: &InspectArguments) -> Result<(), WorkerError> {
    let config = arguments.model.config()?;
    let parameters = config.parameters();
    let names = config.names();
    let (found, problems) = match weights::scan(&arguments.model.model, names) {
        Ok(scan) => {
            let problems = weights::compare(&parameters, names, &scan);
            (Some(scan.tensors), problems)
        }
        Err(ModelError::NoWeights { foreign: None, .. }) => (None, WeightProblems::default()),
        Err(error) => {
            return Err(super::arguments::failed("read the weights", &arguments.model.model)(
                error,
            ));
        }
    };
    let dtype: candle_core::DType = arguments.model.dtype.into();
    let report = Report {
        config,
        parameters,
        found,
        problems,
        bytes_per_value: dtype.size_in_bytes() as u64,
    };
    if arguments.json {
        println!("{:#}", report.json(arguments));
    } else {
        print!("{}", report.text(arguments));
    }
    if report.problems.is_empty() {
        return Ok(());
    }
    let path = arguments.model.model.clone();
    let problems = report.problems;
    Err(WorkerError::permanent(
        "the checkpoint cannot be loaded",
        ModelError::Weights {
            path,
            problems: Box::new(problems),
        },
    ))
}

impl Report {
    /// Values of all parameters for which `belongs` holds.
    fn count(&self, belongs: impl Fn(&Parameter) -> bool) -> u64 {
        let own = self.parameters.iter().filter(|parameter| belongs(parameter));
        own.map(|parameter| parameter.count() as u64).sum()
    }

    fn total(&self) -> u64 {
        self.count(|_| true)
    }

    fn vision(&self) -> u64 {
        self.count(|parameter| self.config.is_vision(&parameter.name))
    }

    /// Bytes on disk by element type.
    fn on_disk(&self) -> BTreeMap<String, u64> {
        let mut by_type = BTreeMap::new();
        for tensor in self.found.iter().flatten() {
            *by_type.entry(tensor.dtype.to_string()).or_default() += tensor.bytes;
        }
        by_type
    }

    fn kv_bytes(&self) -> u64 {
        self.config.text.kv_values_per_token() as u64 * self.bytes_per_value
    }

    fn json(&self, arguments: &InspectArguments) -> Value {
        let text = &self.config.text;
        json!({
            "model_type": self.config.model_type(),
            "text": {
                "hidden_size": text.hidden_size, "num_hidden_layers": text.num_hidden_layers,
                "num_attention_heads": text.num_attention_heads, "num_key_value_heads": text.num_key_value_heads,
                "head_dim": text.head_dim, "intermediate_size": text.intermediate_size, "vocab_size": text.vocab_size,
                "max_position_embeddings": text.max_position_embeddings, "tie_word_embeddings": text.tie_word_embeddings,
            },
            "parameters": self.total(),
            "vision_parameters": self.vision(),
            "text_parameters": self.total() - self.vision(),
            "dtype": arguments.model.dtype.to_string(),
            "weight_bytes": self.total() * self.bytes_per_value,
            "kv_bytes_per_token": self.kv_bytes(),
            "tensors_on_disk": self.found.as_ref().map(Vec::len),
            "bytes_on_disk": self.on_disk(),
            "fits": self.found.as_ref().map(|_| self.problems.is_empty()),
            "problems": (!self.problems.is_empty()).then(|| self.problems.to_string()),
        })
    }

    fn vision_text(&self) -> String {
        match &self.config.vision {
            Vision::Qwen25Vl(vision) => format!(
                "{} blocks of {}, {} heads, patches of {}x{} pixels, {}x{} of them a token",
                vision.depth,
                vision.hidden_size,
                vision.num_heads,
                vision.patch_size,
                vision.patch_size,
                vision.spatial_merge_size,
                vision.spatial_merge_size
            ),
            Vision::LlavaOneVision(vision) => format!(
                "{} layers of {}, {} heads, squares of {} pixels, {} tokens each",
                vision.used_layers,
                vision.tower.hidden_size,
                vision.tower.num_attention_heads,
                vision.tower.image_size,
                vision.tower.tokens()
            ),
        }
    }

    fn text(&self, arguments: &InspectArguments) -> String {
        let text = &self.config.text;
        let dtype = arguments.model.dtype;
        let tied = if text.tie_word_embeddings { ", tied head" } else { "" };
        let mut lines = vec![
            ("architecture", self.config.model_type().to_owned()),
            (
                "language model",
                format!(
                    "{} layers of {}, {} heads ({} for keys) of {}, MLP {}, vocabulary {}{tied}, context {}",
                    text.num_hidden_layers,
                    text.hidden_size,
                    text.num_attention_heads,
                    text.num_key_value_heads,
                    text.head_dim,
                    text.intermediate_size,
                    text.vocab_size,
                    text.max_position_embeddings
                ),
            ),
            ("vision", self.vision_text()),
            (
                "parameters",
                format!(
                    "{} (vision {}, language model {})",
                    grouped(self.total()),
                    grouped(self.vision()),
                    grouped(self.total() - self.vision())
                ),
            ),
            (
                "memory",
                format!("{} of weights in {dtype}", bytes(self.total() * self.bytes_per_value)),
            ),
            (
                "cache",
                format!(
                    "{} bytes of keys and values per token in {dtype}; {} for the whole context",
                    grouped(self.kv_bytes()),
                    bytes(self.kv_bytes() * text.max_position_embeddings as u64)
                ),
            ),
        ];
        let disk = match &self.found {
            None => "no weights in this directory".to_owned(),
            Some(found) => {
                let types = self.on_disk();
                let types = types.iter().map(|(dtype, size)| format!("{} {dtype}", bytes(*size)));
                format!("{} tensors: {}", found.len(), types.collect::<Vec<_>>().join(", "))
            }
        };
        lines.push(("on disk", disk));
        let fit = match (&self.found, self.problems.is_empty()) {
            (None, _) => "nothing to compare".to_owned(),
            (Some(_), true) => "every tensor is there, in its shape".to_owned(),
            (Some(_), false) => self.problems.to_string(),
        };
        lines.push(("fit", fit));
        lines
            .iter()
            .map(|(name, value)| format!("{name:<15} {value}\n"))
            .collect()
    }
}

//! A checkpoint in another precision, with an adapter merged, in the hub's layout.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::{
    arguments::{ModelArguments, failed},
    bytes,
};
use crate::{device::Wanted, error::WorkerError};

/// Arguments of `convert`.
#[derive(Args, Debug)]
pub struct ConvertArguments {
    /// Which model; `--dtype` is the precision that is written, `--adapter` is merged.
    #[command(flatten)]
    pub model: ModelArguments,
    /// The directory to write; it must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Largest weight file, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 4768)]
    pub max_shard_size: u64,
}

/// Files beside the weights that belong to a checkpoint.
const COMPANIONS: [&str; 15] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "LICENSE",
];

/// Writes the directory.
pub fn run(arguments: &ConvertArguments) -> Result<(), WorkerError> {
    let out = &arguments.out;
    let mut entries = match std::fs::read_dir(out) {
        Ok(entries) => entries,
        Err(_) => {
            std::fs::create_dir_all(out).map_err(failed("create the directory", out))?;
            std::fs::read_dir(out).map_err(failed("list the directory", out))?
        }
    };
    if entries.next().is_some() {
        return Err(WorkerError::invalid(format!("{} is not empty", out.display())));
    }
    let mut model = arguments.model.load(Wanted::Cpu)?;
    model
        .merge_adapter()
        .map_err(failed("merge the adapter", &arguments.model.model))?;
    for name in COMPANIONS {
        let source = arguments.model.model.join(name);
        if source.is_file() {
            std::fs::copy(&source, out.join(name)).map_err(failed(&format!("copy {name}"), out))?;
        }
    }
    write_precision(&out.join("config.json"), &arguments.model.dtype.to_string())?;
    let weights = model.weights();
    weights
        .save_sharded(out, arguments.max_shard_size.saturating_mul(1 << 20), None)
        .map_err(failed("write the weights", out))?;
    println!(
        "{}: {} of weights in {}",
        out.display(),
        bytes(weights.size_in_bytes() as u64),
        arguments.model.dtype
    );
    Ok(())
}

/// Says in `config.json` in which precision the weights are.
fn write_precision(path: &Path, dtype: &str) -> Result<(), WorkerError> {
    let directory = path.parent().unwrap_or(path);
    let text = std::fs::read_to_string(path).map_err(failed("read config.json", directory))?;
    let mut config: Value = serde_json::from_str(&text).map_err(failed("read config.json", directory))?;
    let name = match dtype {
        "bf16" => "bfloat16",
        "f16" => "float16",
        _ => "float32",
    };
    if let Some(fields) = config.as_object_mut() {
        let key = if fields.contains_key("dtype") {
            "dtype"
        } else {
            "torch_dtype"
        };
        fields.insert(key.to_owned(), name.into());
        for section in ["text_config", "vision_config"] {
            let section = fields.get_mut(section).and_then(Value::as_object_mut);
            let entries = section.into_iter().flatten();
            for (_, value) in entries.filter(|(key, _)| *key == "dtype" || *key == "torch_dtype") {
                *value = name.into();
            }
        }
    }
    std::fs::write(path, format!("{config:#}\n")).map_err(failed("write config.json", directory))
}

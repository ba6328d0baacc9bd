//! Which parameters belong to which module of a job's `freeze`.

use flotilla_api::algorithm::Module;
use flotilla_model::Config;

/// Whether a parameter is trained where these modules are frozen.
pub fn is_trained(config: &Config, name: &str, freeze: &[Module]) -> bool {
    !freeze.iter().any(|module| belongs(config, name, *module))
}

fn belongs(config: &Config, name: &str, module: Module) -> bool {
    match module {
        Module::Vision => config.is_vision(name),
        Module::Embeddings => name.ends_with("embed_tokens.weight") || name == config.text.names.head,
    }
}

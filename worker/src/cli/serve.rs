//! `serve`: a model for people, without a role config.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use flotilla_api::role::{
    self, AccessSettings, EngineSettings, MediaSettings, ModelSource, Owner, Purpose, Role, RoleConfig, SCHEMA_VERSION,
    Serve, TlsFiles,
};

use super::{Assignment, read_token};
use crate::{
    command::arguments::Precision, device::DeviceArguments, error::WorkerError, group, models, spans, uri::Volumes,
};

pub(super) const EXAMPLES: &str = "Examples:\n  \
    flotilla-worker serve --model hf://Qwen/Qwen2.5-VL-3B-Instruct\n  \
    flotilla-worker serve --model ./checkpoint --listen 127.0.0.1:0          (prints the port that it got)\n  \
    flotilla-worker serve --model ./checkpoint --listen 0.0.0.0:8443 \\\n    \
      --api-key-file keys.txt --tls-cert cert.pem --tls-key key.pem --image-host '*.example.com'\n  \
    flotilla-worker serve --model hf://Qwen/Qwen2.5-VL-72B-Instruct --tensor-parallel 4   (4 GPUs share it)\n\
    Then open http://127.0.0.1:8000/ in a browser, read /docs, or ask:\n  \
    curl 127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\\n    \
      -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'\n  \
    curl 127.0.0.1:8000/v1/critic/compare -H 'content-type: application/json' \\\n    \
      -d '{\"question\": \"What digit is this?\", \"responses\": [\"7\", \"3\"], \"image\": \"data:image/png;base64,...\"}'\n\
    SIGTERM drains: answers that have begun end (--drain-seconds), new requests are refused with 503.\n\
    Keys and certificates are read again when their files change. docs/serving.md has the whole story.";

/// Arguments of `serve`.
#[derive(Args, Debug)]
pub struct ServeArguments {
    /// Directory with config.json, safetensors and tokenizer.json; or hf://org/name[@revision], s3://bucket/prefix,
    /// gs://bucket/prefix, az://container/prefix, which is fetched into the cache.
    #[arg(long, value_name = "DIR|URI")]
    pub model: PathBuf,
    /// Digest that the checkpoint must have (sha256:<hex>); only for directories that Flotilla wrote.
    #[arg(long)]
    pub digest: Option<String>,
    /// Address of the HTTP server. Port 0 takes a free one and prints it.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8000")]
    pub listen: SocketAddr,
    /// Name under which /v1/models lists the model; by default that of the directory or repository.
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Which endpoints are offered.
    #[arg(long, value_enum, default_value_t)]
    pub purpose: PurposeArgument,
    /// Critic template: a builtin (critic-short, critic-criteria) or a file.
    #[arg(long, value_name = "NAME|FILE", default_value = "critic-short")]
    pub template: String,
    /// A further template, which requests ask for by this name; may be repeated. The file is Jinja, with an optional
    /// head, or YAML that describes a template beside it: see docs/critic-api.md.
    #[arg(long = "critic-template", value_name = "NAME=FILE")]
    pub critic_templates: Vec<String>,
    /// Longest prompt plus completion, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    pub max_model_len: u32,
    /// Requests that may wait; one more is answered 429.
    #[arg(long, value_name = "REQUESTS", default_value_t = 256)]
    pub max_queue: u32,
    /// Seconds that answers have to end after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value_t = 25)]
    pub drain_seconds: u32,
    /// How the engine is sized.
    #[command(flatten)]
    pub engine: EngineArguments,
    /// Who is let in.
    #[command(flatten)]
    pub access: AccessArguments,
    /// Where pictures may come from.
    #[command(flatten)]
    pub media: MediaArguments,
    /// Where the model runs.
    #[command(flatten)]
    pub device: DeviceArguments,
    /// GPUs that share the model, from that of --device on: for a model that one cannot hold. docs/tensor-parallel.md says
    /// which numbers are possible.
    #[arg(long, value_name = "GPUS", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(group::MOST)))]
    pub tensor_parallel: u32,
    /// OpenTelemetry collector that receives a span per request, for example http://127.0.0.1:4318.
    #[arg(long, value_name = "URL", env = spans::ENDPOINT_VARIABLE, help_heading = "Observation")]
    pub otlp_endpoint: Option<String>,
}

/// How the engine is sized.
#[derive(Args, Debug)]
#[command(next_help_heading = "Engine")]
pub struct EngineArguments {
    /// Precision of weights and activations; by default f32 on a CPU, bf16 on a GPU.
    #[arg(long, value_enum)]
    pub dtype: Option<Precision>,
    /// Blocks of the key-value cache; by default as many as --kv-cache-bytes hold.
    #[arg(long, value_name = "BLOCKS", value_parser = clap::value_parser!(u32).range(1..))]
    pub kv_blocks: Option<u32>,
    /// Bytes of the key-value cache; by default 2 GiB on a CPU, on a GPU 85 % of the memory that the model leaves.
    #[arg(long, value_name = "BYTES", conflicts_with = "kv_blocks", value_parser = clap::value_parser!(u64).range(1..))]
    pub kv_cache_bytes: Option<u64>,
    /// Samples that are decoded at once.
    #[arg(long, value_name = "SAMPLES", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rows: Option<u32>,
    /// Tokens that one step of the engine computes.
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_step_tokens: Option<u32>,
}

/// Who is let in, and over what.
#[derive(Args, Debug)]
#[command(next_help_heading = "Access")]
pub struct AccessArguments {
    /// File with one hashed API key per line (hash-key prints them); without it everybody is let in.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// File with the bearer token that guards /progress and opens /drain.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Certificate chain as PEM: the server speaks HTTPS.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the certificate as PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Origin of web pages that may call the API from a browser (https://example.com, or * for all); may be repeated.
    #[arg(long = "cors-origin", value_name = "ORIGIN")]
    pub cors_origins: Vec<String>,
}

/// Where pictures may come from besides data URLs.
#[derive(Args, Debug)]
#[command(next_help_heading = "Pictures")]
pub struct MediaArguments {
    /// Host of https image URLs (example.com, *.example.com, example.com:8443; http://example.com for plain HTTP); may be
    /// repeated. Addresses that are not public are refused all the same.
    #[arg(long = "image-host", value_name = "HOST")]
    pub image_hosts: Vec<String>,
    /// Directory below which file:// image URLs may point.
    #[arg(long, value_name = "DIR")]
    pub media_root: Option<PathBuf>,
    /// Turn pictures upright by their EXIF orientation; the reference's processors do not.
    #[arg(long)]
    pub upright: bool,
}

/// [`Purpose`] on the command line.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum PurposeArgument {
    /// Chat completions only.
    Policy,
    /// Comparisons only.
    Critic,
    /// One copy of the weights, both.
    #[default]
    Both,
}

impl From<PurposeArgument> for Purpose {
    fn from(argument: PurposeArgument) -> Self {
        match argument {
            PurposeArgument::Policy => Self::Policy,
            PurposeArgument::Critic => Self::Critic,
            PurposeArgument::Both => Self::Both,
        }
    }
}

/// The role config that the arguments stand for.
pub(super) fn by_hand(arguments: ServeArguments) -> Result<Assignment, WorkerError> {
    let (uri, known_as) = match models::uri_argument(&arguments.model) {
        Some(uri) => (uri.to_owned(), models::name_of(uri)),
        None => directory_uri(&arguments.model)?,
    };
    let name = arguments.served_model_name.unwrap_or(known_as);
    let serve = Serve {
        model: ModelSource {
            uri,
            digest: arguments.digest,
            random_seed: None,
        },
        served_model_name: name.clone(),
        purpose: arguments.purpose.into(),
        critic_template: Some(crate::prompt::template_argument(&arguments.template)?),
        critic_templates: crate::prompt::named_templates(&arguments.critic_templates)?,
        max_model_len: arguments.max_model_len,
        max_queue: arguments.max_queue,
        tensor_parallel: arguments.tensor_parallel,
        engine: arguments.engine.into(),
        access: AccessSettings {
            api_key_file: arguments.access.api_key_file.as_deref().map(text),
            tls: arguments
                .access
                .tls_cert
                .zip(arguments.access.tls_key)
                .map(|(certificate, key)| TlsFiles {
                    certificate_file: text(&certificate),
                    key_file: text(&key),
                }),
            cors_origins: arguments.access.cors_origins,
        },
        media: MediaSettings {
            image_hosts: arguments.media.image_hosts,
            media_root: arguments.media.media_root.as_deref().map(text),
            upright: arguments.media.upright,
        },
        drain_seconds: Some(arguments.drain_seconds),
        otlp_endpoint: arguments.otlp_endpoint.filter(|endpoint| !endpoint.is_empty()),
    };
    let config = RoleConfig {
        schema_version: SCHEMA_VERSION,
        owner: Owner {
            kind: "ModelDeployment".to_owned(),
            namespace: "local".to_owned(),
            name,
            uid: "by-hand".to_owned(),
        },
        role: Role::Serve(serve),
    };
    Ok(Assignment {
        config,
        volumes: Volumes::default(),
        token: read_token(arguments.access.token_file.as_deref())?,
        listen: arguments.listen,
        device: arguments.device.device,
    })
}

impl From<EngineArguments> for EngineSettings {
    fn from(arguments: EngineArguments) -> Self {
        Self {
            dtype: arguments.dtype.map(|dtype| match dtype {
                Precision::F32 => role::Precision::F32,
                Precision::Bf16 => role::Precision::Bf16,
                Precision::F16 => role::Precision::F16,
            }),
            kv_blocks: arguments.kv_blocks,
            kv_cache_bytes: arguments.kv_cache_bytes,
            max_rows: arguments.max_rows,
            max_step_tokens: arguments.max_step_tokens,
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The URI of a directory, and its name.
fn directory_uri(directory: &Path) -> Result<(String, String), WorkerError> {
    let directory = directory.canonicalize().map_err(|source| WorkerError::ReadFile {
        what: "model directory",
        path: directory.to_owned(),
        source,
    })?;
    let name = directory.file_name();
    let name = name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    Ok((format!("file://{}", directory.display()), name))
}

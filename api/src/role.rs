//! What the operator writes into a pod and the worker reads: one versioned document, one variant per role.
//!
//! It is mounted as [`crate::names::ROLE_CONFIG_PATH`]. Data are named by URI (`pvc://claim/path`, `file:///path`), never by
//! mount path: the worker learns where a claim is mounted from `--volume claim=/path`, so the same document is valid in a
//! container and in the sandbox, where volumes are ordinary directories.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    algorithm::Algorithm,
    conversion::{Conversion, Template},
    evaluation::Guard,
    reward::Reward,
};

/// The version of this document; a worker refuses any other.
pub const SCHEMA_VERSION: u32 = 1;

/// The document.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RoleConfig {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The object the pod works for, for logs and metrics.
    pub owner: Owner,
    /// What the pod does.
    pub role: Role,
}

/// The object a pod works for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Owner {
    /// Kind, for example `TrainingJob`.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// What a pod does.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(clippy::large_enum_variant, reason = "there is one in a process")]
pub enum Role {
    /// Converts source rows into canonical rows.
    Prepare(Prepare),
    /// Trains; samples in the same process (colocated) or asks rollout pods.
    Train(Box<Train>),
    /// Samples completions for a learner.
    Rollout(Rollout),
    /// Serves a model as policy and critic.
    Serve(Serve),
    /// Checks the digests of a checkpoint.
    Verify(Verify),
}

impl Role {
    /// The role's name as labels, logs and metrics show it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Prepare(_) => "prepare",
            Self::Train(_) => "train",
            Self::Rollout(_) => "rollout",
            Self::Serve(_) => "serve",
            Self::Verify(_) => "verify",
        }
    }
}

/// A model on disk.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ModelSource {
    /// Directory in Hugging Face layout: `pvc://claim/path`, `file:///path`, `hf://org/name[@revision]`,
    /// `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
    pub uri: String,
    /// `sha256:<hex>` of its manifest; loading refuses any other. None for directories that Flotilla did not write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Draw the weights from this seed in place of reading them (config and tokenizer only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub random_seed: Option<u64>,
}

impl ModelSource {
    /// Whether the worker fetches the model from the Hugging Face hub or a bucket: no claim holds it then.
    pub fn is_remote(&self) -> bool {
        let scheme = self.uri.split_once("://").map(|(scheme, _)| scheme);
        matches!(scheme, Some("hf" | "s3" | "gs" | "az"))
    }
}

/// Role `prepare`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Prepare {
    /// File or directory of the source rows: parquet or JSONL.
    pub source_uri: String,
    /// Directory that receives the canonical rows.
    pub output_uri: String,
    /// How rows are converted.
    pub conversion: Conversion,
}

/// A prepared dataset in a run.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PreparedDataset {
    /// Name in the job: the Dataset's name, or the name of the evaluation set.
    pub name: String,
    /// Directory of canonical rows.
    pub uri: String,
    /// `sha256:<hex>`; reading refuses any other.
    pub digest: String,
    /// Use only the first rows (0: all).
    #[serde(default)]
    pub max_rows: u32,
}

/// Role `train`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Train {
    /// The model the run begins with; for GRPO also the frozen reference.
    pub model: ModelSource,
    /// Training rows; several sets are concatenated in this order.
    pub datasets: Vec<PreparedDataset>,
    /// Exactly one member is set.
    pub algorithm: Algorithm,
    /// Terms of the reward (GRPO).
    #[serde(default)]
    pub rewards: Vec<Reward>,
    /// Held-out sets.
    #[serde(default)]
    pub evaluation_sets: Vec<PreparedDataset>,
    /// Evaluate after each so many steps (0: only before the first and after the last).
    #[serde(default)]
    pub evaluate_every: u32,
    /// Stop before a second ability is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
    /// Precision of weights and gradients; if absent that of the checkpoint on a GPU, and f32 on a CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,
    /// Seed of every draw of the run.
    pub seed: u64,
    /// Directory of this run: checkpoints, metrics, plot. A stable checkpoint in it is resumed.
    pub output_uri: String,
    /// Write a checkpoint after each so many steps (0: only the last).
    pub checkpoint_every: u32,
    /// Checkpoints kept on disk.
    pub keep_last: u32,
    /// Threads that share a batch on the CPU; the result does not depend on timing.
    pub threads: u32,
    /// Ask rollout pods for completions; None: sample in this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RemoteRollout>,
}

/// How a learner uses its rollout pods. Which pods there are it is told while it runs: `PUT /v1/rollout-pods`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RemoteRollout {
    /// Requests that one pod works on at once.
    pub lanes: u32,
}

/// Role `rollout`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rollout {
    /// Config, tokenizer and processor; the weights come from the learner.
    pub model: ModelSource,
    /// Requests that are worked on at once, each on a thread of its own.
    pub threads: u32,
    /// Precision of the weights; if absent as of role `train`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,
}

/// Role `serve`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Serve {
    /// The model.
    pub model: ModelSource,
    /// Name under which `/v1/models` lists it.
    pub served_model_name: String,
    /// Which of `chat/completions` (policy) and `critic/*` (critic) are offered.
    pub purpose: Purpose,
    /// How a comparison becomes the user's text; `critic-short` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub critic_template: Option<Template>,
    /// Further templates, which requests ask for by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub critic_templates: BTreeMap<String, Template>,
    /// Longest prompt plus completion, in tokens.
    pub max_model_len: u32,
    /// Requests that may wait; one more is answered 429.
    pub max_queue: u32,
    /// GPUs of this process's machine that share the model.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub tensor_parallel: u32,
    /// How the engine is sized; what is absent the worker chooses.
    #[serde(default, skip_serializing_if = "is_default")]
    pub engine: EngineSettings,
    /// Who is let in, and over what.
    #[serde(default, skip_serializing_if = "is_default")]
    pub access: AccessSettings,
    /// Where pictures may come from besides data URLs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub media: MediaSettings,
    /// Seconds that requests have to end once the server was asked to stop; 25 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_seconds: Option<u32>,
    /// OpenTelemetry collector (OTLP over HTTP, for example `http://collector:4318`) that receives a span per request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<String>,
}

fn one() -> u32 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_one(value: &u32) -> bool {
    *value == 1
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// How the engine of role `serve` is sized.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct EngineSettings {
    /// Precision of weights and activations; if absent 32 bits on a CPU and bf16 on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,
    /// Blocks of the key-value cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_blocks: Option<u32>,
    /// Bytes of the key-value cache, where `kvBlocks` does not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_bytes: Option<u64>,
    /// Samples that are decoded at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rows: Option<u32>,
    /// Tokens that one step of the engine computes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_step_tokens: Option<u32>,
}

/// Precision of weights and activations.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits, 8 of them exponent.
    Bf16,
    /// 16 bits, 5 of them exponent.
    F16,
}

/// Who may use a server of role `serve`, and over what.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AccessSettings {
    /// File with one hashed API key per line; everybody is let in if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<String>,
    /// Certificate and key; plain HTTP if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
    /// Origins of web pages that may call the API from a browser (`https://example.com`, or `*` for all).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cors_origins: Vec<String>,
}

/// A certificate and its key, as PEM files that are read again when they change.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificate chain, the server's own first.
    pub certificate_file: String,
    /// Private key.
    pub key_file: String,
}

/// Where role `serve` takes pictures from besides data URLs.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MediaSettings {
    /// Hosts of https URLs: `example.com`, `*.example.com`, with `:port` for a port that is not 443, with `http://` for
    /// plain HTTP.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub image_hosts: Vec<String>,
    /// Directory below which `file://` URLs may point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub media_root: Option<String>,
    /// Turn pictures upright by their EXIF orientation; the reference's processors do not.
    pub upright: bool,
}

/// What a served model is for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
pub enum Purpose {
    /// Answers users.
    Policy,
    /// Compares responses.
    Critic,
    /// One process, one copy of the weights, both.
    #[default]
    Both,
}

/// Role `verify`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Verify {
    /// The checkpoint and the digest it must have.
    pub model: ModelSource,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_config_survives_json() {
        let config = RoleConfig {
            schema_version: SCHEMA_VERSION,
            owner: Owner {
                kind: "Dataset".into(),
                namespace: "n".into(),
                name: "d".into(),
                uid: "u".into(),
            },
            role: Role::Prepare(Prepare {
                source_uri: "pvc://a/b".into(),
                output_uri: "pvc://c/d".into(),
                conversion: Conversion::default(),
            }),
        };
        let text = serde_json::to_string(&config).expect("serializes");
        assert!(text.contains(r#""role":{"prepare":{"sourceUri""#));
        assert_eq!(serde_json::from_str::<RoleConfig>(&text).expect("parses"), config);
    }

    #[test]
    fn settings_of_a_server_that_say_nothing_are_not_written() {
        let text = r#"{"model":{"uri":"u"},"servedModelName":"m","purpose":"Both","maxModelLen":8,"maxQueue":1}"#;
        let serve: Serve = serde_json::from_str(text).expect("parses");
        // Serving pods are named by a hash of this text: a new field must not replace them.
        assert_eq!(serde_json::to_string(&serve).expect("serializes"), text);
        assert_eq!(serve.tensor_parallel, 1);
        let shared = Serve {
            tensor_parallel: 4,
            ..serve
        };
        let text = serde_json::to_string(&shared).expect("serializes");
        assert!(text.contains(r#""tensorParallel":4"#), "{text}");
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let text = r#"{"schemaVersion":1,"owner":{"kind":"a","namespace":"b","name":"c","uid":"d","x":1},"role":{"verify":{"model":{"uri":"u"}}}}"#;
        let error = serde_json::from_str::<RoleConfig>(text).expect_err("unknown field");
        assert!(error.to_string().contains("unknown field `x`"), "{error}");
    }
}

//! From rows on a user's disk to verifiable rows.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// In which order the two responses of a preference pair are shown.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
pub enum ResponseOrder {
    /// Drawn for each row from the seed: the label says nothing about the position.
    #[default]
    Seeded,
    /// Each row gives two prompts, one per order.
    Both,
    /// The preferred response always first. Only for data that were already shuffled.
    ChosenFirst,
}

/// Preference pairs: which of two responses about a picture is better.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Preference {
    /// In which order the two responses are shown.
    pub order: ResponseOrder,
    /// Control: permute the labels by the seed, so that nothing but chance can be learnt.
    pub shuffle_labels: bool,
}

/// Question and one right answer, compared after normalisation.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct ExactMatch {}

/// Prompt and the completion to imitate.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default)]
pub struct Instruction {}

/// What a row means: exactly one member is set.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(kube::KubeSchema))]
#[cfg_attr(feature = "crd", x_kube(validation = kube::core::Rule::new(
    "[has(self.preference), has(self.exactMatch), has(self.instruction)].filter(x, x).size() == 1")
    .message("format takes exactly one of preference, exactMatch and instruction")))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Format {
    /// Preference pairs; columns `image`, `question`, `chosen`, `rejected`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<Preference>,
    /// Question and right answer; columns `image`, `question`, `answer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact_match: Option<ExactMatch>,
    /// Prompt and completion to imitate; columns `image`, `question`, `response`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instruction: Option<Instruction>,
}

/// A prompt template: exactly one member is set. The template is Jinja over `question`, `response_1`, `response_2`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(kube::KubeSchema))]
#[cfg_attr(feature = "crd", x_kube(validation = kube::core::Rule::new(
    "[has(self.builtin), has(self.uri), has(self.inline)].filter(x, x).size() == 1")
    .message("template takes exactly one of builtin, uri and inline")))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Template {
    /// A template shipped with the worker: `critic-short`, `critic-criteria`, `policy-think`, `plain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "crd", schemars(length(min = 1, max = 63)))]
    pub builtin: Option<String>,
    /// A file: `pvc://claim/path` or `file:///path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "crd", schemars(length(max = 2048), regex(pattern = r"^(pvc|file)://.+")))]
    pub uri: Option<String>,
    /// The template itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "crd", schemars(length(max = 16384)))]
    pub inline: Option<String>,
}

/// What is refused before any work is done on it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Limits {
    /// Largest encoded image, in bytes.
    #[cfg_attr(feature = "crd", schemars(range(min = 1)))]
    pub max_image_bytes: u64,
    /// Largest decoded image, in pixels.
    #[cfg_attr(feature = "crd", schemars(range(min = 1)))]
    pub max_image_pixels: u64,
    /// Longest text field, in characters.
    #[cfg_attr(feature = "crd", schemars(range(min = 1)))]
    pub max_text_characters: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_image_bytes: 20 << 20,
            max_image_pixels: 178_956_970,
            max_text_characters: 100_000,
        }
    }
}

/// Everything that turns source rows into canonical rows.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[cfg_attr(feature = "crd", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Conversion {
    /// What a row means.
    pub format: Format,
    /// Canonical column -> column of the source, where the names differ
    /// (`image`, `question`, `chosen`, `rejected`, `answer`, `response`, `label`, `id`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(feature = "crd", schemars(schema_with = "column_map"))]
    pub columns: BTreeMap<String, String>,
    /// How question and responses become the user's text; by default `critic-short` for preference, else `plain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    /// Bad rows up to this number are counted and left out; one more fails the Dataset.
    #[serde(default)]
    pub max_bad_records: u64,
    /// Seed of every draw of the conversion.
    #[serde(default)]
    pub seed: u64,
    /// What is refused before any work is done on it.
    #[serde(default)]
    pub limits: Limits,
}

/// Bounded, so that the rule that makes a conversion immutable has a cost that the API server can estimate.
#[cfg(feature = "crd")]
fn column_map(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": { "type": "string", "minLength": 1, "maxLength": 253 },
    })
}

//! What a value must look like: structural schemas of custom and built-in kinds and everything asked of them.
//!
//! Pure functions on [`serde_json::Value`]; no clock, no I/O.
//!
//! # Layout
//!
//! | file | what it holds |
//! |---|---|
//! | `structural.rs` | a schema node, parsed once |
//! | `prune.rs`, `default.rs` | unknown fields go, defaults come |
//! | `validate.rs`, `format.rs`, `list.rs` | types, bounds, formats, uniqueness |
//! | `rule.rs`, `rule_value.rs` | CEL rules and their values |
//! | `cause.rs`, `path.rs` | how a refusal is worded |
//! | `ratchet.rs` | what was there before may stay |
//! | `duplicate.rs` | JSON keys given twice |
//! | `builtin.rs`, `builtin_table.rs`, `builtin_default.rs` | schemas of the built-in kinds and what Go code adds to them |
//! | `crd.rs` | is a CustomResourceDefinition itself valid; its versions |
//! | `subresource.rs` | what `/status` and `/scale` may change; generation |
//! | `openapi.rs` | OpenAPI v3 documents |

pub mod builtin;
mod builtin_default;
mod builtin_table;
pub mod cause;
pub mod crd;
pub mod default;
pub mod duplicate;
pub mod format;
pub mod list;
pub mod openapi;
pub mod path;
pub mod prune;
mod ratchet;
pub mod rule;
mod rule_value;
pub mod structural;
pub mod subresource;
mod validate;

use std::sync::Arc;

use serde_json::Value;

pub use self::{
    cause::{Cause, Reason, summary},
    structural::{SchemaError, Structural},
};

const BLOCKED: &str = "some validation rules were not checked because the object was invalid; correct the existing \
                       errors to complete validation";

/// The schema of one kind in one version, with the operations of a write.
///
/// Order of a write: [`prune`](Self::prune), [`default`](Self::default), [`validate`](Self::validate).
/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct ResourceSchema {
    root: Arc<Structural>,
    native: Option<builtin::Builtin>,
}

impl ResourceSchema {
    /// The schema of a CRD version: `spec.versions[].schema.openAPIV3Schema`, completed by type and object metadata.
    ///
    /// # Errors
    /// When the schema is malformed.
    pub fn custom(open_api: &Value) -> Result<Self, SchemaError> {
        let own = Structural::parse(open_api)?;
        let mut root = (*own).clone();
        let text = Arc::new(Structural {
            kind: Some(structural::Kind::String),
            ..Structural::default()
        });
        root.properties.insert("apiVersion".to_owned(), text.clone());
        root.properties.insert("kind".to_owned(), text);
        root.properties
            .insert("metadata".to_owned(), metadata(own.properties.get("metadata")));
        Ok(Self {
            root: Arc::new(root),
            native: None,
        })
    }

    /// The schema of a built-in kind; `None` when this server has no such kind. Group is "" for core.
    #[must_use]
    pub fn builtin(group: &str, version: &str, kind: &str) -> Option<Self> {
        let found = builtin::find(group, version, kind)?;
        Some(Self {
            root: builtin::structural(found)?,
            native: Some(found),
        })
    }

    /// A schema that accepts and keeps everything.
    #[must_use]
    pub fn open() -> Self {
        Self {
            root: Structural::open(),
            native: None,
        }
    }

    /// The root node, for field ownership.
    #[must_use]
    pub fn root(&self) -> &Structural {
        &self.root
    }

    /// Name of the OpenAPI definition of a built-in kind, for strategic merge patches; `None` for custom kinds.
    #[must_use]
    pub fn definition_name(&self) -> Option<&'static str> {
        builtin::definition_name(self.native?)
    }

    /// Removes unknown fields and returns their paths, sorted.
    pub fn prune(&self, value: &mut Value) -> Vec<String> {
        prune::prune(value, &self.root)
    }

    /// Fills defaults; for built-in kinds also those that depend on other fields.
    pub fn default(&self, value: &mut Value) {
        default::default(value, &self.root);
        if let Some(native) = self.native {
            builtin_default::complete(native.kind, value);
        }
    }

    /// Everything that is wrong with `value`; `old` is the object it replaces, for transition rules.
    #[must_use]
    pub fn validate(&self, value: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        validate::check(value, &self.root, "", &mut causes);
        list::check(value, &self.root, "", &mut causes);
        if let (Some(old), None) = (old, self.native) {
            causes.retain(|cause| !ratchet::is_unchanged(cause, value, old));
        }
        if !self.root.has_rules {
            return causes;
        }
        if causes.iter().any(Cause::blocks_rules) {
            causes.push(Cause::invalid("", &Value::Null, BLOCKED));
        } else {
            causes.extend(rule::check(value, old, &self.root));
        }
        causes
    }
}

/// What strict field validation says of a pruned path, and a warning says of it too.
#[must_use]
pub fn unknown_field(path: &str) -> String {
    format!("unknown field {}", cause::quoted(path))
}

/// Object metadata with what a CRD may add to it: conditions on the name.
fn metadata(own: Option<&Arc<Structural>>) -> Arc<Structural> {
    let Some(full) = builtin::definition("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta") else {
        return Structural::open();
    };
    let Some(own) = own else { return full };
    let mut merged = (*full).clone();
    for name in ["name", "generateName"] {
        if let Some(condition) = own.properties.get(name) {
            merged.properties.insert(name.to_owned(), condition.clone());
        }
    }
    merged.rules.clone_from(&own.rules);
    merged.has_rules = own.has_rules;
    Arc::new(merged)
}

#[cfg(test)]
mod tests;

//! The object that children are made for: their names, labels and owner references.

use std::collections::BTreeMap;

use flotilla_api::{names::label, role};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Bytes that a label value may have.
const MAX_LABEL: usize = 63;

/// The identity of a parent.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Owner {
    /// Its kind, for example `TrainingJob`.
    pub kind: String,
    /// Its API version.
    pub api_version: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID: a namesake made later has another.
    pub uid: String,
}

impl Owner {
    /// The identity of `object`.
    pub fn of<K: Resource<DynamicType = ()>>(object: &K) -> Result<Self> {
        let meta = object.meta();
        let missing = |field| Error::Incomplete {
            kind: K::kind(&()).into_owned(),
            name: meta.name.clone().unwrap_or_default(),
            field,
        };
        Ok(Self {
            kind: K::kind(&()).into_owned(),
            api_version: K::api_version(&()).into_owned(),
            namespace: meta.namespace.clone().ok_or_else(|| missing("namespace"))?,
            name: meta.name.clone().ok_or_else(|| missing("name"))?,
            uid: meta.uid.clone().ok_or_else(|| missing("uid"))?,
        })
    }

    /// The reference that makes the garbage collector delete a child with its parent.
    pub fn reference(&self) -> OwnerReference {
        OwnerReference {
            api_version: self.api_version.clone(),
            kind: self.kind.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }
    }

    /// Whether a child with these metadata is controlled by this object (and not by a deleted namesake).
    pub fn controls(&self, child: &ObjectMeta) -> bool {
        child
            .owner_references
            .iter()
            .flatten()
            .any(|reference| reference.controller == Some(true) && reference.uid == self.uid)
    }

    /// Labels that select all children of this object.
    pub fn selector(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            (label::OWNER_KIND.to_owned(), self.kind.to_lowercase()),
            (label::OWNER_NAME.to_owned(), label_value(&self.name)),
        ])
    }

    /// Metadata of a child that does the work of `role`.
    pub fn child(&self, name: String, role: &str) -> ObjectMeta {
        let mut labels = self.selector();
        labels.insert(label::MANAGED_BY.to_owned(), label::MANAGED_BY_VALUE.to_owned());
        labels.insert(label::ROLE.to_owned(), role.to_owned());
        ObjectMeta {
            name: Some(name),
            namespace: Some(self.namespace.clone()),
            labels: Some(labels),
            owner_references: Some(vec![self.reference()]),
            ..ObjectMeta::default()
        }
    }

    /// Stem of the names of all children of `role`: kinds have different roles, so namesakes of two kinds do not collide.
    pub fn stem(&self, role: &str) -> String {
        // "-token", "-<revision>-<n>" and "-<attempt>" must still fit into the 253 bytes of a name.
        format!("{}-{role}", shortened(&self.name, 200))
    }

    /// The identity as a worker reads it.
    pub fn role_owner(&self) -> role::Owner {
        role::Owner {
            kind: self.kind.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
        }
    }

    /// First eight characters of the UID: tells namesakes apart in paths.
    pub fn short_uid(&self) -> &str {
        self.uid.get(..8).unwrap_or(&self.uid)
    }
}

/// A name as a label value: cut and given a hash where it is too long.
pub fn label_value(name: &str) -> String {
    shortened(name, MAX_LABEL)
}

fn shortened(name: &str, longest: usize) -> String {
    if name.len() <= longest {
        return name.to_owned();
    }
    let hash = hex::encode(Sha256::digest(name.as_bytes()));
    // Names of objects are ASCII, so bytes are characters.
    let cut = name.get(..longest - 9).unwrap_or_default();
    format!("{}-{}", cut.trim_end_matches(['.', '-']), &hash[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(name: &str) -> Owner {
        Owner {
            kind: "TrainingJob".into(),
            api_version: "flotilla.dev/v1alpha1".into(),
            namespace: "lab".into(),
            name: name.into(),
            uid: "0123456789".into(),
        }
    }

    #[test]
    fn a_namesake_made_later_does_not_control_the_children_of_the_first() {
        let first = owner("a");
        let later = Owner {
            uid: "9".into(),
            ..first.clone()
        };
        let child = first.child("a-train-1".into(), "train");
        assert!(first.controls(&child));
        assert!(!later.controls(&child));
    }

    #[test]
    fn long_names_give_distinct_label_values_that_fit() {
        let (a, b) = ("x".repeat(70), "x".repeat(71));
        assert!(label_value(&a).len() <= MAX_LABEL);
        assert_ne!(label_value(&a), label_value(&b));
        assert_eq!(label_value("short"), "short");
    }
}

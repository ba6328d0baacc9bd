//! What is left in a namespace that is being deleted, told by its conditions as the real namespace controller tells it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::{ApiResource, PartialObjectMeta},
};
use serde_json::{Value, json};

use crate::server::write::metadata;

/// Counts of what is left: by resource, and by finalizer.
#[derive(Debug, Default)]
pub(super) struct Remainder {
    resources: BTreeMap<String, usize>,
    finalizers: BTreeMap<String, usize>,
}

impl Remainder {
    /// Counts objects of one resource.
    pub(super) fn add<K>(&mut self, resource: &ApiResource, objects: &[PartialObjectMeta<K>]) {
        if objects.is_empty() {
            return;
        }
        // The dot stands there also where the group is the core one.
        let name = format!("{}.{}", resource.plural, resource.group);
        *self.resources.entry(name).or_default() += objects.len();
        for finalizer in objects
            .iter()
            .flat_map(|object| object.metadata.finalizers.iter().flatten())
        {
            *self.finalizers.entry(finalizer.clone()).or_default() += 1;
        }
    }

    /// Nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// Writes the conditions, if they say something new.
    pub(super) async fn report(&self, client: &Client, namespace: &Namespace, name: &str) -> Result<(), kube::Error> {
        let known = namespace.status.as_ref().and_then(|status| status.conditions.as_ref());
        let conditions = self.conditions();
        let same = |wanted: &Value| {
            known.into_iter().flatten().any(|known| {
                wanted["type"] == known.type_.as_str()
                    && wanted["status"] == known.status.as_str()
                    && wanted["message"] == known.message.as_deref().unwrap_or_default()
            })
        };
        if conditions.iter().all(same) {
            return Ok(());
        }
        let patch = Patch::Strategic(json!({"status": {"conditions": conditions}}));
        let api: Api<Namespace> = Api::all(client.clone());
        api.patch_status(name, &PatchParams::default(), &patch).await.map(drop)
    }

    fn conditions(&self) -> Vec<Value> {
        let counted = |counts: &BTreeMap<String, usize>, word: &str| -> String {
            let parts = counts
                .iter()
                .map(|(name, count)| format!("{name} {word} {count} resource instances"));
            parts.collect::<Vec<_>>().join(", ")
        };
        let resources = format!("Some resources are remaining: {}", counted(&self.resources, "has"));
        let finalizers = format!(
            "Some content in the namespace has finalizers remaining: {}",
            counted(&self.finalizers, "in")
        );
        let condition = |kind: &str, state: bool, reason: &str, message: &str| {
            json!({"type": kind, "status": if state { "True" } else { "False" }, "reason": reason, "message": message,
                "lastTransitionTime": metadata::now()})
        };
        vec![
            condition(
                "NamespaceDeletionDiscoveryFailure",
                false,
                "ResourcesDiscovered",
                "All resources successfully discovered",
            ),
            condition(
                "NamespaceDeletionGroupVersionParsingFailure",
                false,
                "ParsedGroupVersions",
                "All legacy kube types successfully parsed",
            ),
            condition(
                "NamespaceDeletionContentFailure",
                false,
                "ContentDeleted",
                "All content successfully deleted, may be waiting on finalization",
            ),
            condition("NamespaceContentRemaining", true, "SomeResourcesRemain", &resources),
            if self.finalizers.is_empty() {
                let none = "All content-preserving finalizers finished";
                condition("NamespaceFinalizersRemaining", false, "ContentHasNoFinalizers", none)
            } else {
                condition(
                    "NamespaceFinalizersRemaining",
                    true,
                    "SomeFinalizersRemain",
                    &finalizers,
                )
            },
        ]
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::core::{ObjectMeta, PartialObjectMetaExt};

    use super::*;

    #[test]
    fn what_is_left_is_counted_by_resource_and_by_finalizer() {
        let resource = ApiResource::erase::<ConfigMap>(&());
        let object = ObjectMeta {
            finalizers: Some(vec!["example.dev/x".to_owned()]),
            ..ObjectMeta::default()
        };
        let objects = [object.into_request_partial::<ConfigMap>()];
        let mut left = Remainder::default();
        left.add(&resource, &objects);
        let conditions = left.conditions();
        assert_eq!(
            conditions[3]["message"],
            "Some resources are remaining: configmaps. has 1 resource instances"
        );
        assert_eq!(
            conditions[4]["message"],
            "Some content in the namespace has finalizers remaining: example.dev/x in 1 resource instances"
        );
    }
}

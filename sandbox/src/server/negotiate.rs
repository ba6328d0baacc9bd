//! What the client accepts: plain JSON, a table, or only metadata.

/// Form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The object itself.
    Object,
    /// `meta.k8s.io/v1 Table`.
    Table,
    /// `meta.k8s.io/v1 PartialObjectMetadata` or its list.
    Metadata,
}

/// Media types that this server writes.
pub const WRITTEN: &str = "application/json, application/yaml";

/// One entry of an `Accept` header.
#[derive(Debug)]
struct Entry<'a> {
    media: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
}

impl Entry<'_> {
    fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| *value)
    }

    fn is_json(&self) -> bool {
        matches!(
            self.media,
            "*/*" | "application/*" | "application/json" | "application/yaml"
        )
    }
}

fn entries(accept: &str) -> impl Iterator<Item = Entry<'_>> {
    accept.split(',').map(|entry| {
        let mut parts = entry.split(';').map(str::trim);
        let media = parts.next().unwrap_or_default();
        let parameters = parts
            .filter_map(|part| part.split_once('='))
            .map(|(k, v)| (k.trim(), v.trim()))
            .collect();
        Entry { media, parameters }
    })
}

/// The first form in the header that this server has; `None` when there is none (406).
#[must_use]
pub fn form(accept: Option<&str>) -> Option<Form> {
    let Some(accept) = accept.filter(|accept| !accept.is_empty()) else {
        return Some(Form::Object);
    };
    entries(accept).find_map(|entry| {
        if !entry.is_json() {
            return None;
        }
        match entry.parameter("as") {
            None => Some(Form::Object),
            Some("Table") if entry.parameter("v").is_none_or(|version| version == "v1") => Some(Form::Table),
            Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Some(Form::Metadata),
            Some(_) => None,
        }
    })
}

/// Whether the first form that this server has is asked for as YAML.
#[must_use]
pub fn wants_yaml(accept: Option<&str>) -> bool {
    let first = accept.and_then(|accept| entries(accept).find(Entry::is_json));
    first.is_some_and(|entry| entry.media == "application/yaml")
}

/// The version (`v2`, `v2beta1`) of aggregated discovery that comes first in the header, if it is asked for at all.
#[must_use]
pub fn aggregated_discovery(accept: Option<&str>) -> Option<&'static str> {
    let wanted = entries(accept?).find(Entry::is_json)?;
    if wanted.parameter("as") != Some("APIGroupDiscoveryList") {
        return None;
    }
    match wanted.parameter("v") {
        Some("v2beta1") => Some("v2beta1"),
        _ => Some("v2"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_form_that_is_known_is_taken() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(form(Some(kubectl)), Some(Form::Table));
        assert_eq!(
            form(Some("application/vnd.kubernetes.protobuf,application/json")),
            Some(Form::Object)
        );
        assert_eq!(
            form(Some("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")),
            Some(Form::Metadata)
        );
        assert_eq!(form(Some("application/vnd.kubernetes.protobuf")), None);
        assert_eq!(form(None), Some(Form::Object));
    }

    #[test]
    fn aggregated_discovery_is_recognised() {
        let kubectl = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(aggregated_discovery(Some(kubectl)), Some("v2"));
        assert_eq!(aggregated_discovery(Some("application/json")), None);
    }
}

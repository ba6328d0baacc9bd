//! Which claims a role needs, read off the URIs of its config.

use std::collections::BTreeMap;

use flotilla_api::{
    conversion::Template,
    role::{ModelSource, Role},
};

/// A URI that names no place.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UriError {
    /// Neither `pvc://` nor `file://`.
    #[error("{uri:?} begins with neither pvc:// nor file://")]
    Scheme {
        /// The URI.
        uri: String,
    },
    /// `pvc://` without the name of a claim.
    #[error("{uri:?} names no claim: write pvc://claim/path")]
    NoClaim {
        /// The URI.
        uri: String,
    },
    /// A path that leaves its claim.
    #[error("{uri:?} leaves its claim by `..`")]
    Escapes {
        /// The URI.
        uri: String,
    },
}

/// What a pod does with a claim.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Access {
    /// Mounted read-only.
    Read,
    /// Mounted for writing.
    Write,
}

/// The claim of a URI; None for `file://`.
pub fn claim_of(uri: &str) -> Result<Option<&str>, UriError> {
    let own = || uri.to_owned();
    if uri.starts_with("file://") {
        return Ok(None);
    }
    let rest = uri
        .strip_prefix("pvc://")
        .ok_or_else(|| UriError::Scheme { uri: own() })?;
    let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
    if claim.is_empty() || claim == "." || claim == ".." {
        return Err(UriError::NoClaim { uri: own() });
    }
    if path.split('/').any(|segment| segment == "..") {
        return Err(UriError::Escapes { uri: own() });
    }
    Ok(Some(claim))
}

/// Every claim that a role names, and whether it writes there.
pub fn claims(role: &Role) -> Result<BTreeMap<String, Access>, UriError> {
    let mut claims = BTreeMap::new();
    for (uri, access) in uris(role) {
        if let Some(claim) = claim_of(uri)? {
            let known = claims.entry(claim.to_owned()).or_insert(access);
            *known = access.max(*known);
        }
    }
    Ok(claims)
}

fn uris(role: &Role) -> Vec<(&str, Access)> {
    match role {
        Role::Prepare(prepare) => {
            let mut uris = vec![
                (prepare.source_uri.as_str(), Access::Read),
                (prepare.output_uri.as_str(), Access::Write),
            ];
            uris.extend(template_uri(prepare.conversion.template.as_ref()));
            uris
        }
        Role::Train(train) => {
            let sets = train.datasets.iter().chain(&train.evaluation_sets);
            let mut uris: Vec<_> = sets.map(|set| (set.uri.as_str(), Access::Read)).collect();
            uris.extend(model_uri(&train.model));
            uris.push((train.output_uri.as_str(), Access::Write));
            uris
        }
        Role::Rollout(rollout) => model_uri(&rollout.model).into_iter().collect(),
        Role::Serve(serve) => {
            let mut uris = Vec::from_iter(model_uri(&serve.model));
            let templates = serve.critic_template.iter().chain(serve.critic_templates.values());
            uris.extend(templates.filter_map(|template| template_uri(Some(template))));
            uris
        }
        Role::Verify(verify) => model_uri(&verify.model).into_iter().collect(),
    }
}

/// The URI of a model that lies on a volume or in the image; others are fetched by the worker.
fn model_uri(model: &ModelSource) -> Option<(&str, Access)> {
    (!model.is_remote()).then_some((model.uri.as_str(), Access::Read))
}

fn template_uri(template: Option<&Template>) -> Option<(&str, Access)> {
    template
        .and_then(|template| template.uri.as_deref())
        .map(|uri| (uri, Access::Read))
}

#[cfg(test)]
mod tests {
    use flotilla_api::{
        conversion::Conversion,
        role::{Prepare, Verify},
    };

    use super::*;

    #[test]
    fn a_claim_that_is_read_and_written_is_mounted_once_for_writing() {
        let role = Role::Prepare(Prepare {
            source_uri: "pvc://digits/raw".into(),
            output_uri: "pvc://digits/datasets/a".into(),
            conversion: Conversion {
                template: Some(Template {
                    uri: Some("pvc://prompts/critic.jinja".into()),
                    ..Template::default()
                }),
                ..Conversion::default()
            },
        });
        let claims = claims(&role).expect("valid URIs");
        assert_eq!(
            claims,
            BTreeMap::from([("digits".into(), Access::Write), ("prompts".into(), Access::Read)])
        );
    }

    #[test]
    fn a_file_and_a_model_that_is_fetched_need_no_claim() {
        let verify = |uri: &str| {
            let model = ModelSource {
                uri: uri.into(),
                digest: None,
                random_seed: None,
            };
            claims(&Role::Verify(Verify { model }))
        };
        for uri in ["file:///models/a", "hf://org/name", "s3://b/p", "gs://b/p", "az://c/p"] {
            assert!(verify(uri).expect("valid").is_empty(), "{uri}");
        }
        assert!(verify("https://host/model").is_err());
    }

    #[test]
    fn data_are_not_fetched() {
        let role = Role::Prepare(Prepare {
            source_uri: "s3://bucket/rows".into(),
            output_uri: "pvc://digits/datasets/a".into(),
            conversion: Conversion::default(),
        });
        assert!(matches!(claims(&role), Err(UriError::Scheme { .. })));
    }

    #[test]
    fn uris_that_name_no_place_are_refused() {
        assert!(matches!(claim_of("s3://bucket"), Err(UriError::Scheme { .. })));
        assert!(matches!(claim_of("pvc:///path"), Err(UriError::NoClaim { .. })));
        assert!(matches!(claim_of("pvc://../x"), Err(UriError::NoClaim { .. })));
        assert!(matches!(claim_of("pvc://a/b/../../c"), Err(UriError::Escapes { .. })));
        assert_eq!(claim_of("pvc://a"), Ok(Some("a")));
    }
}

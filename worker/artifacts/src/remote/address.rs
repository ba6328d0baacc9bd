//! `hf://org/name@revision`, `s3://bucket/prefix`, `gs://bucket/prefix` and `az://container/prefix`, taken apart and checked.

use std::fmt;

use super::error::RemoteError;

/// The revision where none is named.
const DEFAULT_REVISION: &str = "main";
/// Longest URI, as the API has it.
const MAX_LENGTH: usize = 2048;
/// What a model address looks like, for messages.
const FORMS: &str =
    "hf://org/name, hf://org/name@revision, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix";

/// A service that keeps objects by key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Service {
    /// Amazon S3 and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Google,
    /// Azure Blob Storage.
    Azure,
}

/// Where a model lies outside of this cluster's volumes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Address {
    /// A repository of the Hugging Face hub or of a mirror of it.
    Hub {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
    },
    /// Objects below a prefix.
    Bucket {
        /// Who keeps them.
        service: Service,
        /// Bucket or container.
        bucket: String,
        /// Key of the model's directory, without slashes at its ends; empty for the whole bucket.
        prefix: String,
    },
}

impl Address {
    /// Whether a URI has one of the schemes of this module.
    pub fn is_remote(uri: &str) -> bool {
        ["hf://", "s3://", "gs://", "az://"]
            .iter()
            .any(|scheme| uri.starts_with(scheme))
    }

    /// Takes a URI apart.
    ///
    /// # Errors
    /// Another scheme, or a part that is missing or has characters that such a part cannot have.
    pub fn parse(uri: &str) -> Result<Self, RemoteError> {
        let invalid = |reason: &str| RemoteError::Address {
            uri: uri.chars().take(200).collect(),
            reason: format!("{reason}: write {FORMS}"),
        };
        if uri.len() > MAX_LENGTH {
            return Err(invalid("it is too long"));
        }
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| invalid("it has no scheme"))?;
        let service = match scheme {
            "hf" => return hub(rest).map_err(invalid),
            "s3" => Service::S3,
            "gs" => Service::Google,
            "az" => Service::Azure,
            _ => return Err(invalid("its scheme is not known")),
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if !is_name(bucket) {
            return Err(invalid("it names no bucket"));
        }
        let prefix = prefix.trim_end_matches('/');
        let is_key = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(char::is_control);
        if !prefix.is_empty() && !prefix.split('/').all(is_key) {
            return Err(invalid("its prefix has empty or relative parts"));
        }
        Ok(Self::Bucket {
            service,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repo, revision } => write!(f, "hf://{repo}@{revision}"),
            Self::Bucket {
                service,
                bucket,
                prefix,
            } => {
                let scheme = match service {
                    Service::S3 => "s3",
                    Service::Google => "gs",
                    Service::Azure => "az",
                };
                write!(f, "{scheme}://{bucket}/{prefix}")
            }
        }
    }
}

fn hub(rest: &str) -> Result<Address, &'static str> {
    let (repo, revision) = rest.split_once('@').unwrap_or((rest, DEFAULT_REVISION));
    let Some((organisation, name)) = repo.split_once('/') else {
        return Err("it names no organisation");
    };
    if !is_name(organisation) || !is_name(name) {
        return Err("its repository is not of the form org/name");
    }
    // A revision may be `refs/pr/7`.
    if !revision.split('/').all(is_name) {
        return Err("its revision is no name of a branch, tag or commit");
    }
    Ok(Address::Hub {
        repo: repo.to_owned(),
        revision: revision.to_owned(),
    })
}

/// Letters, digits, `-`, `_` and `.`, not beginning with a dot.
fn is_name(text: &str) -> bool {
    let allowed = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
    !text.is_empty() && !text.starts_with('.') && !text.contains("..") && text.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_is_taken_apart_and_put_together() {
        let cases = [
            (
                "hf://Qwen/Qwen2.5-VL-3B-Instruct",
                "hf://Qwen/Qwen2.5-VL-3B-Instruct@main",
            ),
            ("hf://org/name@refs/pr/7", "hf://org/name@refs/pr/7"),
            ("s3://bucket/a/b/", "s3://bucket/a/b"),
            ("gs://bucket", "gs://bucket/"),
            ("az://container/model", "az://container/model"),
        ];
        for (uri, expected) in cases {
            assert!(Address::is_remote(uri));
            assert_eq!(Address::parse(uri).expect(uri).to_string(), expected);
        }
    }

    #[test]
    fn what_names_no_model_is_refused_with_the_forms_that_do() {
        for uri in [
            "hf://name",
            "hf://org/",
            "hf://org/name/file",
            "hf://org/../name",
            "hf://org/name@",
            "hf://org/name@a/../b",
            "hf://org/na me",
            "s3://",
            "s3:///key",
            "s3://bucket/a/../b",
            "s3://bucket//b",
            "gs://bucket/a\nb",
            "https://host/x",
            "plain",
        ] {
            let message = Address::parse(uri).expect_err(uri).to_string();
            assert!(message.contains("write hf://org/name"), "{message}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic_or_lets_a_parent_directory_through(text in "(hf|s3|gs|az)://[a-z./@%\\\\ -]{0,24}") {
            if let Ok(address) = Address::parse(&text) {
                let shown = address.to_string();
                prop_assert!(!shown.split(['/', '@']).any(|part| part == ".."), "{}", shown);
            }
        }
    }
}

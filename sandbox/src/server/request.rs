//! A request's path and query, typed.

use serde_json::{Value, json};

use crate::{
    schema::Cause,
    server::{
        selector::{FieldSelector, LabelSelector},
        status::ApiError,
    },
};

/// What a path below `/api` or `/apis` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourcePath {
    /// API group, empty for core.
    pub group: String,
    /// API version.
    pub version: String,
    /// Namespace in the path.
    pub namespace: Option<String>,
    /// Plural.
    pub resource: String,
    /// Name of the object.
    pub name: Option<String>,
    /// `status`, `scale`, `log`, …
    pub subresource: Option<String>,
}

impl ResourcePath {
    /// Whether the path asks for a watch in the old way: `/api/v1/watch/pods`.
    #[must_use]
    pub fn is_watch(path: &str) -> bool {
        let words: Vec<&str> = path.trim_matches('/').split('/').collect();
        matches!(
            words.as_slice(),
            ["api", _, "watch", _, ..] | ["apis", _, _, "watch", _, ..]
        )
    }

    /// Reads `/api/v1/namespaces/NS/pods/NAME/log` and the like; `None` when the path names no resource.
    #[must_use]
    pub fn parse(path: &str) -> Option<Self> {
        let mut parts = path.trim_matches('/').split('/').map(percent_decode);
        let (group, version) = match parts.next()?.as_str() {
            "api" => (String::new(), parts.next()?),
            "apis" => (parts.next()?, parts.next()?),
            _ => return None,
        };
        let rest: Vec<String> = parts.collect();
        let words: Vec<&str> = rest.iter().map(String::as_str).collect();
        let words = words
            .strip_prefix(&["watch"])
            .filter(|below| !below.is_empty())
            .unwrap_or(&words);
        let (namespace, resource, tail) = match words {
            // Namespaces are objects themselves, with subresources of their own.
            ["namespaces", _, "status" | "finalize"] => (None, "namespaces", &words[1..]),
            ["namespaces", namespace, resource, tail @ ..] => (Some((*namespace).to_owned()), *resource, tail),
            [resource, tail @ ..] => (None, *resource, tail),
            [] => return None,
        };
        let (name, subresource) = match tail {
            [] => (None, None),
            [name] => (Some((*name).to_owned()), None),
            [name, subresource] => (Some((*name).to_owned()), Some((*subresource).to_owned())),
            _ => return None,
        };
        if resource.is_empty() || name.as_deref() == Some("") {
            return None;
        }
        Some(Self {
            group,
            version,
            namespace,
            resource: resource.to_owned(),
            name,
            subresource,
        })
    }
}

/// Names and values of the part of a URL after `?`.
pub fn pairs(query: &str) -> impl Iterator<Item = (String, String)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (percent_decode(key), percent_decode(&value.replace('+', " ")))
    })
}

/// `%2F` and the like; malformed escapes stay as they are.
fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let decoded = match (first, tail) {
            (b'%', [high, low, ..]) => hex_digit(*high).zip(hex_digit(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        bytes.push(decoded.unwrap_or(*first));
        rest = if decoded.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// How unknown and duplicate fields are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    /// Dropped in silence.
    Ignore,
    /// Dropped with `Warning` headers.
    #[default]
    Warn,
    /// Refused.
    Strict,
}

/// How a version in a list request binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VersionMatch {
    /// That state.
    Exact,
    /// That state or a newer one.
    NotOlderThan,
}

/// The query of a request.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// `labelSelector`.
    pub labels: LabelSelector,
    /// `fieldSelector`.
    pub fields: FieldSelector,
    /// `watch`.
    pub watch: bool,
    /// `allowWatchBookmarks`.
    pub bookmarks: bool,
    /// `sendInitialEvents`.
    pub send_initial_events: Option<bool>,
    /// `timeoutSeconds`.
    pub timeout_seconds: Option<u64>,
    /// `resourceVersion`; `None` when empty or absent.
    pub resource_version: Option<u64>,
    /// A `resourceVersion` that is no number.
    bad_version: Option<String>,
    /// `resourceVersionMatch`.
    pub version_match: Option<VersionMatch>,
    /// `limit`, 0 for all.
    pub limit: usize,
    /// `continue`.
    pub continuation: Option<String>,
    /// `dryRun=All`.
    pub dry_run: bool,
    /// `fieldManager`.
    pub field_manager: Option<String>,
    /// `force` of an apply.
    pub force: bool,
    /// `fieldValidation`.
    pub field_validation: FieldValidation,
    /// `propagationPolicy` (deletion; the body may say the same).
    pub propagation_policy: Option<String>,
    /// `gracePeriodSeconds` (deletion).
    pub grace_period_seconds: Option<i64>,
    /// `includeObject` of a table: `None`, `Metadata` (the default) or `Object`.
    pub include_object: Option<String>,
    /// Everything, for subresources with a query of their own.
    pub pairs: Vec<(String, String)>,
}

impl Query {
    /// Reads the part of the URL after `?`. `options` is the kind that errors name: `ListOptions`, `CreateOptions`, …
    pub fn parse(query: &str, options: &str) -> Result<Self, ApiError> {
        let mut parsed = Self::default();
        for (key, value) in pairs(query) {
            parsed.set(&key, &value, options)?;
            parsed.pairs.push((key, value));
        }
        parsed.check(options)?;
        Ok(parsed)
    }

    fn set(&mut self, key: &str, value: &str, options: &str) -> Result<(), ApiError> {
        let bad = || ApiError::bad_request(format!("invalid value {value:?} of query parameter {key}"));
        let number = || value.parse::<u64>().map_err(|_| bad());
        match key {
            "labelSelector" => self.labels = LabelSelector::parse(value).map_err(ApiError::bad_request)?,
            "fieldSelector" => self.fields = FieldSelector::parse(value).map_err(ApiError::bad_request)?,
            "watch" => self.watch = is_true(value),
            "allowWatchBookmarks" => self.bookmarks = is_true(value),
            "sendInitialEvents" => self.send_initial_events = Some(is_true(value)),
            "timeoutSeconds" => self.timeout_seconds = Some(number()?),
            "resourceVersion" if value.is_empty() => {}
            "resourceVersion" => match value.parse() {
                Ok(version) => self.resource_version = Some(version),
                Err(_) => self.bad_version = Some(value.to_owned()),
            },
            "resourceVersionMatch" => {
                self.version_match = match value {
                    "" => None,
                    "Exact" => Some(VersionMatch::Exact),
                    "NotOlderThan" => Some(VersionMatch::NotOlderThan),
                    _ => return Err(unsupported(options, key, &json!(value), &["Exact", "NotOlderThan", ""])),
                };
            }
            "limit" => {
                let limit: i64 = value.parse().map_err(|_| {
                    ApiError::bad_request(format!("strconv.ParseInt: parsing {value:?}: invalid syntax"))
                })?;
                self.limit = usize::try_from(limit).unwrap_or(0);
            }
            "continue" => self.continuation = Some(value.to_owned()).filter(|value| !value.is_empty()),
            "dryRun" => self.dry_run = read_dry_run(value, options)?,
            "fieldManager" => self.field_manager = Some(value.to_owned()).filter(|value| !value.is_empty()),
            "force" => self.force = is_true(value),
            "fieldValidation" => {
                self.field_validation = match value {
                    "" | "Warn" => FieldValidation::Warn,
                    "Ignore" => FieldValidation::Ignore,
                    "Strict" => FieldValidation::Strict,
                    _ => return Err(unsupported(options, key, &json!(value), &["Ignore", "Warn", "Strict"])),
                };
            }
            "propagationPolicy" => self.propagation_policy = Some(value.to_owned()),
            "gracePeriodSeconds" => self.grace_period_seconds = Some(value.parse().map_err(|_| bad())?),
            "includeObject" => self.include_object = Some(value.to_owned()),
            _ => {}
        }
        Ok(())
    }

    fn check(&self, options: &str) -> Result<(), ApiError> {
        let refuse = |cause: Cause| Err(ApiError::invalid("meta.k8s.io", options, "", vec![cause]));
        if self.field_manager.as_ref().is_some_and(|manager| manager.len() > 128) {
            return refuse(Cause::too_long("fieldManager", 128));
        }
        if let Some(version) = &self.bad_version {
            let why = format!(
                "resourceVersion: Invalid value: {version:?}: strconv.ParseUint: parsing {version:?}: invalid syntax"
            );
            return Err(if self.watch {
                ApiError::new(500, "", why)
            } else {
                ApiError::bad_request(format!("invalid resource version: {why}"))
            });
        }
        if self.send_initial_events.is_some() && !self.watch {
            return refuse(Cause::forbidden(
                "sendInitialEvents",
                "sendInitialEvents is forbidden for list",
            ));
        }
        if self.send_initial_events.is_some() && self.version_match != Some(VersionMatch::NotOlderThan) {
            return refuse(Cause::forbidden(
                "resourceVersionMatch",
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ));
        }
        let first_page = !self.watch && self.continuation.is_none();
        if first_page && self.version_match.is_some() && self.resource_version.is_none() {
            return refuse(Cause::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        if first_page && self.version_match == Some(VersionMatch::Exact) && self.resource_version == Some(0) {
            return refuse(Cause::forbidden(
                "resourceVersionMatch",
                "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
            ));
        }
        if !self.watch && self.continuation.is_some() && self.resource_version.is_some_and(|version| version > 0) {
            return Err(ApiError::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        Ok(())
    }
}

fn unsupported(options: &str, key: &str, value: &Value, known: &[&str]) -> ApiError {
    let known: Vec<Value> = known.iter().map(|known| json!(known)).collect();
    let cause = Cause::not_supported(key, value, &known);
    ApiError::invalid("meta.k8s.io", options, "", vec![cause])
}

fn is_true(value: &str) -> bool {
    matches!(value, "" | "1" | "true" | "True" | "TRUE" | "t" | "T")
}

/// `All` is the only dry run that exists.
pub fn read_dry_run(value: &str, options: &str) -> Result<bool, ApiError> {
    match value {
        "" => Ok(false),
        "All" => Ok(true),
        other => Err(unsupported(options, "dryRun", &json!([other]), &["All"])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> ResourcePath {
        ResourcePath::parse(text).unwrap()
    }

    #[test]
    fn a_namespaced_subresource_is_read() {
        let parsed = path("/apis/flotilla.dev/v1alpha1/namespaces/x/modeldeployments/m/scale");
        assert_eq!(parsed.group, "flotilla.dev");
        assert_eq!(parsed.namespace.as_deref(), Some("x"));
        assert_eq!(parsed.resource, "modeldeployments");
        assert_eq!(parsed.name.as_deref(), Some("m"));
        assert_eq!(parsed.subresource.as_deref(), Some("scale"));
    }

    #[test]
    fn a_namespace_is_an_object_with_subresources() {
        assert_eq!(path("/api/v1/namespaces/x").name.as_deref(), Some("x"));
        let finalize = path("/api/v1/namespaces/x/finalize");
        assert_eq!(
            (finalize.resource.as_str(), finalize.subresource.as_deref()),
            ("namespaces", Some("finalize"))
        );
        assert_eq!(path("/api/v1/namespaces/x/pods").resource, "pods");
    }

    #[test]
    fn a_group_alone_names_no_resource() {
        assert_eq!(ResourcePath::parse("/apis/apps/v1"), None);
        assert_eq!(ResourcePath::parse("/api/v1/"), None);
        assert_eq!(ResourcePath::parse("/healthz"), None);
    }

    #[test]
    fn an_escaped_selector_is_read() {
        let query = Query::parse("labelSelector=a%3Db%2Cc&limit=5&watch=1", "ListOptions").unwrap();
        assert!(query.watch);
        assert_eq!(query.limit, 5);
        assert!(!query.labels.is_empty());
    }
}

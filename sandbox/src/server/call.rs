//! One request on a resource: everything a verb needs besides the body.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::{
    ApiServer,
    auth::User,
    negotiate::Form,
    registry::Resource,
    request::{Query, ResourcePath},
    status::ApiError,
    view,
};
use crate::store::object::{Object, ObjectKey};

/// One request on a resource.
#[derive(Debug)]
pub struct Call {
    /// The server.
    pub server: Arc<ApiServer>,
    /// What is asked for.
    pub resource: Arc<Resource>,
    /// The path.
    pub path: ResourcePath,
    /// The query.
    pub query: Query,
    /// Form of the answer.
    pub form: Form,
    /// `Content-Type` of the body.
    pub content_type: Option<String>,
    /// Who asks.
    pub user: User,
    /// Field manager of what is written: the query's, else the first word of the user agent.
    pub manager: String,
    /// `apiVersion` of the request.
    pub api_version: String,
    /// Sentences for `Warning` headers.
    pub warnings: Mutex<Vec<String>>,
}

impl Call {
    /// Adds a warning to the answer.
    pub fn warn(&self, warning: impl Into<String>) {
        self.warnings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(warning.into());
    }

    /// The warnings so far.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut *self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Namespace of the path, for resources that have one.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.path.namespace.as_deref().filter(|_| self.resource.namespaced)
    }

    /// Name in the path; empty for collections.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.name.as_deref().unwrap_or_default()
    }

    /// Place of the object that the path names.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        ObjectKey::new(self.namespace().unwrap_or_default(), self.name())
    }

    /// The object that the path names, as stored.
    pub fn stored(&self) -> Result<Object, ApiError> {
        self.server
            .store
            .get(&self.resource.table, &self.key())
            .ok_or_else(|| ApiError::not_found(&self.resource.key(), self.name()))
    }

    /// Whether the selectors of the query select an object as it is stored.
    #[must_use]
    pub fn selects(&self, object: &Value) -> bool {
        self.query.labels.matches(object)
            && (self.query.fields.is_empty() || self.query.fields.matches(&view::convert(&self.resource, object)))
    }

    /// Refuses field selectors that the resource does not offer.
    pub fn check_fields(&self) -> Result<(), ApiError> {
        let offered = super::selector::selectable_fields(&self.resource.group, &self.resource.plural);
        for path in self.query.fields.paths() {
            let known = path == "metadata.name"
                || path == "metadata.namespace"
                || offered.contains(&path)
                || self.resource.selectable.iter().any(|field| field == path);
            if !known {
                return Err(ApiError::bad_request(if offered.is_empty() && !self.resource.custom {
                    format!("{path:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\"")
                } else {
                    format!("field label not supported: {path}")
                }));
            }
        }
        Ok(())
    }
}

//! `GET` of a collection, in pages that all show one revision.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    server::{
        call::Call,
        negotiate::Form,
        reply::{self, Reply},
        request::VersionMatch,
        status::ApiError,
        table,
        view::{self, BareItem},
    },
    store::{
        Snapshot, StoreError,
        object::{Object, ObjectKey},
    },
};

/// Where the next page begins.
#[derive(Debug, Deserialize, Serialize)]
struct Continuation {
    rv: u64,
    namespace: String,
    name: String,
}

impl Continuation {
    fn encode(&self) -> Result<String, ApiError> {
        serde_json::to_vec(self)
            .map(|bytes| URL_SAFE_NO_PAD.encode(bytes))
            .map_err(ApiError::internal)
    }

    fn decode(text: &str) -> Result<Self, ApiError> {
        let refuse = || ApiError::bad_request("continue key is not valid: the token cannot be read");
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| refuse())?;
        serde_json::from_slice(&bytes).map_err(|_| refuse())
    }
}

/// Answers with one page.
pub fn list(call: &Call) -> Result<Reply, ApiError> {
    call.check_fields()?;
    let (snapshot, after) = read(call)?;
    let mut selected = snapshot
        .objects
        .into_iter()
        .filter(|(key, object)| after.as_ref().is_none_or(|after| key > after) && call.selects(object))
        .peekable();
    let limit = if call.query.limit == 0 {
        usize::MAX
    } else {
        call.query.limit
    };
    let page: Vec<(ObjectKey, Object)> = selected.by_ref().take(limit).collect();
    let mut metadata = json!({"resourceVersion": snapshot.revision.to_string()});
    if call.resource.custom {
        metadata["continue"] = json!("");
    }
    if selected.peek().is_some()
        && let Some((last, _)) = page.last()
    {
        let next = Continuation {
            rv: snapshot.revision,
            namespace: last.namespace.clone(),
            name: last.name.clone(),
        };
        metadata["continue"] = json!(next.encode()?);
        if call.query.labels.is_empty() && call.query.fields.is_empty() {
            metadata["remainingItemCount"] = json!(selected.count());
        }
    }
    Ok(write(call, &page, metadata))
}

fn read(call: &Call) -> Result<(Snapshot, Option<ObjectKey>), ApiError> {
    let store = &call.server.store;
    let (table, namespace) = (&call.resource.table, call.namespace());
    if let Some(token) = &call.query.continuation {
        let token = Continuation::decode(token)?;
        let snapshot = store.list_at(table, namespace, token.rv).map_err(|error| match error {
            StoreError::Compacted { .. } => ApiError::expired(
                "The provided continue parameter is too old to display a consistent list result. You must start a new list without the continue parameter.",
            ),
            other => ApiError::from_store(&call.resource.key(), "", &other),
        })?;
        return Ok((snapshot, Some(ObjectKey::new(token.namespace, token.name))));
    }
    let refuse = |error: StoreError| ApiError::from_store(&call.resource.key(), "", &error);
    match (call.query.resource_version, call.query.version_match) {
        // A limit without a match means exactly that version (apimachinery, semantics of resourceVersion).
        (Some(version), Some(VersionMatch::Exact)) => {
            Ok((store.list_at(table, namespace, version).map_err(refuse)?, None))
        }
        (Some(version), None) if version > 0 && call.query.limit > 0 => {
            Ok((store.list_at(table, namespace, version).map_err(refuse)?, None))
        }
        (Some(version), _) if version > store.revision() => Err(refuse(StoreError::Future {
            asked: version,
            current: store.revision(),
        })),
        _ => Ok((store.list(table, namespace), None)),
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List<'a, T> {
    kind: &'a str,
    api_version: String,
    metadata: Value,
    items: Vec<T>,
}

/// The objects as a list, in the form that the request asks for.
pub(super) fn write(call: &Call, page: &[(ObjectKey, Object)], metadata: Value) -> Reply {
    let resource = &call.resource;
    let converted = page.iter().map(|(_, object)| view::convert(resource, object));
    match call.form {
        Form::Object if resource.custom => {
            let items = converted.collect();
            reply::json(
                200,
                &List {
                    kind: &resource.list_kind,
                    api_version: resource.api_version(),
                    metadata,
                    items,
                },
            )
        }
        Form::Object => {
            let items = converted.map(BareItem).collect();
            reply::json(
                200,
                &List {
                    kind: &resource.list_kind,
                    api_version: resource.api_version(),
                    metadata,
                    items,
                },
            )
        }
        Form::Metadata => {
            let items = converted.map(|object| view::metadata_only(&object)).collect();
            let (kind, api_version) = ("PartialObjectMetadataList", "meta.k8s.io/v1".to_owned());
            reply::json(
                200,
                &List {
                    kind,
                    api_version,
                    metadata,
                    items,
                },
            )
        }
        Form::Table => {
            let objects: Vec<_> = converted.collect();
            let mut table = table::table(call, objects.iter().map(AsRef::as_ref), true);
            table["metadata"] = metadata;
            reply::json(200, &table)
        }
    }
}

//! `GET` of a collection with `watch=true`: one JSON event a line.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::{
    server::{
        call::Call,
        negotiate::Form,
        reply::{self, Reply},
        status::ApiError,
        table, view,
    },
    store::{
        StoreError,
        history::Change,
        watcher::{Signal, Watch},
    },
};

/// How long before the end of a watch its last bookmark comes (that of the real server).
const BEFORE_END: Duration = Duration::from_secs(2);
/// A watch without a timeout of its own ends after this time.
const LONGEST: Duration = Duration::from_secs(3600);

/// Opens the watch.
pub fn watch(call: Call) -> Result<Reply, ApiError> {
    call.check_fields()?;
    let initial = call
        .query
        .send_initial_events
        .unwrap_or(call.query.resource_version.unwrap_or(0) == 0);
    let store = &call.server.store;
    let (table, namespace) = (&call.resource.table, call.namespace());
    if let Some(asked) = call.query.resource_version
        && asked > store.revision()
    {
        let error = StoreError::Future {
            asked,
            current: store.revision(),
        };
        return Err(ApiError::from_store(&call.resource.key(), "", &error));
    }
    let (first, watch, end_of_list) = if initial {
        let (snapshot, watch) = store.list_and_watch(table, namespace);
        let objects: Vec<_> = snapshot.objects.into_iter().map(|(_, object)| object).collect();
        let marked = call.query.send_initial_events == Some(true) && call.query.bookmarks;
        (objects, watch, marked.then_some(snapshot.revision))
    } else {
        let from = call
            .query
            .resource_version
            .filter(|version| *version > 0)
            .unwrap_or_else(|| store.revision());
        match store.watch(table, namespace, from) {
            Ok(watch) => (Vec::new(), watch, None),
            Err(error) => return Ok(gone(&call, &error)),
        }
    };
    Ok(reply::stream(
        "application/json",
        events(call, first, watch, end_of_list),
    ))
}

/// A watch from a forgotten version begins, and ends with this event.
fn gone(call: &Call, error: &StoreError) -> Reply {
    let status = ApiError::from_store(&call.resource.key(), "", error).to_status();
    reply::bytes(200, "application/json", line("ERROR", &status))
}

fn events(
    call: Call,
    first: Vec<crate::store::object::Object>,
    mut watch: Watch,
    end_of_list: Option<u64>,
) -> impl futures::Stream<Item = Bytes> {
    async_stream::stream! {
        let mut writer = Writer { call: &call, header_sent: false };
        for object in first.iter().filter(|object| call.selects(object)) {
            yield writer.event("ADDED", object);
        }
        drop(first);
        if let Some(revision) = end_of_list {
            yield writer.bookmark(revision, true);
        }
        let timeout = call.query.timeout_seconds.map_or(LONGEST, Duration::from_secs).min(LONGEST);
        let end = tokio::time::sleep(timeout);
        let farewell = tokio::time::sleep(timeout.saturating_sub(BEFORE_END));
        tokio::pin!(end, farewell);
        let mut says_farewell = call.query.bookmarks;
        let period = call.server.settings.bookmark_period;
        let mut bookmarks = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
        loop {
            tokio::select! {
                () = &mut end => break,
                () = call.server.shutdown.cancelled() => break,
                () = &mut farewell, if says_farewell => {
                    says_farewell = false;
                    call.server.store.bookmark(&watch);
                }
                _ = bookmarks.tick(), if call.query.bookmarks => call.server.store.bookmark(&watch),
                signal = watch.next() => match signal {
                    Some(Signal::Change(change)) => if let Some(line) = writer.change(&change) { yield line },
                    Some(Signal::Bookmark(revision)) => yield writer.bookmark(revision, false),
                    None => break,
                },
            }
        }
    }
}

/// Writes events in the form that the watch asked for.
struct Writer<'a> {
    call: &'a Call,
    header_sent: bool,
}

impl Writer<'_> {
    /// What a change means to a watch with selectors: an object may enter or leave the selection.
    fn change(&mut self, change: &Arc<Change>) -> Option<Bytes> {
        let before = change.before.as_ref().filter(|before| self.call.selects(before));
        let after = Some(&change.after).filter(|after| !change.removed && self.call.selects(after));
        match (before, after) {
            (None, Some(after)) => Some(self.event("ADDED", after)),
            (Some(_), Some(after)) => Some(self.event("MODIFIED", after)),
            (Some(_), None) if change.removed => Some(self.event("DELETED", &change.after)),
            (Some(before), None) => {
                let mut last = before.as_ref().clone();
                crate::store::object::set_revision(&mut last, change.revision);
                Some(self.event("DELETED", &last))
            }
            (None, None) => None,
        }
    }

    fn event(&mut self, kind: &str, object: &Value) -> Bytes {
        let converted = view::convert(&self.call.resource, object);
        match self.call.form {
            Form::Object => line(kind, &converted),
            Form::Metadata => line(kind, &view::metadata_only(&converted)),
            Form::Table => {
                let table = table::table(self.call, std::iter::once(converted.as_ref()), !self.header_sent);
                self.header_sent = true;
                line(kind, &table)
            }
        }
    }

    fn bookmark(&self, revision: u64, end_of_list: bool) -> Bytes {
        let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
        if end_of_list {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let resource = &self.call.resource;
        let (kind, api_version) = match self.call.form {
            Form::Object => (resource.kind.as_str(), resource.api_version()),
            Form::Metadata => ("PartialObjectMetadata", "meta.k8s.io/v1".into()),
            Form::Table => ("Table", "meta.k8s.io/v1".into()),
        };
        let mut object = json!({"kind": kind, "apiVersion": api_version, "metadata": metadata});
        if self.call.form == Form::Table {
            object["columnDefinitions"] = json!([]);
            object["rows"] = json!([]);
        }
        line("BOOKMARK", &object)
    }
}

fn line(kind: &str, object: &Value) -> Bytes {
    #[derive(serde::Serialize)]
    struct Event<'a> {
        r#type: &'a str,
        object: &'a Value,
    }
    // A Value always serialises: its keys are strings and its numbers are finite.
    let mut bytes = serde_json::to_vec(&Event { r#type: kind, object }).unwrap_or_default();
    bytes.push(b'\n');
    bytes.into()
}

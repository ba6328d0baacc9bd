//! `meta.k8s.io/v1 Table`: what `kubectl get` prints.

pub mod cell;
pub mod core;
pub mod custom;
pub mod pod;

use serde_json::{Value, json};

use super::{call::Call, registry::Column, view};

/// Columns and cells of one resource.
#[derive(Debug)]
pub struct Layout {
    /// Headings.
    pub columns: Vec<Column>,
    /// Cells of an object, in the order of the headings.
    pub row: fn(&Value) -> Vec<Value>,
}

/// A built-in column; priority above 0 shows only with `-o wide`.
#[must_use]
pub fn column(name: &str, kind: &str, priority: i64) -> Column {
    Column {
        name: name.into(),
        kind: kind.into(),
        format: if name == "Name" { "name".into() } else { String::new() },
        description: name.into(),
        priority,
        json_path: String::new(),
    }
}

/// The table of some objects, with headings or (later events of a watch) without.
pub fn table<'a>(call: &Call, objects: impl Iterator<Item = &'a Value>, headings: bool) -> Value {
    let resource = &call.resource;
    let include = call.query.include_object.as_deref().unwrap_or("Metadata");
    let item = |object: &Value| match include {
        "Object" => object.clone(),
        "None" => Value::Null,
        _ => view::metadata_only(object),
    };
    let (columns, rows): (Vec<Column>, Vec<Value>) = if resource.custom {
        let mut columns = vec![column("Name", "string", 0)];
        columns.extend(resource.columns.iter().cloned());
        let rows = objects
            .map(|object| json!({"cells": custom::cells(&resource.columns, object), "object": item(object)}))
            .collect();
        (columns, rows)
    } else {
        let layout = layout(&resource.plural);
        let rows = objects
            .map(|object| json!({"cells": (layout.row)(object), "object": item(object)}))
            .collect();
        (layout.columns, rows)
    };
    let definitions: Vec<Value> = if headings {
        columns.iter().map(definition).collect()
    } else {
        Vec::new()
    };
    let mut table = json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "rows": rows});
    if headings {
        table["columnDefinitions"] = Value::Array(definitions);
    } else {
        table["columnDefinitions"] = Value::Null;
    }
    if let Some(version) = table["rows"][0]["object"]["metadata"]["resourceVersion"].as_str() {
        table["metadata"] = json!({"resourceVersion": version});
    }
    table
}

fn definition(column: &Column) -> Value {
    json!({"name": column.name, "type": column.kind, "format": column.format, "description": column.description,
        "priority": column.priority})
}

fn layout(plural: &str) -> Layout {
    match plural {
        "pods" => pod::layout(),
        other => core::layout(other),
    }
}

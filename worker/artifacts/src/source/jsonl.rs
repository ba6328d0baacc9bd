//! Rows of a JSON Lines file.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use super::Value;
use crate::error::{ArtifactError, io};

/// Calls `visit` for each line that is not blank.
pub(super) fn read<E: From<ArtifactError>>(
    path: &Path,
    visit: &mut impl FnMut(Result<BTreeMap<String, Value>, String>) -> Result<(), E>,
) -> Result<(), E> {
    let file = File::open(path).map_err(io("open", path))?;
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(io("read", path))?;
        if line.trim_ascii().is_empty() {
            continue;
        }
        visit(parse(&line))?;
    }
    Ok(())
}

fn parse(line: &[u8]) -> Result<BTreeMap<String, Value>, String> {
    match serde_json::from_slice(line) {
        Ok(serde_json::Value::Object(object)) => {
            Ok(object.into_iter().map(|(name, value)| (name, convert(value))).collect())
        }
        Ok(_) => Err("the line is not a JSON object".into()),
        Err(error) => Err(format!("parse JSON: {error}")),
    }
}

fn convert(value: serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::Null,
        serde_json::Value::Bool(value) => Value::Text(value.to_string()),
        serde_json::Value::Number(value) => Value::Text(value.to_string()),
        serde_json::Value::String(value) => Value::Text(value),
        serde_json::Value::Array(values) => Value::List(values.into_iter().map(convert).collect()),
        serde_json::Value::Object(object) => {
            Value::Struct(object.into_iter().map(|(name, value)| (name, convert(value))).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_no_object_is_a_bad_row_and_the_next_is_read() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("rows.jsonl");
        std::fs::write(&path, "{\"a\":1}\n\n[1]\n{\"a\":\n{\"a\":{\"b\":[null,\"x\"]}}").expect("write");
        let mut rows = Vec::new();
        read::<ArtifactError>(&path, &mut |row| {
            rows.push(row);
            Ok(())
        })
        .expect("read");
        assert_eq!(rows.len(), 4);
        assert_eq!(rows[0].as_ref().expect("row")["a"], Value::Text("1".into()));
        assert!(rows[1].is_err() && rows[2].is_err());
        let inner = Value::List(vec![Value::Null, Value::Text("x".into())]);
        let expected = Value::Struct([("b".to_owned(), inner)].into());
        assert_eq!(rows[3].as_ref().expect("row")["a"], expected);
    }
}

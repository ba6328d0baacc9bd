//! Cells of a custom resource, by the printer columns of its definition.

use serde_json::{Value, json};

use super::cell;
use crate::server::registry::Column;

/// Name, then one cell a column.
#[must_use]
pub fn cells(columns: &[Column], object: &Value) -> Vec<Value> {
    let mut cells = vec![cell::name(object)];
    cells.extend(columns.iter().map(|column| value(column, object)));
    cells
}

fn value(column: &Column, object: &Value) -> Value {
    let found = find(object, &column.json_path);
    let Some(first) = found.first().copied().filter(|value| !value.is_null()) else {
        return Value::Null;
    };
    match column.kind.as_str() {
        "integer" => first
            .as_f64()
            .map_or(Value::Null, |number| json!(number.trunc() as i64)),
        "number" => first.as_f64().map_or(Value::Null, |number| json!(number)),
        "boolean" => first.as_bool().map_or(Value::Null, |flag| json!(flag)),
        "date" => cell::age(first),
        _ if found.len() > 1 => json!(found.iter().map(|value| plain(value)).collect::<Vec<_>>().join(",")),
        _ => json!(plain(first)),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// One step of a path.
#[derive(Debug, PartialEq)]
enum Step {
    Field(String),
    Index(i64),
    All,
    Where(String, String),
}

/// The values at a JSON path: fields, `['quoted']`, `[0]`, `[-1]`, `[*]` and `[?(@.a=="b")]`, which are the forms that
/// printer columns use.
#[must_use]
pub fn find<'a>(object: &'a Value, path: &str) -> Vec<&'a Value> {
    let Some(steps) = parse(path) else { return Vec::new() };
    steps.iter().fold(vec![object], |values, step| {
        values.into_iter().flat_map(|value| follow(value, step)).collect()
    })
}

fn follow<'a>(value: &'a Value, step: &Step) -> Vec<&'a Value> {
    match step {
        Step::Field(name) => value.get(name).into_iter().collect(),
        Step::Index(index) => {
            let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
            let length = i64::try_from(items.len()).unwrap_or(i64::MAX);
            let index = if *index < 0 { index + length } else { *index };
            usize::try_from(index)
                .ok()
                .and_then(|index| items.get(index))
                .into_iter()
                .collect()
        }
        Step::All => match value {
            Value::Array(items) => items.iter().collect(),
            Value::Object(fields) => fields.values().collect(),
            _ => Vec::new(),
        },
        Step::Where(path, wanted) => {
            let fits = |item: &&Value| find(item, path).first().is_some_and(|found| plain(found) == *wanted);
            value.as_array().into_iter().flatten().filter(fits).collect()
        }
    }
}

fn parse(path: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let mut rest = path
        .trim()
        .trim_start_matches('{')
        .trim_end_matches('}')
        .trim_start_matches('$');
    while !rest.is_empty() {
        if let Some(tail) = rest.strip_prefix('[') {
            let end = if tail.starts_with("?(") {
                tail.find(")]")? + 1
            } else {
                tail.find(']')?
            };
            steps.push(parse_bracket(&tail[..end])?);
            rest = &tail[end + 1..];
            continue;
        }
        let (name, tail) = parse_name(rest.strip_prefix('.').unwrap_or(rest));
        match name.as_str() {
            "" => {}
            "*" => steps.push(Step::All),
            _ => steps.push(Step::Field(name)),
        }
        if tail.len() == rest.len() {
            return None;
        }
        rest = tail;
    }
    Some(steps)
}

/// A field's name, in which `\.` is a dot.
fn parse_name(text: &str) -> (String, &str) {
    let mut name = String::new();
    let mut characters = text.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '\\' => name.extend(characters.next().map(|(_, escaped)| escaped)),
            '.' | '[' => return (name, &text[index..]),
            other => name.push(other),
        }
    }
    (name, "")
}

fn parse_bracket(inner: &str) -> Option<Step> {
    if inner == "*" {
        return Some(Step::All);
    }
    if let Some(filter) = inner.strip_prefix("?(").and_then(|filter| filter.strip_suffix(')')) {
        let (path, wanted) = filter.split_once("==")?;
        let wanted = wanted.trim().trim_matches(|quote| quote == '"' || quote == '\'');
        return Some(Step::Where(
            path.trim().trim_start_matches('@').to_owned(),
            wanted.to_owned(),
        ));
    }
    if let Some(name) = inner.strip_prefix(['\'', '"']) {
        return Some(Step::Field(name.trim_end_matches(['\'', '"']).to_owned()));
    }
    inner.parse().ok().map(Step::Index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_path_finds_its_value() {
        let object = json!({"a": {"b.c": 1}, "list": [{"type": "X", "v": "1"}, {"type": "Y", "v": "2"}]});
        for (path, expected) in [
            (".a['b.c']", json!([1])),
            (".a.b\\.c", json!([1])),
            (".list[0].v", json!(["1"])),
            (".list[-1:].v", json!([])),
            (".list[-1].v", json!(["2"])),
            (".list[*].v", json!(["1", "2"])),
            (".list[?(@.type==\"Y\")].v", json!(["2"])),
            (".missing.x", json!([])),
        ] {
            assert_eq!(json!(find(&object, path)), expected, "{path}");
        }
    }

    #[test]
    fn a_float_in_an_integer_column_is_cut() {
        let column = Column {
            name: "N".into(),
            kind: "integer".into(),
            format: String::new(),
            description: String::new(),
            priority: 0,
            json_path: ".n".into(),
        };
        assert_eq!(value(&column, &json!({"n": 2.7})), json!(2));
        assert_eq!(value(&column, &json!({})), Value::Null);
    }
}

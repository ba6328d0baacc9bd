//! JSON to CEL values, by the schema: texts with a format become timestamps, durations or bytes,
//! numbers become doubles where the schema says `number`, field names are escaped.
//!
//! Source: `apiserver/pkg/cel` (`UnstructuredToVal`, `Escape`).

use std::{collections::HashMap, sync::Arc};

use base64::Engine as _;
use kube_cel::cel::{
    Context, Program, Value as Cel,
    objects::{Key, Map as CelMap},
};
use serde_json::{Map, Number, Value};

use super::structural::{Kind, Structural};

const RESERVED: [&str; 21] = [
    "true",
    "false",
    "null",
    "in",
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "package",
    "namespace",
    "return",
    "var",
    "void",
    "while",
];

/// The CEL value of `value`, read by `schema`; `context` supplies CEL's own text conversions.
pub(crate) fn convert(value: &Value, schema: Option<&Structural>, context: &Context<'_>) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(b) => Cel::Bool(*b),
        Value::Number(n) => number(n, schema),
        Value::String(text) => string(text, schema, context),
        Value::Array(items) => {
            let below = schema.and_then(|s| s.items.as_deref());
            Cel::List(Arc::new(
                items.iter().map(|item| convert(item, below, context)).collect(),
            ))
        }
        Value::Object(map) => object(map, schema, context),
    }
}

fn number(n: &Number, schema: Option<&Structural>) -> Cel {
    let kind = schema.and_then(|s| s.kind);
    match (n.as_i64(), n.as_u64()) {
        _ if kind == Some(Kind::Number) => Cel::Float(n.as_f64().unwrap_or(f64::NAN)),
        (Some(i), _) => Cel::Int(i),
        (None, Some(u)) => Cel::UInt(u),
        (None, None) => Cel::Float(n.as_f64().unwrap_or(f64::NAN)),
    }
}

fn string(text: &str, schema: Option<&Structural>, context: &Context<'_>) -> Cel {
    let plain = || Cel::String(Arc::new(text.to_owned()));
    match schema.and_then(|s| s.format.as_deref()) {
        Some("date-time") => parsed("timestamp(text)", text, context).unwrap_or_else(plain),
        Some("duration") => parsed("duration(text)", text, context).unwrap_or_else(plain),
        Some("byte") => {
            let bytes = base64::engine::general_purpose::STANDARD.decode(text);
            bytes.map_or_else(|_| plain(), |b| Cel::Bytes(Arc::new(b)))
        }
        _ => plain(),
    }
}

fn parsed(call: &str, text: &str, context: &Context<'_>) -> Option<Cel> {
    let mut scope = context.new_inner_scope();
    scope.add_variable_from_value("text", text.to_owned());
    Program::compile(call).ok()?.execute(&scope).ok()
}

fn object(map: &Map<String, Value>, schema: Option<&Structural>, context: &Context<'_>) -> Cel {
    let mut fields = HashMap::with_capacity(map.len());
    for (name, value) in map {
        let declared = schema.and_then(|s| s.properties.get(name));
        let below = declared.or_else(|| schema.and_then(|s| s.field(name)));
        // Keys of a map are data; only names that the schema declares are identifiers of the rule.
        let free = declared.is_none() && schema.is_some_and(|s| s.additional.is_some());
        let key = if free { name.clone() } else { escape(name) };
        fields.insert(Key::String(Arc::new(key)), convert(value, below.map(|b| &**b), context));
    }
    Cel::Map(CelMap { map: Arc::new(fields) })
}

/// A field name as an identifier of CEL.
fn escape(name: &str) -> String {
    if RESERVED.contains(&name) {
        return format!("__{name}__");
    }
    name.replace("__", "__underscores__")
        .replace('.', "__dot__")
        .replace('-', "__dash__")
        .replace('/', "__slash__")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cel_cannot_say_are_escaped() {
        assert_eq!(escape("namespace"), "__namespace__");
        assert_eq!(escape("a-b.c/d"), "a__dash__b__dot__c__slash__d");
        assert_eq!(escape("a__b_c"), "a__underscores__b_c");
    }
}

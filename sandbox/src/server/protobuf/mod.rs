//! Kubernetes' protobuf envelope, read only: some kubectl verbs (`create configmap`, `auth can-i`, `drain`) send it and
//! know no other format. Answers are always JSON, which every client accepts.
//!
//! Source: apimachinery `runtime/serializer/protobuf`, the `generated.proto` files of the API groups.

mod message;

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use self::message::{Field, Type};

/// Media type of the envelope.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// First bytes of every envelope.
const MAGIC: &[u8] = b"k8s\0";
/// Messages nest no deeper than this.
const MAX_DEPTH: usize = 32;

/// Why a body cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtobufError {
    /// The bytes are no envelope or end too early.
    #[error("malformed protobuf: {0}")]
    Malformed(&'static str),
    /// The kind's message is not known here.
    #[error("kind {0} cannot be read from protobuf")]
    UnknownKind(String),
}

/// One field as it stands on the wire.
#[derive(Debug)]
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The object in an envelope.
pub fn decode(body: &[u8]) -> Result<Value, ProtobufError> {
    let rest = body
        .strip_prefix(MAGIC)
        .ok_or(ProtobufError::Malformed("the first four bytes are not k8s\\0"))?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for (number, wire) in fields(rest)? {
        match (number, wire) {
            (1, Wire::Bytes(meta)) => {
                for (number, wire) in fields(meta)? {
                    match (number, wire) {
                        (1, Wire::Bytes(text)) => api_version = utf8(text)?,
                        (2, Wire::Bytes(text)) => kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    if !message::is_known(&kind) {
        return Err(ProtobufError::UnknownKind(kind));
    }
    let mut object = read_message(&kind, raw, 0)?;
    object["apiVersion"] = json!(api_version);
    object["kind"] = json!(kind);
    Ok(object)
}

fn utf8(bytes: &[u8]) -> Result<String, ProtobufError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| ProtobufError::Malformed("a string is not UTF-8"))
}

fn varint(bytes: &mut &[u8]) -> Result<u64, ProtobufError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes
            .split_first()
            .ok_or(ProtobufError::Malformed("a number ends too early"))?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(ProtobufError::Malformed("a number is too long"))
}

fn take<'a>(bytes: &mut &'a [u8], length: u64) -> Result<&'a [u8], ProtobufError> {
    let cut = usize::try_from(length)
        .ok()
        .and_then(|length| bytes.split_at_checked(length));
    let (head, tail) = cut.ok_or(ProtobufError::Malformed("a field ends too early"))?;
    *bytes = tail;
    Ok(head)
}

fn fields(mut bytes: &[u8]) -> Result<Vec<(u64, Wire<'_>)>, ProtobufError> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let wire = match tag & 7 {
            0 => Wire::Number(varint(&mut bytes)?),
            1 => Wire::Bytes(take(&mut bytes, 8)?),
            2 => {
                let length = varint(&mut bytes)?;
                Wire::Bytes(take(&mut bytes, length)?)
            }
            5 => Wire::Bytes(take(&mut bytes, 4)?),
            _ => return Err(ProtobufError::Malformed("a field has an unknown wire type")),
        };
        found.push((tag >> 3, wire));
    }
    Ok(found)
}

fn read_message(name: &str, bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    if depth > MAX_DEPTH {
        return Err(ProtobufError::Malformed("messages nest too deeply"));
    }
    match name {
        "Time" => return read_time(bytes),
        "Quantity" => return Ok(numbered(bytes)?.remove(&1).unwrap_or_default()),
        "IntOrString" => return read_int_or_string(bytes),
        _ => {}
    }
    let mut object = Map::new();
    for (number, wire) in fields(bytes)? {
        let Some(field) = message::field(name, number) else {
            continue;
        };
        let place = object.entry(field.name.clone()).or_insert(Value::Null);
        put(place, field, wire, depth)?;
    }
    // Go writes every field that is no pointer; its zero means absence.
    object.retain(|key, value| !is_absent(message::by_name(name, key), value));
    Ok(Value::Object(object))
}

fn put(place: &mut Value, field: &Field, wire: Wire<'_>, depth: usize) -> Result<(), ProtobufError> {
    match &field.kind {
        Type::List(item) => {
            let value = read_value(item, wire, depth)?;
            match place {
                Value::Array(items) => items.push(value),
                other => *other = json!([value]),
            }
        }
        Type::Map(item) => {
            let Wire::Bytes(entry) = wire else {
                return Err(ProtobufError::Malformed("a map entry is a number"));
            };
            let (mut key, mut value) = (String::new(), read_value(item, Wire::Bytes(&[]), depth)?);
            for (number, wire) in fields(entry)? {
                match (number, wire) {
                    (1, Wire::Bytes(text)) => key = utf8(text)?,
                    (2, wire) => value = read_value(item, wire, depth)?,
                    _ => {}
                }
            }
            place[key] = value;
        }
        single => *place = read_value(single, wire, depth)?,
    }
    Ok(())
}

fn read_value(kind: &Type, wire: Wire<'_>, depth: usize) -> Result<Value, ProtobufError> {
    Ok(match (kind, wire) {
        (Type::Text, Wire::Bytes(text)) => json!(utf8(text)?),
        (Type::Base64, Wire::Bytes(bytes)) => json!(STANDARD.encode(bytes)),
        (Type::Bool, Wire::Number(number)) => json!(number != 0),
        // Two's complement in 64 bits, also of 32-bit fields.
        (Type::Integer, Wire::Number(number)) => json!(number.cast_signed()),
        (Type::Message(name), Wire::Bytes(bytes)) => read_message(name, bytes, depth + 1)?,
        _ => {
            return Err(ProtobufError::Malformed(
                "a field has another type than its message says",
            ));
        }
    })
}

fn is_absent(field: Option<&Field>, value: &Value) -> bool {
    if field.is_some_and(|field| field.optional) {
        return value.is_null();
    }
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_i64() == Some(0),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Scalars of a small message by number.
fn numbered(bytes: &[u8]) -> Result<BTreeMap<u64, Value>, ProtobufError> {
    let mut found = BTreeMap::new();
    for (number, wire) in fields(bytes)? {
        let value = match wire {
            Wire::Number(value) => json!(value.cast_signed()),
            Wire::Bytes(text) => json!(utf8(text)?),
        };
        found.insert(number, value);
    }
    Ok(found)
}

fn read_time(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let found = numbered(bytes)?;
    let part = |number: u64| found.get(&number).and_then(Value::as_i64).unwrap_or(0);
    if part(1) == 0 && part(2) == 0 {
        return Ok(Value::Null);
    }
    let nanoseconds = i32::try_from(part(2)).unwrap_or(0);
    let time = Timestamp::new(part(1), nanoseconds).map_err(|_| ProtobufError::Malformed("a time is out of range"))?;
    Ok(json!(time.to_string()))
}

fn read_int_or_string(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let mut found = numbered(bytes)?;
    let is_text = found.get(&1).and_then(Value::as_i64) == Some(1);
    Ok(found
        .remove(if is_text { &3 } else { &2 })
        .unwrap_or(if is_text { json!("") } else { json!(0) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend_from_slice(bytes);
        out
    }

    fn envelope(kind: &str, raw: &[u8]) -> Vec<u8> {
        let mut meta = field(1, b"v1");
        meta.extend(field(2, kind.as_bytes()));
        let mut out = MAGIC.to_vec();
        out.extend(field(1, &meta));
        out.extend(field(2, raw));
        out
    }

    #[test]
    fn a_config_map_is_read() {
        let mut raw = field(1, &[field(1, b"a"), field(3, b""), field(8, b"")].concat());
        raw.extend(field(2, &[field(1, b"k"), field(2, b"")].concat()));
        raw.extend([4 << 3, 0]);
        let object = decode(&envelope("ConfigMap", &raw)).unwrap();
        let expected = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": ""},
            "immutable": false});
        assert_eq!(object, expected);
    }

    #[test]
    fn an_unknown_kind_and_a_torn_body_are_refused() {
        assert_eq!(
            decode(&envelope("Odd", b"")),
            Err(ProtobufError::UnknownKind("Odd".into()))
        );
        let raw = field(1, &field(1, b"a"));
        let whole = envelope("ConfigMap", &raw);
        // Cut between its fields an envelope is only empty.
        let between = whole.len() - field(2, &raw).len();
        for end in (5..whole.len()).filter(|end| *end != between) {
            assert!(decode(&whole[..end]).is_err(), "{end}");
        }
    }
}

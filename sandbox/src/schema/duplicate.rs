//! Keys that a JSON text gives twice: `serde_json::Value` keeps the last and forgets, strict validation reports them.

use std::{cell::RefCell, collections::HashSet};

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::{cause::quoted, path};

/// Messages such as `duplicate field "spec.a"`, in the order of the text. Malformed text has none.
#[must_use]
pub fn duplicate_fields(text: &[u8]) -> Vec<String> {
    let found = RefCell::new(Vec::new());
    let mut reader = serde_json::Deserializer::from_slice(text);
    let parsed = Node {
        at: String::new(),
        found: &found,
    }
    .deserialize(&mut reader);
    if parsed.is_err() {
        return Vec::new();
    }
    found
        .into_inner()
        .iter()
        .map(|at: &String| format!("duplicate field {}", quoted(at)))
        .collect()
}

struct Node<'a> {
    at: String,
    found: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let mut i = 0;
        while items
            .next_element_seed(Node {
                at: path::index(&self.at, i),
                found: self.found,
            })?
            .is_some()
        {
            i += 1;
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(name) = fields.next_key::<String>()? {
            let at = path::child(&self.at, &name);
            if !seen.insert(name) {
                self.found.borrow_mut().push(at.clone());
            }
            fields.next_value_seed(Node { at, found: self.found })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_given_twice_is_reported_with_its_path() {
        let text = br#"{"a": 1, "s": {"l": [{"k": 1, "k": 2}], "x": null}, "a": {"a": "b"}}"#;
        assert_eq!(
            duplicate_fields(text),
            [r#"duplicate field "s.l[0].k""#, r#"duplicate field "a""#]
        );
        assert!(duplicate_fields(b"{").is_empty());
    }
}

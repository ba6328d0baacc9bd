//! A structural schema: one OpenAPI v3 node, parsed once, asked often.
//!
//! Source: the `structural` rules of Kubernetes CRDs (KEP-2332) and `JSONSchemaProps` of apiextensions/v1.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use regex::Regex;
use serde_json::{Map, Value};

use super::rule::Rule;

/// JSON type a schema asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// `object`.
    Object,
    /// `array`.
    Array,
    /// `string`.
    String,
    /// `integer`: a number without fraction.
    Integer,
    /// `number`.
    Number,
    /// `boolean`.
    Boolean,
}

impl Kind {
    /// The name in OpenAPI.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Object => "object",
            Self::Array => "array",
            Self::String => "string",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "object" => Self::Object,
            "array" => Self::Array,
            "string" => Self::String,
            "integer" => Self::Integer,
            "number" => Self::Number,
            "boolean" => Self::Boolean,
            _ => return None,
        })
    }
}

/// How the entries of a list belong together (`x-kubernetes-list-type`).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum ListType {
    /// The list is one value.
    #[default]
    Atomic,
    /// Each scalar stands for itself.
    Set,
    /// Each object is named by the values of these keys.
    Map(Vec<String>),
}

/// What keys beyond `properties` may be.
#[derive(Clone, Debug)]
pub enum Additional {
    /// Any key with any value (`additionalProperties: true`).
    Any,
    /// No other key (`additionalProperties: false`).
    None,
    /// Any key with a value of this schema.
    Schema(Arc<Structural>),
}

/// Bounds on a value.
#[derive(Clone, Debug, Default)]
pub struct Bounds {
    /// Lower bound of a number.
    pub minimum: Option<f64>,
    /// The lower bound itself is excluded.
    pub exclusive_minimum: bool,
    /// Upper bound of a number.
    pub maximum: Option<f64>,
    /// The upper bound itself is excluded.
    pub exclusive_maximum: bool,
    /// The number is a multiple of this.
    pub multiple_of: Option<f64>,
    /// Least count of characters.
    pub min_length: Option<u64>,
    /// Greatest count of characters.
    pub max_length: Option<u64>,
    /// Least count of items.
    pub min_items: Option<u64>,
    /// Greatest count of items.
    pub max_items: Option<u64>,
    /// Least count of keys.
    pub min_properties: Option<u64>,
    /// Greatest count of keys.
    pub max_properties: Option<u64>,
}

/// Conditions that other schemas put on the same value.
#[derive(Clone, Debug, Default)]
pub struct Junctors {
    /// Every one must hold.
    pub all_of: Vec<Arc<Structural>>,
    /// At least one must hold.
    pub any_of: Vec<Arc<Structural>>,
    /// Exactly one must hold.
    pub one_of: Vec<Arc<Structural>>,
    /// Must not hold.
    pub not: Option<Arc<Structural>>,
}

/// One node of a schema.
#[derive(Clone, Debug, Default)]
pub struct Structural {
    /// The JSON type, unless any (or int-or-string).
    pub kind: Option<Kind>,
    /// null is a value.
    pub nullable: bool,
    /// An integer or a string.
    pub int_or_string: bool,
    /// Unknown fields stay.
    pub preserve_unknown: bool,
    /// The object has apiVersion, kind and metadata.
    pub embedded: bool,
    /// Declared fields.
    pub properties: BTreeMap<String, Arc<Self>>,
    /// Undeclared fields.
    pub additional: Option<Additional>,
    /// Items of an array.
    pub items: Option<Arc<Self>>,
    /// Value for an absent field.
    pub default: Option<Value>,
    /// How list items are identified.
    pub list_type: ListType,
    /// The object is one value for field ownership (`x-kubernetes-map-type: atomic`).
    pub atomic_map: bool,
    /// Fields that must be present.
    pub required: Vec<String>,
    /// Allowed values.
    pub enumeration: Vec<Value>,
    /// Name of a text format.
    pub format: Option<String>,
    /// Regular expression that a text must match somewhere.
    pub pattern: Option<Regex>,
    /// Items are all different.
    pub unique_items: bool,
    /// Bounds on numbers, texts and counts.
    pub bounds: Bounds,
    /// Conditions by other schemas.
    pub junctors: Junctors,
    /// CEL rules.
    pub rules: Vec<Arc<Rule>>,
    /// This node or one below it has CEL rules.
    pub has_rules: bool,
}

/// A schema that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// A node that is not an object.
    #[error("schema at {path:?} is not an object but {found}")]
    NotAnObject {
        /// Path in the schema.
        path: String,
        /// What was there.
        found: String,
    },
    /// A type name that OpenAPI does not have.
    #[error("schema at {path:?} has the unknown type {found:?}")]
    UnknownType {
        /// Path in the schema.
        path: String,
        /// What was there.
        found: String,
    },
    /// A pattern that is no regular expression.
    #[error("schema at {path:?} has the pattern {pattern:?}, which does not compile: {source}")]
    Pattern {
        /// Path in the schema.
        path: String,
        /// The pattern.
        pattern: String,
        /// Why.
        source: Box<regex::Error>,
    },
    /// A `$ref` to a definition that is not there.
    #[error("schema at {path:?} refers to {target:?}, which is not defined")]
    UnknownReference {
        /// Path in the schema.
        path: String,
        /// The reference.
        target: String,
    },
    /// A CEL rule that is not written as one.
    #[error("schema at {path:?} has a malformed validation rule: {source}")]
    Rule {
        /// Path in the schema.
        path: String,
        /// Why.
        source: serde_json::Error,
    },
}

impl Structural {
    /// Parses a schema without references, as CRDs have them.
    ///
    /// # Errors
    /// When a node, type, pattern or rule is malformed.
    pub fn parse(schema: &Value) -> Result<Arc<Self>, SchemaError> {
        Parser::new(&Map::new()).node(schema, "")
    }

    /// A schema that accepts and keeps everything.
    #[must_use]
    pub fn open() -> Arc<Self> {
        Arc::new(Self {
            preserve_unknown: true,
            ..Self::default()
        })
    }

    /// The schema of the field `name`, declared or by `additionalProperties`.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&Arc<Self>> {
        self.properties.get(name).or(match &self.additional {
            Some(Additional::Schema(schema)) => Some(schema),
            _ => None,
        })
    }
}

/// Parses nodes and remembers the definitions it has resolved.
pub(crate) struct Parser<'a> {
    definitions: &'a Map<String, Value>,
    resolved: HashMap<String, Arc<Structural>>,
    open: Vec<String>,
}

impl<'a> Parser<'a> {
    /// A parser over `definitions`, named as in `#/components/schemas/<name>`.
    pub(crate) fn new(definitions: &'a Map<String, Value>) -> Self {
        Self {
            definitions,
            resolved: HashMap::new(),
            open: Vec::new(),
        }
    }

    /// The schema of a definition; one that contains itself is open at the inner place.
    pub(crate) fn definition(&mut self, name: &str, path: &str) -> Result<Arc<Structural>, SchemaError> {
        if let Some(done) = self.resolved.get(name) {
            return Ok(done.clone());
        }
        if self.open.iter().any(|n| n == name) {
            return Ok(Structural::open());
        }
        let Some(raw) = self.definitions.get(name) else {
            return Err(SchemaError::UnknownReference {
                path: path.to_owned(),
                target: name.to_owned(),
            });
        };
        self.open.push(name.to_owned());
        let parsed = self.node(raw, path);
        self.open.pop();
        let parsed = parsed?;
        self.resolved.insert(name.to_owned(), parsed.clone());
        Ok(parsed)
    }

    /// Parses one node.
    pub(crate) fn node(&mut self, schema: &Value, path: &str) -> Result<Arc<Structural>, SchemaError> {
        let map = match schema {
            Value::Object(map) => map,
            Value::Bool(true) => return Ok(Structural::open()),
            other => {
                return Err(SchemaError::NotAnObject {
                    path: path.to_owned(),
                    found: other.to_string(),
                });
            }
        };
        if let Some(target) = map.get("$ref").and_then(Value::as_str) {
            let name = target.rsplit('/').next().unwrap_or(target);
            let parsed = self.definition(name, path)?;
            let Some(default) = map.get("default").filter(|d| !d.is_null()) else {
                return Ok(parsed);
            };
            return Ok(Arc::new(Structural {
                default: Some(default.clone()),
                ..(*parsed).clone()
            }));
        }
        let mut node = scalars(map, path)?;
        for (name, child) in objects(map.get("properties")) {
            node.properties
                .insert(name.clone(), self.node(child, &join(path, name))?);
        }
        node.items = map
            .get("items")
            .map(|items| self.node(items, &format!("{path}[]")))
            .transpose()?;
        node.additional = match map.get("additionalProperties") {
            None | Some(Value::Null) => None,
            Some(Value::Bool(true)) => Some(Additional::Any),
            Some(Value::Bool(false)) => Some(Additional::None),
            Some(child) => Some(Additional::Schema(self.node(child, &format!("{path}.*"))?)),
        };
        node.junctors = self.junctors(map, path)?;
        node.has_rules = rules_below(&node);
        Ok(Arc::new(node))
    }

    fn junctors(&mut self, map: &Map<String, Value>, path: &str) -> Result<Junctors, SchemaError> {
        let mut branches = |key: &str| -> Result<Vec<Arc<Structural>>, SchemaError> {
            let list = map
                .get(key)
                .and_then(Value::as_array)
                .map_or(&[] as &[Value], Vec::as_slice);
            list.iter().map(|branch| self.node(branch, path)).collect()
        };
        let (all_of, any_of, one_of) = (branches("allOf")?, branches("anyOf")?, branches("oneOf")?);
        let not = map
            .get("not")
            .filter(|n| !n.is_null())
            .map(|n| self.node(n, path))
            .transpose()?;
        Ok(Junctors {
            all_of,
            any_of,
            one_of,
            not,
        })
    }
}

fn rules_below(node: &Structural) -> bool {
    let additional = match &node.additional {
        Some(Additional::Schema(schema)) => schema.has_rules,
        _ => false,
    };
    !node.rules.is_empty()
        || additional
        || node.items.as_ref().is_some_and(|i| i.has_rules)
        || node.properties.values().any(|p| p.has_rules)
        || node.junctors.all_of.iter().any(|p| p.has_rules)
}

fn scalars(map: &Map<String, Value>, path: &str) -> Result<Structural, SchemaError> {
    let int_or_string = flag(map, "x-kubernetes-int-or-string");
    Ok(Structural {
        kind: if int_or_string { None } else { kind(map, path)? },
        nullable: flag(map, "nullable"),
        int_or_string,
        preserve_unknown: flag(map, "x-kubernetes-preserve-unknown-fields"),
        embedded: flag(map, "x-kubernetes-embedded-resource"),
        default: map.get("default").filter(|d| !d.is_null()).cloned(),
        list_type: list_type(map),
        atomic_map: map.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic"),
        required: texts(map.get("required")),
        enumeration: map.get("enum").and_then(Value::as_array).cloned().unwrap_or_default(),
        format: map.get("format").and_then(Value::as_str).map(str::to_owned),
        pattern: pattern(map, path)?,
        unique_items: flag(map, "uniqueItems"),
        bounds: bounds(map),
        rules: rules(map, path)?,
        ..Structural::default()
    })
}

fn kind(map: &Map<String, Value>, path: &str) -> Result<Option<Kind>, SchemaError> {
    let Some(text) = map.get("type").and_then(Value::as_str).filter(|t| !t.is_empty()) else {
        return Ok(None);
    };
    match Kind::parse(text) {
        Some(kind) => Ok(Some(kind)),
        None => Err(SchemaError::UnknownType {
            path: path.to_owned(),
            found: text.to_owned(),
        }),
    }
}

fn pattern(map: &Map<String, Value>, path: &str) -> Result<Option<Regex>, SchemaError> {
    let Some(text) = map.get("pattern").and_then(Value::as_str).filter(|t| !t.is_empty()) else {
        return Ok(None);
    };
    Regex::new(text).map(Some).map_err(|source| SchemaError::Pattern {
        path: path.to_owned(),
        pattern: text.to_owned(),
        source: Box::new(source),
    })
}

fn rules(map: &Map<String, Value>, path: &str) -> Result<Vec<Arc<Rule>>, SchemaError> {
    let list = map
        .get("x-kubernetes-validations")
        .and_then(Value::as_array)
        .map_or(&[] as &[Value], Vec::as_slice);
    let parse = |raw: &Value| {
        Rule::parse(raw).map(Arc::new).map_err(|source| SchemaError::Rule {
            path: path.to_owned(),
            source,
        })
    };
    list.iter().map(parse).collect()
}

fn list_type(map: &Map<String, Value>) -> ListType {
    match map.get("x-kubernetes-list-type").and_then(Value::as_str) {
        Some("set") => ListType::Set,
        Some("map") => ListType::Map(texts(map.get("x-kubernetes-list-map-keys"))),
        _ => ListType::Atomic,
    }
}

fn bounds(map: &Map<String, Value>) -> Bounds {
    let number = |key: &str| map.get(key).and_then(Value::as_f64);
    // A bound may be written 3.0: schema generators emit counts as floats.
    let count = |key: &str| {
        map.get(key)
            .and_then(|v| v.as_u64().or_else(|| v.as_f64().map(|f| f as u64)))
    };
    Bounds {
        minimum: number("minimum"),
        exclusive_minimum: flag(map, "exclusiveMinimum"),
        maximum: number("maximum"),
        exclusive_maximum: flag(map, "exclusiveMaximum"),
        multiple_of: number("multipleOf"),
        min_length: count("minLength"),
        max_length: count("maxLength"),
        min_items: count("minItems"),
        max_items: count("maxItems"),
        min_properties: count("minProperties"),
        max_properties: count("maxProperties"),
    }
}

fn flag(map: &Map<String, Value>, key: &str) -> bool {
    map.get(key).and_then(Value::as_bool) == Some(true)
}

fn texts(value: Option<&Value>) -> Vec<String> {
    let list = value.and_then(Value::as_array).map_or(&[] as &[Value], Vec::as_slice);
    list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn objects(value: Option<&Value>) -> impl Iterator<Item = (&String, &Value)> {
    value.and_then(Value::as_object).into_iter().flatten()
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_definition_that_contains_itself_is_open_inside() {
        let definitions = json!({"tree": {"type": "object", "properties": {
            "leaf": {"type": "string"}, "child": {"$ref": "#/components/schemas/tree"}}}});
        let tree = Parser::new(definitions.as_object().unwrap())
            .definition("tree", "")
            .unwrap();
        assert!(tree.properties["child"].preserve_unknown);
        assert_eq!(tree.properties["leaf"].kind, Some(Kind::String));
    }

    #[test]
    fn a_pattern_that_does_not_compile_is_refused_with_its_path() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}});
        assert!(
            Structural::parse(&schema)
                .unwrap_err()
                .to_string()
                .contains(r#"at "a""#)
        );
    }
}

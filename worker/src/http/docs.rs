//! `GET /docs`: the document of the API as one page without scripts and without anything from elsewhere.

use std::fmt::Write as _;

use minijinja::{
    Environment,
    value::{Serde, Value as Rendered},
};
use serde_json::{Map, Value, json};

/// How deep an example goes into schemas that hold schemas.
const MAX_DEPTH: usize = 12;

/// The page of a document. A template that fails is a fault of this program; the page then says so.
pub fn page(document: &Value) -> String {
    let mut environment = Environment::new();
    environment.add_filter("kind", |schema: Rendered| {
        let schema = serde_json::to_value(&schema).unwrap_or_default();
        Rendered::from_safe_string(kind(&schema))
    });
    environment.add_filter("curl", {
        let schemas = document["components"]["schemas"].clone();
        move |operation: Rendered, path: String, method: String| {
            let operation = serde_json::to_value(&operation).unwrap_or_default();
            curl(&operation, &path, &method, &schemas)
        }
    });
    let rendered = environment
        .add_template("docs.html", include_str!("docs.html"))
        .and_then(|()| environment.get_template("docs.html"))
        .and_then(|template| template.render(Serde(json!({"document": document, "groups": groups(document)}))));
    // A slash is harmless, and its escape makes paths and commands hard to read in the source of the page.
    let rendered = rendered.map(|page| page.replace("&#x2f;", "/"));
    rendered.unwrap_or_else(|error| {
        tracing::error!(%error, "the page of the API cannot be rendered");
        "<!doctype html><title>Flotilla</title><p>The page cannot be rendered; see <a href=\"/openapi.json\">openapi.json</a>."
            .to_owned()
    })
}

/// The operations under each tag, in the order of the tags: objects with `path`, `method` and `operation`.
fn groups(document: &Value) -> Vec<Value> {
    let empty = Map::new();
    let paths = document["paths"].as_object().unwrap_or(&empty);
    let tags = document["tags"].as_array().into_iter().flatten();
    tags.map(|tag| {
        let mut operations = Vec::new();
        for (path, methods) in paths {
            for (method, operation) in methods.as_object().unwrap_or(&empty) {
                if operation["tags"]
                    .as_array()
                    .is_some_and(|tags| tags.contains(&tag["name"]))
                {
                    operations.push(json!({"path": path, "method": method, "operation": operation}));
                }
            }
        }
        json!({"tag": tag, "operations": operations})
    })
    .collect()
}

/// A schema's type in words, as HTML: `array of <a href="#ChatPart">ChatPart</a>`.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        let name = escaped(name);
        return format!("<a href=\"#schema-{name}\">{name}</a>");
    }
    for choice in ["oneOf", "anyOf", "allOf"] {
        if let Some(options) = schema[choice].as_array() {
            let options: Vec<String> = options.iter().map(kind).collect();
            return options.join(if choice == "allOf" { " and " } else { " or " });
        }
    }
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<String> = values.iter().map(|value| escaped(&value.to_string())).collect();
        return values.join(" or ");
    }
    if let Some(value) = schema.get("const") {
        return escaped(&value.to_string());
    }
    let mut text = match &schema["type"] {
        Value::String(name) => escaped(name),
        Value::Array(names) => {
            let names: Vec<String> = names.iter().filter_map(Value::as_str).map(escaped).collect();
            names.join(" or ")
        }
        _ => "any".to_owned(),
    };
    if schema["items"].is_object() {
        let _ = write!(text, " of {}", kind(&schema["items"]));
    }
    if schema["additionalProperties"].is_object() {
        let _ = write!(text, " of {}", kind(&schema["additionalProperties"]));
    }
    for (field, word) in [
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("minItems", "entries, at least"),
        ("maxItems", "entries, at most"),
        ("minLength", "characters, at least"),
        ("maxLength", "characters, at most"),
        ("default", "by default"),
    ] {
        if let Some(value) = schema.get(field) {
            let _ = write!(text, ", {word} {}", escaped(&value.to_string()));
        }
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A command that asks this endpoint, with the smallest body that it takes.
fn curl(operation: &Value, path: &str, method: &str, schemas: &Value) -> String {
    let mut command = format!("curl http://127.0.0.1:8000{path}");
    if method != "get" {
        let _ = write!(command, " -X {}", method.to_uppercase());
    }
    if operation["security"].is_array() {
        command.push_str(" \\\n  -H \"authorization: Bearer $KEY\"");
    }
    let content = &operation["requestBody"]["content"];
    if content["application/json"].is_object() {
        let example = content["application/json"].get("example").cloned();
        let example = example.unwrap_or_else(|| example_of(&content["application/json"]["schema"], schemas, 0));
        let body = example.to_string().replace('\'', "'\\''");
        let _ = write!(command, " \\\n  -H 'content-type: application/json' \\\n  -d '{body}'");
    } else if content.is_object() {
        command.push_str(" \\\n  --data-binary @FILE");
    }
    command
}

/// A value that a schema admits: its own example, or the least that it requires.
fn example_of(schema: &Value, schemas: &Value, depth: usize) -> Value {
    if let Some(example) = schema.get("example").or_else(|| schema["examples"].get(0)) {
        return example.clone();
    }
    if depth >= MAX_DEPTH {
        return Value::Null;
    }
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        return example_of(&schemas[name], schemas, depth + 1);
    }
    if let Some(value) = schema
        .get("const")
        .or_else(|| schema["enum"].get(0))
        .or_else(|| schema.get("default"))
    {
        return value.clone();
    }
    let choices = ["oneOf", "anyOf"].iter().find_map(|choice| schema[choice].as_array());
    if let Some(option) = choices.and_then(|options| options.iter().find(|option| option["type"] != "null")) {
        return example_of(option, schemas, depth + 1);
    }
    if let Some(parts) = schema["allOf"].as_array() {
        let mut whole = Map::new();
        for part in parts {
            if let Value::Object(fields) = example_of(part, schemas, depth + 1) {
                whole.extend(fields);
            }
        }
        return Value::Object(whole);
    }
    let name = match &schema["type"] {
        Value::Array(names) => names.first().and_then(Value::as_str),
        name => name.as_str(),
    };
    match name {
        Some("object") => {
            let required = schema["required"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str);
            let field = |name: &str| example_of(&schema["properties"][name], schemas, depth + 1);
            required.map(|name| (name.to_owned(), field(name))).collect()
        }
        Some("array") => {
            let least = schema["minItems"].as_u64().unwrap_or(1).clamp(1, 2);
            (0..least)
                .map(|_| example_of(&schema["items"], schemas, depth + 1))
                .collect()
        }
        Some("string") => "text".into(),
        Some("integer" | "number") => schema.get("minimum").cloned().unwrap_or_else(|| 1.into()),
        Some("boolean") => false.into(),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Value {
        json!({
            "info": {"title": "T<i>", "description": "d", "version": "1"},
            "tags": [{"name": "policy", "description": "answers"}],
            "paths": {"/v1/ask": {"post": {
                "tags": ["policy"],
                "summary": "Asks <script>alert(1)</script>",
                "parameters": [{"name": "wait", "in": "query", "schema": {"type": "integer", "maximum": 5}}],
                "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Ask"}}}},
                "responses": {"200": {"description": "it's fine"}},
                "security": [{"apiKey": []}],
            }}},
            "components": {"securitySchemes": {"apiKey": {"description": "A key"}}, "schemas": {"Ask": {
                "type": "object",
                "required": ["question", "n"],
                "properties": {
                    "question": {"type": "string", "description": "What is asked"},
                    "n": {"type": "integer", "minimum": 2},
                    "parts": {"type": ["array", "null"], "items": {"$ref": "#/components/schemas/Ask"}},
                },
            }}},
        })
    }

    #[test]
    fn endpoints_schemas_and_commands_are_on_the_page_and_text_stays_text() {
        let page = page(&document());
        for part in [
            "/v1/ask",
            "What is asked",
            "href=\"#schema-Ask\"",
            "id=\"schema-Ask\"",
            "integer, at most 5",
            "array or null of",
            "authorization: Bearer",
            "T&lt;i&gt;",
        ] {
            assert!(page.contains(part), "{part} in\n{page}");
        }
        assert!(!page.contains("<script"), "{page}");
        for elsewhere in ["src=", "url(", "<link", "@import"] {
            assert!(!page.contains(elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn a_command_holds_the_least_that_the_endpoint_requires() {
        let document = document();
        let operation = &document["paths"]["/v1/ask"]["post"];
        let command = curl(operation, "/v1/ask", "post", &document["components"]["schemas"]);
        assert!(
            command.contains(r#"-d '{"n":2,"question":"text"}'"#)
                || command.contains(r#"-d '{"question":"text","n":2}'"#),
            "{command}"
        );
        assert!(
            command.contains("-X POST") && command.contains("Bearer $KEY"),
            "{command}"
        );
    }
}

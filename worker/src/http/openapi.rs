//! `GET /openapi.json`: what this server answers, generated from the code of its endpoints.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::State,
    http::header,
    response::{Html, IntoResponse},
};
use serde_json::{Map, Value, json};
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{chat::ChatChunk, docs, error::ErrorBody};

/// What the document says besides its endpoints.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Flotilla",
        description = "A vision-language model as policy (it answers) and critic (it judges answers), over one engine. \
                       The endpoints under /v1 follow OpenAI's API where that has one. Errors have one shape \
                       everywhere: ErrorBody. Every answer carries x-request-id; 429 and 503 carry retry-after in \
                       seconds.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    servers((url = "/", description = "This server")),
    tags(
        (name = "policy", description = "Answers to questions about text and pictures"),
        (name = "critic", description = "Judgements of answers"),
        (name = "models", description = "What is served"),
        (name = "operation", description = "For who runs the server"),
        (name = "internal", description = "Between the pods of one training job"),
    ),
    components(schemas(ErrorBody, ChatChunk)),
)]
struct Document;

/// An error that an endpoint may answer without saying so itself: status, who may, and when.
const ERRORS: [(&str, &[&str], &str); 9] = [
    ("400", &["post"], "The request is wrong; `param` names the field"),
    ("403", &["get", "post"], "This deployment has another purpose"),
    ("404", &["post"], "The model is not served here"),
    ("408", &["post", "put"], "The body did not come in time"),
    ("413", &["post", "put"], "The body is too large"),
    ("415", &["post"], "The body is not JSON"),
    (
        "429",
        &["get", "post"],
        "A limit of the key, or the queue, is full: come again after retry-after",
    ),
    ("500", &["get", "post", "put"], "The server failed"),
    (
        "503",
        &["get", "post", "put"],
        "The model is being loaded, or the server drains",
    ),
];

/// Which doors are locked: only those are described as such.
#[derive(Clone, Copy, Debug, Default)]
pub struct Locks {
    /// The model's endpoints need an API key.
    pub api_key: bool,
    /// Role-internal endpoints need the token of the job.
    pub job_token: bool,
}

/// Adds `/openapi.json` and `/docs` to a role's endpoints.
pub fn described(routes: OpenApiRouter, locks: Locks) -> axum::Router {
    let state = Arc::new(Pages::default());
    let pages = OpenApiRouter::new().routes(routes!(openapi)).routes(routes!(docs));
    let with_pages = OpenApiRouter::with_openapi(Document::openapi())
        .merge(routes)
        .merge(pages.with_state(state.clone()));
    let (router, document) = with_pages.split_for_parts();
    let document = serde_json::to_value(&document).map_or(Value::Null, |document| complete(document, locks));
    state.fill(&document);
    router
}

/// Says what all endpoints have in common: their locks, and the errors that come before their own code.
fn complete(mut document: Value, locks: Locks) -> Value {
    let mut schemes = Map::new();
    if locks.api_key {
        schemes.insert("apiKey".to_owned(), bearer("An API key, as OpenAI's clients send it"));
    }
    if locks.job_token {
        schemes.insert("jobToken".to_owned(), bearer("The token of the job or deployment"));
    }
    if let Some(paths) = document["paths"].as_object_mut() {
        for (path, methods) in paths {
            for (method, operation) in methods.as_object_mut().into_iter().flatten() {
                lock(path, operation, locks);
                if path.starts_with("/v1/") {
                    add_errors(method, operation);
                }
            }
        }
    }
    document["components"]["securitySchemes"] = Value::Object(schemes);
    bound_unsigned(&mut document);
    document
}

/// The generator writes unsigned numbers in the formats of signed ones, which allow half of them. Their bounds say it right.
fn bound_unsigned(part: &mut Value) {
    match part {
        Value::Object(fields) => {
            let largest = match fields.get("format").and_then(Value::as_str) {
                Some("int32") => u64::from(u32::MAX),
                Some("int64") => u64::MAX,
                _ => 0,
            };
            let unsigned = fields.get("minimum").and_then(Value::as_u64).is_some();
            if largest > 0 && unsigned {
                fields.remove("format");
                fields.entry("maximum").or_insert_with(|| largest.into());
            }
            fields.values_mut().for_each(bound_unsigned);
        }
        Value::Array(items) => items.iter_mut().for_each(bound_unsigned),
        _ => {}
    }
}

fn bearer(description: &str) -> Value {
    json!({"type": "http", "scheme": "bearer", "description": description})
}

/// The endpoints of the model need a key, those that say so the token; a lock that is not there is not described.
fn lock(path: &str, operation: &mut Value, locks: Locks) {
    let internal = operation.get("security").is_some();
    let scheme = match internal {
        true if locks.job_token => Some("jobToken"),
        false if locks.api_key && path.starts_with("/v1/") => Some("apiKey"),
        _ => None,
    };
    if let Some(fields) = operation.as_object_mut() {
        fields.remove("security");
    }
    let Some(scheme) = scheme else { return };
    operation["security"] = json!([{scheme: []}]);
    let missing = operation["responses"].get("401").is_none();
    if missing {
        operation["responses"]["401"] = error("The key is missing or not known");
    }
}

fn add_errors(method: &str, operation: &mut Value) {
    for (status, methods, description) in ERRORS {
        if methods.contains(&method) && operation["responses"].get(status).is_none() {
            operation["responses"][status] = error(description);
        }
    }
}

fn error(description: &str) -> Value {
    let schema = json!({"$ref": "#/components/schemas/ErrorBody"});
    json!({"description": description, "content": {"application/json": {"schema": schema}}})
}

/// The two pages, once they are known: they describe themselves, too.
#[derive(Debug, Default)]
struct Pages(std::sync::OnceLock<(Bytes, String)>);

impl Pages {
    fn fill(&self, document: &Value) {
        let page = docs::page(document);
        let _ = self.0.set((document.to_string().into(), page));
    }
}

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "operation",
    responses((status = 200, description = "The OpenAPI 3.1 document", body = Value)),
)]
async fn openapi(State(pages): State<Arc<Pages>>) -> impl IntoResponse {
    let document = pages.0.get().map(|(document, _)| document.clone()).unwrap_or_default();
    ([(header::CONTENT_TYPE, "application/json")], document)
}

/// This document as a page for people.
#[utoipa::path(
    get, path = "/docs", tag = "operation",
    responses((status = 200, description = "A page", body = String, content_type = "text/html")),
)]
async fn docs(State(pages): State<Arc<Pages>>) -> impl IntoResponse {
    let page = pages.0.get().map(|(_, page)| page.clone()).unwrap_or_default();
    // Nothing but the page's own styles: whatever a schema's text says, no script runs.
    let policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'";
    ([(header::CONTENT_SECURITY_POLICY, policy)], Html(page))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(locks: Locks) -> Value {
        let operation = || json!({"responses": {"200": {}}});
        let mut internal = operation();
        internal["security"] = json!([{"jobToken": []}]);
        let document = json!({
            "paths": {"/v1/models": {"get": operation()}, "/drain": {"post": internal}, "/healthz": {"get": operation()}},
            "components": {},
        });
        complete(document, locks)
    }

    #[test]
    fn a_lock_that_is_not_there_is_not_described() {
        let open = sample(Locks::default());
        assert!(open["paths"]["/v1/models"]["get"].get("security").is_none());
        assert!(open["paths"]["/drain"]["post"].get("security").is_none());
        assert_eq!(open["components"]["securitySchemes"], json!({}));
        let locked = sample(Locks {
            api_key: true,
            job_token: true,
        });
        assert_eq!(
            locked["paths"]["/v1/models"]["get"]["security"],
            json!([{"apiKey": []}])
        );
        assert!(locked["paths"]["/v1/models"]["get"]["responses"]["401"].is_object());
        assert_eq!(locked["paths"]["/drain"]["post"]["security"], json!([{"jobToken": []}]));
        assert!(locked["paths"]["/healthz"]["get"].get("security").is_none());
    }

    #[test]
    fn an_unsigned_number_has_its_own_bounds() {
        let mut schemas = json!([
            {"type": "integer", "format": "int64", "minimum": 0},
            {"type": ["integer", "null"], "format": "int32", "minimum": 1, "maximum": 9},
            {"type": "integer", "format": "int64"},
        ]);
        bound_unsigned(&mut schemas);
        assert_eq!(
            schemas[0],
            json!({"type": "integer", "minimum": 0, "maximum": u64::MAX})
        );
        assert_eq!(
            schemas[1],
            json!({"type": ["integer", "null"], "minimum": 1, "maximum": 9})
        );
        assert_eq!(schemas[2]["format"], "int64");
    }

    #[test]
    fn errors_that_come_before_the_endpoint_are_described_for_the_model() {
        let document = sample(Locks::default());
        let responses = &document["paths"]["/v1/models"]["get"]["responses"];
        assert!(responses["503"].is_object() && responses.get("413").is_none());
        assert!(document["paths"]["/healthz"]["get"]["responses"].get("503").is_none());
    }
}

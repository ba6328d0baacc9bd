//! From a request to the part of the server that answers it.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, header, request::Parts};
use hyper::body::Incoming;

use super::{
    ApiServer,
    auth::{self, User},
    call::Call,
    discovery, eviction, negotiate, openapi,
    reply::{self, Reply},
    request::{Query, ResourcePath},
    review,
    status::ApiError,
    subresource, verb,
};
use crate::patch::managed::manager_name;

/// Answers any request.
pub async fn answer(server: Arc<ApiServer>, request: Request<Incoming>) -> Reply {
    let (parts, mut body) = request.into_parts();
    let (method, path) = (parts.method.clone(), parts.uri.path().to_owned());
    let reply = match route(server, parts, &mut body).await {
        Ok(reply) => reply,
        Err(error) => reply::failure(&error),
    };
    reply::drain(body).await;
    tracing::debug!(%method, path, code = reply.status().as_u16(), "request");
    reply
}

async fn route(server: Arc<ApiServer>, parts: Parts, body: &mut Incoming) -> Result<Reply, ApiError> {
    let path = parts.uri.path().to_owned();
    // What every cluster shows to anyone (role system:public-info-viewer).
    match path.trim_end_matches('/') {
        "/healthz" | "/livez" | "/readyz" => return Ok(reply::text(200, "ok")),
        "/version" => return Ok(reply::json(200, &discovery::version())),
        _ => {}
    }
    let user = auth::authenticate(&parts.headers, &server.settings.token)?;
    if let Some(found) = ResourcePath::parse(&path) {
        return resource(server, &parts, body, found, user).await;
    }
    if path.starts_with("/sandbox/") {
        let body = reply::read_body(body).await?;
        return admin(&server, &parts.method, &path, &body);
    }
    if parts.method != Method::GET {
        return Err(ApiError::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        ));
    }
    document(&server, &parts, &path)
}

fn text_of(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Discovery and OpenAPI.
fn document(server: &ApiServer, parts: &Parts, path: &str) -> Result<Reply, ApiError> {
    let registry = server.registry();
    let accept = text_of(&parts.headers, header::ACCEPT);
    let aggregated = negotiate::aggregated_discovery(accept);
    let words: Vec<&str> = path.trim_matches('/').split('/').collect();
    if let ["openapi", "v3", rest @ ..] = words.as_slice() {
        return Ok(match rest {
            [] => reply::json(200, &openapi::index(&registry)),
            rest => match openapi::documents(&registry).get(&rest.join("/")) {
                Some(document) => reply::json(200, document),
                None => reply::text(404, "404 page not found\n"),
            },
        });
    }
    if words == ["openapi", "v2"] {
        return Ok(openapi::legacy());
    }
    let found = match (words.as_slice(), aggregated) {
        (["api" | "apis"], Some(version)) => {
            return Ok(aggregated_reply(
                &discovery::aggregated(&registry, words == ["api"], version),
                version,
            ));
        }
        (["api"], None) => Some(discovery::core_versions(&server.settings.address)),
        (["apis"], None) => Some(discovery::groups(&registry)),
        (["api", version], _) => discovery::resources(&registry, "", version),
        (["apis", group], _) => discovery::group(&registry, group),
        (["apis", group, version], _) => discovery::resources(&registry, group, version),
        _ => None,
    };
    match found {
        Some(document) if negotiate::form(accept).is_some() => Ok(reply::json(200, &document)),
        Some(_) => Err(ApiError::not_acceptable(negotiate::WRITTEN)),
        // The real server answers unknown paths in plain text.
        None => Ok(reply::text(404, "404 page not found\n")),
    }
}

fn aggregated_reply(document: &serde_json::Value, version: &str) -> Reply {
    let content_type = match version {
        "v2beta1" => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
        _ => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
    };
    let mut reply = reply::json(200, document);
    reply
        .headers_mut()
        .insert(header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    reply
        .headers_mut()
        .insert(header::VARY, http::HeaderValue::from_static("Accept"));
    reply
}

/// Knobs of tests: `/sandbox/faults`, `/sandbox/compact`, `/sandbox/drop-watches`.
fn admin(server: &ApiServer, method: &Method, path: &str, body: &Bytes) -> Result<Reply, ApiError> {
    #[derive(serde::Deserialize)]
    struct Faults {
        #[serde(default)]
        seed: u64,
        rules: Vec<crate::fault::Rule>,
    }
    match (method.as_str(), path) {
        ("GET", "/sandbox/faults") => {}
        ("PUT", "/sandbox/faults") => {
            let faults: Faults = serde_json::from_slice(body)
                .map_err(|error| ApiError::bad_request(format!("reading the fault rules: {error}")))?;
            server.faults.set(faults.seed, faults.rules);
        }
        ("DELETE", "/sandbox/faults") => server.faults.clear(),
        ("POST", "/sandbox/compact") => server.store.compact(),
        ("POST", "/sandbox/drop-watches") => server.store.drop_watches(),
        _ => return Err(ApiError::no_such_path()),
    }
    let rules = server.faults.rules();
    Ok(reply::json(
        200,
        &serde_json::json!({"rules": rules, "injected": server.faults.injected()}),
    ))
}

async fn resource(
    server: Arc<ApiServer>,
    parts: &Parts,
    body: &mut Incoming,
    path: ResourcePath,
    user: User,
) -> Result<Reply, ApiError> {
    let registry = server.registry();
    let Some(resource) = registry.find(&path.group, &path.version, &path.resource) else {
        // Only a group that is compiled into the real server knows what is missing in it.
        return if registry.of(&path.group, &path.version).any(|known| !known.custom) {
            Err(ApiError::no_such_path())
        } else {
            Ok(reply::text(404, "404 page not found\n"))
        };
    };
    if path.namespace.is_some() && !resource.namespaced {
        return Ok(reply::text(404, "404 page not found\n"));
    }
    let options = match parts.method.as_str() {
        "POST" => "CreateOptions",
        "PUT" => "UpdateOptions",
        "PATCH" => "PatchOptions",
        "DELETE" => "DeleteOptions",
        _ => "ListOptions",
    };
    let mut asked = parts.uri.query().unwrap_or_default().to_owned();
    if ResourcePath::is_watch(parts.uri.path()) {
        asked.push_str("&watch=true");
    }
    let query = Query::parse(&asked, options)?;
    let raw_form = negotiate::form(text_of(&parts.headers, header::ACCEPT));
    let manager = manager_name(
        query.field_manager.as_deref(),
        text_of(&parts.headers, header::USER_AGENT),
    );
    let logs = path.subresource.as_deref() == Some("log");
    let form = match raw_form {
        Some(form) => form,
        None if logs => negotiate::Form::Object,
        None => return Err(ApiError::not_acceptable(negotiate::WRITTEN)),
    };
    let verb = verb_of(&parts.method, &path, &query)?;
    let call = Call {
        api_version: resource.api_version(),
        server: server.clone(),
        resource,
        path,
        query,
        form,
        content_type: text_of(&parts.headers, header::CONTENT_TYPE).map(str::to_owned),
        user,
        manager,
        warnings: Mutex::default(),
    };
    if let Some(failure) = server.faults.draw(verb, &call.resource.key(), call.name()) {
        return Err(failure);
    }
    if let Some(deprecation) = &call.resource.deprecation {
        call.warn(deprecation);
    }
    if verb == "watch" {
        let warnings = call.take_warnings();
        let mut reply = verb::watch::watch(call)?;
        reply::warn(&mut reply, &warnings);
        return Ok(reply);
    }
    let body = reply::read_body(body).await?;
    let reply = dispatch(call, verb, &body).await?;
    Ok(if negotiate::wants_yaml(text_of(&parts.headers, header::ACCEPT)) {
        reply::as_yaml(reply).await
    } else {
        reply
    })
}

/// Kubernetes' name of what is done.
fn verb_of(method: &Method, path: &ResourcePath, query: &Query) -> Result<&'static str, ApiError> {
    Ok(match (method.as_str(), path.name.is_some()) {
        ("GET", true) => "get",
        ("GET", false) if query.watch => "watch",
        ("GET", false) => "list",
        ("POST", named) if !named || path.subresource.is_some() => "create",
        ("PUT", true) => "update",
        ("PATCH", true) => "patch",
        ("DELETE", true) => "delete",
        ("DELETE", false) => "deletecollection",
        _ => {
            let key = crate::store::object::ResourceKey::new(path.group.clone(), path.resource.clone());
            return Err(ApiError::method_not_allowed(&key));
        }
    })
}

async fn dispatch(call: Call, verb: &'static str, body: &[u8]) -> Result<Reply, ApiError> {
    let not_allowed = || ApiError::method_not_allowed(&call.resource.key());
    if call.path.subresource.is_none() && !call.resource.verbs.contains(&verb) {
        return Err(not_allowed());
    }
    if call.resource.namespaced
        && call.path.namespace.is_none()
        && !matches!(verb, "list" | "watch" | "deletecollection")
    {
        if verb == "create" && !call.resource.custom {
            return Err(not_allowed());
        }
        // An object of a namespace has no address without it.
        return Ok(reply::text(404, "404 page not found\n"));
    }
    let known = call.path.subresource.as_deref().is_none_or(|name| {
        call.resource.subresources.contains(&name) || (name == "scale" && call.resource.scale.is_some())
    });
    if !known {
        return Ok(reply::text(404, "404 page not found\n"));
    }
    if review::is_review(&call) {
        return review::answer(&call, body);
    }
    let apply = call
        .content_type
        .as_deref()
        .is_some_and(|media| media.starts_with("application/apply-patch"));
    let result = match (call.path.subresource.as_deref(), verb) {
        (None | Some("status"), "get") => verb::get::get(&call),
        (None, "list") => verb::list::list(&call),
        (None, "create") => verb::create::create(&call, body),
        (None | Some("status"), "update") => verb::update::update(&call, body),
        (None | Some("status"), "patch") if apply => verb::apply::apply(&call, body),
        (None | Some("status"), "patch") => verb::patch::patch(&call, body),
        (Some("scale"), "get") => subresource::get_scale(&call),
        (Some("scale"), "update") => subresource::write_scale(&call, body, false),
        (Some("scale"), "patch") => subresource::write_scale(&call, body, true),
        (Some("log"), "get") => subresource::log(&call).await,
        (Some("binding"), "create") => subresource::bind(&call, body),
        (Some("eviction"), "create") => eviction::evict(&call, body),
        (Some("finalize"), "update") => subresource::finalize(&call, body),
        (None, "delete") => return verb::delete::delete(call, body),
        (None, "deletecollection") => return verb::delete::delete_collection(call, body),
        _ => Err(not_allowed()),
    };
    let mut reply = match result {
        Ok(reply) => reply,
        Err(error) => reply::failure(&error),
    };
    reply::warn(&mut reply, &call.take_warnings());
    Ok(reply)
}

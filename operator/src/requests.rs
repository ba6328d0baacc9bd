//! Counts requests to the API server by verb, resource and status code.

use flotilla_api::names::GROUP;
use http::{Method, Request, Response, header::CONTENT_TYPE};
use kube::{Client, client::Body};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};

/// Labels of one counter. Resources come from the operator's own calls and codes from HTTP: both are closed sets.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct RequestLabels {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `apply`, `delete`, `deletecollection`.
    verb: &'static str,
    /// `pods`, `trainingjobs.flotilla.dev/status`.
    resource: String,
    /// The status code; `none` where there was no answer.
    code: String,
}

/// Requests so far; clones count together.
#[derive(Clone, Debug, Default)]
pub struct Requests {
    counters: Family<RequestLabels, Counter>,
}

impl Requests {
    /// The counters.
    pub fn counters(&self) -> Family<RequestLabels, Counter> {
        self.counters.clone()
    }

    /// `client`, with each of its requests counted.
    pub fn count(&self, client: Client) -> Client {
        let counters = self.counters();
        let namespace = client.default_namespace().to_owned();
        let service = tower::service_fn(move |request: Request<Body>| {
            let (client, counters) = (client.clone(), counters.clone());
            let (verb, resource) = (verb(&request), resource(request.uri().path()));
            async move {
                let answer: kube::Result<Response<Body>> = client.send(request).await;
                let code = answer
                    .as_ref()
                    .map_or_else(|_| "none".to_owned(), |answer| answer.status().as_str().to_owned());
                counters.get_or_create(&RequestLabels { verb, resource, code }).inc();
                answer
            }
        });
        Client::new(service, namespace)
    }
}

/// The verb as RBAC and audit logs call it, but server-side apply apart.
fn verb<B>(request: &Request<B>) -> &'static str {
    let named = Path::of(request.uri().path()).name.is_some();
    let watches = || {
        let query = request.uri().query().unwrap_or_default();
        query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1"))
    };
    let applies = || {
        let kind = request.headers().get(CONTENT_TYPE);
        kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/apply-patch"))
    };
    match *request.method() {
        Method::GET if watches() => "watch",
        Method::GET if named => "get",
        Method::GET => "list",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH if applies() => "apply",
        Method::PATCH => "patch",
        Method::DELETE if named => "delete",
        Method::DELETE => "deletecollection",
        _ => "other",
    }
}

/// The resource with its subresource.
fn resource(path: &str) -> String {
    let Path {
        group,
        resource,
        subresource,
        ..
    } = Path::of(path);
    let mut text = resource.unwrap_or("none").to_owned();
    if group == GROUP {
        text = format!("{text}.{group}");
    }
    if let Some(subresource) = subresource {
        text = format!("{text}/{subresource}");
    }
    text
}

/// A path of the API, taken apart.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Path<'a> {
    group: &'a str,
    resource: Option<&'a str>,
    name: Option<&'a str>,
    subresource: Option<&'a str>,
}

impl<'a> Path<'a> {
    /// `/api/v1/…` or `/apis/GROUP/VERSION/…`, then `[namespaces/NS/]RESOURCE[/NAME[/SUBRESOURCE]]`.
    fn of(path: &'a str) -> Self {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let (group, rest) = match parts.as_slice() {
            ["api", _, rest @ ..] => ("", rest),
            ["apis", group, _, rest @ ..] => (*group, rest),
            _ => return Self::default(),
        };
        let rest = match rest {
            ["namespaces", _, inner @ ..] if !inner.is_empty() => inner,
            rest => rest,
        };
        Self {
            group,
            resource: rest.first().copied(),
            name: rest.get(1).copied(),
            subresource: rest.get(2).copied(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: Method, uri: &str, content_type: &str) -> Request<()> {
        let request = Request::builder().method(method).uri(uri);
        request.header(CONTENT_TYPE, content_type).body(()).expect("a request")
    }

    #[test]
    fn requests_are_named_as_rbac_names_them() {
        let json = "application/json";
        let apply = "application/apply-patch+yaml";
        let cases = [
            (
                Method::GET,
                "/api/v1/pods?watch=true&resourceVersion=1",
                json,
                ("watch", "pods"),
            ),
            (Method::GET, "/api/v1/pods?limit=500", json, ("list", "pods")),
            (Method::GET, "/api/v1/namespaces/lab", json, ("get", "namespaces")),
            (
                Method::GET,
                "/api/v1/namespaces/lab/secrets/a",
                json,
                ("get", "secrets"),
            ),
            (Method::PATCH, "/api/v1/namespaces/lab/pods/a", apply, ("apply", "pods")),
            (
                Method::DELETE,
                "/api/v1/namespaces/lab/pods/a",
                json,
                ("delete", "pods"),
            ),
            (
                Method::PATCH,
                "/apis/flotilla.dev/v1alpha1/namespaces/lab/trainingjobs/a/status",
                apply,
                ("apply", "trainingjobs.flotilla.dev/status"),
            ),
            (
                Method::POST,
                "/apis/events.k8s.io/v1/namespaces/lab/events",
                json,
                ("create", "events"),
            ),
        ];
        for (method, uri, content_type, (expected_verb, expected_resource)) in cases {
            let request = request(method, uri, content_type);
            assert_eq!(verb(&request), expected_verb, "{uri}");
            assert_eq!(resource(request.uri().path()), expected_resource, "{uri}");
        }
    }
}

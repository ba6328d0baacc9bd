//! Where a check works: a namespace of its own on the server, and requests as they go over the wire.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use http::{Request, header};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::{Value, json};

use super::{answer::Answer, definition, kubectl::Kubectl, server::Server, stream::Watch};
use crate::eventually;

/// How long a check waits for what the server does by itself. The real garbage collector learns of a new definition within
/// half a minute.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// How a patch is meant.
#[derive(Clone, Copy, Debug)]
pub enum PatchKind {
    /// RFC 6902.
    Json,
    /// RFC 7386.
    Merge,
    /// Strategic merge patch.
    Strategic,
    /// Server-side apply.
    Apply,
}

impl PatchKind {
    fn media(self) -> &'static str {
        match self {
            Self::Json => "application/json-patch+json",
            Self::Merge => "application/merge-patch+json",
            Self::Strategic => "application/strategic-merge-patch+json",
            Self::Apply => "application/apply-patch+yaml",
        }
    }
}

/// A namespace of the check's own on the server.
///
/// Paths: one that begins with `/` is taken as it is; another begins with a plural (`configmaps/a?dryRun=All`) and is
/// completed by the API of that resource and, where it has one, by the namespace.
#[derive(Clone, Debug)]
pub struct Ground {
    /// The server.
    pub server: Arc<Server>,
    /// The namespace, which is there and empty.
    pub namespace: String,
}

impl Ground {
    /// The complete path.
    #[must_use]
    pub fn path(&self, path: &str) -> String {
        if path.starts_with('/') {
            return path.to_owned();
        }
        let plural = path.split(['/', '?']).next().unwrap_or_default();
        let (api, namespaced) = self.api(plural);
        if namespaced {
            format!("{api}/namespaces/{}/{path}", self.namespace)
        } else {
            format!("{api}/{path}")
        }
    }

    fn api(&self, plural: &str) -> (String, bool) {
        let group = &self.server.group;
        match plural {
            "namespaces" | "nodes" | "persistentvolumes" => ("/api/v1".to_owned(), false),
            "widgets" => (format!("/apis/{group}/v1"), true),
            "gadgets" => (format!("/apis/{group}/v1"), false),
            "trainingjobs" | "modelcheckpoints" | "datasets" | "evaluations" | "modeldeployments" => {
                (format!("/apis/{group}/v1alpha1"), true)
            }
            "customresourcedefinitions" => ("/apis/apiextensions.k8s.io/v1".to_owned(), false),
            "leases" => ("/apis/coordination.k8s.io/v1".to_owned(), true),
            "poddisruptionbudgets" => ("/apis/policy/v1".to_owned(), true),
            "networkpolicies" => ("/apis/networking.k8s.io/v1".to_owned(), true),
            "roles" | "rolebindings" => ("/apis/rbac.authorization.k8s.io/v1".to_owned(), true),
            "priorityclasses" => ("/apis/scheduling.k8s.io/v1".to_owned(), false),
            _ => ("/api/v1".to_owned(), true),
        }
    }

    /// Sends any request.
    pub async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<Answer> {
        let path = self.path(path);
        let mut request = Request::builder()
            .method(method)
            .uri(&path)
            .header(header::USER_AGENT, "conformance/1");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from(body.unwrap_or_default()))?;
        let described = format!("{method} {path}");
        let answer = self.server.client.send(request).await;
        let (parts, body) = answer.with_context(|| described.clone())?.into_parts();
        let text = String::from_utf8_lossy(&body.collect().await?.to_bytes()).into_owned();
        let header = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let warnings = parts.headers.get_all(header::WARNING).iter().map(header).collect();
        Ok(Answer {
            request: described,
            code: parts.status.as_u16(),
            media: parts.headers.get(header::CONTENT_TYPE).map(header).unwrap_or_default(),
            warnings,
            body: serde_json::from_str(&text).unwrap_or(Value::Null),
            text,
        })
    }

    async fn json(&self, method: &str, path: &str, body: &Value) -> anyhow::Result<Answer> {
        let headers = [("content-type", "application/json"), ("accept", "application/json")];
        self.send(method, path, &headers, Some(serde_json::to_vec(body)?)).await
    }

    /// GET as JSON.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        self.send("GET", path, &[("accept", "application/json")], None).await
    }

    /// GET in another form.
    pub async fn get_as(&self, path: &str, accept: &str) -> anyhow::Result<Answer> {
        self.send("GET", path, &[("accept", accept)], None).await
    }

    /// POST.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        self.json("POST", path, body).await
    }

    /// PUT.
    pub async fn put(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        self.json("PUT", path, body).await
    }

    /// PATCH.
    pub async fn patch(&self, kind: PatchKind, path: &str, body: &Value) -> anyhow::Result<Answer> {
        let headers = [("content-type", kind.media()), ("accept", "application/json")];
        self.send("PATCH", path, &headers, Some(serde_json::to_vec(body)?))
            .await
    }

    /// A merge patch.
    pub async fn merge(&self, path: &str, body: &Value) -> anyhow::Result<Answer> {
        self.patch(PatchKind::Merge, path, body).await
    }

    /// A server-side apply by `manager`.
    pub async fn apply(&self, manager: &str, path: &str, body: &Value) -> anyhow::Result<Answer> {
        let separator = if path.contains('?') { '&' } else { '?' };
        self.patch(
            PatchKind::Apply,
            &format!("{path}{separator}fieldManager={manager}"),
            body,
        )
        .await
    }

    /// DELETE without options.
    pub async fn delete(&self, path: &str) -> anyhow::Result<Answer> {
        self.send("DELETE", path, &[("accept", "application/json")], None).await
    }

    /// DELETE with options.
    pub async fn delete_with(&self, path: &str, options: &Value) -> anyhow::Result<Answer> {
        let mut body = json!({"kind": "DeleteOptions", "apiVersion": "v1"});
        for (key, value) in options.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        self.json("DELETE", path, &body).await
    }

    /// A watch; the path says from where.
    pub async fn watch(&self, path: &str) -> anyhow::Result<Watch> {
        self.watch_as(path, "application/json").await
    }

    /// A watch in another form.
    pub async fn watch_as(&self, path: &str, accept: &str) -> anyhow::Result<Watch> {
        let separator = if path.contains('?') { '&' } else { '?' };
        let path = format!("{}{separator}watch=true", self.path(path));
        let request = Request::get(&path).header(header::ACCEPT, accept).body(Body::empty())?;
        Watch::open(self.server.client.send(request).await?).await
    }

    /// Waits until the object is gone.
    pub async fn is_gone(&self, path: &str) -> anyhow::Result<()> {
        eventually(&format!("{path} is gone"), PATIENCE, || async {
            Ok((self.get(path).await?.code == 404).then_some(()))
        })
        .await
    }

    /// Waits until `holds` of the object, which it returns.
    pub async fn until(&self, path: &str, holds: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        eventually(path, PATIENCE, || async {
            let object = self.get(path).await?.ok()?;
            Ok(holds(&object).then_some(object))
        })
        .await
    }

    /// Newest resourceVersion of a list.
    pub async fn version(&self, path: &str) -> anyhow::Result<String> {
        let list = self.get(path).await?.ok()?;
        let version = list["metadata"]["resourceVersion"].as_str();
        Ok(version.context("a list without resourceVersion")?.to_owned())
    }

    /// A ConfigMap with these entries, created.
    pub async fn map(&self, name: &str, data: &Value) -> anyhow::Result<Value> {
        self.post("configmaps", &config_map(name, data)).await?.created()
    }

    /// A Widget, not created.
    #[must_use]
    pub fn widget(&self, name: &str, spec: &Value) -> Value {
        definition::widget(&self.server.group, name, spec)
    }

    /// A Widget, created.
    pub async fn new_widget(&self, name: &str, spec: &Value) -> anyhow::Result<Value> {
        self.post("widgets", &self.widget(name, spec)).await?.created()
    }

    /// Name for something cluster-scoped that no other check has.
    #[must_use]
    pub fn unique(&self, name: &str) -> String {
        format!("{}-{name}", self.namespace)
    }

    /// Waits until pods may be made here: the real server refuses them before the default service account is there.
    pub async fn takes_pods(&self) -> anyhow::Result<()> {
        self.until("serviceaccounts/default", |_| true).await.map(drop)
    }

    /// kubectl in this namespace.
    #[must_use]
    pub fn kubectl(&self) -> Kubectl<'_> {
        Kubectl::new(self)
    }
}

/// A ConfigMap.
#[must_use]
pub fn config_map(name: &str, data: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
}

/// A pod of one container that no node runs.
#[must_use]
pub fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
        "containers": [{"name": "c", "image": "registry.invalid/none:1"}]}})
}

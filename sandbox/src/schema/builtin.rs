//! Schemas of the built-in kinds, generated from the `k8s-openapi` types the first time they are asked for.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use k8s_openapi::{
    Resource,
    api::{
        apps::v1 as apps, authorization::v1 as authorization, batch::v1 as batch, coordination::v1 as coordination,
        core::v1 as core, discovery::v1 as discovery, events::v1 as events, networking::v1 as networking,
        policy::v1 as policy, rbac::v1 as rbac, scheduling::v1 as scheduling,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions,
    apimachinery::pkg::apis::meta::v1 as meta,
};
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    builtin_table,
    structural::{Parser, Structural},
};

/// A built-in kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Builtin {
    /// API group, "" for core.
    pub group: &'static str,
    /// API version.
    pub version: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// Plural name in URLs.
    pub plural: &'static str,
    /// Lives in a namespace.
    pub namespaced: bool,
}

struct Library {
    kinds: Vec<(Builtin, String)>,
    /// As published in OpenAPI documents.
    published: Map<String, Value>,
    /// As pruning and validation see them: free-form types are open.
    effective: Map<String, Value>,
}

static LIBRARY: LazyLock<Library> = LazyLock::new(library);
static PARSED: LazyLock<Mutex<HashMap<String, Arc<Structural>>>> = LazyLock::new(Mutex::default);

/// Types that hold any JSON, or a schema within a schema.
const FREE_FORM: [&str; 7] = [
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1",
    "io.k8s.apimachinery.pkg.runtime.RawExtension",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray",
];

/// The built-in kind with these names.
#[must_use]
pub fn find(group: &str, version: &str, kind: &str) -> Option<Builtin> {
    let matches = |b: &Builtin| b.group == group && b.version == version && b.kind == kind;
    LIBRARY.kinds.iter().map(|(b, _)| *b).find(matches)
}

/// All built-in kinds with a schema.
pub fn kinds() -> impl Iterator<Item = Builtin> {
    LIBRARY.kinds.iter().map(|(b, _)| *b)
}

/// Name of the OpenAPI definition of a built-in kind.
#[must_use]
pub fn definition_name(builtin: Builtin) -> Option<&'static str> {
    LIBRARY
        .kinds
        .iter()
        .find(|(b, _)| *b == builtin)
        .map(|(_, name)| name.as_str())
}

/// All OpenAPI definitions, by name.
#[must_use]
pub fn definitions() -> &'static Map<String, Value> {
    &LIBRARY.published
}

/// The parsed schema of a built-in kind.
#[must_use]
pub fn structural(builtin: Builtin) -> Option<Arc<Structural>> {
    definition(definition_name(builtin)?)
}

/// The parsed schema of an OpenAPI definition.
#[must_use]
pub fn definition(name: &str) -> Option<Arc<Structural>> {
    let mut parsed = PARSED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(done) = parsed.get(name) {
        return Some(done.clone());
    }
    let schema = Parser::new(&LIBRARY.effective).definition(name, "").ok()?;
    parsed.insert(name.to_owned(), schema.clone());
    Some(schema)
}

fn library() -> Library {
    let settings = SchemaSettings::draft07().with(|s| {
        s.definitions_path = "/components/schemas".into();
        s.meta_schema = None;
        s.transforms.clear();
    });
    let mut generator = settings.into_generator();
    let kinds = all(&mut generator);
    // No kind contains these two, but lists and deletions do.
    generator.subschema_for::<meta::ListMeta>();
    generator.subschema_for::<meta::DeleteOptions>();
    let mut published = generator.take_definitions(false);
    builtin_table::annotate(&mut published);
    for (builtin, name) in &kinds {
        if let Some(Value::Object(definition)) = published.get_mut(name) {
            let gvk = json!([{"group": builtin.group, "version": builtin.version, "kind": builtin.kind}]);
            definition.insert("x-kubernetes-group-version-kind".to_owned(), gvk);
        }
    }
    let mut effective = published.clone();
    for name in FREE_FORM {
        effective.insert(name.to_owned(), json!({"x-kubernetes-preserve-unknown-fields": true}));
    }
    Library {
        kinds,
        published,
        effective,
    }
}

fn one<T: JsonSchema + Resource>(generator: &mut SchemaGenerator) -> (Builtin, String)
where
    T::Scope: Scope,
{
    generator.subschema_for::<T>();
    let builtin = Builtin {
        group: T::GROUP,
        version: T::VERSION,
        kind: T::KIND,
        plural: T::URL_PATH_SEGMENT,
        namespaced: T::Scope::NAMESPACED,
    };
    (builtin, T::schema_name().into_owned())
}

trait Scope {
    const NAMESPACED: bool;
}

impl Scope for k8s_openapi::NamespaceResourceScope {
    const NAMESPACED: bool = true;
}

impl Scope for k8s_openapi::ClusterResourceScope {
    const NAMESPACED: bool = false;
}

impl Scope for k8s_openapi::SubResourceScope {
    const NAMESPACED: bool = true;
}

fn all(g: &mut SchemaGenerator) -> Vec<(Builtin, String)> {
    vec![
        one::<core::Namespace>(g),
        one::<core::Node>(g),
        one::<core::Pod>(g),
        one::<core::Service>(g),
        one::<core::Endpoints>(g),
        one::<core::ConfigMap>(g),
        one::<core::Secret>(g),
        one::<core::ServiceAccount>(g),
        one::<core::Event>(g),
        one::<core::PersistentVolumeClaim>(g),
        one::<core::PersistentVolume>(g),
        one::<core::LimitRange>(g),
        one::<core::ResourceQuota>(g),
        one::<core::Binding>(g),
        one::<events::Event>(g),
        one::<discovery::EndpointSlice>(g),
        one::<coordination::Lease>(g),
        one::<apps::Deployment>(g),
        one::<apps::ReplicaSet>(g),
        one::<apps::StatefulSet>(g),
        one::<apps::DaemonSet>(g),
        one::<batch::Job>(g),
        one::<batch::CronJob>(g),
        one::<rbac::Role>(g),
        one::<rbac::RoleBinding>(g),
        one::<rbac::ClusterRole>(g),
        one::<rbac::ClusterRoleBinding>(g),
        one::<scheduling::PriorityClass>(g),
        one::<networking::NetworkPolicy>(g),
        one::<networking::Ingress>(g),
        one::<policy::PodDisruptionBudget>(g),
        one::<policy::Eviction>(g),
        one::<authorization::SelfSubjectAccessReview>(g),
        one::<authorization::SelfSubjectRulesReview>(g),
        one::<authorization::SubjectAccessReview>(g),
        one::<authorization::LocalSubjectAccessReview>(g),
        one::<k8s_openapi::api::storage::v1::StorageClass>(g),
        one::<k8s_openapi::api::authentication::v1::SelfSubjectReview>(g),
        one::<k8s_openapi::api::authentication::v1::TokenReview>(g),
        one::<k8s_openapi::api::autoscaling::v1::Scale>(g),
        one::<apiextensions::CustomResourceDefinition>(g),
    ]
}

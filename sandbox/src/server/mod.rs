//! The HTTP side: connections, routes, verbs.
//!
//! | file | what it is |
//! |---|---|
//! | `connection` | TLS, HTTP/1.1 and HTTP/2, end of connections at shutdown |
//! | `route` | path -> discovery, OpenAPI, health, or a call on a resource |
//! | `request`, `selector`, `negotiate` | path, query and `Accept`, typed |
//! | `registry`, `discovery`, `openapi` | which resources exist, and how clients learn of them |
//! | `verb`, `subresource`, `eviction`, `review` | what a call does |
//! | `write`, `kind` | from a body to a stored object |
//! | `protobuf` | the envelope that some kubectl verbs send |
//! | `view`, `table`, `reply`, `status` | answers |
//! | `log` | the door to container logs |

pub mod auth;
pub mod call;
pub mod connection;
pub mod discovery;
pub mod eviction;
pub mod kind;
pub mod log;
pub mod negotiate;
pub mod openapi;
pub mod protobuf;
pub mod registry;
pub mod reply;
pub mod request;
pub mod review;
pub mod route;
pub mod selector;
pub mod status;
pub mod subresource;
pub mod table;
pub mod verb;
pub mod view;
pub mod write;

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use self::{kind::definition, log::PodLogs, registry::Registry, write::metadata};
use crate::{
    fault::FaultPlan,
    store::{
        Store, StoreError,
        object::{ObjectKey, ResourceKey},
    },
};

/// Namespaces that exist from the start.
const NAMESPACES: &[&str] = &["default", "kube-system", "kube-public", "kube-node-lease"];

/// What can be set about the server.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Bearer token of the one user.
    pub token: String,
    /// `host:port`, as the legacy discovery document names it.
    pub address: String,
    /// Time between bookmarks of a watch that allows them.
    pub bookmark_period: Duration,
}

/// The API server behind its connections.
pub struct ApiServer {
    /// The objects.
    pub store: Store,
    /// Failures on demand.
    pub faults: FaultPlan,
    /// Settings.
    pub settings: ServerSettings,
    /// Ends watches and logs.
    pub shutdown: CancellationToken,
    registry: RwLock<Arc<Registry>>,
    logs: RwLock<Option<Arc<dyn PodLogs>>>,
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer")
            .field("address", &self.settings.address)
            .finish_non_exhaustive()
    }
}

impl ApiServer {
    /// A server over a store; makes the namespaces that every cluster has.
    pub fn new(store: Store, settings: ServerSettings, shutdown: CancellationToken) -> Result<Arc<Self>, StoreError> {
        let server = Self {
            store,
            faults: FaultPlan::default(),
            settings,
            shutdown,
            registry: RwLock::new(Arc::new(Registry::default())),
            logs: RwLock::new(None),
        };
        server.refresh_registry();
        for name in NAMESPACES {
            server.ensure_namespace(name)?;
        }
        // What is there at the start is listed, not watched: the cache of a real API server begins at its start, too.
        server.store.compact();
        Ok(Arc::new(server))
    }

    fn ensure_namespace(&self, name: &str) -> Result<(), StoreError> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "uid": uuid::Uuid::new_v4().to_string(), "creationTimestamp": metadata::now(),
                "labels": {"kubernetes.io/metadata.name": name}},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}});
        match self.store.create(
            &ResourceKey::new("", "namespaces"),
            &ObjectKey::new("", name),
            namespace,
        ) {
            Ok(_) | Err(StoreError::Exists(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The resources as they are now.
    pub fn registry(&self) -> Arc<Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the definitions again.
    pub fn refresh_registry(&self) {
        // The lock is held while reading, so that of two refreshes the later one sees the newer state.
        let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
        let definitions = self.store.list(&definition::table(), None);
        let definitions: Vec<&Value> = definitions.objects.iter().map(|(_, object)| object.as_ref()).collect();
        *registry = Arc::new(Registry::build(definitions.into_iter()));
    }

    /// Who reads container logs.
    pub fn pod_logs(&self) -> Option<Arc<dyn PodLogs>> {
        self.logs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says who reads container logs.
    pub fn set_pod_logs(&self, logs: Arc<dyn PodLogs>) {
        *self.logs.write().unwrap_or_else(PoisonError::into_inner) = Some(logs);
    }
}

//! The embedded control plane: a small Kubernetes API on loopback, the controllers that objects need to live and die,
//! and a node that runs pods as local processes. For one machine and for tests; what it serves is written down in
//! `docs/sandbox.md`.
//!
//! # Layout
//!
//! | module | what it is |
//! |---|---|
//! | `sandbox` | start and stop of the API server: directory, port, kubeconfig |
//! | `store` | objects, revisions, history, watches, the file they survive in |
//! | `server` | HTTP: paths, verbs, discovery, tables, errors |
//! | `schema` | structural schemas: pruning, defaults, validation, CEL; OpenAPI documents |
//! | `patch` | JSON, merge and strategic patches; server-side apply |
//! | `fault` | failures on demand, by a seed |
//! | `tls`, `kubeconfig` | certificates and how clients find them |
//! | `controller` | garbage collection, namespaces, claims, services, scheduling |
//! | `node` | pods as process groups |
//! | `hollow` | many GPU nodes whose pods run without a process |

pub mod controller;
pub mod fault;
pub mod hollow;
pub mod kubeconfig;
pub mod node;
pub mod patch;
pub mod sandbox;
pub mod schema;
pub mod server;
pub mod store;
pub mod tls;

pub use sandbox::{Sandbox, SandboxError, Settings};

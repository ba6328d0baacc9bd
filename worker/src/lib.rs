//! One binary, one role per file: it reads a [`RoleConfig`](flotilla_api::role::RoleConfig), does what it says, and
//! tells how far it is. It holds no Kubernetes credentials and links no Kubernetes client.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`cli`] | the command line: `run` for pods, `serve` by hand |
//! | [`role`] | one file per role: `prepare`, `train`, `rollout`, `serve`, `verify`, and the dispatch between them |
//! | [`command`] | commands for people: `inspect`, `plan`, `generate`, `logits`, `convert` |
//! | [`device`] | CPU or GPU: what was asked for, what is there, what was chosen and why |
//! | [`group`] | one model over several GPUs: which, and the processes of the others |
//! | [`context`] | what every role is given |
//! | [`progress`] | the one cell that a role writes and HTTP and the termination log read |
//! | [`uri`] | `pvc://claim/path` and `file:///path` to paths |
//! | [`models`] | the directory of a model, fetched from the hub or a bucket where it lies there |
//! | [`http`] | one endpoint per file |
//! | [`access`] | API keys and what each may ask for |
//! | [`service`] | what role `serve` offers: prompts, generation, verdicts |
//! | [`rollout`] | what rollout pods and a learner say to each other |
//! | [`critic`] | best of n: selectors, and the critic that the engine is |
//! | [`prompt`] | templates: how question and responses become the user's text |
//! | [`train`] | the loops of role `train` |
//! | [`error`] | errors and the exit codes they mean |
//! | [`telemetry`] | logs |
//! | [`spans`] | traces, one span per request |
//! | [`watched`] | files that are read again when they change |

pub mod access;
pub mod cli;
pub mod command;
pub mod context;
pub mod critic;
pub mod device;
pub mod error;
pub mod group;
pub mod http;
pub mod models;
pub mod progress;
pub mod prompt;
pub mod role;
pub mod rollout;
pub mod runner;
pub mod service;
pub mod spans;
pub mod telemetry;
pub mod train;
pub mod uri;
pub mod watched;

pub use cli::main;
pub use error::WorkerError;

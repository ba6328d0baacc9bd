//! What clients rely on in a Kubernetes API server, as facts that can be asked of any: of the sandbox in `make test`, of
//! a real control plane in `make test-cluster`. Whatever a fact says has been seen on the real one.
//!
//! # Layout
//!
//! | file | what it holds |
//! |---|---|
//! | [`topic`] | the facts, one file a topic |
//! | [`check`] | a fact and what came of asking for it; known differences |
//! | [`suite`] | runs the checks, some at a time, each in a namespace of its own |
//! | [`server`], [`definition`] | the server that is asked, and the definitions that the checks need on it |
//! | [`ground`], [`answer`], [`stream`] | requests of a check, and what comes back |
//! | [`kubectl`] | the real kubectl in the namespace of a check |
//! | [`report`] | the table and the verdict |

pub mod answer;
pub mod check;
pub mod definition;
pub mod ground;
pub mod kubectl;
pub mod report;
pub mod server;
pub mod stream;
pub mod suite;
pub mod topic;

use check::Check;

/// Checks that belong together.
#[derive(Clone, Copy, Debug)]
pub struct Topic {
    /// What they are about.
    pub name: &'static str,
    /// They run kubectl.
    pub needs_kubectl: bool,
    /// The checks.
    pub checks: &'static [Check],
}

const fn topic(name: &'static str, checks: &'static [Check]) -> Topic {
    Topic {
        name,
        needs_kubectl: false,
        checks,
    }
}

const fn kubectl_topic(name: &'static str, checks: &'static [Check]) -> Topic {
    Topic {
        name,
        needs_kubectl: true,
        checks,
    }
}

/// All checks.
pub const TOPICS: &[Topic] = &[
    topic("create", topic::create::CHECKS),
    topic("update", topic::update::CHECKS),
    topic("patch", topic::patch::CHECKS),
    topic("apply", topic::apply::CHECKS),
    topic("schema", topic::schema::CHECKS),
    topic("rule", topic::rule::CHECKS),
    topic("strict", topic::strict::CHECKS),
    topic("subresource", topic::subresource::CHECKS),
    topic("watch", topic::watch::CHECKS),
    topic("list", topic::list::CHECKS),
    topic("selector", topic::selector::CHECKS),
    topic("delete", topic::delete::CHECKS),
    topic("garbage", topic::garbage::CHECKS),
    topic("namespace", topic::namespace::CHECKS),
    topic("form", topic::form::CHECKS),
    topic("dry run", topic::dry_run::CHECKS),
    topic("discovery", topic::discovery::CHECKS),
    topic("definition", topic::definition::CHECKS),
    topic("core", topic::core::CHECKS),
    topic("pod", topic::pod::CHECKS),
    kubectl_topic("kubectl", topic::kubectl::CHECKS),
    kubectl_topic("kubectl write", topic::kubectl_write::CHECKS),
];

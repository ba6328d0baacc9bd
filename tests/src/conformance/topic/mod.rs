//! The checks, one file a topic.

pub mod apply;
pub mod core;
pub mod create;
pub mod definition;
pub mod delete;
pub mod discovery;
pub mod dry_run;
pub mod form;
pub mod garbage;
pub mod kubectl;
pub mod kubectl_write;
pub mod list;
pub mod namespace;
pub mod patch;
pub mod pod;
pub mod rule;
pub mod schema;
pub mod selector;
pub mod strict;
pub mod subresource;
pub mod update;
pub mod watch;

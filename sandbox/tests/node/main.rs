//! The node and the controllers against the sandbox's own API server. The containers are shell scripts.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a helper of tests fails the test")]

mod cluster;
mod crash;
mod garbage;
mod hollow;
mod pods;
mod probes;
mod services;
mod stopping;

//! The node and the controllers against the sandbox's own API server. The containers are shell scripts.

mod cluster;
mod crash;
mod garbage;
mod pods;
mod probes;
mod services;
mod stopping;

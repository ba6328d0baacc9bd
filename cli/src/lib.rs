//! The parts of `flotilla`, the command that users type (kubectl finds it too, as `kubectl flotilla`).
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`arguments`] | the command line, with its help |
//! | [`up`] | `flotilla sandbox up`: the embedded control plane in the foreground |
//! | [`run`] | `flotilla run`: apply manifests to a sandbox of their own and follow them to their goals |
//! | [`demo`] | `flotilla demo`: the digits sample, then a question to the served critic |
//! | [`control_plane`] | API server, controllers, node and operator in this process |
//! | [`manifest`] | documents from files and folders |
//! | [`apply`] | documents to the API server |
//! | [`hollow`] | `flotilla sandbox hollow`: many GPU nodes without processes |
//! | [`goal`] | what "done" means for each kind |
//! | [`follow`] | live progress of what was applied |
//! | [`picture`] | an image as terminal cells |

pub mod apply;
pub mod arguments;
pub mod control_plane;
pub mod demo;
pub mod follow;
pub mod goal;
pub mod hollow;
pub mod manifest;
pub mod picture;
pub mod run;
pub mod up;

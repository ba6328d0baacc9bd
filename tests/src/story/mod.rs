//! The stories, each on whatever ground its fleet stands: `tests/*.rs` plays them in the sandbox, `tests/cluster_*.rs` on a
//! real cluster.
//!
//! # Layout
//!
//! | file | story |
//! |---|---|
//! | `first_light.rs` | from manifests to a served critic |
//! | `bad_rows.rs` | bad rows are counted, too many fail the dataset |
//! | `refused_weights.rs` | weights whose digest does not match are refused |
//! | `suspension.rs` | suspend, resume, expire |
//! | `invalid_input.rs` | what the API server refuses, with words that help |
//! | `kills.rs` | worker, operator and node killed at random points |
//! | `rollout_pods.rs` | rollout pods killed, deleted and added while the learner goes on |

mod bad_rows;
mod first_light;
mod invalid_input;
mod kills;
mod refused_weights;
mod rollout_pods;
mod suspension;

use std::time::Duration;

use kube::ResourceExt as _;

pub use self::{
    bad_rows::bad_rows,
    first_light::first_light,
    invalid_input::invalid_input,
    kills::{Kill, Outcome, kills},
    refused_weights::refused_weights,
    rollout_pods::rollout_pods,
    suspension::suspension,
};
use crate::{fleet::Fleet, sample};

/// Longest wait for anything in a story.
const LIMIT: Duration = Duration::from_secs(300);

/// Claims, and the data and jobs of the small sample up to the warm-up.
fn warm_up(fleet: &Fleet) -> anyhow::Result<Vec<flotilla_cli::manifest::Manifest>> {
    let keep = [
        "digits-instruction",
        "digits-policy-heldout",
        "digits-sft",
        "critic-digits",
        "critic-digits-source",
    ];
    let sample = sample::only(sample::small()?, |manifest| {
        keep.contains(&manifest.object.name_any().as_str())
    });
    Ok(fleet.adapt(sample))
}

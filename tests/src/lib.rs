//! The vocabulary of the stories in `tests/`: the built programs, a small version of the sample, and how a story waits.
//!
//! # Layout
//!
//! | file | what |
//! |---|---|
//! | [`conformance`] | what clients rely on in an API server, asked of the sandbox and of the real one |
//! | [`program`] | the programs of this workspace, and processes that must not outlive a story |
//! | [`control_plane`] | the real kube-apiserver and its companions on loopback |
//! | [`cluster`] | the cluster of the cluster tier: that control plane, or the user's own |
//! | [`fleet`] | API server, node and operator as processes of their own, each of which can be killed |
//! | [`install`] | the operator as a cluster knows it |
//! | [`story`] | the stories, on whatever ground |
//! | [`sample`] | the digits sample, cut down to seconds |
//! | [`rows`] | a handful of rows, some of them bad, and the Dataset that converts them |
//! | [`run_folder`] | what a training run left on disk |
//! | [`chart`] | the Helm chart, and its operator under the chart's own identity |
//! | [`kubelet_by_hand`] | pod statuses without a node |
//! | [`rbac`] | what a Role grants against what the audit log says was used |

pub mod chart;
pub mod cluster;
pub mod conformance;
pub mod control_plane;
pub mod fleet;
pub mod install;
pub mod kubelet_by_hand;
pub mod program;
pub mod rbac;
pub mod rows;
pub mod run_folder;
pub mod sample;
pub mod story;

use std::{path::PathBuf, time::Duration};

use anyhow::bail;

/// Root of the checkout.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Asks `question` until it answers, for at most `limit`; an error counts as no answer yet.
pub async fn eventually<T, F>(what: &str, limit: Duration, mut question: impl FnMut() -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<Option<T>>>,
{
    let begun = std::time::Instant::now();
    loop {
        let answer = question().await;
        if let Ok(Some(value)) = answer {
            return Ok(value);
        }
        if begun.elapsed() > limit {
            match answer {
                Err(error) => return Err(error.context(format!("{what}: not within {limit:?}"))),
                Ok(_) => bail!("{what}: not within {limit:?}"),
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

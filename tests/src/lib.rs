//! The vocabulary of the stories in `tests/`: where the built programs lie, and how a story waits.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};

/// Path of a program of this workspace, beside the running test.
///
/// `make test` builds the programs before the tests; `cargo test` alone does not, hence the advice in the error.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe().context("path of the running test")?;
    let folder = test.ancestors().nth(2).context("folder of the built programs")?;
    let path = folder.join(name);
    if !path.is_file() {
        bail!("{} is missing: run `make build` first", path.display());
    }
    Ok(path)
}

/// Root of the checkout.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Asks `question` until it answers, for at most `limit`.
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

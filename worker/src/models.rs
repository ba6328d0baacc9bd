//! The directory of a model that a URI names: on a volume, or fetched from the Hugging Face hub or a bucket into the cache.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use flotilla_api::progress::Stage;
use flotilla_artifacts::remote::{self, Address, RemoteError, Settings, Transfer};
use futures::future::BoxFuture;

use crate::{context::Context, error::WorkerError, uri::Volumes};

/// How often a fetch looks whether it is to end.
const ASKED_EVERY: Duration = Duration::from_millis(100);

/// The directory of a role's model. What is not here is fetched; the progress tells how far that is.
pub fn locate<'a>(context: &'a Context, uri: &'a str) -> BoxFuture<'a, Result<PathBuf, WorkerError>> {
    Box::pin(async move {
        if !Address::is_remote(uri) {
            return Ok(context.volumes.resolve(uri)?);
        }
        context.progress.enter(Stage::Loading, format!("fetching {uri}"));
        let report = |transfer: &Transfer| {
            let message = format!("fetching {uri}: {transfer}");
            context.progress.update(|progress| progress.message = message);
        };
        fetch(uri, context.volumes.cache(), &report).await
    })
}

/// [`locate`] for a thread that may block; ends as suspended once `cancelled` says yes.
pub fn locate_blocking(
    context: &Context,
    uri: &str,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<PathBuf, WorkerError> {
    if !Address::is_remote(uri) {
        return Ok(context.volumes.resolve(uri)?);
    }
    let asked = async {
        while !cancelled() {
            tokio::time::sleep(ASKED_EVERY).await;
        }
    };
    runtime()?.block_on(async {
        tokio::select! {
            found = locate(context, uri) => found,
            () = asked => Err(WorkerError::Suspended { step: 0 }),
        }
    })
}

/// The directory that an argument of the command line means: a path, or one of the URIs of [`remote`].
pub fn locate_argument(argument: &Path, cache: Option<&Path>) -> Result<PathBuf, WorkerError> {
    match uri_argument(argument) {
        Some(uri) if Address::is_remote(uri) => runtime()?.block_on(fetch(uri, cache, &|_| {})),
        Some(uri) => Ok(Volumes::default().resolve(uri)?),
        None => Ok(argument.to_owned()),
    }
}

/// An argument that is a URI. A path that exists is no URI, whatever it looks like.
pub fn uri_argument(argument: &Path) -> Option<&str> {
    let text = argument.to_str()?;
    (text.contains("://") && !argument.exists()).then_some(text)
}

/// The last part of a URI, by which people know the model.
pub fn name_of(uri: &str) -> String {
    let path = uri.split_once("://").map_or(uri, |(_, path)| path);
    let path = path.split('@').next().unwrap_or(path).trim_end_matches('/');
    path.rsplit('/').next().unwrap_or(path).to_owned()
}

async fn fetch(uri: &str, cache: Option<&Path>, report: &(dyn Fn(&Transfer) + Sync)) -> Result<PathBuf, WorkerError> {
    let failed = |error: RemoteError| {
        let what = format!("failed to fetch {uri}");
        if error.is_permanent() {
            WorkerError::permanent(what, error)
        } else {
            WorkerError::retryable(what, error)
        }
    };
    let address = Address::parse(uri).map_err(failed)?;
    let settings = Settings::from_environment(cache.map(Path::to_owned));
    Box::pin(remote::fetch(&address, &settings, report))
        .await
        .map_err(failed)
}

fn runtime() -> Result<tokio::runtime::Runtime, WorkerError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| WorkerError::retryable("failed to start the async runtime", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_argument_is_a_path_unless_it_has_a_scheme() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(
            locate_argument(directory.path(), None).expect("a path"),
            directory.path()
        );
        let uri = format!("file://{}", directory.path().display());
        assert_eq!(
            locate_argument(Path::new(&uri), None).expect("a file URI"),
            directory.path()
        );
        let error = locate_argument(Path::new("ftp://host/model"), None).expect_err("no scheme of ours");
        assert!(crate::error::chain(&error).contains("hf://org/name"), "{error}");
    }

    #[test]
    fn a_remote_uri_that_names_no_model_is_permanent() {
        let directory = tempfile::tempdir().expect("a directory");
        let error = locate_argument(Path::new("hf://name"), Some(directory.path())).expect_err("no organisation");
        assert_eq!(error.exit_code(), flotilla_api::names::exit::PERMANENT);
    }

    #[test]
    fn a_model_is_known_by_the_last_part_of_its_uri() {
        for (uri, name) in [
            ("hf://Qwen/Qwen2.5-VL-3B-Instruct@main", "Qwen2.5-VL-3B-Instruct"),
            ("hf://org/model@refs/pr/1", "model"),
            ("s3://bucket/a/critic/", "critic"),
            ("gs://bucket", "bucket"),
        ] {
            assert_eq!(name_of(uri), name);
        }
    }
}

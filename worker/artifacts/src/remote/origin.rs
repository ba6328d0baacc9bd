//! A hub revision or a bucket prefix behind one face: which version it is, which files it has, and their bytes.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    bucket::{Bucket, fingerprint},
    error::RemoteError,
    file::{Reading, RemoteFile},
    hub::Hub,
    plan::{self, Guide},
};
use crate::manifest::MANIFEST;

/// Where a model comes from.
#[derive(Debug)]
pub(super) enum Origin {
    /// A revision of a repository.
    Hub(Box<Hub>),
    /// Objects below a prefix.
    Bucket(Bucket),
}

/// One version of a model at its origin.
#[derive(Debug)]
pub(super) struct Version {
    /// What names exactly this version: a commit, or the fingerprint of a listing.
    pub id: String,
    /// Paths of all files.
    pub names: BTreeSet<String>,
    /// What the listing tells of them.
    known: BTreeMap<String, RemoteFile>,
}

impl Origin {
    /// The model as messages name it.
    pub fn name(&self) -> String {
        match self {
            Self::Hub(hub) => hub.name(),
            Self::Bucket(bucket) => bucket.name(),
        }
    }

    /// Asks for the version that the address means now.
    pub async fn version(&self) -> Result<Version, RemoteError> {
        let version = match self {
            Self::Hub(hub) => {
                let snapshot = hub.snapshot().await?;
                Version {
                    id: snapshot.commit,
                    names: snapshot.names,
                    known: BTreeMap::new(),
                }
            }
            Self::Bucket(bucket) => {
                let known = bucket.files().await?;
                let names = known.keys().cloned().collect::<BTreeSet<_>>();
                Version {
                    id: fingerprint(deciding(&names).iter().filter_map(|name| known.get(name))),
                    names,
                    known,
                }
            }
        };
        plan::check_names(&self.name(), version.names.iter().map(String::as_str))?;
        Ok(version)
    }

    /// Size and digest of a file.
    pub async fn describe(&self, version: &Version, name: &str) -> Result<RemoteFile, RemoteError> {
        match (self, version.known.get(name)) {
            (_, Some(file)) => Ok(file.clone()),
            (Self::Hub(hub), None) => hub.describe(&version.id, name).await,
            (Self::Bucket(_), None) => Err(RemoteError::Invalid {
                source_name: self.name(),
                reason: format!("it lacks {name}"),
            }),
        }
    }

    /// Begins to read a file at `begin`.
    pub async fn read(&self, version: &Version, file: &RemoteFile, begin: u64) -> Result<Reading, RemoteError> {
        match self {
            Self::Hub(hub) => hub.read(&version.id, file, begin).await,
            Self::Bucket(bucket) => bucket.read(file, begin).await,
        }
    }
}

/// The files whose change is another version: a manifest stands for all that it lists.
fn deciding(names: &BTreeSet<String>) -> BTreeSet<String> {
    match plan::guide(names) {
        Guide::Manifest => BTreeSet::from([MANIFEST.to_owned()]),
        guide => {
            let mut deciding = plan::needed(names, guide);
            let weights = names
                .iter()
                .filter(|name| name.ends_with(".safetensors") && !name.contains('/'));
            deciding.extend(weights.cloned());
            deciding
        }
    }
}

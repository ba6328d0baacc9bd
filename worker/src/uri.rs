//! `pvc://claim/path` and `file:///path` to paths of this process.
//!
//! Role configs name data by claim, so that they mean the same in a container and in the sandbox; `--volume claim=DIR`
//! says where a claim lies here.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

/// Why a URI cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum UriError {
    /// Neither `pvc://` nor `file:///`.
    #[error(
        "{uri:?} has an unsupported scheme: use pvc://claim/path or file:///path (models also hf://org/name, s3://, gs://, az://)"
    )]
    Scheme {
        /// The URI.
        uri: String,
    },
    /// The claim is not mounted.
    #[error("{uri:?} names claim {claim:?}, which is not mounted (mounted: {mounted})")]
    Claim {
        /// The URI.
        uri: String,
        /// The claim.
        claim: String,
        /// Claims given by `--volume`.
        mounted: String,
    },
    /// The path leaves its root.
    #[error("{uri:?} leaves its volume: \"..\" and links to the outside are refused")]
    Escape {
        /// The URI.
        uri: String,
    },
    /// `--volume` is not `claim=/path`.
    #[error("volume {text:?} is not of the form CLAIM=/path")]
    Volume {
        /// The argument.
        text: String,
    },
}

/// Where the claims of this process lie.
#[derive(Clone, Debug, Default)]
pub struct Volumes {
    by_claim: BTreeMap<String, PathBuf>,
    cache: Option<PathBuf>,
}

impl Volumes {
    /// From `--volume` arguments, each `claim=/path`.
    pub fn parse(arguments: &[String]) -> Result<Self, UriError> {
        let by_claim = arguments
            .iter()
            .map(|text| match text.split_once('=') {
                Some((claim, path)) if !claim.is_empty() && !path.is_empty() => {
                    Ok((claim.to_owned(), PathBuf::from(path)))
                }
                _ => Err(UriError::Volume { text: text.clone() }),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { by_claim, cache: None })
    }

    /// The same, with a directory to keep fetched models in.
    pub fn with_cache(self, cache: Option<PathBuf>) -> Self {
        Self { cache, ..self }
    }

    /// Where fetched models are kept, if it was said.
    pub fn cache(&self) -> Option<&Path> {
        self.cache.as_deref()
    }

    /// The path that a URI means here. It need not exist; where it does, it lies inside its volume.
    pub fn resolve(&self, uri: &str) -> Result<PathBuf, UriError> {
        if let Some(rest) = uri.strip_prefix("pvc://") {
            let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
            let root = self.by_claim.get(claim).ok_or_else(|| UriError::Claim {
                uri: uri.to_owned(),
                claim: claim.to_owned(),
                mounted: self.mounted(),
            })?;
            let path = below(root, path, uri)?;
            stays_inside(root, &path, uri)?;
            Ok(path)
        } else if let Some(path) = uri.strip_prefix("file:///") {
            below(Path::new("/"), path, uri)
        } else {
            Err(UriError::Scheme { uri: uri.to_owned() })
        }
    }

    fn mounted(&self) -> String {
        if self.by_claim.is_empty() {
            return "none".to_owned();
        }
        self.by_claim.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

/// The URI of something below another URI.
pub fn join(uri: &str, relative: &str) -> String {
    format!("{}/{relative}", uri.trim_end_matches('/'))
}

fn below(root: &Path, relative: &str, uri: &str) -> Result<PathBuf, UriError> {
    let escape = || UriError::Escape { uri: uri.to_owned() };
    if relative.contains('\0') || relative.starts_with('/') {
        return Err(escape());
    }
    let mut path = root.to_owned();
    for component in Path::new(relative).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return Err(escape()),
        }
    }
    Ok(path)
}

/// Refuses links that lead out of the volume: the deepest part of the path that exists must lie below the root.
fn stays_inside(root: &Path, path: &Path, uri: &str) -> Result<(), UriError> {
    let Ok(real_root) = root.canonicalize() else {
        return Ok(());
    };
    let real = path.ancestors().find_map(|part| part.canonicalize().ok());
    match real {
        Some(real) if !real.starts_with(&real_root) => Err(UriError::Escape { uri: uri.to_owned() }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn volumes(root: &Path) -> Volumes {
        Volumes::parse(&[format!("data={}", root.display())]).expect("a volume")
    }

    #[test]
    fn a_claim_resolves_below_its_directory() {
        let volumes = volumes(Path::new("/mnt/data"));
        assert_eq!(
            volumes.resolve("pvc://data/a/b").expect("resolves"),
            Path::new("/mnt/data/a/b")
        );
        assert_eq!(volumes.resolve("pvc://data").expect("resolves"), Path::new("/mnt/data"));
        assert_eq!(volumes.resolve("file:///a/b").expect("resolves"), Path::new("/a/b"));
    }

    #[test]
    fn an_unknown_claim_is_named_with_the_mounted_ones() {
        let error = volumes(Path::new("/mnt/data"))
            .resolve("pvc://other/a")
            .expect_err("not mounted");
        assert!(error.to_string().contains("\"other\"") && error.to_string().contains("mounted: data"));
    }

    #[test]
    fn a_parent_directory_is_refused() {
        for uri in [
            "pvc://data/../x",
            "pvc://data/a/../../x",
            "file:///a/../b",
            "pvc://data//etc",
        ] {
            assert!(
                matches!(
                    volumes(Path::new("/mnt/data")).resolve(uri),
                    Err(UriError::Escape { .. })
                ),
                "{uri}"
            );
        }
    }

    #[test]
    fn a_link_out_of_the_volume_is_refused() {
        let outside = tempfile::tempdir().expect("a directory");
        let root = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).expect("a link");
        let error = volumes(root.path())
            .resolve("pvc://data/link/x")
            .expect_err("leads outside");
        assert!(matches!(error, UriError::Escape { .. }));
    }

    #[test]
    fn other_schemes_and_relative_files_are_refused() {
        for uri in ["https://host/x", "file://relative", "/plain", ""] {
            assert!(
                matches!(Volumes::default().resolve(uri), Err(UriError::Scheme { .. })),
                "{uri}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_path_leaves_its_volume(path in "[a-z./]{0,24}") {
            let root = Path::new("/mnt/data");
            if let Ok(resolved) = volumes(root).resolve(&format!("pvc://data/{path}")) {
                prop_assert!(resolved.starts_with(root));
                prop_assert!(resolved.components().all(|part| part != Component::ParentDir));
            }
        }
    }
}

//! `manifest.json`: the files of a directory with size and SHA-256. The digest of its bytes names the whole directory.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    digest::{digest, file_sha256},
    error::{ArtifactError, io},
    publish::STABLE,
};

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// The version of the manifest's form.
const VERSION: u32 = 1;

/// The files of a directory, sorted by path.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Form of this document.
    pub version: u32,
    /// Every file except this one and the marker.
    pub files: Vec<FileRecord>,
}

/// One file of a manifest.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Path relative to the directory, `/` between parts.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Hex SHA-256.
    pub sha256: String,
}

impl Manifest {
    /// Describes every file below a directory.
    pub fn of(dir: &Path) -> Result<Self, ArtifactError> {
        let mut files = Vec::new();
        for path in list_files(dir)? {
            if path == MANIFEST || path == STABLE {
                continue;
            }
            let (sha256, bytes) = file_sha256(&dir.join(&path))?;
            files.push(FileRecord { path, bytes, sha256 });
        }
        Ok(Self {
            version: VERSION,
            files,
        })
    }

    /// The document's bytes, the same for the same files on every machine.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut text = String::from("{\"version\":1,\"files\":[\n");
        for (index, file) in self.files.iter().enumerate() {
            let end = if index + 1 == self.files.len() { "\n" } else { ",\n" };
            let path = serde_json::Value::from(file.path.as_str());
            text.push_str(&format!(
                "{{\"path\":{path},\"bytes\":{},\"sha256\":\"{}\"}}{end}",
                file.bytes, file.sha256
            ));
        }
        text.push_str("]}\n");
        text.into_bytes()
    }

    /// `sha256:<hex>` of [`Manifest::to_bytes`].
    pub fn digest(&self) -> String {
        digest(&self.to_bytes())
    }

    /// Bytes of all files together.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Reads a directory's manifest; None where there is none.
    pub fn read(dir: &Path) -> Result<Option<(Self, String)>, ArtifactError> {
        let path = dir.join(MANIFEST);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io("read", &path)(error)),
        };
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|error| ArtifactError::Parse {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        let foreign = manifest.files.iter().find(|file| !is_plain_relative(&file.path));
        if let Some(file) = foreign {
            return Err(ArtifactError::Parse {
                path,
                reason: format!("file {:?} is not a plain relative path", file.path),
            });
        }
        let digest = digest(&bytes);
        Ok(Some((manifest, digest)))
    }

    /// Compares the directory's files with the manifest; the error names the first file that differs.
    pub fn check(&self, dir: &Path) -> Result<(), ArtifactError> {
        let differs = |file: &str, difference: String| ArtifactError::FileDiffers {
            path: dir.to_path_buf(),
            file: file.to_owned(),
            difference,
        };
        for file in &self.files {
            let path = dir.join(&file.path);
            let size = match fs::metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(error) => return Err(differs(&file.path, format!("cannot be read: {error}"))),
            };
            if size != file.bytes {
                return Err(differs(
                    &file.path,
                    format!("has {size} bytes, the manifest says {}", file.bytes),
                ));
            }
            let (found, _) = file_sha256(&path)?;
            if found != file.sha256 {
                return Err(differs(
                    &file.path,
                    format!("has sha256 {found}, the manifest says {}", file.sha256),
                ));
            }
        }
        let listed = |path: &str| path == MANIFEST || path == STABLE || self.files.iter().any(|file| file.path == path);
        match list_files(dir)?.into_iter().find(|path| !listed(path)) {
            Some(path) => Err(differs(&path, "is not in the manifest".into())),
            None => Ok(()),
        }
    }
}

/// True for `a/b`, false for `/a`, `../a` and the like.
pub(crate) fn is_plain_relative(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
}

/// Relative paths of all files below a directory, sorted, `/` between parts.
pub(crate) fn list_files(dir: &Path) -> Result<Vec<String>, ArtifactError> {
    let mut open: Vec<PathBuf> = vec![PathBuf::new()];
    let mut files = Vec::new();
    while let Some(relative) = open.pop() {
        let folder = dir.join(&relative);
        for entry in fs::read_dir(&folder).map_err(io("list", &folder))? {
            let entry = entry.map_err(io("list", &folder))?;
            let path = relative.join(entry.file_name());
            if entry.file_type().map_err(io("inspect", &entry.path()))?.is_dir() {
                open.push(path);
            } else {
                files.push(path.to_string_lossy().replace('\\', "/"));
            }
        }
    }
    files.sort();
    Ok(files)
}

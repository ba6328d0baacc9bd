//! Documents from files and folders.

use std::path::{Path, PathBuf};

use flotilla_api::names::annotation::SEED_FROM;
use kube::core::{DynamicObject, GroupVersionKind};
use serde::Deserialize;
use serde_json::Value;

/// Why manifests cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The file or folder cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The folder has no manifest.
    #[error("{path} holds no .yaml or .yml file")]
    Empty {
        /// The folder.
        path: PathBuf,
    },
    /// The text is no YAML.
    #[error("{path}, document {document}: malformed YAML: {source}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Number of the document, from 1.
        document: usize,
        /// Where and why.
        source: serde_yaml::Error,
    },
    /// The document is no Kubernetes object.
    #[error("{path}, document {document}: {problem}")]
    NotAnObject {
        /// The file.
        path: PathBuf,
        /// Number of the document, from 1.
        document: usize,
        /// What is missing.
        problem: String,
    },
}

/// One object to apply.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// Where it stands.
    pub path: PathBuf,
    /// Its type.
    pub kind: GroupVersionKind,
    /// The object.
    pub object: DynamicObject,
}

impl Manifest {
    /// `trainingjob/critic`.
    pub fn label(&self) -> String {
        format!(
            "{}/{}",
            self.kind.kind.to_lowercase(),
            self.object.metadata.name.as_deref().unwrap_or_default()
        )
    }

    /// The namespace it is applied to.
    pub fn namespace(&self) -> &str {
        self.object.metadata.namespace.as_deref().unwrap_or("default")
    }
}

/// Every document below `paths`: files as given, folders in the order of their file names.
pub fn load(paths: &[PathBuf]) -> Result<Vec<Manifest>, ManifestError> {
    let mut manifests = Vec::new();
    for path in paths {
        for file in files(path)? {
            let text = std::fs::read_to_string(&file).map_err(|source| ManifestError::Read {
                path: file.clone(),
                source,
            })?;
            manifests.extend(parse(&file, &text)?);
        }
    }
    Ok(manifests)
}

fn files(path: &Path) -> Result<Vec<PathBuf>, ManifestError> {
    let read = |source| ManifestError::Read {
        path: path.to_owned(),
        source,
    };
    if !std::fs::metadata(path).map_err(read)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(read)? {
        let file = entry.map_err(read)?.path();
        if file
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml")
        {
            found.push(file);
        }
    }
    if found.is_empty() {
        return Err(ManifestError::Empty { path: path.to_owned() });
    }
    found.sort();
    Ok(found)
}

/// The documents of one file. Seed paths become absolute.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Manifest>, ManifestError> {
    let mut manifests = Vec::new();
    for (index, document) in serde_yaml::Deserializer::from_str(text).enumerate() {
        let number = index + 1;
        let value = Value::deserialize(document).map_err(|source| ManifestError::Malformed {
            path: path.to_owned(),
            document: number,
            source,
        })?;
        if value.is_null() {
            continue;
        }
        manifests.push(object(path, value).map_err(|problem| ManifestError::NotAnObject {
            path: path.to_owned(),
            document: number,
            problem,
        })?);
    }
    Ok(manifests)
}

fn object(path: &Path, value: Value) -> Result<Manifest, String> {
    let mut object: DynamicObject = serde_json::from_value(value).map_err(|error| error.to_string())?;
    let types = object.types.clone().ok_or("apiVersion and kind are missing")?;
    let kind =
        GroupVersionKind::try_from(&types).map_err(|error| format!("apiVersion {}: {error}", types.api_version))?;
    if object.metadata.name.as_deref().unwrap_or_default().is_empty() {
        return Err(format!("{} has no metadata.name", types.kind));
    }
    if let Some(seed) = object
        .metadata
        .annotations
        .as_mut()
        .and_then(|all| all.get_mut(SEED_FROM))
    {
        *seed = seed_folder(path, seed)?.to_string_lossy().into_owned();
    }
    Ok(Manifest {
        path: path.to_owned(),
        kind,
        object,
    })
}

/// `seed` in the manifest's folder or the nearest folder above it that has it: the same text serves `kubectl apply` to a
/// sandbox that was started in a folder above.
fn seed_folder(manifest: &Path, seed: &str) -> Result<PathBuf, String> {
    let absolute = std::path::absolute(manifest).map_err(|error| format!("{SEED_FROM}: {error}"))?;
    let mut candidates = absolute.ancestors().skip(1).map(|folder| folder.join(seed));
    candidates.find(|folder| folder.is_dir()).ok_or_else(|| {
        format!(
            "{SEED_FROM}: {seed} is no folder beside {} or above it",
            manifest.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_documents_are_skipped_and_order_is_kept() {
        let text = "---\n# nothing\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\napiVersion: flotilla.dev/v1alpha1\nkind: Dataset\nmetadata: {name: b}\n";
        let manifests = parse(Path::new("x.yaml"), text).expect("parses");
        assert_eq!(
            manifests.iter().map(Manifest::label).collect::<Vec<_>>(),
            ["namespace/a", "dataset/b"]
        );
    }

    #[test]
    fn malformed_yaml_names_file_document_and_place() {
        let error = parse(Path::new("x.yaml"), "a: 1\n---\na: [1\n").expect_err("no object");
        assert!(error.to_string().starts_with("x.yaml, document 1"), "{error}");
        let error = parse(Path::new("x.yaml"), "a: [1\nb: }").expect_err("malformed");
        assert!(
            error.to_string().contains("malformed YAML") && error.to_string().contains("line"),
            "{error}"
        );
    }

    #[test]
    fn a_document_without_name_is_refused() {
        let error = parse(Path::new("x.yaml"), "apiVersion: v1\nkind: Pod\nmetadata: {}\n").expect_err("no name");
        assert_eq!(error.to_string(), "x.yaml, document 1: Pod has no metadata.name");
    }

    #[test]
    fn a_seed_path_is_relative_to_its_manifest_or_a_folder_above() {
        let folder = tempfile::tempdir().expect("folder");
        std::fs::create_dir(folder.path().join("data")).expect("data");
        let text = |seed: &str| {
            format!(
                "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: a, annotations: {{{SEED_FROM}: {seed}}}}}\n"
            )
        };
        let path = folder.path().join("x.yaml");
        let manifests = parse(&path, &text("data")).expect("parses");
        let seed = &manifests[0].object.metadata.annotations.as_ref().expect("annotations")[SEED_FROM];
        assert_eq!(Path::new(seed), folder.path().join("data"));
        assert!(
            parse(&path, &text("nothing"))
                .expect_err("missing")
                .to_string()
                .contains("is no folder beside")
        );
        let below = folder.path().join("manifests/sample");
        std::fs::create_dir_all(&below).expect("folders");
        let manifests = parse(&below.join("x.yaml"), &text("manifests/sample")).expect("parses");
        let seed = &manifests[0].object.metadata.annotations.as_ref().expect("annotations")[SEED_FROM];
        assert_eq!(Path::new(seed), below);
    }
}

//! What the weight files of a directory hold, by their headers alone, and how that differs from what a configuration asks for.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

use super::{
    INDEX_FILE, Init, Parameter, SINGLE_FILE,
    dtype::ElementType,
    file::{Entry, MappedFile},
    index::Index,
    names::Names,
};
use crate::{ModelError, Result, error::WeightProblems};

/// A tensor of a directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Name on the hub, by which parameters ask for it.
    pub hub: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Type of the elements.
    pub dtype: ElementType,
    /// Name of the file.
    pub file: String,
    /// Bytes in the file.
    pub bytes: u64,
}

/// The tensors of a directory.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// Every tensor of every readable file, files sorted by name, tensors as in the file.
    pub tensors: Vec<TensorInfo>,
    /// What is wrong whatever the configuration asks for.
    pub problems: WeightProblems,
    /// Hub names that the index promises in files that cannot be read.
    hidden: BTreeSet<String>,
}

/// Reads the headers of the weight files in `dir`. Files that cannot be read are in [`Scan::problems`]; an error means that
/// there are no files to read.
pub fn scan(dir: &Path, names: &Names) -> Result<Scan> {
    Checkpoint::open(dir, names).map(|checkpoint| checkpoint.scan)
}

/// Everything that keeps the tensors from becoming exactly `parameters`.
pub fn compare(parameters: &[Parameter], names: &Names, scan: &Scan) -> WeightProblems {
    let mut problems = scan.problems.clone();
    let found = scan
        .tensors
        .iter()
        .map(|tensor| (tensor.hub.as_str(), tensor))
        .collect::<HashMap<_, _>>();
    let nothing_was_read = scan.tensors.is_empty() && !problems.unreadable.is_empty();
    for parameter in parameters {
        let name = &parameter.name;
        match found.get(name.as_str()) {
            None => {
                let explained = nothing_was_read || scan.hidden.contains(name);
                if !explained && constant(parameter, names).is_none() {
                    problems.missing.push(name.clone());
                }
            }
            Some(tensor) => {
                if tensor.shape != parameter.shape {
                    let shapes = (parameter.shape.clone(), tensor.shape.clone());
                    problems.misshaped.push((name.clone(), shapes.0, shapes.1));
                }
                if let ElementType::Other(dtype) = &tensor.dtype {
                    problems.unsupported.push((name.clone(), dtype.clone()));
                }
            }
        }
    }
    let mut asked = parameters
        .iter()
        .map(|parameter| parameter.name.as_str())
        .collect::<Vec<_>>();
    asked.sort_unstable();
    let extra = scan
        .tensors
        .iter()
        .filter(|tensor| asked.binary_search(&tensor.hub.as_str()).is_err() && !names.ignores(&tensor.hub, &asked));
    problems.extra = extra.map(|tensor| tensor.name.clone()).collect();
    problems
}

/// The value of every element of a parameter that may be absent.
pub(super) fn constant(parameter: &Parameter, names: &Names) -> Option<f64> {
    match parameter.init {
        _ if !names.is_optional(&parameter.name) => None,
        Init::Ones => Some(1.0),
        Init::Zeros => Some(0.0),
        Init::Normal(_) => None,
    }
}

/// The mapped files of a directory.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// Their tensors.
    pub scan: Scan,
    files: Vec<MappedFile>,
}

impl Checkpoint {
    /// Maps the weight files of a directory and checks their headers.
    pub fn open(dir: &Path, names: &Names) -> Result<Self> {
        let index = read_index(dir)?;
        let wanted = match &index {
            Some(index) => index.shards.clone(),
            None => BTreeSet::from([SINGLE_FILE.to_owned()]),
        };
        let (mut files, mut scan) = (Vec::new(), Scan::default());
        for name in wanted {
            match MappedFile::open(&dir.join(&name)) {
                Ok(file) => {
                    scan.tensors
                        .extend(file.entries.iter().map(|entry| describe(entry, &name, names)));
                    files.push(file);
                }
                Err(fault) => scan.problems.unreadable.push((name, fault.to_string())),
            }
        }
        if let Some(index) = &index {
            compare_with_index(index, names, &mut scan);
        }
        scan.problems.duplicated.extend(duplicated(&scan.tensors));
        Ok(Self { scan, files })
    }

    /// Type and bytes of every tensor by its hub name.
    pub fn data(&self) -> HashMap<&str, (&Entry, &[u8])> {
        let entries = self
            .files
            .iter()
            .flat_map(|file| file.entries.iter().map(move |entry| (entry, file.bytes(entry))));
        let hubs = self.scan.tensors.iter().map(|tensor| tensor.hub.as_str());
        hubs.zip(entries).collect()
    }

    /// Where each tensor is, by its hub name: for [`Self::entry`].
    pub fn places(&self) -> HashMap<String, (usize, usize)> {
        let places = self
            .files
            .iter()
            .enumerate()
            .flat_map(|(file, mapped)| (0..mapped.entries.len()).map(move |entry| (file, entry)));
        let hubs = self.scan.tensors.iter().map(|tensor| tensor.hub.clone());
        hubs.zip(places).collect()
    }

    /// Type and bytes of the tensor at a place.
    pub fn entry(&self, (file, entry): (usize, usize)) -> Option<(&Entry, &[u8])> {
        let file = self.files.get(file)?;
        let entry = file.entries.get(entry)?;
        Some((entry, file.bytes(entry)))
    }
}

/// The index of a directory in shards, None for one with a single file. As in transformers, the single file wins.
fn read_index(dir: &Path) -> Result<Option<Index>> {
    let index = dir.join(INDEX_FILE);
    if dir.join(SINGLE_FILE).exists() {
        Ok(None)
    } else if index.exists() {
        Index::read(&index).map(Some)
    } else {
        let foreign = foreign_weights(dir).map_err(ModelError::file(dir))?;
        Err(ModelError::NoWeights {
            path: dir.to_owned(),
            foreign,
        })
    }
}

/// A file of weights in a form that is not read.
fn foreign_weights(dir: &Path) -> std::io::Result<Option<String>> {
    const EXTENSIONS: [&str; 5] = ["bin", "pt", "pth", "ckpt", "gguf"];
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let extension = name.rsplit_once('.').map(|(_, extension)| extension);
        if extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) {
            found.push(name);
        }
    }
    Ok(found.into_iter().min())
}

fn describe(entry: &Entry, file: &str, names: &Names) -> TensorInfo {
    TensorInfo {
        name: entry.name.clone(),
        hub: names.hub(&entry.name),
        shape: entry.shape.clone(),
        dtype: entry.dtype.clone(),
        file: file.to_owned(),
        bytes: entry.bytes.end - entry.bytes.start,
    }
}

/// Notes where index and shards contradict each other.
fn compare_with_index(index: &Index, names: &Names, scan: &mut Scan) {
    let mut promised = BTreeMap::<&str, &str>::new();
    for (tensor, shard) in &index.entries {
        if let Some(first) = promised.insert(tensor, shard) {
            let places = [first, shard].map(|shard| format!("{tensor} in {shard} by the index"));
            scan.problems.duplicated.push((names.hub(tensor), places.to_vec()));
        }
    }
    let held = scan
        .tensors
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor.file.as_str()))
        .collect::<BTreeSet<_>>();
    let pair = |(tensor, shard): (&str, &str)| (tensor.to_owned(), shard.to_owned());
    for (tensor, shard) in &promised {
        if scan.problems.unreadable.iter().any(|(file, _)| file == shard) {
            scan.hidden.insert(names.hub(tensor));
        } else if !held.contains(&(tensor, shard)) {
            scan.problems.lacking.push(pair((tensor, shard)));
        }
    }
    for (tensor, shard) in held {
        if promised.get(tensor) != Some(&shard) {
            scan.problems.unindexed.push(pair((tensor, shard)));
        }
    }
}

/// Hub names that several tensors have, and which.
fn duplicated(tensors: &[TensorInfo]) -> Vec<(String, Vec<String>)> {
    let mut places = BTreeMap::<&str, Vec<String>>::new();
    for tensor in tensors {
        let place = format!("{} in {}", tensor.name, tensor.file);
        places.entry(&tensor.hub).or_default().push(place);
    }
    places
        .into_iter()
        .filter(|(_, places)| places.len() > 1)
        .map(|(hub, places)| (hub.to_owned(), places))
        .collect()
}

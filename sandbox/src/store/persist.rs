//! The store's file: one JSON object a line, newest last. Opening reads it, forgets a torn last line, and rewrites the
//! live objects into a new file (temporary file, fsync, rename), so that it never grows without bound.
//!
//! A write is handed to the operating system before it is acknowledged; it survives the end of the process, not a loss
//! of power.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::object::{Object, ObjectKey, ResourceKey};

/// Name of the file.
const FILE: &str = "objects.jsonl";
/// Below this size the file is never rewritten while the server runs.
const MIN_REWRITE_BYTES: u64 = 32 << 20;

/// Why the file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The operating system refused.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// A line before the last is not what this program writes.
    #[error("{path} line {line} is damaged: {source}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What the parser said.
        source: serde_json::Error,
    },
}

/// One line: the object's state after revision `rv`; none means that it was removed.
#[derive(Debug, Deserialize, Serialize)]
struct Line<'a> {
    rv: u64,
    #[serde(flatten)]
    place: Option<Place<'a>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Place<'a> {
    resource: std::borrow::Cow<'a, ResourceKey>,
    namespace: std::borrow::Cow<'a, str>,
    name: std::borrow::Cow<'a, str>,
    object: Option<std::borrow::Cow<'a, Value>>,
}

/// What a file held.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Newest revision.
    pub revision: u64,
    /// Live objects.
    pub tables: HashMap<ResourceKey, BTreeMap<ObjectKey, Object>>,
}

/// The open file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    bytes: u64,
    live_bytes: u64,
}

impl Journal {
    /// Opens `directory`'s file, or makes it.
    pub fn open(directory: &Path) -> Result<(Self, Loaded), PersistError> {
        fs::create_dir_all(directory).map_err(|source| io_error("create directory", directory, source))?;
        let path = directory.join(FILE);
        let loaded = match fs::read(&path) {
            Ok(bytes) => load(&path, &bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Loaded {
                revision: 1,
                ..Loaded::default()
            },
            Err(source) => return Err(io_error("read", &path, source)),
        };
        let (file, bytes) = write_new(&path, loaded.revision, &loaded.tables)?;
        Ok((
            Self {
                path,
                file,
                bytes,
                live_bytes: bytes,
            },
            loaded,
        ))
    }

    /// Adds one line; returns its length in bytes.
    pub fn append(
        &mut self,
        revision: u64,
        resource: &ResourceKey,
        key: &ObjectKey,
        object: Option<&Object>,
    ) -> Result<usize, PersistError> {
        let line = encode(revision, resource, key, object.map(Arc::as_ref))
            .map_err(|source| io_error("encode a line of", &self.path, source.into()))?;
        if let Err(source) = self.file.write_all(&line) {
            // A partial line in the middle would make the file unreadable: cut it off again.
            self.file
                .set_len(self.bytes)
                .map_err(|source| io_error("truncate", &self.path, source))?;
            return Err(io_error("append to", &self.path, source));
        }
        self.bytes += line.len() as u64;
        Ok(line.len())
    }

    /// Whether most of the file is history.
    #[must_use]
    pub fn is_mostly_garbage(&self) -> bool {
        self.bytes > MIN_REWRITE_BYTES && self.bytes > 4 * self.live_bytes
    }

    /// Replaces the file by one that holds only `tables`.
    pub fn rewrite(
        &mut self,
        revision: u64,
        tables: &HashMap<ResourceKey, BTreeMap<ObjectKey, Object>>,
    ) -> Result<(), PersistError> {
        (self.file, self.bytes) = write_new(&self.path, revision, tables)?;
        self.live_bytes = self.bytes;
        Ok(())
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> PersistError {
    PersistError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

fn encode(
    revision: u64,
    resource: &ResourceKey,
    key: &ObjectKey,
    object: Option<&Value>,
) -> Result<Vec<u8>, serde_json::Error> {
    let place = Place {
        resource: std::borrow::Cow::Borrowed(resource),
        namespace: key.namespace.as_str().into(),
        name: key.name.as_str().into(),
        object: object.map(std::borrow::Cow::Borrowed),
    };
    let mut line = serde_json::to_vec(&Line {
        rv: revision,
        place: Some(place),
    })?;
    line.push(b'\n');
    Ok(line)
}

fn write_new(
    path: &Path,
    revision: u64,
    tables: &HashMap<ResourceKey, BTreeMap<ObjectKey, Object>>,
) -> Result<(File, u64), PersistError> {
    let temporary = path.with_extension("tmp");
    let mut bytes = 0;
    let mut write = || -> io::Result<File> {
        let mut file = BufWriter::new(File::create(&temporary)?);
        let mut put = |line: &[u8]| -> io::Result<()> {
            bytes += line.len() as u64;
            file.write_all(line)
        };
        let mut header = serde_json::to_vec(&Line {
            rv: revision,
            place: None,
        })?;
        header.push(b'\n');
        put(&header)?;
        for (resource, table) in tables {
            for (key, object) in table {
                put(&encode(super::object::revision(object), resource, key, Some(object))?)?;
            }
        }
        let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        drop(file);
        fs::rename(&temporary, path)?;
        File::options().append(true).open(path)
    };
    let file = write().map_err(|source| io_error("write", path, source))?;
    Ok((file, bytes))
}

fn load(path: &Path, bytes: &[u8]) -> Result<Loaded, PersistError> {
    let mut loaded = Loaded {
        revision: 1,
        ..Loaded::default()
    };
    let complete = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let lines: Vec<&[u8]> = bytes[..complete]
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .collect();
    for (index, line) in lines.iter().enumerate() {
        let line: Line<'_> = match serde_json::from_slice(line) {
            Ok(line) => line,
            Err(_) if index + 1 == lines.len() => break,
            Err(source) => {
                return Err(PersistError::Damaged {
                    path: path.to_owned(),
                    line: index + 1,
                    source,
                });
            }
        };
        loaded.revision = loaded.revision.max(line.rv);
        let Some(place) = line.place else { continue };
        let table = loaded.tables.entry(place.resource.into_owned()).or_default();
        let key = ObjectKey::new(place.namespace, place.name);
        match place.object {
            Some(object) => table.insert(key, Arc::new(object.into_owned())),
            None => table.remove(&key),
        };
    }
    Ok(loaded)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(directory: &Path) -> PathBuf {
        let (mut journal, _) = Journal::open(directory).unwrap();
        let pods = ResourceKey::new("", "pods");
        let object: Object = Arc::new(json!({"metadata": {"name": "a", "resourceVersion": "7"}}));
        journal
            .append(7, &pods, &ObjectKey::new("x", "a"), Some(&object))
            .unwrap();
        journal
            .append(8, &pods, &ObjectKey::new("x", "b"), Some(&object))
            .unwrap();
        directory.join(FILE)
    }

    #[test]
    fn a_torn_last_line_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path());
        let length = fs::metadata(&path).unwrap().len();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(length - 5)
            .unwrap();
        let (_, loaded) = Journal::open(directory.path()).unwrap();
        assert_eq!(loaded.revision, 7);
        assert_eq!(loaded.tables[&ResourceKey::new("", "pods")].len(), 1);
    }

    #[test]
    fn a_damaged_line_in_the_middle_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = written(directory.path());
        let text = fs::read_to_string(&path).unwrap().replacen("\"rv\":7", "\"rv\":?", 1);
        fs::write(&path, text).unwrap();
        assert!(matches!(
            Journal::open(directory.path()),
            Err(PersistError::Damaged { line: 2, .. })
        ));
    }
}

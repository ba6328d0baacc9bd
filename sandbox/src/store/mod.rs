//! The state behind the API: objects by resource, one revision counter, a bounded history, watchers, and a log on disk.
//!
//! What goes in comes out unchanged but for `metadata.resourceVersion`, which every write sets to the next revision.
//! Validation, defaulting and ownership are the server's business.

pub mod history;
pub mod object;
pub mod persist;
pub mod watcher;

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::Value;

use self::{
    history::{Change, History},
    object::{Object, ObjectKey, ResourceKey},
    persist::{Journal, PersistError},
    watcher::{Watch, Watchers},
};

/// Why the store refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The name is taken.
    #[error("{0} already exists")]
    Exists(ObjectKey),
    /// There is no such object.
    #[error("{0} not found")]
    Missing(ObjectKey),
    /// The object is at another revision than the writer read.
    #[error("{key} is at revision {current}, not at {expected}")]
    Stale {
        /// The object.
        key: ObjectKey,
        /// Its revision.
        current: u64,
        /// What the writer expected.
        expected: u64,
    },
    /// The history no longer reaches back that far.
    #[error("too old resource version: {asked} ({oldest})")]
    Compacted {
        /// The revision asked for.
        asked: u64,
        /// The oldest revision that can be served.
        oldest: u64,
    },
    /// The revision has not been reached yet.
    #[error("Too large resource version: {asked}, current: {current}")]
    Future {
        /// The revision asked for.
        asked: u64,
        /// The newest revision.
        current: u64,
    },
    /// The write could not be made durable; memory is unchanged.
    #[error(transparent)]
    Persist(#[from] PersistError),
}

/// Objects of one resource at one revision.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The revision.
    pub revision: u64,
    /// Ordered by namespace, then name.
    pub objects: Vec<(ObjectKey, Object)>,
}

#[derive(Debug)]
struct State {
    revision: u64,
    tables: HashMap<ResourceKey, BTreeMap<ObjectKey, Object>>,
    history: History,
    watchers: Watchers,
    journal: Option<Journal>,
}

/// Shared handle of the state.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
}

impl Store {
    /// Loads what `directory` holds, or begins empty and writes there.
    pub fn open(directory: &Path) -> Result<Self, PersistError> {
        let (journal, loaded) = Journal::open(directory)?;
        Ok(Self::with(loaded.revision, loaded.tables, Some(journal)))
    }

    /// An empty store without a file.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::with(1, HashMap::new(), None)
    }

    fn with(
        revision: u64,
        tables: HashMap<ResourceKey, BTreeMap<ObjectKey, Object>>,
        journal: Option<Journal>,
    ) -> Self {
        let history = History::starting_at(revision);
        let state = State {
            revision,
            tables,
            history,
            watchers: Watchers::default(),
            journal,
        };
        Self {
            state: Mutex::new(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A writer that panicked left the state as it was before its commit, so that going on is safe.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Newest revision.
    pub fn revision(&self) -> u64 {
        self.lock().revision
    }

    /// One object.
    pub fn get(&self, resource: &ResourceKey, key: &ObjectKey) -> Option<Object> {
        self.lock()
            .tables
            .get(resource)
            .and_then(|table| table.get(key))
            .cloned()
    }

    /// All objects of a resource, of one namespace if given.
    pub fn list(&self, resource: &ResourceKey, namespace: Option<&str>) -> Snapshot {
        let state = self.lock();
        Snapshot {
            revision: state.revision,
            objects: state.objects(resource, namespace),
        }
    }

    /// All objects of a resource as they were at `revision`.
    pub fn list_at(
        &self,
        resource: &ResourceKey,
        namespace: Option<&str>,
        revision: u64,
    ) -> Result<Snapshot, StoreError> {
        let state = self.lock();
        state.check_revision(revision)?;
        let mut table: BTreeMap<ObjectKey, Object> = state.objects(resource, namespace).into_iter().collect();
        for change in state
            .history
            .since(revision)
            .rev()
            .filter(|change| change.concerns(resource, namespace))
        {
            match &change.before {
                Some(before) => table.insert(change.key.clone(), before.clone()),
                None => table.remove(&change.key),
            };
        }
        Ok(Snapshot {
            revision,
            objects: table.into_iter().collect(),
        })
    }

    /// Adds an object.
    pub fn create(&self, resource: &ResourceKey, key: &ObjectKey, value: Value) -> Result<Object, StoreError> {
        let mut state = self.lock();
        if state.current(resource, key).is_some() {
            return Err(StoreError::Exists(key.clone()));
        }
        state.commit(resource, key, Some(value), None)
    }

    /// Replaces the object that is at revision `expected`.
    pub fn replace(
        &self,
        resource: &ResourceKey,
        key: &ObjectKey,
        expected: u64,
        value: Value,
    ) -> Result<Object, StoreError> {
        let mut state = self.lock();
        state.expect(resource, key, expected)?;
        state.commit(resource, key, Some(value), None)
    }

    /// Removes the object that is at revision `expected`; `last` is what watchers see of it.
    pub fn remove(
        &self,
        resource: &ResourceKey,
        key: &ObjectKey,
        expected: u64,
        last: Value,
    ) -> Result<Object, StoreError> {
        let mut state = self.lock();
        state.expect(resource, key, expected)?;
        state.commit(resource, key, None, Some(last))
    }

    /// Changes of a resource after `revision`, then those to come.
    pub fn watch(&self, resource: &ResourceKey, namespace: Option<&str>, revision: u64) -> Result<Watch, StoreError> {
        let mut state = self.lock();
        state.check_revision(revision)?;
        let backlog = state
            .history
            .since(revision)
            .filter(|change| change.concerns(resource, namespace))
            .cloned()
            .collect();
        Ok(state.watchers.add(resource, namespace, backlog))
    }

    /// All objects now, and a watch of the changes that follow, without a gap.
    pub fn list_and_watch(&self, resource: &ResourceKey, namespace: Option<&str>) -> (Snapshot, Watch) {
        let mut state = self.lock();
        let snapshot = Snapshot {
            revision: state.revision,
            objects: state.objects(resource, namespace),
        };
        let watch = state.watchers.add(resource, namespace, Vec::new());
        (snapshot, watch)
    }

    /// Puts the present revision into the queue of a watch, behind all changes up to it.
    pub fn bookmark(&self, watch: &Watch) {
        let mut state = self.lock();
        let revision = state.revision;
        state.watchers.bookmark(watch.id(), revision);
    }

    /// Ends every watch, as an API server does that restarts. Clients come back from their last version.
    pub fn drop_watches(&self) {
        self.lock().watchers.clear();
    }

    /// Forgets the history: reads and watches from before the present revision are answered with 410.
    pub fn compact(&self) {
        let mut state = self.lock();
        let revision = state.revision;
        state.history = History::starting_at(revision);
    }

    /// Writes the live objects to a new log, so that the next start reads only them.
    pub fn checkpoint(&self) -> Result<(), StoreError> {
        let mut state = self.lock();
        let State {
            revision,
            tables,
            journal,
            ..
        } = &mut *state;
        if let Some(journal) = journal {
            journal.rewrite(*revision, tables)?;
        }
        Ok(())
    }
}

impl State {
    fn objects(&self, resource: &ResourceKey, namespace: Option<&str>) -> Vec<(ObjectKey, Object)> {
        let Some(table) = self.tables.get(resource) else {
            return Vec::new();
        };
        table
            .iter()
            .filter(|(key, _)| namespace.is_none_or(|namespace| namespace == key.namespace))
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect()
    }

    fn current(&self, resource: &ResourceKey, key: &ObjectKey) -> Option<&Object> {
        self.tables.get(resource).and_then(|table| table.get(key))
    }

    fn expect(&self, resource: &ResourceKey, key: &ObjectKey, expected: u64) -> Result<(), StoreError> {
        let Some(object) = self.current(resource, key) else {
            return Err(StoreError::Missing(key.clone()));
        };
        let current = object::revision(object);
        if current == expected {
            return Ok(());
        }
        Err(StoreError::Stale {
            key: key.clone(),
            current,
            expected,
        })
    }

    fn check_revision(&self, asked: u64) -> Result<(), StoreError> {
        if asked > self.revision {
            return Err(StoreError::Future {
                asked,
                current: self.revision,
            });
        }
        let oldest = self.history.oldest();
        if asked < oldest {
            return Err(StoreError::Compacted { asked, oldest });
        }
        Ok(())
    }

    /// One write: journal first, then memory, then watchers.
    fn commit(
        &mut self,
        resource: &ResourceKey,
        key: &ObjectKey,
        after: Option<Value>,
        last: Option<Value>,
    ) -> Result<Object, StoreError> {
        let revision = self.revision + 1;
        let removed = after.is_none();
        let mut value = after.or(last).unwrap_or(Value::Null);
        object::set_revision(&mut value, revision);
        let object: Object = Arc::new(value);
        let mut size = 0;
        if let Some(journal) = &mut self.journal {
            size = journal.append(revision, resource, key, (!removed).then_some(&object))?;
        }
        self.revision = revision;
        let table = self.tables.entry(resource.clone()).or_default();
        let before = if removed {
            table.remove(key)
        } else {
            table.insert(key.clone(), object.clone())
        };
        let change = Arc::new(Change {
            revision,
            resource: resource.clone(),
            key: key.clone(),
            before,
            after: object.clone(),
            removed,
        });
        self.watchers.send(&change);
        self.history.push(change, size);
        if self.journal.as_ref().is_some_and(Journal::is_mostly_garbage) {
            let Self { tables, journal, .. } = self;
            if let Some(journal) = journal {
                journal.rewrite(revision, tables)?;
            }
        }
        Ok(object)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pods() -> ResourceKey {
        ResourceKey::new("", "pods")
    }

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("default", name)
    }

    fn pod(name: &str) -> Value {
        json!({"metadata": {"name": name, "namespace": "default"}})
    }

    #[test]
    fn every_write_takes_the_next_revision() {
        let store = Store::in_memory();
        let first = store.create(&pods(), &key("a"), pod("a")).unwrap();
        let second = store.create(&pods(), &key("b"), pod("b")).unwrap();
        assert_eq!(object::revision(&second), object::revision(&first) + 1);
    }

    #[test]
    fn a_stale_replace_is_refused() {
        let store = Store::in_memory();
        let first = store.create(&pods(), &key("a"), pod("a")).unwrap();
        store
            .replace(&pods(), &key("a"), object::revision(&first), pod("a"))
            .unwrap();
        let error = store
            .replace(&pods(), &key("a"), object::revision(&first), pod("a"))
            .unwrap_err();
        assert!(matches!(error, StoreError::Stale { .. }), "{error}");
    }

    #[test]
    fn a_list_at_an_old_revision_shows_the_objects_of_that_time() {
        let store = Store::in_memory();
        let first = store.create(&pods(), &key("a"), pod("a")).unwrap();
        let then = store.revision();
        store.create(&pods(), &key("b"), pod("b")).unwrap();
        store
            .remove(&pods(), &key("a"), object::revision(&first), pod("a"))
            .unwrap();
        let names: Vec<String> = store
            .list_at(&pods(), None, then)
            .unwrap()
            .objects
            .into_iter()
            .map(|(key, _)| key.name)
            .collect();
        assert_eq!(names, ["a"]);
    }

    #[test]
    fn a_compacted_revision_is_too_old() {
        let store = Store::in_memory();
        let then = store.revision();
        store.create(&pods(), &key("a"), pod("a")).unwrap();
        store.compact();
        assert!(matches!(
            store.watch(&pods(), None, then),
            Err(StoreError::Compacted { .. })
        ));
        assert!(store.watch(&pods(), None, store.revision()).is_ok());
    }

    #[tokio::test]
    async fn a_watch_replays_what_came_after_its_revision() {
        let store = Store::in_memory();
        store.create(&pods(), &key("a"), pod("a")).unwrap();
        let then = store.revision();
        store.create(&pods(), &key("b"), pod("b")).unwrap();
        let mut watch = store.watch(&pods(), Some("default"), then).unwrap();
        store.create(&pods(), &key("c"), pod("c")).unwrap();
        for name in ["b", "c"] {
            match watch.next().await {
                Some(watcher::Signal::Change(change)) => assert_eq!(change.key.name, name),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn objects_and_revision_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let kept = store.create(&pods(), &key("a"), pod("a")).unwrap();
        let gone = store.create(&pods(), &key("b"), pod("b")).unwrap();
        store
            .remove(&pods(), &key("b"), object::revision(&gone), pod("b"))
            .unwrap();
        let revision = store.revision();
        drop(store);
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(store.revision(), revision);
        assert_eq!(store.get(&pods(), &key("a")), Some(kept));
        assert_eq!(store.get(&pods(), &key("b")), None);
    }
}

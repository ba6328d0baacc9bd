//! The last changes, bounded by number and by bytes: what a watch from an older version is answered from.

use std::{collections::VecDeque, sync::Arc};

use super::object::{Object, ObjectKey, ResourceKey};

/// Changes kept at most.
const MAX_CHANGES: usize = 8192;
/// Journal bytes of the changes kept at most.
const MAX_BYTES: usize = 64 << 20;

/// One committed write.
#[derive(Debug)]
pub struct Change {
    /// Revision of the write.
    pub revision: u64,
    /// The table.
    pub resource: ResourceKey,
    /// The object's place.
    pub key: ObjectKey,
    /// The object before, unless it was created.
    pub before: Option<Object>,
    /// The object after; of a removed one its last state, at the revision of the removal.
    pub after: Object,
    /// The object is gone.
    pub removed: bool,
}

impl Change {
    /// Whether a watch of this resource (and namespace) sees the change.
    #[must_use]
    pub fn concerns(&self, resource: &ResourceKey, namespace: Option<&str>) -> bool {
        self.resource == *resource && namespace.is_none_or(|namespace| namespace == self.key.namespace)
    }
}

/// A window over the newest changes.
#[derive(Debug)]
pub struct History {
    changes: VecDeque<(Arc<Change>, usize)>,
    bytes: usize,
    oldest: u64,
}

impl History {
    /// An empty history of a store that is at `revision`.
    #[must_use]
    pub fn starting_at(revision: u64) -> Self {
        Self {
            changes: VecDeque::new(),
            bytes: 0,
            oldest: revision,
        }
    }

    /// The oldest revision from which all later changes are known.
    #[must_use]
    pub fn oldest(&self) -> u64 {
        self.oldest
    }

    /// Adds the newest change, which took `size` bytes in the journal, and forgets the oldest beyond the bounds.
    pub fn push(&mut self, change: Arc<Change>, size: usize) {
        self.changes.push_back((change, size));
        self.bytes += size;
        while self.changes.len() > MAX_CHANGES || self.bytes > MAX_BYTES {
            let Some((gone, size)) = self.changes.pop_front() else {
                break;
            };
            self.bytes -= size;
            self.oldest = gone.revision;
        }
    }

    /// Changes after `revision`, oldest first.
    pub fn since(&self, revision: u64) -> impl DoubleEndedIterator<Item = &Arc<Change>> {
        let first = self.changes.partition_point(|(change, _)| change.revision <= revision);
        self.changes.range(first..).map(|(change, _)| change)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_history_is_bounded() {
        let mut history = History::starting_at(0);
        for revision in 1..=(MAX_CHANGES as u64 + 10) {
            let change = Change {
                revision,
                resource: ResourceKey::new("", "pods"),
                key: ObjectKey::new("a", "b"),
                before: None,
                after: Arc::new(json!({})),
                removed: false,
            };
            history.push(Arc::new(change), 1);
        }
        assert_eq!(history.oldest(), 10);
        assert_eq!(history.since(10).count(), MAX_CHANGES);
        assert_eq!(history.since(12).next().map(|change| change.revision), Some(13));
    }
}

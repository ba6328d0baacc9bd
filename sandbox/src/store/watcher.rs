//! Queues from the store to those who watch it. A queue is bounded: a watcher that does not read is closed, and comes
//! back from the last version it saw.

use std::{collections::VecDeque, sync::Arc};

use tokio::sync::mpsc;

use super::{history::Change, object::ResourceKey};

/// Changes that may wait for a watcher.
const QUEUE: usize = 1024;

/// What a watcher receives.
#[derive(Clone, Debug)]
pub enum Signal {
    /// A committed write.
    Change(Arc<Change>),
    /// All changes up to this revision have been delivered.
    Bookmark(u64),
}

#[derive(Debug)]
struct Slot {
    id: u64,
    resource: ResourceKey,
    namespace: Option<String>,
    queue: mpsc::Sender<Signal>,
}

/// All open watches.
#[derive(Debug, Default)]
pub struct Watchers {
    next: u64,
    slots: Vec<Slot>,
}

/// The reading end of one watch.
#[derive(Debug)]
pub struct Watch {
    id: u64,
    backlog: VecDeque<Arc<Change>>,
    queue: mpsc::Receiver<Signal>,
}

impl Watchers {
    /// Opens a watch whose first signals are `backlog`.
    pub fn add(&mut self, resource: &ResourceKey, namespace: Option<&str>, backlog: Vec<Arc<Change>>) -> Watch {
        let (queue, receiver) = mpsc::channel(QUEUE);
        self.next += 1;
        self.slots.retain(|slot| !slot.queue.is_closed());
        self.slots.push(Slot {
            id: self.next,
            resource: resource.clone(),
            namespace: namespace.map(str::to_owned),
            queue,
        });
        Watch {
            id: self.next,
            backlog: backlog.into(),
            queue: receiver,
        }
    }

    /// Sends a change to those whom it concerns, and closes those whose queue is full.
    pub fn send(&mut self, change: &Arc<Change>) {
        self.slots.retain(|slot| {
            !change.concerns(&slot.resource, slot.namespace.as_deref())
                || slot.queue.try_send(Signal::Change(change.clone())).is_ok()
        });
    }

    /// Queues a bookmark for one watch.
    pub fn bookmark(&mut self, id: u64, revision: u64) {
        if let Some(slot) = self.slots.iter().find(|slot| slot.id == id) {
            // A full queue needs no bookmark: its changes carry versions.
            slot.queue.try_send(Signal::Bookmark(revision)).ok();
        }
    }

    /// Closes all watches.
    pub fn clear(&mut self) {
        self.slots.clear();
    }
}

impl Watch {
    /// Number of the watch.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The next signal; `None` when the store closed the watch. Safe to drop while waiting.
    pub async fn next(&mut self) -> Option<Signal> {
        match self.backlog.pop_front() {
            Some(change) => Some(Signal::Change(change)),
            None => self.queue.recv().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::store::object::ObjectKey;

    #[tokio::test]
    async fn a_watcher_that_does_not_read_is_closed() {
        let pods = ResourceKey::new("", "pods");
        let mut watchers = Watchers::default();
        let mut watch = watchers.add(&pods, None, Vec::new());
        for revision in 0..=QUEUE as u64 {
            watchers.send(&Arc::new(Change {
                revision,
                resource: pods.clone(),
                key: ObjectKey::new("a", "b"),
                before: None,
                after: Arc::new(json!({})),
                removed: false,
            }));
        }
        let mut read = 0;
        while watch.next().await.is_some() {
            read += 1;
        }
        assert_eq!(read, QUEUE);
    }
}

//! The one cell that a role writes and that `/progress`, `/readyz`, `/metrics` and the termination log read.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use flotilla_api::progress::{Progress, Stage};

/// A shared [`Progress`]. Cloning shares the cell.
#[derive(Clone, Debug, Default)]
pub struct ProgressCell {
    cell: Arc<Mutex<Progress>>,
}

impl ProgressCell {
    /// Changes the progress. The closure is short: readers wait for it.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        // A closure that panicked left a progress that is old, not one that is invalid.
        change(&mut self.cell.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A copy of the progress as it is now.
    pub fn snapshot(&self) -> Progress {
        self.cell.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where the role stands.
    pub fn stage(&self) -> Stage {
        self.cell.lock().unwrap_or_else(PoisonError::into_inner).stage
    }

    /// Moves to a stage with a message for people.
    pub fn enter(&self, stage: Stage, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(?stage, "{message}");
        self.update(|progress| {
            progress.stage = stage;
            progress.message = message;
        });
    }

    /// Leaves the last progress where the kubelet finds it. The file exists before the container starts and cannot be
    /// replaced by a rename.
    pub fn write_termination_log(&self, path: &Path) -> std::io::Result<()> {
        std::fs::write(path, self.snapshot().termination_message())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_termination_log_holds_the_last_progress() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("termination-log");
        let cell = ProgressCell::default();
        cell.enter(Stage::Failed, "row 3 is corrupt");
        cell.write_termination_log(&path).expect("writes");
        let read: Progress = serde_json::from_slice(&std::fs::read(path).expect("reads")).expect("parses");
        assert_eq!((read.stage, read.message.as_str()), (Stage::Failed, "row 3 is corrupt"));
    }
}

//! Paths inside the directory of a run:
//! `checkpoints/step-00000040/`, `metrics.jsonl`, `plot.svg`.

use std::path::{Path, PathBuf};

/// The directory of one training run.
#[derive(Clone, Debug)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// A run whose files lie below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Directory of all checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Directory of one checkpoint.
    pub fn checkpoint(&self, step: u32) -> PathBuf {
        self.checkpoints().join(checkpoint_name(step))
    }

    /// One JSON line per step.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// Curves of the run.
    pub fn plot(&self) -> PathBuf {
        self.root.join("plot.svg")
    }
}

/// Directory name of a checkpoint: eight digits, so that names sort as steps do.
pub fn checkpoint_name(step: u32) -> String {
    format!("step-{step:08}")
}

/// Step of a checkpoint's directory name, None for any other name.
pub fn checkpoint_step(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("step-")?;
    (digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| digits.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_checkpoint_name_gives_its_step_back(step: u32) {
            prop_assert_eq!(checkpoint_step(&checkpoint_name(step)), Some(step));
        }
    }

    #[test]
    fn a_temp_dir_is_not_a_checkpoint() {
        assert_eq!(checkpoint_step(".tmp-step-00000040"), None);
        assert_eq!(checkpoint_step("step-40"), None);
    }
}

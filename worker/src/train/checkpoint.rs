//! Weights, optimiser and position of a run, written as one directory in Hugging Face layout and restored bit by bit.
//!
//! The files of the base model (config, tokenizer, processor, chat template) lie beside `model.safetensors`; what only a
//! trainer needs is in `trainer/`. Nothing in it depends on time, so equal runs have equal digests.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use flotilla_api::{evaluation::Score, progress::CheckpointRecord};
use flotilla_artifacts::{
    checkpoint::{Checkpoint, list},
    layout::{RunDir, checkpoint_name},
    publish::{Draft, Published},
};
use serde::{Deserialize, Serialize};

use super::{
    actor::{Actor, Moments},
    error::TrainError,
};
use crate::uri::join;

/// Largest file of weights, as transformers writes them.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;
/// What only a trainer needs.
const TRAINER: &str = "trainer";
/// The position.
const POSITION: &str = "position.json";

/// Where a run stands. Draws follow from seed and step, so the step is the data position and the state of every generator.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Position {
    /// Steps done.
    pub step: u32,
    /// Updates of the optimiser.
    pub updates: u64,
    /// How the optimiser's moments are stored.
    #[serde(default, skip_serializing_if = "is_by_parameter")]
    pub moments: Moments,
    /// Newest step that was evaluated.
    pub evaluated: Option<u32>,
    /// Every score so far, oldest first.
    pub history: Vec<Score>,
    /// Newest evaluated step at which the guard's set had not fallen too far.
    pub held: Option<u32>,
}

fn is_by_parameter(moments: &Moments) -> bool {
    *moments == Moments::ByParameter
}

impl Position {
    /// Scores of one step.
    pub fn scores_at(&self, step: u32) -> Vec<Score> {
        self.history
            .iter()
            .filter(|score| score.step == step)
            .cloned()
            .collect()
    }

    /// Scores as metrics, `<set>/accuracy` and so on, where this step was evaluated.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        let mut metrics = BTreeMap::new();
        for score in self.scores_at(self.step) {
            metrics.insert(format!("{}/accuracy", score.set), score.accuracy);
            metrics.insert(format!("{}/format_rate", score.set), score.format_rate);
            if let Some(consistency) = score.swap_consistency {
                metrics.insert(format!("{}/swap_consistency", score.set), consistency);
            }
        }
        metrics
    }
}

/// The small files of a model directory that every checkpoint carries on: config, tokenizer, processor, chat template.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    files: Vec<(String, Vec<u8>)>,
}

impl ModelFiles {
    /// Reads them.
    pub fn read(dir: &Path) -> Result<Self, TrainError> {
        let unreadable = |error: std::io::Error| TrainError::Invalid(format!("read model {}: {error}", dir.display()));
        let mut files = Vec::new();
        for entry in fs::read_dir(dir).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.path().is_file() && is_carried_on(&name) {
                files.push((name, fs::read(entry.path()).map_err(unreadable)?));
            }
        }
        files.sort();
        Ok(Self { files })
    }
}

fn is_carried_on(name: &str) -> bool {
    let extension = Path::new(name)
        .extension()
        .and_then(|extension| extension.to_str())
        .unwrap_or_default();
    matches!(extension, "json" | "jinja" | "txt" | "model")
        && name != flotilla_artifacts::manifest::MANIFEST
        && !name.ends_with(".index.json")
        && !name.starts_with('.')
}

/// Writes and publishes a checkpoint, in place of one of the same step that was saved before its evaluation was done.
pub fn write(
    run: &RunDir,
    files: &ModelFiles,
    actor: &mut dyn Actor,
    position: &Position,
) -> Result<Published, TrainError> {
    let draft = Draft::begin_replacing(&run.checkpoint(position.step))?;
    let dir = draft.path();
    let failed =
        |path: &Path, error: &std::io::Error| TrainError::Invalid(format!("write {}: {error}", path.display()));
    let put = |path: &Path, bytes: &[u8]| fs::write(path, bytes).map_err(|error| failed(path, &error));
    for (name, bytes) in &files.files {
        put(&dir.join(name), bytes)?;
    }
    let trainer = trainer(dir);
    fs::create_dir(&trainer).map_err(|error| failed(&trainer, &error))?;
    let saved = actor.save(dir, &trainer)?;
    let position = Position {
        updates: saved.updates,
        moments: saved.moments,
        ..position.clone()
    };
    let text = serde_json::to_vec_pretty(&position).map_err(|error| TrainError::Invalid(error.to_string()))?;
    put(&trainer.join(POSITION), &text)?;
    Ok(draft.publish()?)
}

/// The position that a checkpoint holds.
pub fn read_position(dir: &Path) -> Result<Position, TrainError> {
    let path = dir.join(TRAINER).join(POSITION);
    let invalid = |reason: String| TrainError::Invalid(format!("read {}: {reason}", path.display()));
    let bytes = fs::read(&path).map_err(|error| invalid(error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))
}

/// Where a checkpoint holds what only a trainer needs.
pub fn trainer(dir: &Path) -> PathBuf {
    dir.join(TRAINER)
}

/// The stable checkpoints of a run as the operator reads them, oldest first.
pub fn records(run: &RunDir, output_uri: &str) -> Result<Vec<CheckpointRecord>, TrainError> {
    let record = |checkpoint: Checkpoint| {
        Ok(CheckpointRecord {
            step: checkpoint.step,
            uri: join(output_uri, &format!("checkpoints/{}", checkpoint_name(checkpoint.step))),
            metrics: read_position(&checkpoint.path)?.metrics(),
            digest: checkpoint.digest,
            bytes: checkpoint.bytes,
        })
    };
    list(&run.checkpoints())?.into_iter().map(record).collect()
}

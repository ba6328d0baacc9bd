//! What a training run left on disk.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// The folder of the only run of `job` below a claim's directory.
pub fn of(claim: &Path, namespace: &str, job: &str) -> anyhow::Result<PathBuf> {
    let jobs = claim.join("jobs").join(namespace);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&jobs).with_context(|| jobs.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name
            .strip_prefix(job)
            .is_some_and(|rest| rest.starts_with('-') && rest.len() == 9)
        {
            found.push(entry.path());
        }
    }
    ensure!(found.len() == 1, "{job} has {} run folders", found.len());
    found.pop().context("a run folder")
}

/// The step of every line of `metrics.jsonl`.
pub fn steps(run: &Path) -> anyhow::Result<Vec<u32>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).context("metrics.jsonl")?;
    let step = |line: &str| -> anyhow::Result<u32> {
        let value: serde_json::Value = serde_json::from_str(line)?;
        Ok(u32::try_from(value["step"].as_u64().context("a step")?)?)
    };
    text.lines().map(step).collect()
}

/// Weights of the newest checkpoint, and how many checkpoint folders have no `STABLE` marker.
pub fn newest_weights(run: &Path) -> anyhow::Result<(Vec<u8>, usize)> {
    let mut stable = Vec::new();
    let mut partial = 0;
    for entry in std::fs::read_dir(run.join("checkpoints"))? {
        let path = entry?.path();
        if path.join("STABLE").exists() {
            stable.push(path);
        } else {
            partial += 1;
        }
    }
    stable.sort();
    let newest = stable.pop().context("no stable checkpoint")?;
    Ok((std::fs::read(newest.join("model.safetensors"))?, partial))
}

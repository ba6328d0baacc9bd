//! `metrics.jsonl`: one line per step, and never two for one step; times of a step's stages.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use flotilla_artifacts::publish::replace_file;
use serde::{Deserialize, Serialize};

use super::error::TrainError;

/// One line.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Line {
    /// Step, counted from 1.
    pub step: u32,
    /// Values of the step.
    #[serde(flatten)]
    pub metrics: BTreeMap<String, f64>,
}

/// The lines of a run.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    lines: Vec<Line>,
}

impl Journal {
    /// Opens the file of a run that goes on after `step`: lines of later steps belong to work that was lost with its
    /// weights and is done again, so they are cut off, as is a line that was half written.
    pub fn open(path: &Path, step: u32) -> Result<Self, TrainError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(unwritable(path, &error)),
        };
        let mut lines: Vec<Line> = Vec::new();
        for line in text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok()) {
            if line.step <= step && lines.last().is_none_or(|last| last.step < line.step) {
                lines.push(line);
            }
        }
        let kept: String = lines.iter().map(text_of).collect();
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| unwritable(path, &error))?;
        }
        replace_file(path, kept.as_bytes())?;
        Ok(Self {
            path: path.to_path_buf(),
            lines,
        })
    }

    /// Appends the line of a step. JSON has no infinities: such values are left out.
    pub fn append(&mut self, mut line: Line) -> Result<(), TrainError> {
        line.metrics.retain(|_, value| value.is_finite());
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&self.path)
            .and_then(|mut file| file.write_all(text_of(&line).as_bytes()))
            .map_err(|error| unwritable(&self.path, &error))?;
        self.lines.push(line);
        Ok(())
    }

    /// Every line so far.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }
}

fn text_of(line: &Line) -> String {
    let mut text = serde_json::to_string(line).unwrap_or_default();
    text.push('\n');
    text
}

fn unwritable(path: &Path, error: &std::io::Error) -> TrainError {
    TrainError::Invalid(format!("write {}: {error}", path.display()))
}

/// Times of the stages of a step, as `timing_s/<stage>`.
#[derive(Debug)]
pub struct Stopwatch {
    begin: Instant,
    lap: Instant,
    times: BTreeMap<String, f64>,
}

impl Stopwatch {
    /// Begins now.
    pub fn start() -> Self {
        let now = Instant::now();
        Self {
            begin: now,
            lap: now,
            times: BTreeMap::new(),
        }
    }

    /// Ends a stage that began with the last one's end.
    pub fn lap(&mut self, stage: &str) {
        let now = Instant::now();
        let seconds = now.duration_since(self.lap).as_secs_f64();
        tracing::debug!(stage, seconds, "stage done");
        self.times.insert(format!("timing_s/{stage}"), seconds);
        self.lap = now;
    }

    /// All stages and `timing_s/step`.
    pub fn finish(mut self) -> BTreeMap<String, f64> {
        self.times
            .insert("timing_s/step".to_owned(), self.begin.elapsed().as_secs_f64());
        self.times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u32) -> Line {
        Line {
            step,
            metrics: [("loss".to_owned(), f64::from(step))].into(),
        }
    }

    #[test]
    fn a_resumed_run_counts_no_step_twice() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("run/metrics.jsonl");
        let mut journal = Journal::open(&path, 0).expect("open");
        for step in 1..=5 {
            journal.append(line(step)).expect("append");
        }
        let mut half = fs::read_to_string(&path).expect("read");
        half.push_str("{\"step\":6,\"lo");
        fs::write(&path, half).expect("write");
        let mut journal = Journal::open(&path, 3).expect("open");
        journal.append(line(4)).expect("append");
        let reopened = Journal::open(&path, 9).expect("open");
        assert_eq!(reopened.lines(), [line(1), line(2), line(3), line(4)]);
    }
}

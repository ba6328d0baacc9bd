//! One program of the control plane: its log, its record on disk, its end.

use std::{
    fs,
    io::Read as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use flotilla_sandbox::node::{
    process::{kill_exactly, start_ticks},
    record::ProcessId,
};
use rustix::process::{Pid, Signal, kill_process};

/// Longest wait after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// Folder of the records of running programs.
const RECORDS: &str = "pids";

/// A running program.
#[derive(Debug)]
pub struct Component {
    name: &'static str,
    child: Child,
    id: ProcessId,
    log: PathBuf,
    record: PathBuf,
}

impl Component {
    /// Starts `program` with its output in `DIR/NAME.log` and a record in `DIR/pids/NAME`.
    pub fn start(name: &'static str, program: &Path, arguments: &[String], dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let output = fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let child = Command::new(program)
            .args(arguments)
            .current_dir(dir)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let pid = i32::try_from(child.id()).context("a process number")?;
        let id = ProcessId {
            pid,
            start_ticks: start_ticks(pid).with_context(|| format!("{name} ended at once: see {}", log.display()))?,
        };
        let record = dir.join(RECORDS).join(name);
        fs::create_dir_all(dir.join(RECORDS))?;
        fs::write(&record, serde_json::to_vec(&id)?).with_context(|| format!("write {}", record.display()))?;
        Ok(Self {
            name,
            child,
            id,
            log,
            record,
        })
    }

    /// Name of the program.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Number and start time.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Number.
    pub fn pid(&self) -> i32 {
        self.id.pid
    }

    /// An error with the end of its log once it has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!(
                "{} ended with {status}; the end of {}:\n{}",
                self.name,
                self.log.display(),
                tail(&self.log)
            );
        }
        Ok(())
    }

    /// SIGTERM, SIGKILL after the grace period.
    pub fn stop(mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_none() {
            kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        }
        let begun = Instant::now();
        while self.child.try_wait()?.is_none() && begun.elapsed() < GRACE {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Whatever happens to a story, the program does not outlive it.
impl Drop for Component {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.record);
    }
}

/// Kills what an earlier control plane recorded in `dir` and did not stop.
pub fn sweep(dir: &Path) -> anyhow::Result<()> {
    let Ok(entries) = fs::read_dir(dir.join(RECORDS)) else {
        return Ok(());
    };
    for entry in entries {
        let path = entry?.path();
        if let Ok(id) = serde_json::from_slice::<ProcessId>(&fs::read(&path)?)
            && kill_exactly(id)
        {
            eprintln!(
                "killed {} of an earlier control plane in {}",
                path.display(),
                dir.display()
            );
        }
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// The last lines of a log.
fn tail(path: &Path) -> String {
    let mut text = String::new();
    if let Ok(mut file) = fs::File::open(path) {
        let _ = file.read_to_string(&mut text);
    }
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn a_program_that_a_crashed_owner_left_is_killed_by_the_next_start_in_its_directory() {
        let dir = tempfile::tempdir().expect("a folder");
        let arguments = ["600".to_owned()];
        let mut sleep = Component::start("sleep", Path::new("/bin/sleep"), &arguments, dir.path()).expect("starts");
        sweep(dir.path()).expect("sweeps");
        assert_eq!(sleep.child.wait().expect("an end").signal(), Some(9));
        assert!(!sleep.record.exists());
    }

    #[test]
    fn the_end_of_a_program_is_told_with_the_end_of_its_log() {
        let dir = tempfile::tempdir().expect("a folder");
        let script = ["-c", "echo no such flag; exec sleep 0.2"].map(str::to_owned);
        let mut shell = Component::start("shell", Path::new("/bin/sh"), &script, dir.path()).expect("starts");
        shell.child.wait().expect("an end");
        let error = shell.check().expect_err("it ended").to_string();
        assert!(error.contains("no such flag"), "{error}");
    }
}

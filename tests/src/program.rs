//! The programs of this workspace, and processes that must not outlive a story.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Path of a program of this workspace, beside the running test or program.
///
/// `make test` builds the programs before the tests; `cargo test` alone does not, hence the advice in the error.
pub fn path(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("path of the running program")?;
    let folder = own.parent().context("folder of the running program")?;
    // Tests lie one folder below the programs.
    let folder = folder.parent().filter(|_| folder.ends_with("deps")).unwrap_or(folder);
    let path = folder.join(name);
    if !path.is_file() {
        bail!("{} is missing: run `make build` first", path.display());
    }
    Ok(path)
}

/// A running program; dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
}

impl Running {
    /// Starts `program` of this workspace with its output in `log`.
    pub fn start(
        program: &str,
        arguments: &[String],
        environment: &[(&str, &str)],
        log: &Path,
    ) -> anyhow::Result<Self> {
        Self::start_binary(&path(program)?, arguments, environment, log)
    }

    /// Starts any program with its output in `log`.
    pub fn start_binary(
        program: &Path,
        arguments: &[String],
        environment: &[(&str, &str)],
        log: &Path,
    ) -> anyhow::Result<Self> {
        let output = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .context("log of a program")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        Ok(Self {
            child: command
                .spawn()
                .with_context(|| format!("start {}", program.display()))?,
        })
    }

    /// Its process number.
    pub fn pid(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    /// An error once it has ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("a program ended with {status}"),
            None => Ok(()),
        }
    }

    /// `kill -9`, as a node that loses power would.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends a signal, for example SIGSTOP.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Waits for an end that nobody asked for, for at most `limit`; its exit code.
    pub async fn ended(mut self, limit: Duration) -> anyhow::Result<Option<i32>> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            if begun.elapsed() > limit {
                bail!("the process did not end within {limit:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// SIGTERM, then the exit within `limit`.
    pub fn terminate(mut self, limit: Duration) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let begun = Instant::now();
        while self.child.try_wait()?.is_none() {
            if begun.elapsed() > limit {
                bail!("the process is still there {limit:?} after SIGTERM");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Process ids of every worker whose arguments name `folder`.
pub fn workers_below(folder: &Path) -> anyhow::Result<Vec<i32>> {
    let folder = folder.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        let (program, arguments) = command.split_once('\0').unwrap_or((&command, ""));
        if Path::new(program).ends_with("flotilla-worker") && arguments.contains(&folder) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// `kill -9` of one process.
pub fn kill(pid: i32) -> anyhow::Result<()> {
    let pid = Pid::from_raw(pid).context("a process id")?;
    kill_process(pid, Signal::KILL)?;
    Ok(())
}

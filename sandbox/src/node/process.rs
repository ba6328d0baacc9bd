//! One container run: a process group of its own, observed through a pidfd.
//!
//! The leader's number (and so the group's) is not given to another process before the leader is reaped, so the whole
//! group is killed while the leader is still a zombie, and every signal is sent under the lock that reaping takes.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{fd::OwnedFd, unix::process::CommandExt, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, ChildStdout, Command, Stdio},
    sync::{Mutex, PoisonError},
};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use super::record::ProcessId;

/// Variable that marks every process of a container; its value is `POD-UID/CONTAINER`. A process that left the group
/// is found by it.
pub const MARKER: &str = "FLOTILLA_SANDBOX_CONTAINER";

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Executable.
    pub program: PathBuf,
    /// Arguments without the program.
    pub args: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub dir: PathBuf,
}

/// A started process with its output.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub process: Process,
    /// Its standard output.
    pub stdout: ChildStdout,
    /// Its standard error.
    pub stderr: ChildStderr,
}

/// A process group that this node started.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    child: Mutex<Option<Child>>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exit code, or 128 + the signal.
    pub code: i32,
    /// The signal.
    pub signal: Option<i32>,
}

/// Starts `launch` as the leader of a new process group, with standard input closed and no environment of ours.
pub fn start(launch: &Launch) -> io::Result<Started> {
    let mut child = Command::new(&launch.program)
        .args(&launch.args)
        .env_clear()
        .envs(&launch.env)
        .current_dir(&launch.dir)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = Pid::from_child(&child);
    match observe(pid, &mut child) {
        Ok((id, pidfd, stdout, stderr)) => Ok(Started {
            process: Process {
                id,
                pid,
                pidfd,
                child: Mutex::new(Some(child)),
            },
            stdout,
            stderr,
        }),
        Err(error) => {
            child.kill()?;
            child.wait()?;
            Err(error)
        }
    }
}

fn observe(pid: Pid, child: &mut Child) -> io::Result<(ProcessId, AsyncFd<OwnedFd>, ChildStdout, ChildStderr)> {
    let raw = pid.as_raw_nonzero().get();
    let start_ticks =
        start_ticks(raw).ok_or_else(|| io::Error::other(format!("/proc/{raw}/stat has no start time")))?;
    #[expect(
        deprecated,
        reason = "an OwnedFd stays open as long as the AsyncFd; the successor is an unsafe function"
    )]
    let pidfd = AsyncFd::new(pidfd_open(pid, PidfdFlags::NONBLOCK)?)?;
    let missing = || io::Error::other("the process has no output pipe");
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let stderr = child.stderr.take().ok_or_else(missing)?;
    Ok((ProcessId { pid: raw, start_ticks }, pidfd, stdout, stderr))
}

impl Process {
    /// Number and start time.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Sends SIGTERM to the leader alone, as a container runtime does; does nothing after the end.
    pub fn terminate(&self) {
        self.while_unreaped(|pid| kill_process(pid, Signal::TERM));
    }

    /// Sends SIGKILL to the whole group; does nothing after the end.
    pub fn kill(&self) {
        self.while_unreaped(|pid| kill_process_group(pid, Signal::KILL));
    }

    fn while_unreaped(&self, send: impl FnOnce(Pid) -> rustix::io::Result<()>) {
        let child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if child.is_some()
            && let Err(error) = send(self.pid)
        {
            tracing::debug!(pid = self.id.pid, %error, "a signal was not delivered");
        }
    }

    /// Waits for the leader's end, kills what is left of the group, calls `before_reaping` and reaps the leader.
    pub async fn wait(&self, before_reaping: impl FnOnce(ProcessId)) -> io::Result<Ended> {
        let ready = self.pidfd.readable().await?;
        drop(ready);
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = kill_process_group(self.pid, Signal::KILL) {
            tracing::debug!(pid = self.id.pid, %error, "nothing was left of the group");
        }
        before_reaping(self.id);
        let mut leader = child
            .take()
            .ok_or_else(|| io::Error::other("the process was waited for twice"))?;
        let status = leader.wait()?;
        let signal = status.signal();
        Ok(Ended {
            code: status.code().unwrap_or_else(|| 128 + signal.unwrap_or(0)),
            signal,
        })
    }
}

/// A process that nobody waits for any more (an aborted probe, a node that was dropped) does not live on.
impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut child) = child
            && let Err(error) = child.wait()
        {
            tracing::warn!(pid = self.id.pid, %error, "a killed process was not reaped");
        }
    }
}

/// Start time of a process in clock ticks since boot; `None` when there is no such process.
pub fn start_ticks(pid: i32) -> Option<u64> {
    parse_start_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 22 of `/proc/PID/stat`; the name in field 2 may hold spaces and brackets.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// Kills the process `id` if it still is that process, never another that got its number. True when it was there.
pub fn kill_exactly(id: ProcessId) -> bool {
    let Some(pid) = Pid::from_raw(id.pid) else { return false };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return false;
    };
    start_ticks(id.pid) == Some(id.start_ticks) && pidfd_send_signal(&pidfd, Signal::KILL).is_ok()
}

/// Processes whose environment holds `MARKER=value` for a value that begins with `prefix`.
pub fn marked(prefix: &str) -> Vec<ProcessId> {
    let wanted = format!("{MARKER}={prefix}");
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| {
            let environment = fs::read(Path::new("/proc").join(pid.to_string()).join("environ")).ok()?;
            let found = environment
                .split(|byte| *byte == 0)
                .any(|entry| entry.starts_with(wanted.as_bytes()));
            let start_ticks = found.then(|| start_ticks(pid)).flatten()?;
            Some(ProcessId { pid, start_ticks })
        })
        .collect()
}

/// Kills every process marked with `prefix`, again until none is left (one may have started another meanwhile).
/// Returns how many there were.
pub fn kill_marked(prefix: &str) -> usize {
    let mut killed = 0;
    for _ in 0..10 {
        let found = marked(prefix);
        if found.is_empty() {
            break;
        }
        killed += found.into_iter().filter(|id| kill_exactly(*id)).count();
    }
    killed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Launch {
        Launch {
            program: PathBuf::from("/bin/sh"),
            args: vec!["-c".to_owned(), script.to_owned()],
            env: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
            dir: PathBuf::from("/"),
        }
    }

    #[test]
    fn the_start_time_is_read_past_a_name_with_brackets() {
        let fields: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        assert_eq!(
            parse_start_ticks(&format!("7 (a) b (c)) S {}", fields.join(" "))),
            Some(22)
        );
        assert_eq!(parse_start_ticks("7 (a) S 1"), None);
    }

    #[tokio::test]
    async fn exit_code_and_signal_are_told_apart() {
        let started = start(&shell("exit 3")).unwrap();
        assert_eq!(
            started.process.wait(|_| ()).await.unwrap(),
            Ended { code: 3, signal: None }
        );
        let started = start(&shell("kill -9 $$")).unwrap();
        assert_eq!(
            started.process.wait(|_| ()).await.unwrap(),
            Ended {
                code: 137,
                signal: Some(9)
            }
        );
    }

    #[tokio::test]
    async fn what_the_leader_leaves_behind_is_killed_with_it() {
        let mut started = start(&shell("sleep 600 & echo $!; exit 0")).unwrap();
        let ended = started.process.wait(|_| ()).await.unwrap();
        assert_eq!(ended.code, 0);
        let mut output = String::new();
        io::Read::read_to_string(&mut started.stdout, &mut output).unwrap();
        let pid: i32 = output.trim().parse().unwrap();
        // The signal is sent; the kernel ends the process in its own time.
        while is_alive(pid) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_process_that_left_the_group_is_found_by_its_mark() {
        let mut launch = shell("setsid sleep 600 & exit 0");
        let mark = format!("test-{}", std::process::id());
        launch.env.insert(MARKER.to_owned(), format!("{mark}/a"));
        let started = start(&launch).unwrap();
        started.process.wait(|_| ()).await.unwrap();
        kill_marked(&mark);
        // The signal is sent; the kernel ends the process in its own time.
        while !marked(&mark).is_empty() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_number_with_another_start_time_is_not_killed() {
        let started = start(&shell("sleep 600")).unwrap();
        let id = started.process.id();
        assert!(!kill_exactly(ProcessId {
            start_ticks: id.start_ticks + 1,
            ..id
        }));
        assert!(kill_exactly(id));
        assert_eq!(started.process.wait(|_| ()).await.unwrap().signal, Some(9));
    }

    fn is_alive(pid: i32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.trim_start().starts_with('Z'))
    }
}

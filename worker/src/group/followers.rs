//! The processes of the other ranks: started, watched, ended with this one.
//!
//! A follower that ends, for whatever reason, ends the group: [`Fate`] tells its rank, its exit status and the last that it
//! said, and the others are let go. Followers are in process groups of their own, so that an interrupt of the terminal reaches rank 0 alone, which drains.

use std::{
    io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, Command},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::Fate;
use crate::error::WorkerError;

/// A follower whose leader has let go of it may take so long to end by itself.
const PARTING: Duration = Duration::from_secs(3);
/// What a process has said is waited for so long after its end: a process of its own may hold the pipe.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The longest last words.
const MOST_WORDS: usize = 600;

/// A process that is to be started.
#[derive(Debug)]
pub struct Recruit {
    /// Its rank.
    pub rank: usize,
    /// Number of its GPU, for people.
    pub gpu: usize,
    /// The program with its arguments.
    pub command: Command,
    /// A line for its standard input.
    pub told: String,
}

/// Processes that run as long as this value lives.
#[derive(Debug)]
pub struct Followers {
    closing: CancellationToken,
}

impl Drop for Followers {
    /// Standard inputs are closed, and who does not end by that is killed.
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

impl Followers {
    /// Starts all of them; within a tokio runtime, which watches them.
    ///
    /// # Errors
    /// A program cannot be started: those before it are ended.
    pub fn start(recruits: Vec<Recruit>, fate: &Fate) -> Result<Self, WorkerError> {
        let followers = Self {
            closing: CancellationToken::new(),
        };
        for recruit in recruits {
            let Recruit {
                rank,
                gpu,
                mut command,
                told,
            } = recruit;
            let piped = [Stdio::piped(), Stdio::piped(), Stdio::piped()];
            let [stdin, stdout, stderr] = piped;
            command.stdin(stdin).stdout(stdout).stderr(stderr);
            command.process_group(0).kill_on_drop(true);
            let failed = |error: io::Error| WorkerError::retryable(format!("failed to start rank {rank}"), error);
            let mut child = command.spawn().map_err(failed)?;
            let pipes = Pipes {
                stdin: child.stdin.take(),
                told,
                words: tokio::spawn(pass_on(rank, child.stderr.take())),
                others: tokio::spawn(pass_on(rank, child.stdout.take())),
            };
            let name = format!("rank {rank} (cuda:{gpu})");
            tracing::info!(rank, gpu, pid = child.id(), "started a rank");
            tokio::spawn(watch(child, pipes, name, fate.clone(), followers.closing.clone()));
        }
        Ok(followers)
    }
}

/// The ends of a process's pipes that are here.
struct Pipes {
    stdin: Option<ChildStdin>,
    told: String,
    words: tokio::task::JoinHandle<String>,
    others: tokio::task::JoinHandle<String>,
}

/// Tells a process what it is to do, and how it ended unless it was let go.
async fn watch(mut child: Child, mut pipes: Pipes, name: String, fate: Fate, closing: CancellationToken) {
    if let Some(stdin) = &mut pipes.stdin {
        // One that has ended already does not read; how it ended is said below.
        let _ = stdin.write_all(format!("{}\n", pipes.told).as_bytes()).await;
    }
    let let_go = async {
        tokio::select! {
            () = closing.cancelled() => {}
            // Of another: this one waits for it in vain.
            _ = fate.fallen() => {}
        }
    };
    let ended = tokio::select! {
        ended = child.wait() => ended,
        () = let_go => {
            drop(pipes.stdin.take());
            if timeout(PARTING, child.wait()).await.is_err() {
                let _ = child.kill().await;
            }
            return;
        }
    };
    let words = timeout(LAST_WORDS, pipes.words).await;
    pipes.others.abort();
    let words = words.ok().and_then(Result::ok).unwrap_or_default();
    fate.fall(obituary(&name, ended, &words));
}

fn obituary(name: &str, ended: io::Result<ExitStatus>, words: &str) -> String {
    let ended = match ended {
        Ok(status) => format!("{name} ended ({status})"),
        Err(error) => format!("{name} cannot be waited for ({error})"),
    };
    if words.is_empty() {
        ended
    } else {
        format!("{ended}: {words}")
    }
}

/// Writes what a process says to standard error, each line with its rank, and gives the last line that is not empty.
async fn pass_on(rank: usize, pipe: Option<impl AsyncRead + Unpin>) -> String {
    let Some(pipe) = pipe else { return String::new() };
    let mut lines = BufReader::new(pipe).split(b'\n');
    let mut last = String::new();
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end();
        if !line.is_empty() {
            eprintln!("{}", with_rank(rank, line));
            last = line.chars().take(MOST_WORDS).collect();
        }
    }
    last
}

/// A line of a follower's log. One that is a JSON object stays one.
fn with_rank(rank: usize, line: &str) -> String {
    match line.strip_prefix('{') {
        Some(members) if members.starts_with('"') && members.ends_with('}') => format!("{{\"rank\":{rank},{members}"),
        _ => format!("rank={rank} {line}"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A shell that does this in a follower's place.
    fn recruit(rank: usize, script: &str) -> Recruit {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        Recruit {
            rank,
            gpu: rank,
            command,
            told: "the duty".to_owned(),
        }
    }

    async fn fallen(recruits: Vec<Recruit>) -> String {
        let fate = Fate::default();
        let _followers = Followers::start(recruits, &fate).expect("started");
        timeout(Duration::from_secs(20), fate.fallen()).await.expect("an end")
    }

    /// Waits until a file holds a number.
    async fn number(path: &Path) -> u32 {
        for _ in 0..500 {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            if let Ok(number) = text.trim().parse() {
                return number;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{} holds no number", path.display());
    }

    async fn ends(pid: u32) -> bool {
        for _ in 0..500 {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z") {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    #[tokio::test]
    async fn a_follower_that_ends_is_named_with_its_status_and_its_last_words() {
        let why = fallen(vec![
            recruit(1, "cat >/dev/null"),
            recruit(2, "echo first >&2; echo 'error: no memory' >&2; echo; exit 78"),
        ])
        .await;
        assert_eq!(why, "rank 2 (cuda:2) ended (exit status: 78): error: no memory");
    }

    #[tokio::test]
    async fn a_follower_that_is_killed_and_one_that_ends_well_are_named_too() {
        assert!(
            fallen(vec![recruit(1, "kill -9 $$")])
                .await
                .contains("signal: 9 (SIGKILL)")
        );
        assert_eq!(
            fallen(vec![recruit(1, "true")]).await,
            "rank 1 (cuda:1) ended (exit status: 0)"
        );
    }

    #[tokio::test]
    async fn a_follower_reads_its_duty_from_its_standard_input() {
        let why = fallen(vec![recruit(1, "read line; echo \"it is $line\" >&2; exit 3")]).await;
        assert!(why.ends_with("(exit status: 3): it is the duty"), "{why}");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error_and_ends_the_others() {
        let directory = tempfile::tempdir().expect("a directory");
        let pid = directory.path().join("pid");
        let script = format!("echo $$ > {}; cat >/dev/null", pid.display());
        let missing = Recruit {
            command: Command::new("/nowhere/flotilla-worker"),
            ..recruit(2, "")
        };
        let error = Followers::start(vec![recruit(1, &script), missing], &Fate::default()).expect_err("no program");
        assert_eq!(error.to_string(), "failed to start rank 2");
        assert!(ends(number(&pid).await).await);
    }

    #[tokio::test]
    async fn followers_end_with_the_leader_also_those_that_do_not_listen() {
        let directory = tempfile::tempdir().expect("a directory");
        let (well, badly) = (directory.path().join("1"), directory.path().join("2"));
        let listens = format!("echo $$ > {}; cat >/dev/null", well.display());
        let does_not = format!("trap '' TERM; echo $$ > {}; while :; do sleep 1; done", badly.display());
        let fate = Fate::default();
        let followers = Followers::start(vec![recruit(1, &listens), recruit(2, &does_not)], &fate).expect("started");
        let pids = (number(&well).await, number(&badly).await);
        drop(followers);
        assert!(ends(pids.0).await && ends(pids.1).await);
        // Whoever was let go has not failed.
        assert!(timeout(Duration::from_millis(50), fate.fallen()).await.is_err());
    }

    #[tokio::test]
    async fn one_that_ends_takes_the_others_along_while_nobody_lets_go_of_them() {
        let directory = tempfile::tempdir().expect("a directory");
        let pid = directory.path().join("pid");
        let other = format!("echo $$ > {}; cat >/dev/null", pid.display());
        let ends_after = format!("while [ ! -s {} ]; do sleep 0.05; done; exit 1", pid.display());
        let fate = Fate::default();
        let _followers = Followers::start(vec![recruit(1, &other), recruit(2, &ends_after)], &fate).expect("started");
        assert!(fate.fallen().await.starts_with("rank 2"));
        assert!(ends(number(&pid).await).await);
    }

    #[test]
    fn lines_carry_the_rank_and_json_stays_json() {
        assert_eq!(with_rank(1, "error: no"), "rank=1 error: no");
        let line = with_rank(3, r#"{"level":"INFO","fields":{"message":"device"}}"#);
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!((&value["rank"], &value["level"]), (&3.into(), &"INFO".into()));
        assert_eq!(with_rank(1, "{ no JSON }"), "rank=1 { no JSON }");
    }
}

//! The real kubectl, in the namespace of a check.

use std::process::Stdio;

use anyhow::{Context, ensure};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

use super::ground::Ground;

/// What kubectl printed.
#[derive(Debug)]
pub struct Printed {
    /// Exit code; -1 after a signal.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// A kubectl that goes on printing.
#[derive(Debug)]
pub struct Printing {
    _child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Printing {
    /// The next line of its standard output.
    pub async fn next(&mut self) -> anyhow::Result<String> {
        self.lines.next_line().await?.context("kubectl ended")
    }
}

/// kubectl for one check.
#[derive(Debug)]
pub struct Kubectl<'a> {
    at: &'a Ground,
    environment: Vec<(&'static str, String)>,
}

impl<'a> Kubectl<'a> {
    pub(super) fn new(at: &'a Ground) -> Self {
        Self {
            at,
            environment: Vec::new(),
        }
    }

    /// With an environment variable.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    fn start(&self, arguments: &[&str]) -> anyhow::Result<Child> {
        let server = &self.at.server;
        let program = server.kubectl.as_ref().context("kubectl checks need kubectl")?;
        let child = Command::new(program)
            .args(["--namespace", &self.at.namespace])
            .args(arguments)
            .env("KUBECONFIG", &server.kubeconfig)
            .env("HOME", server.home.path())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        Ok(child)
    }

    /// Starts it and reads what it prints line by line; it ends with the value.
    pub fn lines(&self, arguments: &[&str]) -> anyhow::Result<Printing> {
        let mut child = self.start(arguments)?;
        let out = child.stdout.take().context("standard output")?;
        Ok(Printing {
            _child: child,
            lines: BufReader::new(out).lines(),
        })
    }

    /// Runs it with `input` on its standard input, whatever comes of it.
    pub async fn run(&self, arguments: &[&str], input: &str) -> anyhow::Result<Printed> {
        let mut child = self.start(arguments)?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await.ok();
        }
        let output = child.wait_with_output().await?;
        Ok(Printed {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs it; it has to succeed. Returns what it printed.
    pub async fn ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.ok_with(arguments, "").await
    }

    /// Runs it with `input`; it has to succeed.
    pub async fn ok_with(&self, arguments: &[&str], input: &str) -> anyhow::Result<String> {
        let printed = self.run(arguments, input).await?;
        ensure!(
            printed.code == 0,
            "kubectl {}: {}{}",
            arguments.join(" "),
            printed.out,
            printed.err
        );
        Ok(printed.out)
    }

    /// Runs it with `input`; it has to fail. Returns its complaint.
    pub async fn refused(&self, arguments: &[&str], input: &str) -> anyhow::Result<String> {
        let printed = self.run(arguments, input).await?;
        ensure!(
            printed.code != 0,
            "kubectl {} did not fail: {}",
            arguments.join(" "),
            printed.out
        );
        Ok(printed.err)
    }
}

//! A server that is to share its model with other processes, on a machine where it cannot.

#![allow(clippy::expect_used, reason = "helpers of tests")]

mod support;

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use flotilla_api::{names::exit, role::Serve};
use flotilla_worker::error::chain;
use support::{Server, spec};

#[tokio::test]
async fn a_cpu_refuses_to_share_a_model_before_it_is_loaded() {
    let mut server = Server::start(Serve {
        tensor_parallel: 2,
        ..spec()
    })
    .await;
    let role = (&mut server.role).await.expect("no panic");
    let error = role.expect_err("one CPU has the whole model");
    assert_eq!(error.exit_code(), exit::PERMANENT);
    let text = chain(&error);
    assert!(
        text.contains("2 GPUs are to share the model, but it would run on the CPU (asked for)"),
        "{text}"
    );
}

/// The program as a follower that is told this.
fn follower(rank: &str, told: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flotilla-worker"));
    command.args(["follow", "--rank", rank]);
    let piped = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = piped.spawn().expect("starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    writeln!(stdin, "{told}").expect("it reads");
    child.wait_with_output().expect("ends")
}

fn refusal(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(exit::PERMANENT), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_follower_that_nobody_leads_says_who_starts_it() {
    let text = refusal(&follower("1", ""));
    assert!(
        text.contains("`follow` is started by a server of several GPUs"),
        "{text}"
    );
}

#[test]
fn a_follower_refuses_the_duty_of_another() {
    let duty = r#"{"rank":2,"size":3,"address":"127.0.0.1:1","token":"t","gpu":2,"directory":"/","dtype":"bf16",
        "maxTokens":8,"maxRows":1,"maxStepTokens":8,"blockSize":16}"#;
    let text = refusal(&follower("1", &duty.replace('\n', "")));
    assert!(text.contains("rank 1 was started with the duty of rank 2"), "{text}");
}

#[test]
fn the_command_line_takes_one_to_eight_gpus() {
    for wrong in ["0", "9", "two"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flotilla-worker"));
        let refused = command
            .args(["serve", "--model", ".", "--tensor-parallel", wrong])
            .output();
        let refused = refused.expect("runs");
        assert_eq!(refused.status.code(), Some(2), "{wrong}: {refused:?}");
    }
}

//! The thread of an engine, its callers, and weights that come while it runs.

use std::time::Duration;

use flotilla_engine::{EngineError, EngineHandle, EngineThread, Limits, LoadPolicy, Tokens, thread::Output};

use super::{endless, expected, expected_with, pool::Toy, request};

fn tokens(mut output: Tokens) -> Result<Vec<(u32, String)>, EngineError> {
    let mut ids = Vec::new();
    while let Some(output) = output.blocking_recv() {
        match output {
            Output::Token { token, version, .. } => ids.push((token.id, version.to_string())),
            Output::Failed(error) => return Err(error),
        }
    }
    Ok(ids)
}

fn ids(output: Tokens) -> Vec<u32> {
    tokens(output).expect("ends").into_iter().map(|(id, _)| id).collect()
}

fn spawn(toy: Toy, limits: Limits, max_queue: usize) -> (EngineThread, EngineHandle<Toy>) {
    EngineThread::spawn(toy, "v0", limits, max_queue).expect("spawns")
}

#[test]
fn the_thread_serves_many_callers_and_ends_with_its_last_handle() {
    let (thread, handle) = spawn(Toy::default(), Limits::default(), 64);
    let callers: Vec<_> = (0..16)
        .map(|seed| {
            let handle = handle.clone();
            std::thread::spawn(move || {
                let request = request(&[1, 2, 3], 1, 20, seed);
                let output = handle.submit(request.clone()).expect("has room");
                assert_eq!(ids(output), expected(&request, 0));
            })
        })
        .collect();
    for caller in callers {
        caller.join().expect("holds");
    }
    assert_eq!(handle.queued(), 0);
    let health = handle.health();
    assert!(health.borrow().alive);
    drop(handle);
    thread.join();
    assert!(!health.borrow().alive);
}

#[test]
fn a_full_queue_refuses() {
    let (_thread, handle) = spawn(Toy::default(), Limits::default(), 0);
    let refused = handle.submit(request(&[1], 1, 4, 0)).expect_err("nobody may wait");
    assert_eq!((refused.waiting, refused.limit), (0, 0));
}

#[test]
fn a_failed_step_ends_its_requests_and_not_the_thread() {
    let toy = Toy {
        fail_at: Some(10),
        ..Toy::default()
    };
    let (_thread, handle) = spawn(toy, Limits::default(), 8);
    let failed = tokens(handle.submit(request(&[10], 1, 4, 0)).expect("has room"));
    assert!(failed.expect_err("fails").to_string().contains("failed to compute"));
    let fine = endless(&[1], 1, 1);
    assert_eq!(ids(handle.submit(fine).expect("has room")).len(), 1);
}

#[test]
fn a_thread_whose_device_is_lost_ends_and_what_comes_then_fails() {
    let toy = Toy {
        fail_at: Some(10),
        lost: true,
        ..Toy::default()
    };
    let (thread, handle) = spawn(toy, Limits::default(), 8);
    let failed = tokens(handle.submit(request(&[10], 1, 4, 0)).expect("has room"));
    assert!(failed.expect_err("fails").to_string().contains("failed to compute"));
    thread.join();
    assert!(!handle.health().borrow().alive);
    let late = tokens(handle.submit(endless(&[1], 1, 1)).expect("has room"));
    assert!(matches!(late, Err(EngineError::Stopped)), "{late:?}");
}

/// Loads weights with salt 1 as `v1` while a request runs that takes a while and another one waits behind it.
fn load_while_running(policy: LoadPolicy) -> [Result<Vec<(u32, String)>, EngineError>; 2] {
    let limits = Limits {
        max_rows: 1,
        ..Limits::default()
    };
    let toy = Toy {
        pause: Duration::from_millis(2),
        ..Toy::default()
    };
    let (_thread, handle) = spawn(toy, limits, 8);
    let mut first = handle.submit(endless(&[1, 2, 3], 1, 40)).expect("has room");
    let second = handle.submit(endless(&[1, 2, 4], 1, 4)).expect("has room");
    let begun = first.blocking_recv();
    assert!(matches!(begun, Some(Output::Token { .. })));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let apply = Box::new(|toy: &mut Toy| {
        toy.salt = 1;
        Ok(())
    });
    runtime
        .block_on(handle.load_weights("v1", policy, apply))
        .expect("loads");
    [tokens(first), tokens(second)]
}

#[test]
fn loading_by_abort_ends_what_runs_and_what_waits() {
    for outcome in load_while_running(LoadPolicy::Abort) {
        let error = outcome.expect_err("aborted");
        assert!(
            matches!(&error, EngineError::Aborted(version) if version == "v1"),
            "{error}"
        );
    }
}

#[test]
fn loading_by_finish_lets_what_runs_end_with_the_old_weights() {
    let [first, second] = load_while_running(LoadPolicy::Finish).map(|outcome| outcome.expect("ends"));
    assert_eq!(first.len(), 39);
    assert!(first.iter().all(|(_, version)| version == "v0"));
    assert!(second.iter().all(|(_, version)| version == "v1"));
    let drawn: Vec<_> = second.into_iter().map(|(id, _)| id).collect();
    assert_eq!(drawn, expected_with(&endless(&[1, 2, 4], 1, 4), 0, |_| 1));
}

#[test]
fn loading_by_keep_goes_on_with_the_tokens_that_were_drawn() {
    let [first, second] = load_while_running(LoadPolicy::Keep).map(|outcome| outcome.expect("ends"));
    let old = 1 + first.iter().filter(|(_, version)| version == "v0").count();
    assert!(old < 40, "the weights came while it ran");
    let whole = expected_with(&endless(&[1, 2, 3], 1, 40), 0, |token| u64::from(token >= old));
    let drawn: Vec<_> = first.into_iter().map(|(id, _)| id).collect();
    assert_eq!(drawn, whole[1..]);
    assert!(second.iter().all(|(_, version)| version == "v1"));
}

#[test]
fn a_request_that_does_not_fit_is_refused_and_the_thread_goes_on() {
    let limits = Limits {
        kv_blocks: 1,
        ..Limits::default()
    };
    let (_thread, handle) = spawn(Toy::default(), limits, 8);
    let refused = tokens(handle.submit(endless(&[1; 17], 1, 1)).expect("has room"));
    assert!(
        refused
            .expect_err("is refused")
            .to_string()
            .contains("the key-value cache has 1")
    );
    assert_eq!(ids(handle.submit(endless(&[1; 16], 1, 1)).expect("has room")).len(), 1);
}

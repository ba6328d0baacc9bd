//! How long a pass computes: its whole time without what it waits for (the API server, workers, its turn).

use std::{
    future::poll_fn,
    pin::pin,
    time::{Duration, Instant},
};

/// Runs `future` and adds up the time inside its polls. Threads that the kernel takes off a processor meanwhile count as
/// computing, so on a machine that is short of processors this is an upper bound.
pub async fn measured<F: Future>(future: F) -> (F::Output, Duration) {
    let mut future = pin!(future);
    let mut spent = Duration::ZERO;
    let output = poll_fn(|context| {
        let begun = Instant::now();
        let poll = future.as_mut().poll(context);
        spent += begun.elapsed();
        poll
    })
    .await;
    (output, spent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waiting_is_not_computing() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let others = Duration::from_millis(20);
        // What others do while the future waits runs between its polls.
        let busy = async {
            std::thread::sleep(others);
            sender.send(()).expect("somebody waits");
        };
        let begun = Instant::now();
        let ((answer, spent), ()) = tokio::join!(measured(receiver), busy);
        answer.expect("an answer");
        assert!(spent + others <= begun.elapsed());
    }

    #[tokio::test]
    async fn computing_before_and_after_a_wait_is_added_up() {
        let work = || std::thread::sleep(Duration::from_millis(2));
        let body = async {
            work();
            tokio::task::yield_now().await;
            work();
        };
        let ((), spent) = measured(body).await;
        assert!(spent >= Duration::from_millis(4), "{spent:?}");
    }
}

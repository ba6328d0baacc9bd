//! Candidates against an API server that holds one Lease and knows versions.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use http::{Method, Request, Response};
use kube::client::Body;
use serde_json::{Value, json};

use super::*;

/// One Lease and who wrote it, in order.
#[derive(Default)]
struct Server {
    lease: Option<Value>,
    version: u64,
    writers: Vec<String>,
    deaf: bool,
}

type Shared = Arc<Mutex<Server>>;

impl Server {
    fn answer(&mut self, method: &Method, body: &Value) -> (u16, Value) {
        let given = body.pointer("/metadata/resourceVersion").cloned();
        let current = self
            .lease
            .as_ref()
            .map(|lease| lease["metadata"]["resourceVersion"].clone());
        match *method {
            Method::GET => self.lease.clone().map_or_else(|| refusal(404), |lease| (200, lease)),
            Method::POST if current.is_some() => refusal(409),
            Method::PUT if current.is_none() => refusal(404),
            Method::PUT if current != given => refusal(409),
            _ => {
                self.version += 1;
                let mut lease = body.clone();
                lease["metadata"]["resourceVersion"] = json!(self.version.to_string());
                let holder = lease.pointer("/spec/holderIdentity").and_then(Value::as_str);
                self.writers.push(holder.unwrap_or("nobody").to_owned());
                self.lease = Some(lease.clone());
                (200, lease)
            }
        }
    }
}

fn refusal(code: u16) -> (u16, Value) {
    let reason = if code == 404 { "NotFound" } else { "Conflict" };
    (
        code,
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": reason, "code": code}),
    )
}

fn lock(server: &Shared) -> std::sync::MutexGuard<'_, Server> {
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

fn client(server: &Shared) -> Client {
    let server = Arc::clone(server);
    let service = tower::service_fn(move |request: Request<Body>| {
        let server = Arc::clone(&server);
        async move {
            let method = request.method().clone();
            let bytes = request.into_body().collect_bytes().await.unwrap_or_default();
            let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            if lock(&server).deaf {
                std::future::pending::<()>().await;
            }
            let (code, answer) = lock(&server).answer(&method, &body);
            let response = Response::builder()
                .status(code)
                .body(Body::from(answer.to_string().into_bytes()));
            Ok::<_, Infallible>(response.expect("a response"))
        }
    });
    Client::new(service, "default")
}

/// A lease duration of two seconds: the Lease counts whole ones.
fn config(identity: &str) -> ElectionConfig {
    ElectionConfig {
        lease_duration: Duration::from_secs(2),
        renew_deadline: Duration::from_millis(400),
        retry_period: Duration::from_millis(20),
        ..ElectionConfig::new(identity, "flotilla-system")
    }
}

fn candidate(server: &Shared, identity: &str) -> (Candidate, WriteGuard) {
    let guard = WriteGuard::default();
    (Candidate::new(client(server), config(identity), guard.clone()), guard)
}

fn may_write(guard: &WriteGuard) -> bool {
    guard.allows(&Method::POST, Moment::now())
}

#[tokio::test]
async fn of_two_candidates_that_start_together_one_leads() {
    let server = Shared::default();
    let ((a, guard_a), (b, guard_b)) = (candidate(&server, "a"), candidate(&server, "b"));
    let (mut first, second) = tokio::select! {
        term = a.clone().campaign() => (term, b),
        term = b.clone().campaign() => (term, a),
    };
    assert!(may_write(&guard_a) != may_write(&guard_b));
    // The other one goes on waiting while the first renews.
    tokio::select! {
        _ = second.campaign() => panic!("two leaders"),
        lost = first.hold() => panic!("{lost}"),
        () = tokio::time::sleep(Duration::from_millis(300)) => {}
    }
}

#[tokio::test]
async fn a_released_lease_is_taken_without_waiting_for_its_end() {
    let server = Shared::default();
    let ((a, guard_a), (b, guard_b)) = (candidate(&server, "a"), candidate(&server, "b"));
    let term = a.campaign().await;
    term.release().await;
    assert!(!may_write(&guard_a));
    // Without the release this would wait for the whole lease duration, and the first look would say so.
    let mut seen = None;
    assert_eq!(b.attempt(&mut seen).await.expect("an answer"), None);
    assert!(!may_write(&guard_b), "a term begins only with campaign");
    assert_eq!(lock(&server).writers, ["a", "nobody", "b"]);
}

#[tokio::test]
async fn a_leader_whose_lease_was_taken_is_deposed_and_cannot_write() {
    let server = Shared::default();
    let (a, guard) = candidate(&server, "a");
    let mut term = a.campaign().await;
    let lease = {
        let server = lock(&server);
        serde_json::from_value(server.lease.clone().expect("a lease")).expect("a Lease")
    };
    let (b, _) = candidate(&server, "b");
    b.replace(Some(&lease)).await.expect("written");
    let Lost::Taken { holder, .. } = term.hold().await else {
        panic!("not taken");
    };
    assert_eq!(holder, "b");
    assert!(!may_write(&guard));
}

#[tokio::test]
async fn a_leader_without_answers_stops_writing_at_the_deadline() {
    let server = Shared::default();
    let (a, guard) = candidate(&server, "a");
    let mut term = a.campaign().await;
    lock(&server).deaf = true;
    assert!(matches!(term.hold().await, Lost::Deadline { .. }));
    assert!(!may_write(&guard));
}

#[tokio::test]
async fn a_leader_that_stood_still_past_the_deadline_does_not_even_renew() {
    let server = Shared::default();
    let (a, guard) = candidate(&server, "a");
    let mut term = a.campaign().await;
    // What SIGSTOP and SIGCONT do: nothing of this process runs for longer than the deadline.
    std::thread::sleep(Duration::from_millis(450));
    assert!(!may_write(&guard));
    assert!(matches!(term.hold().await, Lost::Deadline { .. }));
    assert_eq!(lock(&server).writers, ["a"]);
}

#[tokio::test]
async fn a_label_on_the_lease_does_not_end_a_term() {
    let server = Shared::default();
    let (a, _) = candidate(&server, "a");
    let mut term = a.campaign().await;
    {
        let mut server = lock(&server);
        server.version += 1;
        let version = server.version.to_string();
        let lease = server.lease.as_mut().expect("a lease");
        lease["metadata"]["resourceVersion"] = json!(version);
        lease["metadata"]["labels"] = json!({"team": "fleet"});
    }
    tokio::select! {
        lost = term.hold() => panic!("{lost}"),
        () = tokio::time::sleep(Duration::from_millis(150)) => {}
    }
    let server = lock(&server);
    assert!(server.writers.len() > 1, "renewed after the edit");
    assert_eq!(
        server.lease.as_ref().expect("a lease")["metadata"]["labels"]["team"],
        "fleet"
    );
}

//! Refuses writes to the API server once this process may no longer be the leader.
//!
//! An elected leader can be frozen between two lines of code and go on long after another one took over. So what counts is
//! not what it believes but the clock, read again for each request: a write leaves only before the deadline of the lease.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use http::{Method, Request, Response};
use kube::client::Body;
use tower::{BoxError, Layer, Service};

use super::moment::Moment;

/// Until when this process may write. Clones share one deadline.
#[derive(Clone, Debug, Default)]
pub struct WriteGuard {
    until: Arc<AtomicU64>,
}

/// A write that was refused because this process is not, or no longer surely, the leader.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{method} {path} was not sent: this operator does not hold the lease any more")]
pub struct Fenced {
    /// Method of the request.
    pub method: String,
    /// Path of the request.
    pub path: String,
}

impl WriteGuard {
    /// Lets writes pass until `deadline`.
    pub fn permit(&self, deadline: Moment) {
        self.until.store(deadline.to_nanos(), Ordering::SeqCst);
    }

    /// Lets no write pass.
    pub fn revoke(&self) {
        self.permit(Moment::NEVER);
    }

    /// Whether a request with this method may be sent at `now`. Reads always may.
    pub fn allows(&self, method: &Method, now: Moment) -> bool {
        method.is_safe() || now < Moment::from_nanos(self.until.load(Ordering::SeqCst))
    }
}

impl<S> Layer<S> for WriteGuard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Guarded {
            inner,
            guard: self.clone(),
        }
    }
}

/// A client's service behind a [`WriteGuard`].
#[derive(Clone, Debug)]
pub struct Guarded<S> {
    inner: S,
    guard: WriteGuard,
}

type Answer<B> = Pin<Box<dyn Future<Output = Result<Response<B>, BoxError>> + Send>>;

impl<S, B> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: 'static,
{
    type Response = Response<B>;
    type Error = BoxError;
    type Future = Answer<B>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if !self.guard.allows(request.method(), Moment::now()) {
            let refused = Fenced {
                method: request.method().to_string(),
                path: request.uri().path().to_owned(),
            };
            return Box::pin(async move { Err(refused.into()) });
        }
        let answer = self.inner.call(request);
        Box::pin(async move { answer.await.map_err(Into::into) })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use tower::{ServiceExt as _, service_fn};

    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment::NEVER.after(Duration::from_secs(seconds))
    }

    #[test]
    fn a_write_passes_only_before_the_deadline_and_a_read_always() {
        let guard = WriteGuard::default();
        assert!(!guard.allows(&Method::PATCH, at(1)), "before the first term");
        guard.permit(at(10));
        for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
            assert!(guard.allows(&method, at(9)), "{method}");
            assert!(!guard.allows(&method, at(10)), "{method}");
        }
        assert!(guard.allows(&Method::GET, at(11)));
        guard.revoke();
        assert!(!guard.allows(&Method::POST, at(9)));
    }

    #[tokio::test]
    async fn a_refused_write_never_reaches_the_connection() {
        let sent = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&sent);
        let connection = service_fn(move |_: Request<Body>| {
            count.fetch_add(1, Ordering::SeqCst);
            async { Ok::<_, Infallible>(Response::new(Body::empty())) }
        });
        let guard = WriteGuard::default();
        let client = guard.layer(connection);
        let request = |method: Method| {
            let request = Request::builder().method(method).uri("/api/v1/namespaces/lab/pods");
            request.body(Body::empty()).expect("a request")
        };
        let refused = client.clone().oneshot(request(Method::POST)).await.expect_err("fenced");
        assert!(
            refused
                .to_string()
                .starts_with("POST /api/v1/namespaces/lab/pods was not sent")
        );
        assert_eq!(sent.load(Ordering::SeqCst), 0);
        guard.permit(Moment::now().after(Duration::from_secs(60)));
        client.clone().oneshot(request(Method::POST)).await.expect("sent");
        client.oneshot(request(Method::GET)).await.expect("sent");
        assert_eq!(sent.load(Ordering::SeqCst), 2);
    }
}

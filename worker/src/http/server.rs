//! Connections: accepted while there is room, with or without TLS, HTTP/1.1 or HTTP/2, and ended in good order.

use std::{pin::pin, sync::Arc, time::Duration};

use axum::{Router, body::Body};
use hyper::{Request, body::Incoming};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use super::first_bytes::FirstBytes;

/// After a failure to accept (no file descriptors are left, say) nothing is accepted for so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// An idle HTTP/2 connection is asked after so long whether its client is still there, and has as long to answer.
const PING: Duration = Duration::from_secs(30);

/// What connections may take, each and all together.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; more wait in the kernel's queue.
    pub connections: usize,
    /// From the beginning of a request's head, or of an idle wait for one, to its end.
    pub head_time: Duration,
    /// Bytes of a request's head.
    pub head_bytes: usize,
    /// A TLS handshake.
    pub handshake_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            head_time: Duration::from_secs(60),
            head_bytes: 64 << 10,
            handshake_time: Duration::from_secs(10),
        }
    }
}

/// How connections are taken.
#[derive(Clone, Default)]
pub struct Settings {
    /// Plain HTTP if None.
    pub tls: Option<TlsAcceptor>,
    /// What they may take.
    pub limits: Limits,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("tls", &self.tls.is_some())
            .field("limits", &self.limits)
            .finish()
    }
}

/// Answers on `listener` until `stop`, then lets open connections end for at most `patience` and cuts the others off.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    settings: Settings,
    stop: CancellationToken,
    patience: Duration,
) {
    let places = Arc::new(Semaphore::new(settings.limits.connections));
    let (cut, connections) = (CancellationToken::new(), TaskTracker::new());
    while let Some((stream, place)) = next(&listener, &places, &stop).await {
        let (app, settings, stop, cut) = (app.clone(), settings.clone(), stop.clone(), cut.clone());
        connections.spawn(async move {
            tokio::select! {
                () = connection(stream, app, settings, stop) => {}
                () = cut.cancelled() => {}
            }
            drop(place);
        });
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(patience, connections.wait()).await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "connections were still open at the end"
        );
        cut.cancel();
        connections.wait().await;
    }
}

/// The next connection, once there is room for it; None after `stop`.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    stop: &CancellationToken,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let accepted = async {
        // The semaphore is never closed.
        let place = places.clone().acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((stream, place)),
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => None,
        accepted = accepted => accepted,
    }
}

async fn connection(stream: TcpStream, app: Router, settings: Settings, stop: CancellationToken) {
    let limits = settings.limits;
    // Tokens of a stream are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let Some(acceptor) = settings.tls else {
        return drive(FirstBytes::new(stream, limits.head_time), app, limits, stop).await;
    };
    match tokio::time::timeout(limits.handshake_time, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => drive(FirstBytes::new(stream, limits.head_time), app, limits, stop).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

/// Answers what comes over one connection; after `stop` the requests that have begun, and no others.
async fn drive<S>(stream: S, app: Router, limits: Limits, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_time)
        .max_buf_size(limits.head_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(limits.head_bytes).unwrap_or(u32::MAX))
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let app = app.map_request(|request: Request<Incoming>| request.map(Body::new));
    let service = TowerToHyperService::new(app);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended: {error}");
    }
}

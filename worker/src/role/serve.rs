//! Role `serve`.

use flotilla_api::role::Serve;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{context::Context, error::WorkerError, http};

/// Serves until it is asked to stop.
pub async fn run(
    _context: Context,
    _spec: Serve,
    common: http::Common,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    http::serve(listener, http::common(common), shutdown).await;
    Ok(())
}

//! One HTTP server at the address that all pods of a fleet share.

use std::net::{Ipv4Addr, SocketAddr};

use axum::{Router, http::header::CONTENT_TYPE, response::IntoResponse as _, routing::get};
use tokio::net::TcpListener;

use super::HollowError;

/// Port at which pods are asked.
const PORT: u16 = 8080;

/// Takes the address.
pub async fn bind(ip: Ipv4Addr) -> Result<TcpListener, HollowError> {
    let address = SocketAddr::from((ip, PORT));
    let listener = TcpListener::bind(address).await;
    listener.map_err(|source| HollowError::Listen { address, source })
}

/// Answers `GET /progress` with `progress` and agrees to everything else that a worker may be told, for ever.
pub async fn serve(listener: TcpListener, progress: String) {
    let answer = move || {
        let body = progress.clone();
        async move { ([(CONTENT_TYPE, "application/json")], body).into_response() }
    };
    let agree = async || ([(CONTENT_TYPE, "application/json")], "{}");
    let router = Router::new().route("/progress", get(answer)).fallback(agree);
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "answering for hollow pods ended");
    }
}

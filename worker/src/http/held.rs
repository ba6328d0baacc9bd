//! Things that an answer holds until its last byte is on its way: places in queues, counts of what is being answered.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes},
    response::Response,
};
use hyper::body::{Frame, SizeHint};

/// A body and what it holds.
struct Held<G> {
    body: Body,
    _held: G,
}

/// The same answer, which holds `held` until it ended or its client has gone.
pub fn hold<G: Send + Unpin + 'static>(response: Response, held: G) -> Response {
    response.map(|body| Body::new(Held { body, _held: held }))
}

impl<G: Unpin> hyper::body::Body for Held<G> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

//! A connection on which nothing comes must not be kept. The server reads its first bytes to tell HTTP/1.1 and HTTP/2 apart
//! before any timeout of theirs runs; until that is told, this one does.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

/// What a client of HTTP/2 sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream that fails if it is not told in time which protocol it carries.
#[derive(Debug)]
pub struct FirstBytes<S> {
    inner: S,
    /// Bytes of the preface that have come; None once the protocol is told.
    matched: Option<usize>,
    deadline: Pin<Box<Sleep>>,
}

impl<S> FirstBytes<S> {
    /// The stream, which has so long.
    pub fn new(inner: S, patience: Duration) -> Self {
        Self {
            inner,
            matched: Some(0),
            deadline: Box::pin(tokio::time::sleep(patience)),
        }
    }

    fn look_at(&mut self, bytes: &[u8]) {
        let Some(matched) = self.matched else { return };
        let rest = &PREFACE[matched..];
        let common = bytes.len().min(rest.len());
        self.matched = (common < rest.len() && bytes[..common] == rest[..common]).then_some(matched + common);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for FirstBytes<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.inner).poll_read(context, buffer) {
            Poll::Ready(Ok(())) => {
                self.look_at(&buffer.filled()[before..]);
                Poll::Ready(Ok(()))
            }
            Poll::Pending if self.matched.is_some() => self
                .deadline
                .as_mut()
                .poll(context)
                .map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "no request came"))),
            other => other,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FirstBytes<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pieces: &[&[u8]]) -> bool {
        let mut stream = FirstBytes {
            inner: (),
            matched: Some(0),
            deadline: Box::pin(tokio::time::sleep(Duration::ZERO)),
        };
        pieces.iter().for_each(|piece| stream.look_at(piece));
        stream.matched.is_none()
    }

    #[tokio::test]
    async fn the_protocol_is_told_by_the_whole_preface_or_by_what_is_not_in_it() {
        assert!(told(&[PREFACE]) && told(&[&PREFACE[..3], &PREFACE[3..], b"more"]));
        assert!(told(&[b"GET / HTTP/1.1"]) && told(&[b"P", b"OST"]));
        assert!(!told(&[]) && !told(&[b"P"]) && !told(&[b"PRI", b" * HT"]));
    }
}

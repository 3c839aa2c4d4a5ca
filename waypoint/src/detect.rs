//! What a client speaks, by its first bytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// HTTP/1.1 or 1.0.
    Http1,
    /// HTTP/2, without TLS.
    Http2,
    /// Something else, or nothing yet.
    Other,
}

/// How an HTTP/2 connection begins. Source: RFC 9113 §3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest method that counts as one, bytes; registered ones have at most 17.
const MAX_METHOD: usize = 24;

/// What the first bytes of a connection are; none while they may be the beginning of several.
#[must_use]
pub fn spoken(bytes: &[u8]) -> Option<Spoken> {
    if bytes.starts_with(PREFACE) {
        return Some(Spoken::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    // An empty line in front of a request is passed over (RFC 9112 §2.2).
    if bytes == b"\r" {
        return None;
    }
    let bytes = bytes.strip_prefix(b"\r\n").unwrap_or(bytes);
    let method =
        bytes.iter().take_while(|byte| byte.is_ascii_uppercase() || **byte == b'-').count();
    if method > MAX_METHOD {
        return Some(Spoken::Other);
    }
    match (method, bytes.get(method), bytes.get(method + 1)) {
        (_, None, _) | (1.., Some(b' '), None) => None,
        (1.., Some(b' '), Some(b'/' | b'*' | b'h' | b'H')) => Some(Spoken::Http1),
        // CONNECT asks for an authority.
        (7, Some(b' '), Some(_)) if bytes.starts_with(b"CONNECT") => Some(Spoken::Http1),
        _ => Some(Spoken::Other),
    }
}

/// Reads until it is known what is spoken, at most for `patience`; what was read is read again from the result.
///
/// # Errors
/// When the connection fails.
pub(crate) async fn detect<S: AsyncRead + Unpin>(
    mut stream: S,
    patience: Duration,
) -> io::Result<(Spoken, Rewound<S>)> {
    let mut read = BytesMut::with_capacity(1024);
    let find = async {
        loop {
            if stream.read_buf(&mut read).await? == 0 {
                return Ok(Spoken::Other);
            }
            if let Some(found) = spoken(&read) {
                return Ok::<_, io::Error>(found);
            }
        }
    };
    let found = match tokio::time::timeout(patience, find).await {
        Ok(found) => found?,
        Err(_elapsed) => Spoken::Other,
    };
    Ok((found, Rewound { read, stream }))
}

/// A stream of which the first bytes are read again.
pub(crate) struct Rewound<S> {
    read: BytesMut,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, into);
        }
        let bytes = self.read.len().min(into.remaining());
        into.put_slice(&self.read[..bytes]);
        self.read.advance(bytes);
        if self.read.is_empty() {
            self.read = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_are_told_by_their_first_bytes() {
        for (bytes, found) in [
            (&b""[..], None),
            (b"P", None),
            (b"\r", None),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nxx", Some(Spoken::Http2)),
            (b"PRI * HTTP/2.0\r\n\r\nSM", None),
            (b"PRI * HTTP/1.1\r\n", Some(Spoken::Http1)),
            (b"PUT", None),
            (b"GET ", None),
            (b"GET /", Some(Spoken::Http1)),
            (b"\r\nGET /", Some(Spoken::Http1)),
            (b"OPTIONS *", Some(Spoken::Http1)),
            (b"VERSION-CONTROL /x", Some(Spoken::Http1)),
            (b"GET http://a/", Some(Spoken::Http1)),
            (b"CONNECT a:1", Some(Spoken::Http1)),
            (b"GET x", Some(Spoken::Other)),
            (b"\x16\x03\x01", Some(Spoken::Other)),
            (b"get /", Some(Spoken::Other)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", Some(Spoken::Other)),
            (b"\0", Some(Spoken::Other)),
        ] {
            assert_eq!(spoken(bytes), found, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}

//! HTTP/1 to the letter: the bytes of a connection are followed beside the parser, and what servers are known to read in two ways
//! ends the connection before a server sees it. Source: RFC 9112 §2.2, §5, §6, §7.1.
//!
//! Followed are only line ends, the names and values that frame a message, and the lengths of bodies. Everything else is the
//! parser's.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use mesh_telemetry::metric;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest line of a head or of a chunk's size, bytes.
const MAX_LINE: usize = 64 * 1024;

/// What is wrong with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ambiguous {
    /// A line feed without its carriage return, or the other way round.
    #[error("a line that does not end in CRLF")]
    LineEnd,
    /// A line of a head that begins with a blank.
    #[error("a folded header line")]
    Folded,
    /// A header's name with something before its colon, or none.
    #[error("a malformed header name")]
    Name,
    /// `Content-Length` that is not one number, or given twice.
    #[error("a Content-Length that is not one number")]
    Length,
    /// `Transfer-Encoding` that is not `chunked` alone.
    #[error("a Transfer-Encoding other than chunked")]
    Encoding,
    /// Both of them.
    #[error("both Content-Length and Transfer-Encoding")]
    Both,
    /// A chunk's size that is no number.
    #[error("a malformed chunk")]
    Chunk,
    /// A line beyond the bound.
    #[error("a line that is too long")]
    TooLong,
}

/// Where in a message the next byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In front of a request, where an empty line is passed over.
    Start,
    /// In the head, behind the first line.
    Head,
    /// In a body of which this much is to come.
    Body(u64),
    /// In the line with a chunk's size.
    ChunkSize,
    /// In a chunk of which this much is to come.
    Chunk(u64),
    /// In the line end behind a chunk.
    ChunkEnd,
    /// In the trailers.
    Trailers,
}

/// Follows the bytes of a client's side of a connection.
#[derive(Debug)]
pub struct Follower {
    place: Place,
    line: Vec<u8>,
    length: Option<u64>,
    chunked: bool,
}

impl Default for Follower {
    fn default() -> Self {
        Self { place: Place::Start, line: Vec::new(), length: None, chunked: false }
    }
}

impl Follower {
    /// Takes in what was read.
    ///
    /// # Errors
    /// What may be read in two ways. The connection must end; nothing more may be fed.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Ambiguous> {
        while !bytes.is_empty() {
            match &mut self.place {
                Place::Body(left) | Place::Chunk(left) => {
                    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    *left -= taken as u64;
                    bytes = &bytes[taken..];
                    match self.place {
                        Place::Body(0) => self.place = Place::Start,
                        Place::Chunk(0) => self.place = Place::ChunkEnd,
                        Place::Body(_)
                        | Place::Chunk(_)
                        | Place::Start
                        | Place::Head
                        | Place::ChunkSize
                        | Place::ChunkEnd
                        | Place::Trailers => {}
                    }
                }
                Place::Start
                | Place::Head
                | Place::ChunkSize
                | Place::ChunkEnd
                | Place::Trailers => bytes = self.feed_line(bytes)?,
            }
        }
        Ok(())
    }

    /// True between requests.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.place == Place::Start && self.line.is_empty()
    }

    /// Takes bytes up to the end of a line; gives the rest.
    fn feed_line<'b>(&mut self, bytes: &'b [u8]) -> Result<&'b [u8], Ambiguous> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let (of_line, rest) = bytes.split_at(end.map_or(bytes.len(), |end| end + 1));
        if self.line.len() + of_line.len() > MAX_LINE {
            return Err(Ambiguous::TooLong);
        }
        self.line.extend_from_slice(of_line);
        let line = std::mem::take(&mut self.line);
        let result = match line.strip_suffix(b"\n") {
            // A carriage return may only be the last byte so far.
            None if line[..line.len().saturating_sub(1)].contains(&b'\r') => {
                Err(Ambiguous::LineEnd)
            }
            None => {
                self.line = line;
                return Ok(rest);
            }
            Some(line) => match line.strip_suffix(b"\r") {
                Some(line) if !line.contains(&b'\r') => self.take_line(line),
                Some(_) | None => Err(Ambiguous::LineEnd),
            },
        };
        // The buffer is used again.
        self.line = line;
        self.line.clear();
        result.map(|()| rest)
    }

    fn take_line(&mut self, line: &[u8]) -> Result<(), Ambiguous> {
        match self.place {
            Place::Start if line.is_empty() => {}
            Place::Start => self.place = Place::Head,
            Place::Head if line.is_empty() => self.end_head()?,
            Place::Head => self.header(line)?,
            Place::Trailers if line.is_empty() => self.place = Place::Start,
            Place::Trailers => name(line).map(drop)?,
            Place::ChunkSize => {
                let size = chunk_size(line)?;
                self.place = if size == 0 { Place::Trailers } else { Place::Chunk(size) };
            }
            Place::ChunkEnd if line.is_empty() => self.place = Place::ChunkSize,
            Place::ChunkEnd => return Err(Ambiguous::Chunk),
            Place::Body(_) | Place::Chunk(_) => {}
        }
        Ok(())
    }

    fn header(&mut self, line: &[u8]) -> Result<(), Ambiguous> {
        let (name, value) = name(line)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            let length = std::str::from_utf8(value).ok().filter(|_| digits);
            let length = length.and_then(|text| text.parse().ok()).ok_or(Ambiguous::Length)?;
            if self.length.replace(length).is_some() {
                return Err(Ambiguous::Length);
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Ambiguous::Encoding);
            }
            self.chunked = true;
        }
        Ok(())
    }

    fn end_head(&mut self) -> Result<(), Ambiguous> {
        let (length, chunked) = (self.length.take(), std::mem::take(&mut self.chunked));
        self.place = match (length, chunked) {
            (Some(_), true) => return Err(Ambiguous::Both),
            (None, true) => Place::ChunkSize,
            (None | Some(0), false) => Place::Start,
            (Some(length), false) => Place::Body(length),
        };
        Ok(())
    }
}

/// A header's name and its value without blanks around it.
fn name(line: &[u8]) -> Result<(&[u8], &[u8]), Ambiguous> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(Ambiguous::Folded);
    }
    let colon = line.iter().position(|byte| *byte == b':').ok_or(Ambiguous::Name)?;
    let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
    if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
        return Err(Ambiguous::Name);
    }
    Ok((name, value))
}

/// Source: RFC 9110 §5.6.2.
const fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        )
}

/// Hexadecimal digits; extensions behind a semicolon mean nothing to us.
fn chunk_size(line: &[u8]) -> Result<u64, Ambiguous> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let behind = line[digits..].trim_ascii_start();
    let fits = (1..=16).contains(&digits) && (behind.is_empty() || behind.starts_with(b";"));
    let text = std::str::from_utf8(&line[..digits]).ok().filter(|_| fits);
    text.and_then(|text| u64::from_str_radix(text, 16).ok()).ok_or(Ambiguous::Chunk)
}

/// A client's connection, followed until its protocol is switched.
pub(crate) struct Followed<S> {
    stream: S,
    follower: Follower,
    switched: Arc<AtomicBool>,
}

impl<S> Followed<S> {
    /// Follows `stream` for as long as `switched` is false.
    pub(crate) fn new(stream: S, switched: Arc<AtomicBool>) -> Self {
        Self { stream, follower: Follower::default(), switched }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Followed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        std::task::ready!(Pin::new(&mut self.stream).poll_read(context, into))?;
        if !self.switched.load(Ordering::Relaxed)
            && let Err(ambiguous) = self.follower.feed(&into.filled()[before..])
        {
            metrics::counter!(metric::WAYPOINT_REFUSED.name, "reason" => "bad_framing", "rule" => "")
                .increment(1);
            tracing::debug!(%ambiguous, "a client's connection is ended");
            into.set_filled(before);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, ambiguous)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Followed<S> {
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

    /// Fed whole and byte by byte the answer is the same.
    fn follow(text: &str) -> Result<bool, Ambiguous> {
        let mut whole = Follower::default();
        let found = whole.feed(text.as_bytes()).map(|()| whole.is_idle());
        let mut slow = Follower::default();
        let mut slowly = Ok(());
        for byte in text.bytes() {
            slowly = slow.feed(&[byte]);
            if slowly.is_err() {
                break;
            }
        }
        assert_eq!(slowly.map(|()| slow.is_idle()), found, "{text:?}");
        found
    }

    #[test]
    fn messages_are_followed_to_their_ends() {
        for (text, idle) in [
            ("", true),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", true),
            ("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\nGET", false),
            ("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nab\r\n\n", true),
            ("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc", false),
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3;x=y\r\na\n\r\r\n0\r\nA: b\r\n\r\n",
                true,
            ),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", false),
        ] {
            assert_eq!(follow(text), Ok(idle), "{text:?}");
        }
    }

    #[test]
    fn what_may_be_read_in_two_ways_is_found() {
        let head = "POST / HTTP/1.1\r\n";
        for (rest, problem) in [
            ("A: 1\n\r\n", Ambiguous::LineEnd),
            ("A: 1\rB: 2\r\n\r\n", Ambiguous::LineEnd),
            ("A: 1\r\r\n\r\n", Ambiguous::LineEnd),
            ("A: 1\r\n 2\r\n\r\n", Ambiguous::Folded),
            ("A : 1\r\n\r\n", Ambiguous::Name),
            (": 1\r\n\r\n", Ambiguous::Name),
            ("A\r\n\r\n", Ambiguous::Name),
            ("Content-Length: 1\r\nContent-Length: 1\r\n\r\n", Ambiguous::Length),
            ("Content-Length: +1\r\n\r\n", Ambiguous::Length),
            ("Content-Length: 1, 1\r\n\r\n", Ambiguous::Length),
            ("Content-Length: 99999999999999999999\r\n\r\n", Ambiguous::Length),
            ("Content-Length: \r\n\r\n", Ambiguous::Length),
            ("Transfer-Encoding: gzip, chunked\r\n\r\n", Ambiguous::Encoding),
            (
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
                Ambiguous::Encoding,
            ),
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", Ambiguous::Both),
            ("Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", Ambiguous::Both),
            ("Transfer-Encoding: chunked\r\n\r\n0x1\r\n", Ambiguous::Chunk),
            ("Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", Ambiguous::Chunk),
            ("Transfer-Encoding: chunked\r\n\r\n1\na", Ambiguous::LineEnd),
            ("Transfer-Encoding: chunked\r\n\r\n11111111111111111\r\n", Ambiguous::Chunk),
        ] {
            assert_eq!(follow(&format!("{head}{rest}")), Err(problem), "{rest:?}");
        }
        let long = format!("GET /{}", "a".repeat(MAX_LINE));
        assert_eq!(Follower::default().feed(long.as_bytes()), Err(Ambiguous::TooLong));
    }
}

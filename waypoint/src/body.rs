//! Bodies on their way through: counted, bounded in time, and let go of at their end.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use crate::telemetry::Report;
use crate::upstream::Lease;

/// Whatever ends a body early.
pub(crate) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A request's body, as it goes to the server.
pub(crate) struct RequestBody {
    content: Content,
    count: Arc<AtomicU64>,
}

enum Content {
    Stream(Incoming),
    Whole(Option<Bytes>),
}

impl RequestBody {
    /// A client's body, passed on as it comes.
    pub(crate) const fn stream(body: Incoming, count: Arc<AtomicU64>) -> Self {
        Self { content: Content::Stream(body), count }
    }

    /// Bytes that are all here; they have been counted.
    pub(crate) fn whole(bytes: Bytes) -> Self {
        let content = Content::Whole((!bytes.is_empty()).then_some(bytes));
        Self { content, count: Arc::default() }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.content {
            Content::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Content::Stream(body) => {
                let frame = std::task::ready!(Pin::new(body).poll_frame(context));
                if let Some(Ok(frame)) = &frame
                    && let Some(data) = frame.data_ref()
                {
                    self.count.fetch_add(data.remaining() as u64, Ordering::Relaxed);
                }
                Poll::Ready(frame.map(|frame| frame.map(without_head_fields).map_err(Into::into)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Whole(bytes) => bytes.is_none(),
            Content::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Content::Stream(body) => body.size_hint(),
        }
    }
}

/// An answer's body, as it goes to the client.
pub(crate) struct AnswerBody {
    content: Answer,
    report: Option<Report>,
    deadline: Option<Pin<Box<Sleep>>>,
}

enum Answer {
    Whole(Option<Bytes>),
    Server(Incoming, Option<Lease>),
}

impl AnswerBody {
    /// An answer of the waypoint's own.
    pub(crate) fn own(text: impl Into<Bytes>, report: Option<Report>) -> Self {
        let text = text.into();
        let content = Answer::Whole((!text.is_empty()).then_some(text));
        Self { content, report, deadline: None }
    }

    /// The server's; the connection that it comes on is let go of at its end.
    pub(crate) fn server(
        body: Incoming,
        lease: Option<Lease>,
        report: Option<Report>,
        deadline: Option<Instant>,
    ) -> Self {
        let deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at)));
        let mut body = Self { content: Answer::Server(body, lease), report, deadline };
        if body.is_end_stream() {
            body.end();
        }
        body
    }

    /// It has no body and has ended.
    pub(crate) fn finish(&mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Answer::Server(_, lease) = &mut self.content
            && let Some(lease) = lease.take()
        {
            lease.give_back();
        }
        if let Some(mut report) = self.report.take() {
            report.finish();
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match &mut self.content {
            Answer::Whole(bytes) => bytes.take().map(|bytes| Ok(Frame::data(bytes))),
            Answer::Server(body, _) => match Pin::new(body).poll_frame(context) {
                Poll::Ready(frame) => {
                    frame.map(|frame| frame.map(without_head_fields).map_err(BodyError::from))
                }
                Poll::Pending => {
                    if let Some(deadline) = &mut self.deadline
                        && deadline.as_mut().poll(context).is_ready()
                    {
                        if let Some(mut report) = self.report.take() {
                            report.failed("request_timeout", "UT");
                        }
                        return Poll::Ready(Some(Err("the answer took too long".into())));
                    }
                    return Poll::Pending;
                }
            },
        };
        match &frame {
            None => self.end(),
            Some(Err(_)) => {
                if let Some(mut report) = self.report.take() {
                    report.failed("upstream_reset", "UC");
                }
            }
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                if let Some(report) = &mut self.report {
                    report.sent(bytes);
                    if let Some(trailers) = frame.trailers_ref() {
                        report.saw(trailers);
                    }
                }
                // Nobody may ask again after the last frame.
                if self.is_end_stream() {
                    self.end();
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Answer::Whole(bytes) => bytes.is_none(),
            Answer::Server(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Answer::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Answer::Server(body, _) => body.size_hint(),
        }
    }
}

/// What decides about a message and stands in its head, or is about one connection: in trailers it would be read by a server that
/// joins them with the head, after everybody has judged that. Source: RFC 9110 §6.5.1.
const HEAD_FIELDS: [&str; 35] = [
    "accept-encoding",
    "age",
    "authorization",
    "cache-control",
    "connection",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "cookie",
    "culvert-denied-by",
    "culvert-hops",
    "culvert-reason",
    "date",
    "expect",
    "expires",
    "forwarded",
    "host",
    "http2-settings",
    "keep-alive",
    "location",
    "max-forwards",
    "origin",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "range",
    "retry-after",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "vary",
    "www-authenticate",
];

/// Takes out of trailers what belongs into a head.
fn without_head_fields(frame: Frame<Bytes>) -> Frame<Bytes> {
    let mut trailers = match frame.into_trailers() {
        Ok(trailers) => trailers,
        Err(frame) => return frame,
    };
    let names: Vec<_> =
        trailers.keys().filter(|name| is_head_field(name.as_str())).cloned().collect();
    for name in names {
        trailers.remove(name);
    }
    Frame::trailers(trailers)
}

fn is_head_field(name: &str) -> bool {
    // Servers of the CGI kind read a line for a dash.
    let dashed = name.replace('_', "-");
    HEAD_FIELDS.binary_search(&&*dashed).is_ok()
        || dashed.starts_with("x-forwarded-")
        || dashed.starts_with("if-")
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    #[test]
    fn trailers_hold_nothing_that_belongs_into_a_head() {
        assert!(HEAD_FIELDS.is_sorted());
        let names = [
            "grpc-status",
            "x-checksum",
            "content-length",
            "transfer-encoding",
            "authorization",
            "x-forwarded-client-cert",
            "x_forwarded_client_cert",
            "if-match",
            "host",
        ];
        let trailers: HeaderMap =
            names.map(|name| (name.parse().unwrap(), "1".parse().unwrap())).into_iter().collect();
        let left = without_head_fields(Frame::trailers(trailers)).into_trailers().unwrap();
        let mut left: Vec<_> = left.keys().map(http::HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["grpc-status", "x-checksum"]);
        let data = without_head_fields(Frame::data(Bytes::from_static(b"x")));
        assert_eq!(data.into_data().unwrap(), "x");
    }
}

//! The messages of an agent's stream, as gRPC frames them.
//!
//! tonic's own codec would keep a buffer as large as the largest message for as long as a stream lasts, in each direction. Here
//! the first response, and the first request of an agent that comes back, are megabytes, and everything after them is small; so
//! every message has memory of its own, which ends with it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http::HeaderMap;
use http_body::Frame;
use http_body_util::BodyExt as _;
use mesh_wire::MAX_MESSAGE_BYTES;
use mesh_wire::pb::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::Status;
use tonic::body::Body;

/// Bytes before each message: whether it is compressed, and its length. Source: gRPC over HTTP/2, Length-Prefixed-Message.
const HEADER_BYTES: usize = 5;
/// Largest message from an agent, bytes; its first lists what it holds.
const MAX_REQUEST_BYTES: usize = 64 << 20;
/// A buffer that held more than this, bytes, is not used again.
const KEPT_BYTES: usize = 4 << 10;

/// What an agent says.
#[derive(Debug)]
pub(super) struct Requests {
    body: Body,
    /// What was read and is not a whole message yet.
    read: BytesMut,
}

impl Requests {
    pub(super) fn new(body: Body) -> Self {
        Self { body, read: BytesMut::new() }
    }

    /// The next message; none at the end. Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Option<Result<DeltaDiscoveryRequest, Status>> {
        loop {
            if let Some(request) = take_request(&mut self.read).transpose() {
                return Some(request);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    // What is not data are trailers, in which a client says nothing.
                    if let Ok(data) = frame.into_data() {
                        self.read.extend_from_slice(&data);
                    }
                }
                Some(Err(status)) => return Some(Err(status)),
                None if self.read.is_empty() => return None,
                None => {
                    self.read.clear();
                    return Some(Err(Status::invalid_argument("the stream ends in a message")));
                }
            }
        }
    }
}

/// Takes the request at the beginning of `read`, if all of it is there.
///
/// # Errors
/// The agent's fault, not to be retried: compressed, larger than is taken, or no request. `read` is as it was.
pub fn take_request(read: &mut BytesMut) -> Result<Option<DeltaDiscoveryRequest>, Status> {
    let Some((header, rest)) = read.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let [compressed, length @ ..] = *header;
    if compressed != 0 {
        return Err(Status::unimplemented("compressed messages are not taken"));
    }
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_REQUEST_BYTES {
        return Err(Status::out_of_range(format!(
            "a message of {length} bytes; {MAX_REQUEST_BYTES} are taken"
        )));
    }
    let Some((message, rest)) = rest.split_at_checked(length) else { return Ok(None) };
    let request = DeltaDiscoveryRequest::decode(message)
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    if rest.is_empty() || length > KEPT_BYTES {
        *read = BytesMut::from(rest);
    } else {
        read.advance(HEADER_BYTES + length);
    }
    Ok(Some(request))
}

/// What the controller says, as the body of its answer.
#[derive(Debug)]
pub(super) struct Responses {
    messages: mpsc::Receiver<Result<DeltaDiscoveryResponse, Status>>,
    ended: bool,
}

impl Responses {
    pub(super) const fn new(
        messages: mpsc::Receiver<Result<DeltaDiscoveryResponse, Status>>,
    ) -> Self {
        Self { messages, ended: false }
    }
}

impl http_body::Body for Responses {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let next = ready!(self.messages.poll_recv(context));
        let framed = next.unwrap_or_else(|| Err(Status::ok(""))).and_then(|one| frame(&one));
        Poll::Ready(Some(match framed {
            Ok(bytes) => Ok(Frame::data(bytes)),
            Err(status) => {
                self.ended = true;
                self.messages.close();
                let mut trailers = HeaderMap::new();
                status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))
            }
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// One message with its header, in memory that is just large enough.
fn frame(response: &DeltaDiscoveryResponse) -> Result<Bytes, Status> {
    let length = response.encoded_len();
    let header = u32::try_from(length).ok().filter(|_| length <= MAX_MESSAGE_BYTES);
    let Some(header) = header else {
        return Err(Status::out_of_range(format!(
            "a response of {length} bytes; {MAX_MESSAGE_BYTES} may be sent"
        )));
    };
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + length);
    bytes.put_u8(0);
    bytes.put_u32(header);
    response.encode(&mut bytes).map_err(|error| Status::internal(error.to_string()))?;
    Ok(bytes.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(request: &DeltaDiscoveryRequest) -> Vec<u8> {
        let content = request.encode_to_vec();
        let length = u32::try_from(content.len()).unwrap();
        [&[0][..], &length.to_be_bytes(), &content].concat()
    }

    fn request(name_bytes: usize) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest { type_url: "t".repeat(name_bytes), ..Default::default() }
    }

    /// A body that comes in pieces of `size` bytes.
    fn requests(bytes: &[u8], size: usize) -> Requests {
        let (send, receive) = mpsc::channel(bytes.len() + 1);
        for piece in bytes.chunks(size) {
            let frame = Frame::data(Bytes::copy_from_slice(piece));
            send.try_send(Ok::<_, Status>(frame)).unwrap();
        }
        let stream = tokio_stream::wrappers::ReceiverStream::new(receive);
        Requests::new(Body::new(http_body_util::StreamBody::new(stream)))
    }

    #[tokio::test]
    async fn messages_are_read_whole_however_they_are_cut_and_leave_no_memory() {
        let sent = [request(3), request(0), request(3 * KEPT_BYTES), request(40)];
        let bytes: Vec<u8> = sent.iter().flat_map(framed).collect();
        for size in [1, 2, 7, 4_096, bytes.len()] {
            let mut requests = requests(&bytes, size);
            for one in &sent {
                assert_eq!(&requests.next().await.unwrap().unwrap(), one);
            }
            assert_eq!(requests.read.capacity(), 0);
            assert!(requests.next().await.is_none());
        }
    }

    #[tokio::test]
    async fn what_is_not_a_message_is_an_error() {
        let too_long = [&[0][..], &u32::MAX.to_be_bytes()].concat();
        let mut cut = framed(&request(9));
        cut.pop();
        let cases: [(&[u8], tonic::Code); 4] = [
            (&[1, 0, 0, 0, 0], tonic::Code::Unimplemented),
            (&too_long, tonic::Code::OutOfRange),
            (&[0, 0, 0, 0, 1, 0xff], tonic::Code::InvalidArgument),
            (&cut, tonic::Code::InvalidArgument),
        ];
        for (bytes, code) in cases {
            let error = requests(bytes, 4).next().await.unwrap().unwrap_err();
            assert_eq!(error.code(), code, "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn responses_are_framed_and_end_with_their_status() {
        let (send, receive) = mpsc::channel(2);
        let response = DeltaDiscoveryResponse { nonce: "n".to_owned(), ..Default::default() };
        send.try_send(Ok(response.clone())).unwrap();
        send.try_send(Err(Status::unavailable("later"))).unwrap();
        let mut body = Responses::new(receive);
        let data = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(
            data[..HEADER_BYTES],
            [0, 0, 0, 0, u8::try_from(response.encoded_len()).unwrap()]
        );
        assert_eq!(DeltaDiscoveryResponse::decode(&data[HEADER_BYTES..]).unwrap(), response);
        let trailers = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "14");
        assert!(body.frame().await.is_none());
        let (_, receive) = mpsc::channel(1);
        let trailers = Responses::new(receive).frame().await.unwrap().unwrap();
        assert_eq!(trailers.into_trailers().unwrap()["grpc-status"], "0");
    }
}

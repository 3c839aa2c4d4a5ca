//! Header blocks: requests on a server's tunnel, answers on a client's.

use mesh_model::CloseReason;

use super::{Doom, Ending, Engine};
use crate::event::{EngineEvent, RelayBytes, RelayId, RequestId, TunnelId};
use crate::frame::ErrorCode;
use crate::head::{ConnectHead, Fields, Request, Response};
use crate::io::Io;
use crate::queue::ByteQueue;
use crate::stream::{Flags, Phase, Setup, Side, Stream};
use crate::tunnel::GoawaySent;
use crate::window::{ReceiveWindow, SendWindow};

impl Engine {
    /// A whole header block is in the tunnel's reader.
    pub(super) fn headers(
        &mut self,
        id: u64,
        stream: u32,
        end_stream: bool,
        io: &mut impl Io,
    ) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        let server = tunnel.is_server();
        let limit = if server {
            self.config.request_header_limit
        } else {
            self.config.response_header_limit
        };
        // Always decoded, as the table belongs to the connection.
        let mut fields = Fields::new(limit);
        tunnel
            .decoder
            .decode(tunnel.reader.body(), |name, value| fields.push(name, value))
            .map_err(|_error| ErrorCode::COMPRESSION_ERROR)?;
        if server {
            self.request(id, stream, end_stream, fields)
        } else {
            self.response(id, stream, end_stream, fields, io)
        }
    }

    fn request(
        &mut self,
        id: u64,
        stream: u32,
        end_stream: bool,
        fields: Fields,
    ) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        if stream.is_multiple_of(2) {
            return Err(ErrorCode::PROTOCOL_ERROR.into());
        }
        if let Some(key) = tunnel.streams.get(&stream).copied() {
            // A CONNECT's stream has no second head (RFC 9113 §8.5).
            let ended = self.streams.get(key).is_some_and(|stream| stream.flags.end_received);
            let code = if ended { ErrorCode::STREAM_CLOSED } else { ErrorCode::PROTOCOL_ERROR };
            self.reset_stream(key, code, CloseReason::ProtocolError);
            return Ok(());
        }
        if stream <= tunnel.highest_stream {
            return match tunnel.recall(stream) {
                Some(true) => Ok(()),
                Some(false) => Err(ErrorCode::STREAM_CLOSED.into()),
                None => Err(ErrorCode::PROTOCOL_ERROR.into()),
            };
        }
        tunnel.highest_stream = stream;
        if let GoawaySent::Final(_) = tunnel.goaway_sent {
            // Opened after our GOAWAY: the peer knows that it is not processed.
            tunnel.remember(stream, true);
            return self.costs_a_token(id);
        }
        let crowded = tunnel.streams.len() >= self.config.max_concurrent_streams as usize;
        if crowded || self.relays() >= self.config.max_relays {
            self.send_reset(id, stream, ErrorCode::REFUSED_STREAM);
            return self.costs_a_token(id);
        }
        match fields.into_request() {
            Request::Connect(head) => self.requested(id, stream, end_stream, head),
            Request::Refuse(status) => {
                self.costs_a_token(id)?;
                self.respond(id, stream, status, end_stream);
                if let Some(tunnel) = self.tunnels.get_mut(id) {
                    tunnel.remember(stream, !end_stream);
                }
            }
            Request::Malformed => {
                self.costs_a_token(id)?;
                self.send_reset(id, stream, ErrorCode::PROTOCOL_ERROR);
            }
        }
        Ok(())
    }

    fn costs_a_token(&mut self, id: u64) -> Result<(), Ending> {
        if let Some(tunnel) = self.tunnels.get_mut(id) {
            tunnel.floods.take(self.now).map_err(|_flood| ErrorCode::ENHANCE_YOUR_CALM)?;
        }
        Ok(())
    }

    fn requested(&mut self, id: u64, stream_id: u32, end_stream: bool, head: Box<ConnectHead>) {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return };
        let key = self.streams.insert(Stream {
            side: Side::Server,
            phase: Phase::Requested,
            app: None,
            tunnel: id,
            id: stream_id,
            send_window: SendWindow::new(tunnel.peer_initial_window),
            receive_window: ReceiveWindow::new(self.config.stream_window),
            queue: ByteQueue::default(),
            withheld: 0,
            bytes: RelayBytes::default(),
            setup: Setup::Done,
            deadline: None,
            flags: Flags { end_received: end_stream, ..Flags::default() },
        });
        tunnel.streams.insert(stream_id, key);
        tunnel.idle_since = None;
        let (request, tunnel) = (RequestId(key), TunnelId(id));
        self.events.push_back(EngineEvent::Request { request, tunnel, head });
    }

    fn response(
        &mut self,
        id: u64,
        stream_id: u32,
        end_stream: bool,
        fields: Fields,
        io: &mut impl Io,
    ) -> Result<(), Ending> {
        let Some(tunnel) = self.tunnels.get_mut(id) else { return Ok(()) };
        if tunnel.is_idle_id(stream_id) {
            return Err(ErrorCode::PROTOCOL_ERROR.into());
        }
        let Some(key) = tunnel.streams.get(&stream_id).copied() else {
            return self.frame_on_closed(id, stream_id);
        };
        let Some(stream) = self.streams.get_mut(key) else { return Ok(()) };
        if stream.phase != Phase::Asked {
            let ended = stream.flags.end_received;
            let code = if ended { ErrorCode::STREAM_CLOSED } else { ErrorCode::PROTOCOL_ERROR };
            self.reset_stream(key, code, CloseReason::ProtocolError);
            return Ok(());
        }
        match fields.into_response() {
            Response::Interim if !end_stream => {
                tunnel.floods.take(self.now).map_err(|_flood| ErrorCode::ENHANCE_YOUR_CALM)?;
            }
            Response::Connected(head) => {
                stream.phase = Phase::Open;
                if let Some(opening) = stream.opening_mut() {
                    opening.answered = true;
                }
                Self::settle(stream);
                self.clear_deadline(key);
                let (relay, baggage) = (RelayId(key), head.baggage);
                self.events.push_back(EngineEvent::Established { relay, baggage });
                self.enter_round(key);
                if end_stream {
                    self.end_received(key, io);
                }
            }
            Response::Refused(status) => {
                let reason =
                    if status == 401 { CloseReason::PeerDenied } else { CloseReason::PeerRefused };
                if !(end_stream && stream.flags.end_sent) {
                    self.send_reset(id, stream_id, ErrorCode::CANCEL);
                }
                self.end_stream(key, reason, Doom::Abort);
            }
            Response::Interim | Response::Malformed => {
                let code = ErrorCode::PROTOCOL_ERROR;
                self.reset_stream(key, code, CloseReason::ProtocolError);
            }
        }
        Ok(())
    }
}

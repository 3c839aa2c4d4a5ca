//! The side of an agent that has just started and found another one running.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_ebpf::LAYOUT;
use mesh_identity::Svid;
use mesh_model::PodUid;
use mesh_net::parcel::Parcel;
use mesh_runtime::WrittenMetrics;
use mesh_tunnel::HAND_OVER_FORMAT;

use super::doors::{Door, Doors};
use super::predecessor::taken;
use super::protocol::{
    Farewell, Hello, Line, NONE, PROTOCOL, Welcome, kind, parse, read_certificates,
};
use super::{HandOverFailure, Place};
use crate::dataplane::{DataPlane, HandedPod, Part};
use crate::dns::DnsDesk;

/// How long the running agent may take for a word: it finishes what it enrols, and handshakes.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often an agent that is just ending is asked again, and how long between.
const TRIES: u32 = 40;
const PAUSE: Duration = Duration::from_millis(50);

/// A running agent that is about to hand over.
#[derive(Debug)]
pub(crate) struct Successor {
    line: Line,
    welcome: Welcome,
    certificates: Vec<Svid>,
    /// The agent's own listeners, once connections are taken over.
    doors: Doors,
}

impl Successor {
    /// Asks the agent that listens at `socket`, if one does. Blocks.
    ///
    /// # Errors
    /// When one runs and there is no hand-over; the error says why.
    pub(crate) fn find(socket: &Path, place: &Place) -> Result<Option<Self>, HandOverFailure> {
        for _ in 0..TRIES {
            let stream = match UnixStream::connect(socket) {
                Ok(stream) => stream,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) =>
                {
                    return Ok(None);
                }
                Err(error) => return Err(HandOverFailure::Gone(error)),
            };
            match Self::introduce(stream, place) {
                Ok(successor) => return Ok(Some(successor)),
                // It was about to end; its socket goes with it.
                Err(error) if error.is_end() => std::thread::sleep(PAUSE),
                Err(error) => return Err(error),
            }
        }
        Err(HandOverFailure::Gone(io::ErrorKind::UnexpectedEof.into()))
    }

    fn introduce(stream: UnixStream, place: &Place) -> Result<Self, HandOverFailure> {
        let line = Line::new(stream)?;
        line.be_patient(PATIENCE)?;
        let hello = Hello {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            engine_format: HAND_OVER_FORMAT,
            layout: LAYOUT,
            place: place.clone(),
        };
        line.say_json(kind::HELLO, &hello, NONE)?;
        let welcome: Welcome = parse(&line.hear(kind::WELCOME)?)?;
        let certificates = read_certificates(&line.hear(kind::CERTIFICATES)?.bytes)?;
        tracing::info!(
            version = welcome.version,
            engines = welcome.engines,
            certificates = certificates.len(),
            "the running agent hands over"
        );
        Ok(Self { line, welcome, certificates, doors: Doors::default() })
    }

    /// Engines that the predecessor has.
    pub(crate) const fn engines(&self) -> usize {
        self.welcome.engines
    }

    /// The predecessor's certificates, once.
    pub(crate) fn certificates(&mut self) -> Vec<Svid> {
        std::mem::take(&mut self.certificates)
    }

    /// Takes the data plane over. Blocks, on a thread for that.
    ///
    /// # Errors
    /// Nothing was taken over then, and the predecessor goes on: this process must end.
    pub(crate) fn take_over(
        &mut self,
        data_plane: &Arc<DataPlane>,
        dns: &DnsDesk,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Vec<HandedPod>, HandOverFailure> {
        self.line.say(kind::READY, b"", NONE)?;
        let mut parts = Vec::new();
        let token = loop {
            let parcel = self.line.hear_any(mesh_net::parcel::MAX_BYTES)?;
            match parcel.kind {
                kind::PART => parts.push(Part { bytes: parcel.bytes, fds: parcel.fds }),
                kind::RESOLVERS => {
                    let counts: Vec<(PodUid, usize)> = parse(&parcel)?;
                    let mut fds = parcel.fds.into_iter();
                    let of = |(uid, count)| (uid, fds.by_ref().take(count).collect());
                    dns.take_over(counts.into_iter().map(of));
                }
                kind::TOKEN => break self.token(parcel)?,
                other => return Err(HandOverFailure::Unexpected(other)),
            }
        };
        let taken_over = runtime.block_on(data_plane.take_over(parts, move || taken(token)))?;
        // The engines run here whether or not the predecessor hears it: it has lost the token.
        if let Err(error) = self.line.say(kind::RUNNING, b"", NONE) {
            tracing::warn!(%error, "the predecessor is gone");
        }
        tracing::info!(
            flows = taken_over.flows,
            pods = taken_over.pods.len(),
            "connections were taken over"
        );
        Ok(taken_over.pods)
    }

    /// The token; the doors that come behind it are kept. An older predecessor sends them with its farewell only.
    fn token(&mut self, parcel: Parcel) -> Result<OwnedFd, HandOverFailure> {
        let names: Vec<String> = if parcel.bytes.is_empty() { Vec::new() } else { parse(&parcel)? };
        let mut fds = parcel.fds.into_iter();
        let token = fds.next().ok_or(HandOverFailure::Unexpected(kind::TOKEN))?;
        self.doors = named(&names, fds);
        Ok(token)
    }

    /// Says that every pod is served, and takes the agent's own listeners and counters. Blocks. Without counters the
    /// predecessor is gone, and the listeners are those that came before.
    pub(crate) fn succeed(self) -> (Doors, Result<WrittenMetrics, HandOverFailure>) {
        match self.hear_farewell() {
            Ok((doors, metrics)) => (doors, Ok(metrics)),
            Err(error) => (self.doors, Err(error)),
        }
    }

    fn hear_farewell(&self) -> Result<(Doors, WrittenMetrics), HandOverFailure> {
        self.line.say(kind::SERVING, b"", NONE)?;
        let parcel = self.line.hear(kind::FAREWELL)?;
        let Farewell { doors, metrics } = parse(&parcel)?;
        Ok((named(&doors, parcel.fds.into_iter()), metrics))
    }
}

/// Doors by name; those that this version does not know are closed.
fn named(names: &[String], fds: impl Iterator<Item = OwnedFd>) -> Doors {
    let known = names.iter().zip(fds).filter_map(|(name, fd)| Some((Door::of(name)?, fd)));
    Doors::handed_over(known)
}

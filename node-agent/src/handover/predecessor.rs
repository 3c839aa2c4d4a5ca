//! The running agent's side: lets a successor in, stands still for it, and goes on if it does not come about.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use mesh_runtime::{Drain, DrainTrigger, Metrics};
use mesh_tunnel::HAND_OVER_FORMAT;
use nix::sys::socket::Shutdown;
use tokio::runtime::Handle;

use mesh_ebpf::LAYOUT;

use super::doors::Doors;
use super::protocol::{Farewell, Hello, Line, NONE, PROTOCOL, Welcome, certificates, kind, parse};
use super::{HandOverFailure, Place};
use crate::dataplane::{DataPlane, WrittenPlane};
use crate::dns::DnsDesk;
use crate::enrolment::desk::EnrolmentDesk;
use crate::error::error_chain;
use crate::picture::Picture;
use crate::telemetry::FlowReports;

/// How long a successor may take to introduce itself.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take until it is ready: it loads programs into the kernel and hears the controller.
const READY_PATIENCE: Duration = Duration::from_secs(60);
/// How long handshakes of peers may take to end. Nobody else's begins meanwhile, so that it is short.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(2);
/// How long the successor may take to read everything. All connections stand still meanwhile.
const TAKING_PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take to serve every pod after that.
const SERVING_PATIENCE: Duration = Duration::from_secs(60);
/// How long queries and answers under way may take at the end.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// What a running agent gives to its successor.
pub(crate) struct Predecessor {
    /// Who this agent is.
    pub(crate) place: Place,
    /// The data plane.
    pub(crate) data_plane: Arc<DataPlane>,
    /// Certificates are in here.
    pub(crate) picture: Arc<Picture>,
    /// Enrolment, which pauses.
    pub(crate) enrolment: Arc<EnrolmentDesk>,
    /// The pods' resolvers.
    pub(crate) dns: Arc<DnsDesk>,
    /// The agent's own listeners.
    pub(crate) doors: Doors,
    /// Counters.
    pub(crate) metrics: Metrics,
    /// Ends what is served through the doors, before the counters are handed over.
    pub(crate) close_doors: DrainTrigger,
    /// Where the data plane reports to.
    pub(crate) reports: Arc<FlowReports>,
    /// Runs what waits.
    pub(crate) runtime: Handle,
}

/// How a hand-over ended that passed the point of no return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The successor has everything.
    HandedOver,
    /// The successor took the engines and is gone; their connections were reset.
    SuccessorGone,
}

impl std::fmt::Debug for Predecessor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Predecessor").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Predecessor {
    /// Waits for successors on `listener` until one has taken over, or until this agent is to end. A hand-over that is under
    /// way then is finished: whoever started the successor may have told this agent to end.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub(crate) async fn wait(
        self: Arc<Self>,
        listener: UnixListener,
        drain: &Drain,
    ) -> io::Result<Option<Ended>> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        loop {
            let accepted = tokio::select! {
                // A successor that has come already is heard first: whoever started it may have told this agent to end.
                biased;
                accepted = listener.accept() => accepted,
                () = drain.begun() => {
                    // One that comes later finds nobody, and adopts what is pinned. Also through the duplicates.
                    nix::sys::socket::shutdown(listener.as_raw_fd(), Shutdown::Both)?;
                    return Ok(None);
                }
            };
            let stream = match accepted.and_then(|(stream, _)| stream.into_std()) {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a successor was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let predecessor = Arc::clone(&self);
            let conversation =
                tokio::task::spawn_blocking(move || predecessor.converse(stream)).await;
            match conversation {
                Ok(Ok(Some(ended))) => return Ok(Some(ended)),
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::warn!(
                    error = %error_chain(&error),
                    "no hand-over; this agent goes on as if nothing had happened"
                ),
                Err(error) => {
                    tracing::error!(%error, "a hand-over ended early");
                    self.enrolment.resume();
                }
            }
        }
    }

    /// One conversation. `None` when somebody only looked whether an agent is here.
    fn converse(&self, stream: UnixStream) -> Result<Option<Ended>, HandOverFailure> {
        stream.set_nonblocking(false).map_err(HandOverFailure::Gone)?;
        let line = Line::new(stream)?;
        line.be_patient(HELLO_PATIENCE)?;
        let hello: Hello = match line.hear(kind::HELLO) {
            Ok(word) => parse(&word)?,
            Err(error) if error.is_end() => return Ok(None),
            Err(error) => return Err(error),
        };
        if let Some(why) = self.objection(&hello) {
            line.say(kind::REFUSED, why.as_bytes(), NONE)?;
            return Err(HandOverFailure::Refused(why));
        }
        tracing::info!(version = hello.version, "a successor asks for a hand-over");
        // From here on nothing is enrolled or let go by this process: what it has is what the successor finds.
        let paused = self.runtime.block_on(self.enrolment.pause());
        let handed = match paused {
            Ok(()) => self.hand_over(&line),
            Err(error) => {
                let failure = HandOverFailure::List(error);
                line.say(kind::REFUSED, error_chain(&failure).as_bytes(), NONE)?;
                Err(failure)
            }
        };
        match handed {
            Ok(ended) => Ok(Some(ended)),
            Err(error) => {
                self.enrolment.resume();
                Err(error)
            }
        }
    }

    fn objection(&self, hello: &Hello) -> Option<String> {
        let own = env!("CARGO_PKG_VERSION");
        if hello.protocol != PROTOCOL {
            let Hello { protocol, version, .. } = hello;
            return Some(format!(
                "version {version} speaks hand-over protocol {protocol}, version {own} runs and speaks {PROTOCOL}: \
                 stop the running agent, then start the new one"
            ));
        }
        if hello.engine_format < HAND_OVER_FORMAT {
            return Some(format!(
                "version {} reads engines of form {}, version {own} runs and writes form {HAND_OVER_FORMAT}: \
                 stop the running agent, then start the new one",
                hello.version, hello.engine_format
            ));
        }
        if hello.layout != LAYOUT {
            return Some(format!(
                "version {} pins programs of layout {}, version {own} runs and has layout {LAYOUT}: \
                 stop the running agent, then start the new one",
                hello.version, hello.layout
            ));
        }
        if hello.place != self.place {
            let (other, here) = (&hello.place, &self.place);
            return Some(format!("the agent that runs here is {here:?}, not {other:?}"));
        }
        None
    }

    fn hand_over(&self, line: &Line) -> Result<Ended, HandOverFailure> {
        let engines = self.runtime.block_on(self.data_plane.engines_in_use());
        let welcome = Welcome { version: env!("CARGO_PKG_VERSION").to_owned(), engines };
        line.say_json(kind::WELCOME, &welcome, NONE)?;
        let snapshot = self.picture.snapshot();
        let keys = certificates(snapshot.svids.values().map(|svid| &**svid));
        line.say(kind::CERTIFICATES, &keys, NONE)?;
        drop((keys, snapshot));
        line.be_patient(READY_PATIENCE)?;
        line.hear(kind::READY)?;
        let written = self.runtime.block_on(self.data_plane.write_down(HANDSHAKE_PATIENCE))?;
        self.pass_on(line, written)
    }

    /// Sends what was written down; the token decides who goes on.
    fn pass_on(&self, line: &Line, mut written: WrittenPlane) -> Result<Ended, HandOverFailure> {
        let since = written.since;
        let (token, sent) = match token() {
            Ok((token, theirs)) => (token, self.send(line, &mut written, theirs)),
            Err(error) => {
                // Nothing has left this process.
                self.runtime.block_on(self.data_plane.go_on(written));
                return Err(HandOverFailure::Gone(error));
            }
        };
        let running = sent.and_then(|()| line.hear(kind::RUNNING));
        // Also after `RUNNING`: taking the token is what counts, saying so is not.
        if taken(token) {
            self.runtime.block_on(self.data_plane.go_on(written));
            return Err(running.err().unwrap_or(HandOverFailure::Unexpected(kind::RUNNING)));
        }
        // It goes on, however long it takes to say so, unless it has ended.
        let running = match running {
            Err(error) if !error.is_end() => {
                line.be_patient(SERVING_PATIENCE).and_then(|()| line.hear(kind::RUNNING))
            }
            said => said,
        };
        let stood_still = since.elapsed();
        match running {
            Ok(_running) => {
                written.let_go();
                tracing::info!(?stood_still, "connections are with the successor");
            }
            Err(error) if error.is_end() => {
                tracing::error!("the successor took the connections and has ended; they are reset");
                written.reset();
                return Ok(Ended::SuccessorGone);
            }
            Err(error) => {
                tracing::error!(error = %error_chain(&error), "the successor has the connections and is silent");
                written.let_go();
                return Ok(Ended::SuccessorGone);
            }
        }
        match self.say_farewell(line) {
            Ok(()) => Ok(Ended::HandedOver),
            Err(error) => {
                tracing::error!(error = %error_chain(&error), "the successor has the connections and did not say that it serves");
                Ok(Ended::SuccessorGone)
            }
        }
    }

    fn send(
        &self,
        line: &Line,
        written: &mut WrittenPlane,
        theirs: OwnedFd,
    ) -> Result<(), HandOverFailure> {
        line.be_patient(TAKING_PATIENCE)?;
        for part in std::mem::take(&mut written.parts) {
            line.say(kind::PART, &part.bytes, &part.fds)?;
        }
        let resolvers = self.dns.written().map_err(HandOverFailure::Gone)?;
        let counts: Vec<_> = resolvers.iter().map(|(uid, fds)| (uid.clone(), fds.len())).collect();
        let fds: Vec<OwnedFd> = resolvers.into_iter().flat_map(|(_, fds)| fds).collect();
        line.say_json(kind::RESOLVERS, &counts, &fds)?;
        let (names, doors) = self.doors.duplicates().map_err(HandOverFailure::Gone)?;
        let fds: Vec<OwnedFd> = std::iter::once(theirs).chain(doors).collect();
        line.say_json(kind::TOKEN, &names, &fds)
    }

    /// Once every pod is served by the successor: the agent's own listeners and counters.
    fn say_farewell(&self, line: &Line) -> Result<(), HandOverFailure> {
        line.be_patient(SERVING_PATIENCE)?;
        line.hear(kind::SERVING)?;
        self.dns.stop_taking();
        // No more is shown or counted here: what the successor shows later is never less.
        self.close_doors.begin();
        self.reports.flush(LAST_ANSWERS);
        let (doors, fds) = self.doors.duplicates().map_err(HandOverFailure::Gone)?;
        let farewell = Farewell { doors, metrics: self.metrics.written() };
        line.say_json(kind::FAREWELL, &farewell, &fds)?;
        self.runtime.block_on(self.dns.last_answers(LAST_ANSWERS));
        Ok(())
    }
}

/// A pipe with one byte in it: whichever process reads it goes on, and the other one never does. Both ends to read from.
fn token() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, mut writer) = io::pipe()?;
    writer.write_all(&[1])?;
    let reader = OwnedFd::from(reader);
    Ok((reader.try_clone()?, reader))
}

/// Takes the byte of a token: true for the one process that got it. Nobody writes to it, so that this never waits.
pub(super) fn taken(token: OwnedFd) -> bool {
    // Reads again after a signal: a byte that both processes leave in the pipe would leave nobody to go on.
    File::from(token).read_exact(&mut [0]).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_taken_once() {
        for _ in 0..100 {
            let (one, other) = token().unwrap();
            let rival = std::thread::spawn(move || taken(other));
            let mine = taken(one);
            assert_ne!(mine, rival.join().unwrap());
        }
    }
}

//! Connections whose peers have not proved themselves yet: few, for a short time, and at the bound the noisiest address
//! makes room, so that a flood from a few addresses keeps no agent out.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_telemetry::metric;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::Sleep;
use tonic::Extensions;
use tonic::transport::server::Connected;

/// How many may wait, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct DoorLimits {
    /// Connections in all; default 1,024.
    pub places: usize,
    /// Connections of one address, of IPv6 one /64; default 64.
    pub places_per_source: usize,
    /// Longest silence at the beginning; default 3 s.
    pub silence: Duration,
    /// Longest TLS handshake; default 10 s.
    pub handshake: Duration,
    /// From the handshake to the first call that proves who calls; default 30 s, since tokens may wait for their review.
    pub first_call: Duration,
}

impl Default for DoorLimits {
    fn default() -> Self {
        Self {
            places: 1_024,
            places_per_source: 64,
            silence: Duration::from_secs(3),
            handshake: Duration::from_secs(10),
            first_call: Duration::from_secs(30),
        }
    }
}

/// Who waits at the door.
#[derive(Clone, Debug)]
pub struct Door {
    limits: DoorLimits,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    guests: BTreeMap<u64, Guest>,
    /// How many each source has.
    sources: BTreeMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Guest {
    source: IpAddr,
    silent: bool,
    /// A word lets the connection in, its end without one shows it out.
    admit: oneshot::Sender<()>,
}

impl Door {
    /// Nobody waits.
    #[must_use]
    pub fn new(limits: DoorLimits) -> Self {
        Self { limits, waiting: Arc::default() }
    }

    /// The limits.
    #[must_use]
    pub const fn limits(&self) -> &DoorLimits {
        &self.limits
    }

    /// Gives a new connection its place, and takes another's away when there is none left.
    #[must_use]
    pub fn enter(&self, from: IpAddr) -> (Place, Verdict) {
        let source = source_of(from);
        let (admit, verdict) = oneshot::channel();
        let mut waiting = self.lock();
        let own = waiting.sources.get(&source).copied().unwrap_or(0);
        let crowded = if own >= self.limits.places_per_source {
            Some(source)
        } else if waiting.guests.len() >= self.limits.places {
            waiting.sources.iter().max_by_key(|(_, count)| **count).map(|(source, _)| *source)
        } else {
            None
        };
        if let Some(crowded) = crowded {
            waiting.show_out_of(crowded);
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.guests.insert(number, Guest { source, silent: true, admit });
        *waiting.sources.entry(source).or_default() += 1;
        let place = Place { door: self.clone(), number, from };
        (place.clone(), Verdict { receiver: verdict, place })
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().guests.len()
    }

    /// True when nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// The one of a source that makes room: the longest silent, else the oldest.
    fn show_out_of(&mut self, source: IpAddr) {
        let of_source = || self.guests.iter().filter(|(_, guest)| guest.source == source);
        let victim = of_source().find(|(_, guest)| guest.silent).or_else(|| of_source().next());
        if let Some(number) = victim.map(|(number, _)| *number) {
            metrics::counter!(metric::CONTROLLER_CONNECTIONS_SHED.name).increment(1);
            drop(self.remove(number));
        }
    }

    fn remove(&mut self, number: u64) -> Option<Guest> {
        let guest = self.guests.remove(&number)?;
        if let Some(count) = self.sources.get_mut(&guest.source) {
            *count -= 1;
            if *count == 0 {
                self.sources.remove(&guest.source);
            }
        }
        Some(guest)
    }
}

/// Who shares one bound: an IPv4 address, or the 64 bits that one owner of IPv6 addresses has at least.
fn source_of(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V4(ip) => ip.into(),
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

/// One connection's place.
#[derive(Clone, Debug)]
pub struct Place {
    door: Door,
    number: u64,
    from: IpAddr,
}

impl Place {
    /// The peer has said something.
    pub fn spoke(&self) {
        if let Some(guest) = self.door.lock().guests.get_mut(&self.number) {
            guest.silent = false;
        }
    }

    /// The peer has proved who it is.
    pub fn admit(&self) {
        let guest = self.door.lock().remove(self.number);
        if guest.is_some_and(|guest| guest.admit.send(()).is_err()) {
            // The connection has ended meanwhile.
        }
    }
}

/// Where the request with these extensions comes from.
#[must_use]
pub fn source(extensions: &Extensions) -> Option<IpAddr> {
    extensions.get::<Place>().map(|place| place.from)
}

/// The peer of the request with these extensions has proved who it is.
pub fn admit(extensions: &Extensions) {
    if let Some(place) = extensions.get::<Place>() {
        place.admit();
    }
}

/// What becomes of a connection that waits. Dropping it gives the place up.
#[derive(Debug)]
pub struct Verdict {
    receiver: oneshot::Receiver<()>,
    place: Place,
}

impl Drop for Verdict {
    fn drop(&mut self) {
        drop(self.place.door.lock().remove(self.place.number));
    }
}

impl Verdict {
    /// Runs `work` for as long as the connection has its place.
    ///
    /// # Errors
    /// When the place was taken away, or `work` fails or takes longer than `limit`.
    pub async fn unless_shown_out<T>(
        &mut self,
        limit: Duration,
        work: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        tokio::select! {
            outcome = tokio::time::timeout(limit, work) => {
                outcome.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
            }
            _ended = &mut self.receiver => Err(shown_out()),
        }
    }
}

fn shown_out() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "too many connections wait for their first call",
    )
}

/// A connection that ends unless its peer proves itself in time.
#[derive(Debug)]
pub struct Watched<S> {
    stream: S,
    place: Place,
    /// None once it is let in.
    waiting: Option<(Verdict, Pin<Box<Sleep>>)>,
}

impl<S> Watched<S> {
    /// Watches `stream`, whose handshake is done.
    #[must_use]
    pub fn new(stream: S, verdict: Verdict) -> Self {
        let place = verdict.place.clone();
        let deadline = Box::pin(tokio::time::sleep(place.door.limits.first_call));
        Self { stream, place, waiting: Some((verdict, deadline)) }
    }

    fn poll_place(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some((verdict, deadline)) = &mut self.waiting else { return Ok(()) };
        match Pin::new(&mut verdict.receiver).poll(context) {
            Poll::Ready(Ok(())) => self.waiting = None,
            Poll::Ready(Err(_shown_out)) => return Err(shown_out()),
            Poll::Pending if deadline.as_mut().poll(context).is_ready() => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody proved who calls"));
            }
            Poll::Pending => {}
        }
        Ok(())
    }
}

impl<S> Connected for Watched<S> {
    type ConnectInfo = Place;

    fn connect_info(&self) -> Place {
        self.place.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_place(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
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
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn door(places: usize, places_per_source: usize) -> Door {
        let first_call = Duration::from_millis(50);
        Door::new(DoorLimits { places, places_per_source, first_call, ..DoorLimits::default() })
    }

    fn is_shown_out(verdict: &mut Verdict) -> bool {
        matches!(verdict.receiver.try_recv(), Err(oneshot::error::TryRecvError::Closed))
    }

    #[test]
    fn the_noisiest_source_makes_room_and_its_silent_ones_first() {
        let door = door(4, 3);
        let (one, other) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let (_agent, mut agent) = door.enter(other);
        let mut flood: Vec<_> = (0..3).map(|_| door.enter(one)).collect();
        flood[0].0.spoke();
        // Of its own bound.
        let (_fourth, mut fourth) = door.enter(one);
        let out: Vec<bool> = flood.iter_mut().map(|(_, one)| is_shown_out(one)).collect();
        assert_eq!(out, [false, true, false]);
        // Of the bound of all.
        let (_late, mut late) = door.enter("192.0.2.3".parse().unwrap());
        assert!(is_shown_out(&mut flood[2].1));
        assert!(![&mut agent, &mut fourth, &mut late].into_iter().any(is_shown_out));
        assert_eq!(door.len(), 4);
    }

    #[test]
    fn a_host_with_many_ipv6_addresses_is_one_source() {
        let door = door(100, 2);
        let mut all: Vec<_> =
            (1..=3).map(|n| door.enter(format!("2001:db8::{n}").parse().unwrap())).collect();
        assert!(is_shown_out(&mut all[0].1));
        assert_eq!(door.len(), 2);
    }

    #[tokio::test]
    async fn who_proves_nothing_is_cut_and_who_does_stays() {
        let door = door(4, 4);
        let from = "192.0.2.1".parse().unwrap();
        let open = || {
            let (far, near) = tokio::io::duplex(64);
            let (place, verdict) = door.enter(from);
            (far, Watched::new(near, verdict), place)
        };
        let (_far, mut idle, _place) = open();
        let error = idle.read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let (mut far, mut agent, place) = open();
        place.admit();
        tokio::time::sleep(Duration::from_millis(80)).await;
        far.write_all(b"x").await.unwrap();
        assert_eq!(agent.read(&mut [0]).await.unwrap(), 1);
        assert_eq!(door.len(), 1, "only the idle one still waits");
        drop(idle);
        assert!(door.is_empty());
    }
}

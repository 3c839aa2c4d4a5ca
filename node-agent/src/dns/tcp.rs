//! Queries over TCP: what is the mesh's is answered in between, the rest goes both ways untouched, also answers of many
//! messages such as zone transfers.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use mesh_dns::{DnsDecision, Transport};
use tokio::io::AsyncWriteExt as _;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::meter::CountedQuery;
use super::{DnsDesk, PodDns, count, exchange};

/// How long a connection may be silent. Source: RFC 7766 §6.2.3 leaves it to the server.
const IDLE: Duration = Duration::from_secs(30);
/// Pause after an accept that failed, e.g. without a free descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a resolver that owes nothing any more may be silent after the client's last query: an answer may be of many
/// messages.
const LINGER: Duration = Duration::from_secs(1);

/// Serves connections for as long as the pod has a resolver.
pub(super) async fn serve(desk: Arc<DnsDesk>, pod: Weak<PodDns>, mut listener: TcpListener) {
    let stops = pod.upgrade().map(|pod| (pod.stop.clone(), pod.taking.clone()));
    let Some((stop, taking)) = stops else { return };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
            () = taking.cancelled() => return,
        };
        let Some(pod) = pod.upgrade() else { return };
        match accepted {
            Ok((stream, client)) => {
                let Ok(slot) = Arc::clone(&pod.connections).try_acquire_owned() else {
                    count("refused");
                    continue;
                };
                let (desk, stop) = (Arc::clone(&desk), stop.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        done = converse(&desk, &pod, stream, client) => {
                            if let Err(error) = done {
                                tracing::debug!(%error, "a connection to the pod's resolver ended");
                            }
                        }
                        () = stop.cancelled() => {}
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "a connection to the pod's resolver was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                // It listens no more: somebody in the pod ended it.
                if error.raw_os_error() == Some(libc::EINVAL) {
                    match desk.listener(&pod) {
                        Ok(opened) => listener = opened,
                        Err(error) => {
                            tracing::debug!(%error, "a pod's resolver cannot listen again yet")
                        }
                    }
                }
            }
        }
    }
}

/// A connection to the resolver the pod meant.
struct Upstream {
    writer: OwnedWriteHalf,
    asked: Arc<Asked>,
    /// Carries what it says to the client.
    reader: JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Queries without an answer yet.
#[derive(Default)]
struct Asked {
    queries: std::sync::Mutex<Queries>,
    /// An answer went to the client.
    heard: Notify,
}

#[derive(Default)]
struct Queries {
    /// By their ids; those left when the connection ends have failed.
    timed: BTreeMap<[u8; 2], (Instant, CountedQuery)>,
    /// How many of an id the client still waits for.
    owed: BTreeMap<[u8; 2], usize>,
}

/// Queries of one connection that are timed at once; a further one is not.
const MAX_TIMED: usize = 256;

impl Asked {
    fn lock(&self) -> MutexGuard<'_, Queries> {
        self.queries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, query: &[u8], counted: CountedQuery) {
        let Some(id) = query.first_chunk::<2>() else { return };
        let mut queries = self.lock();
        *queries.owed.entry(*id).or_default() += 1;
        if queries.timed.len() < MAX_TIMED {
            queries.timed.insert(*id, (Instant::now(), counted));
        }
    }

    fn answered(&self, answer: &[u8]) {
        let Some(id) = answer.first_chunk::<2>() else { return };
        let asked = self.lock().timed.remove(id);
        if let Some((since, counted)) = asked {
            counted.answered(since.elapsed());
        }
    }

    fn delivered(&self, answer: &[u8]) {
        if let Some(id) = answer.first_chunk::<2>() {
            let mut queries = self.lock();
            match queries.owed.get_mut(id) {
                Some(count) if *count > 1 => *count -= 1,
                Some(_) | None => {
                    queries.owed.remove(id);
                }
            }
        }
        self.heard.notify_one();
    }

    fn owes(&self) -> bool {
        !self.lock().owed.is_empty()
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let queries = self.queries.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (_, counted) in queries.timed.values() {
            counted.failed();
        }
    }
}

async fn converse(
    desk: &DnsDesk,
    pod: &PodDns,
    stream: TcpStream,
    client: SocketAddr,
) -> io::Result<()> {
    let resolver = desk.tcp_resolver_of(pod, client);
    let (mut queries, answers) = stream.into_split();
    let answers = Arc::new(Mutex::new(answers));
    let mut upstream: Option<Upstream> = None;
    loop {
        let Some(query) = next_query(&mut queries, &mut upstream).await? else { break };
        let (decision, counted) = desk.decide(pod, &query, Transport::Tcp);
        match decision {
            DnsDecision::Reply(answer) => {
                count("answered");
                exchange::write_message(&mut *answers.lock().await, &answer).await?;
            }
            DnsDecision::Refuse(_why, Some(answer)) => {
                count("refused");
                exchange::write_message(&mut *answers.lock().await, &answer).await?;
            }
            DnsDecision::Refuse(_why, None) => {
                count("refused");
                break;
            }
            DnsDecision::Forward => {
                count("forwarded");
                counted.forwarded();
                let open = match upstream.take().filter(|open| !open.reader.is_finished()) {
                    Some(open) => open,
                    None => {
                        let resolver = resolver.ok_or(io::ErrorKind::AddrNotAvailable)?;
                        let stream = exchange::connect(desk, pod, resolver)
                            .await
                            .inspect_err(|_error| counted.failed())?;
                        open_upstream(stream, Arc::clone(&answers))
                    }
                };
                let open = upstream.insert(open);
                open.asked.note(&query, counted);
                exchange::write_message(&mut open.writer, &query).await?;
            }
        }
    }
    match upstream {
        Some(open) => finish(open).await,
        None => Ok(()),
    }
}

/// The client's next query; none when it ended its side. A resolver that ends its own in between is let go.
///
/// # Errors
/// Also when the resolver left without an answer it owed: the client asks again rather than wait.
async fn next_query(
    queries: &mut OwnedReadHalf,
    upstream: &mut Option<Upstream>,
) -> io::Result<Option<Vec<u8>>> {
    let mut read = std::pin::pin!(timeout(IDLE, exchange::read_message(queries)));
    while let Some(open) = upstream {
        tokio::select! {
            query = &mut read => return query_or_end(query?),
            _ended = &mut open.reader => {
                if open.asked.owes() {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                *upstream = None;
            }
        }
    }
    query_or_end(read.await?)
}

fn query_or_end(read: io::Result<Vec<u8>>) -> io::Result<Option<Vec<u8>>> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        read => read.map(Some),
    }
}

/// Carries what the resolver owes to a client that asks no more. The resolver learns of that only when it owes nothing: some
/// drop their answers otherwise.
async fn finish(mut open: Upstream) -> io::Result<()> {
    let mut told = false;
    loop {
        let owes = open.asked.owes();
        if !owes && !told {
            open.writer.shutdown().await?;
            told = true;
        }
        let patience = if owes { IDLE } else { LINGER };
        tokio::select! {
            _ended = &mut open.reader => return Ok(()),
            heard = timeout(patience, open.asked.heard.notified()) => match heard {
                Ok(()) => {}
                Err(_silent) if !owes => return Ok(()),
                Err(silent) => return Err(silent.into()),
            },
        }
    }
}

fn open_upstream(stream: TcpStream, answers: Arc<Mutex<OwnedWriteHalf>>) -> Upstream {
    let (reader, writer) = stream.into_split();
    let asked = Arc::new(Asked::default());
    let noted = Arc::clone(&asked);
    let reader = tokio::spawn(async move {
        if let Err(error) = carry(reader, &answers, &noted).await {
            tracing::debug!(%error, "the resolver's connection ended");
        }
    });
    Upstream { writer, asked, reader }
}

async fn carry(
    mut from: OwnedReadHalf,
    to: &Mutex<OwnedWriteHalf>,
    asked: &Asked,
) -> io::Result<()> {
    loop {
        let answer = exchange::read_message(&mut from).await?;
        asked.answered(&answer);
        exchange::write_message(&mut *to.lock().await, &answer).await?;
        asked.delivered(&answer);
    }
}

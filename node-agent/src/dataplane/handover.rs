//! The data plane, handed over to another process and taken over by it. docs/handover.md has the whole protocol.
//!
//! Every worker of the predecessor writes itself down and stands still until it is told what became of it; every worker of
//! the successor takes one over and stands still until it is certain that the predecessor's never goes on.

pub(super) mod state;
pub(super) mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mesh_model::PodUid;
use mesh_net::Netns;
use mesh_net::driver::handover::TakeOverError;
use mesh_net::driver::ops::ListenerTag;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::pods::{Pod, PodKey};
use super::worker::Command;
use super::{DataPlane, Drain, PodSockets, ask, deliver};
use worker::{HandedWorker, Taking, Writing};

/// What becomes of a worker that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on; no other ever will.
    GoOn,
    /// Another process goes on: its sockets are closed here and live on there.
    LetGo,
    /// Nobody goes on: its sockets are reset.
    Reset,
}

/// Why a hand-over did not come about. The predecessor goes on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandOverRefused {
    /// A worker could not be written down.
    #[error("a worker cannot be written down")]
    Write(#[source] io::Error),
    /// Handshakes did not come to an end.
    #[error("handshakes did not come to an end")]
    Handshakes,
    /// A worker has ended.
    #[error("a worker has ended")]
    WorkerEnded,
    /// The state is not what was written.
    #[error("the predecessor's state does not parse")]
    Malformed(#[source] serde_json::Error),
    /// The state contradicts itself.
    #[error("the predecessor's state is inconsistent: {0}")]
    Inconsistent(&'static str),
    /// An engine could not be taken over.
    #[error("an engine cannot be taken over")]
    Engine(#[source] TakeOverError),
    /// A listener could not be taken over or opened.
    #[error("a listener cannot be taken over")]
    Listener(#[source] io::Error),
    /// A pod's network namespace could not be taken over.
    #[error("a pod's network namespace cannot be taken over")]
    Namespace(#[source] io::Error),
    /// Nobody decided in favour of this process.
    #[error("the predecessor goes on")]
    NotOurs,
}

/// A written part: bytes and descriptors, for one parcel.
#[derive(Debug)]
pub(crate) struct Part {
    /// The bytes; some hold secrets of live tunnels.
    pub(crate) bytes: Zeroizing<Vec<u8>>,
    /// The descriptors.
    pub(crate) fds: Vec<OwnedFd>,
}

/// The data plane, written down. Its workers stand still until it is decided; dropping it undecided resets everything.
#[derive(Debug)]
pub(crate) struct WrittenPlane {
    /// Pods first, then one part per worker.
    pub(crate) parts: Vec<Part>,
    /// When the first worker stood still.
    pub(crate) since: Instant,
    verdicts: Vec<mpsc::Sender<Verdict>>,
}

impl WrittenPlane {
    fn decide(self, verdict: Verdict) {
        for worker in self.verdicts {
            if worker.send(verdict).is_err() {
                tracing::error!("a worker ended while it was handed over");
            }
        }
    }

    /// The successor goes on.
    pub(crate) fn let_go(self) {
        self.decide(Verdict::LetGo);
    }

    /// The successor was to go on and is gone: what it had is lost, and told so.
    pub(crate) fn reset(self) {
        self.decide(Verdict::Reset);
    }
}

/// A pod of the predecessor, for whoever knows pods besides the data plane.
#[derive(Clone, Debug)]
pub(crate) struct HandedPod {
    /// Its sockets.
    pub(crate) sockets: PodSockets,
    /// Places that its listeners take in the kernel's table; none for a pod that leaves.
    pub(crate) slots: Option<u16>,
}

/// What was taken over.
#[derive(Debug)]
pub(crate) struct TakenPlane {
    /// The pods.
    pub(crate) pods: Vec<HandedPod>,
    /// Flows that live on.
    pub(crate) flows: usize,
}

#[derive(Debug, Serialize, Deserialize)]
struct PlaneState {
    pods: Vec<PodState>,
    next_pod: u64,
    next_flow: u64,
    /// What the direct path knows; absent where it is not kept.
    #[serde(default)]
    direct: Option<serde_json::Value>,
}

#[derive(Debug, Serialize, Deserialize)]
struct PodState {
    key: u64,
    uid: PodUid,
    namespace: Arc<str>,
    name: Arc<str>,
    service_account: Arc<str>,
    cookie: u64,
    addresses: Vec<IpAddr>,
    capture_inbound: bool,
    /// How long its last flows may go on, when it leaves.
    leaves_in: Option<Duration>,
}

/// Between two looks at the handshakes in flight.
const LOOK: Duration = Duration::from_millis(2);

impl DataPlane {
    /// Engines that a successor needs at least: those that serve pods, and others of a predecessor that are not empty yet.
    pub(crate) async fn engines_in_use(&self) -> usize {
        let mut in_use = self.serving;
        for (index, worker) in self.workers.iter().enumerate().skip(self.serving) {
            let sockets = ask(worker, |reply| Command::Sockets { reply }).await.unwrap_or(0);
            if sockets > 0 {
                in_use = index + 1;
            }
        }
        in_use
    }

    /// Stops all workers and writes them down. Handshakes that peers have begun are finished first, for `patience` at most:
    /// those that take longer are ended, so that no peer can keep every pod's tunnel port closed. Peers that have said nothing
    /// yet are taken along, new ones wait in the listeners' queues.
    pub(crate) async fn write_down(
        &self,
        patience: Duration,
    ) -> Result<WrittenPlane, HandOverRefused> {
        self.hold_tunnel_ports(true).await;
        let mut ended = self.handshakes_ended(patience).await;
        if !ended {
            for worker in &self.workers {
                deliver(worker, Command::EndHandshakes).await;
            }
            ended = self.handshakes_ended(Duration::ZERO).await;
        }
        let written = match ended {
            true => self.write_workers().await,
            false => Err(HandOverRefused::Handshakes),
        };
        if written.is_err() {
            self.hold_tunnel_ports(false).await;
        }
        written
    }

    /// Goes on after all: the successor never will.
    pub(crate) async fn go_on(&self, written: WrittenPlane) {
        written.decide(Verdict::GoOn);
        self.watchdog.pause(false);
        self.direct.go_on();
        self.hold_tunnel_ports(false).await;
    }

    async fn hold_tunnel_ports(&self, held: bool) {
        for worker in &self.workers {
            deliver(worker, Command::HoldTunnelPorts { held }).await;
        }
    }

    async fn handshakes_ended(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        loop {
            let mut open = 0;
            for worker in &self.workers {
                open += ask(worker, |reply| Command::Accepting { reply }).await.unwrap_or(0);
            }
            if open == 0 {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn write_workers(&self) -> Result<WrittenPlane, HandOverRefused> {
        let since = Instant::now();
        // They turn no more until it is decided, and never again once they are let go.
        self.watchdog.pause(true);
        let mut plane = WrittenPlane { parts: Vec::new(), since, verdicts: Vec::new() };
        let mut replies = Vec::new();
        for worker in &self.workers {
            let (decide, verdict) = mpsc::channel();
            let (reply, written) = oneshot::channel();
            plane.verdicts.push(decide);
            replies.push(written);
            deliver(worker, Command::WriteDown(Writing { reply, verdict })).await;
        }
        let mut workers = Vec::new();
        let mut failed = None;
        for reply in replies {
            match reply.await {
                Ok(Ok(written)) => workers.push(written),
                Ok(Err(error)) => failed = Some(HandOverRefused::Write(error)),
                Err(_ended) => failed = Some(HandOverRefused::WorkerEnded),
            }
        }
        let parts = match failed {
            None => self.parts(workers),
            Some(error) => Err(error),
        };
        match parts {
            Ok(parts) => plane.parts = parts,
            Err(error) => {
                // Nothing has left this process.
                plane.decide(Verdict::GoOn);
                self.watchdog.pause(false);
                self.direct.go_on();
                return Err(error);
            }
        }
        Ok(plane)
    }

    fn parts(&self, mut workers: Vec<HandedWorker>) -> Result<Vec<Part>, HandOverRefused> {
        let mut parts = vec![self.written_pods()?];
        // Inherited ones that have emptied meanwhile were not announced to the successor (`engines_in_use`).
        while workers.len() > self.serving && workers.last().is_some_and(HandedWorker::is_empty) {
            workers.pop();
        }
        for HandedWorker { state, engine, sockets, listeners } in workers {
            let json = serde_json::to_vec(&state).map_err(HandOverRefused::Malformed)?;
            let length = u32::try_from(json.len())
                .map_err(|_too_long| HandOverRefused::Inconsistent("too many flows"))?;
            let mut bytes = Zeroizing::new(Vec::with_capacity(4 + json.len() + engine.len()));
            bytes.extend_from_slice(&length.to_be_bytes());
            bytes.extend_from_slice(&json);
            bytes.extend_from_slice(&engine);
            let mut fds = sockets;
            fds.extend(listeners);
            parts.push(Part { bytes, fds });
        }
        Ok(parts)
    }

    fn written_pods(&self) -> Result<Part, HandOverRefused> {
        let direct = self.direct.freeze();
        let pods = self.pods();
        let mut fds = Vec::with_capacity(pods.len());
        let mut states = Vec::with_capacity(pods.len());
        for pod in pods.values() {
            let PodSockets {
                uid,
                namespace,
                name,
                service_account,
                netns,
                cookie,
                addresses,
                capture_inbound,
            } = pod.sockets.clone();
            fds.push(netns.as_fd().try_clone_to_owned().map_err(HandOverRefused::Write)?);
            let leaves_in = pod.leaves_at().map(|at| at.saturating_duration_since(Instant::now()));
            states.push(PodState {
                key: pod.key.0,
                uid,
                namespace,
                name,
                service_account,
                cookie,
                addresses,
                capture_inbound,
                leaves_in,
            });
        }
        let state = PlaneState {
            pods: states,
            next_pod: self.next_pod.load(Ordering::Relaxed),
            next_flow: self.next_flow.load(Ordering::Relaxed),
            direct,
        };
        let bytes = serde_json::to_vec(&state).map_err(HandOverRefused::Malformed)?;
        Ok(Part { bytes: Zeroizing::new(bytes), fds })
    }

    /// Takes over what a predecessor wrote: `parts` as in [`WrittenPlane`]. This data plane must not have served yet, and
    /// have as many workers as there are parts of workers. `commit` is asked once everything stands ready: true when the
    /// predecessor never goes on.
    pub(crate) async fn take_over(
        self: &Arc<Self>,
        parts: Vec<Part>,
        commit: impl FnOnce() -> bool,
    ) -> Result<TakenPlane, HandOverRefused> {
        let mut parts = parts.into_iter();
        let plane = parts.next().ok_or(HandOverRefused::Inconsistent("no pods"))?;
        let (mut state, pods) = read_pods(plane)?;
        let direct = state.direct.take();
        let mut workers = parts.map(read_worker).collect::<Result<Vec<_>, _>>()?;
        if workers.len() > self.workers.len() {
            return Err(HandOverRefused::Inconsistent("more workers than announced"));
        }
        let flows = workers.iter().map(|worker| worker.state.flows.len()).sum();
        let mut shares: Vec<Vec<_>> = self.workers.iter().map(|_| Vec::new()).collect();
        let mut slots: BTreeMap<PodKey, BTreeSet<u16>> = BTreeMap::new();
        for worker in &mut workers {
            let fds = std::mem::take(&mut worker.listeners);
            for (listener, fd) in worker.state.listeners.iter().zip(fds) {
                let (key, _port) = PodKey::of(ListenerTag(listener.tag));
                slots.entry(key).or_default().insert(listener.slot);
                shares[usize::from(listener.slot) % self.serving].push((*listener, fd));
            }
        }
        self.next_pod.store(state.next_pod, Ordering::Relaxed);
        self.next_flow.store(state.next_flow, Ordering::Relaxed);
        let mut workers = workers.into_iter();
        let mut verdicts = Vec::new();
        let mut replies = Vec::new();
        for (index, (worker, listeners)) in self.workers.iter().zip(shares).enumerate() {
            let open = slots
                .iter()
                .filter(|(_, taken)| {
                    index < self.serving
                        && !taken.iter().any(|slot| usize::from(*slot) % self.serving == index)
                })
                .map(|(key, _)| *key)
                .collect();
            let (decide, verdict) = mpsc::channel();
            let (reply, taken) = oneshot::channel();
            verdicts.push(decide);
            replies.push(taken);
            let pods = pods.iter().map(|(pod, _)| Arc::clone(pod)).collect();
            let worker_state = workers.next();
            let taking = Taking { worker: worker_state, pods, listeners, open, reply, verdict };
            deliver(worker, Command::Take(Box::new(taking))).await;
        }
        let mut outcome = Ok(());
        for reply in replies {
            let taken = reply.await.unwrap_or(Err(HandOverRefused::WorkerEnded));
            outcome = outcome.and(taken);
        }
        if outcome.is_ok() && !commit() {
            outcome = Err(HandOverRefused::NotOurs);
        }
        let verdict = if outcome.is_ok() { Verdict::GoOn } else { Verdict::LetGo };
        for worker in verdicts {
            if worker.send(verdict).is_err() {
                tracing::error!("a worker ended while it took over");
            }
        }
        outcome?;
        self.direct.succeed(direct);
        Ok(TakenPlane { pods: self.serve_handed(pods, &slots), flows })
    }

    fn serve_handed(
        self: &Arc<Self>,
        pods: Vec<(Arc<Pod>, Option<Duration>)>,
        slots: &BTreeMap<PodKey, BTreeSet<u16>>,
    ) -> Vec<HandedPod> {
        let serving = u16::try_from(self.serving).unwrap_or(u16::MAX);
        let mut handed = Vec::with_capacity(pods.len());
        for (pod, leaves_in) in pods {
            let last = slots.get(&pod.key).and_then(|taken| taken.last().copied());
            let slots = last.map(|last| last.saturating_add(1).max(serving));
            handed.push(HandedPod { sockets: pod.sockets.clone(), slots });
            let uid = pod.sockets.uid.clone();
            self.pods().insert(uid.clone(), pod);
            if let Some(left) = leaves_in {
                let plane = Arc::clone(self);
                tokio::spawn(async move {
                    plane.remove_pod(&uid, Drain::Graceful(left)).await;
                });
            }
        }
        handed
    }
}

/// A pod, and how long its last flows may go on if it leaves.
type ReadPod = (Arc<Pod>, Option<Duration>);

fn read_pods(part: Part) -> Result<(PlaneState, Vec<ReadPod>), HandOverRefused> {
    let mut state: PlaneState =
        serde_json::from_slice(&part.bytes).map_err(HandOverRefused::Malformed)?;
    if state.pods.len() != part.fds.len() {
        return Err(HandOverRefused::Inconsistent("descriptors of pods are missing"));
    }
    let mut pods = Vec::with_capacity(state.pods.len());
    for (pod, fd) in std::mem::take(&mut state.pods).into_iter().zip(part.fds) {
        let netns = Netns::from_fd(fd).map_err(HandOverRefused::Namespace)?;
        if netns.cookie() != pod.cookie {
            return Err(HandOverRefused::Inconsistent("another pod's network namespace"));
        }
        let sockets = PodSockets {
            uid: pod.uid,
            namespace: pod.namespace,
            name: pod.name,
            service_account: pod.service_account,
            netns: Arc::new(netns),
            cookie: pod.cookie,
            addresses: pod.addresses,
            capture_inbound: pod.capture_inbound,
        };
        pods.push((Arc::new(Pod::new(PodKey(pod.key), sockets)), pod.leaves_in));
    }
    Ok((state, pods))
}

fn read_worker(part: Part) -> Result<HandedWorker, HandOverRefused> {
    const SHORT: HandOverRefused = HandOverRefused::Inconsistent("a worker is cut short");
    let (length, rest) = part.bytes.split_first_chunk::<4>().ok_or(SHORT)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_too_long| SHORT)?;
    let (json, engine) = rest.split_at_checked(length).ok_or(SHORT)?;
    let state: state::WorkerState =
        serde_json::from_slice(json).map_err(HandOverRefused::Malformed)?;
    if part.fds.len() != state.sockets.len() + state.listeners.len() {
        return Err(HandOverRefused::Inconsistent("descriptors of a worker are missing"));
    }
    let mut sockets = part.fds;
    let listeners = sockets.split_off(state.sockets.len());
    Ok(HandedWorker { state, engine: Zeroizing::new(engine.to_vec()), sockets, listeners })
}

//! The direct path: pods of one node talk without the agent once it has carried a connection of theirs and the full policy
//! allows the pair. docs/ebpf.md has the kernel's side.
//!
//! ```text
//!  workers ── offers ──►  keeper ── judge(picture) ──► Ledger ── commands ──► kernel: verdicts, cuts, lease
//!  picture ── changed ─►  (a thread)  ◄── opened, closed, octets ──────────── kernel: queue of events
//! ```
//! A service's virtual address goes with the pairs of its endpoints: [`spread`](spread::spread) lists all of them.
//!
//! **Invariants.** A pair gets a verdict only by [`judge`] on the current picture, which asks the very functions that carry
//! its connections otherwise; what changes judges every pair again. Nothing is in force while the keeper does not turn: its
//! lease lapses. Each connection has one record of each reporter, also over a change of processes.

mod answers;
mod connections;
mod judge;
mod keeper;
mod spread;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mesh_ebpf::{Capture, PodSettings};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::oneshot;

pub use judge::SameNode;

use connections::WrittenConnection;
use keeper::{Keeper, Message};

use crate::dataplane::Drain;
use crate::dataplane::flows::{ConnectionView, ToPod};
use crate::dataplane::shared::{PodSockets, Shared};

/// Reaches the keeper of the direct path; there is none in a data plane without a kernel's side.
#[derive(Clone, Debug, Default)]
pub struct DirectPath {
    handle: Arc<OnceLock<Handle>>,
}

#[derive(Debug)]
struct Handle {
    inbox: Sender<Message>,
    state: Arc<State>,
}

/// What the keeper and the others share without a message.
#[derive(Debug)]
struct State {
    /// The picture has changed since it was looked at last.
    changed: AtomicBool,
    /// Offers that wait.
    offers: AtomicUsize,
    verdicts: AtomicUsize,
    vips: AtomicUsize,
    open: AtomicUsize,
    cut: AtomicU64,
    /// As set on the command line.
    setting: SameNode,
    /// What the kernel lacks.
    lacking: Option<String>,
}

/// Offers that wait at most; beyond it the next connection of the pair is one again.
const MAX_OFFERS: usize = 1024;
/// How long somebody waits for the keeper at most.
const PATIENCE: Duration = Duration::from_secs(2);

/// How the direct path stands, for people.
#[derive(Clone, Debug, Serialize)]
pub struct DirectStatus {
    /// The setting.
    pub setting: SameNode,
    /// True when pairs may talk directly.
    pub active: bool,
    /// Why not, where the setting would have it.
    pub lacking: Option<String>,
    /// Verdicts in the kernel.
    pub verdicts: usize,
    /// Virtual addresses of services in the kernel, for one client each, that lead straight to endpoints.
    pub virtual_addresses: usize,
    /// Connections open.
    pub open: usize,
    /// Connections ended by force.
    pub cut: u64,
}

/// Whether a connection would go directly, for `culvert explain`.
#[derive(Clone, Debug, Serialize)]
pub struct DirectExplanation {
    /// True when policy and pods allow it.
    pub direct: bool,
    /// True when the kernel has the verdict already; otherwise the next connection goes through the agent and brings it.
    pub in_force: bool,
    /// Why, or why not.
    pub because: String,
    /// The rule that decided.
    pub rule: Option<String>,
}

/// What a successor is told.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Written {
    connections: Vec<WrittenConnection>,
}

impl DirectPath {
    /// Starts the keeper. It does nothing before [`adopt`](Self::adopt) or [`succeed`](Self::succeed).
    ///
    /// # Errors
    /// When there is no thread.
    pub(crate) fn start(
        &self,
        setting: SameNode,
        capture: Arc<Capture>,
        shared: Arc<Shared>,
        next_flow: Arc<AtomicU64>,
    ) -> std::io::Result<()> {
        let lacking = match setting {
            SameNode::Direct => Capture::check_direct().err().map(|error| {
                let error = crate::error::error_chain(&error);
                tracing::warn!(%error, "no direct path: connections on this node go through the agent");
                error
            }),
            SameNode::Tunnel => None,
        };
        let state = Arc::new(State {
            changed: AtomicBool::new(false),
            offers: AtomicUsize::new(0),
            verdicts: AtomicUsize::new(0),
            vips: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            cut: AtomicU64::new(0),
            setting,
            lacking,
        });
        let (inbox, messages) = mpsc::channel();
        let keeper = Keeper::new(capture, shared, next_flow, Arc::clone(&state));
        std::thread::Builder::new()
            .name("culvert-direct".to_owned())
            .spawn(move || keeper.keep(&messages))?;
        self.handle.get_or_init(|| Handle { inbox, state });
        Ok(())
    }

    fn send(&self, message: Message) {
        if let Some(handle) = self.handle.get()
            && handle.inbox.send(message).is_err()
        {
            tracing::error!("the keeper of the direct path has ended");
        }
    }

    /// The agent has carried a connection of a pod to a pod of this node. Never waits.
    pub(super) fn offer(&self, carried: &ToPod) {
        let Some(handle) = self.handle.get() else { return };
        if !handle.state.is_active() {
            return;
        }
        if handle.state.offers.fetch_add(1, Ordering::Relaxed) >= MAX_OFFERS {
            handle.state.offers.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        self.send(Message::Offer(*carried));
    }

    /// True when pairs may talk directly.
    pub(super) fn is_active(&self) -> bool {
        self.handle.get().is_some_and(|handle| handle.state.is_active())
    }

    /// The picture was swapped. Never waits.
    pub(super) fn changed(&self) {
        let Some(handle) = self.handle.get() else { return };
        if !handle.state.changed.swap(true, Ordering::AcqRel) {
            self.send(Message::Wake);
        }
    }

    /// No predecessor hands over: what is in the kernel is out of force until it is judged again.
    pub(crate) fn adopt(&self) {
        self.send(Message::Adopt);
    }

    /// Goes on with what a predecessor wrote; none when it knew nothing of the direct path.
    pub(super) fn succeed(&self, written: Option<Value>) {
        let written = written.map(serde_json::from_value::<Written>).transpose();
        match written {
            Ok(Some(written)) => self.send(Message::Succeed(written)),
            Ok(None) => self.adopt(),
            Err(error) => {
                tracing::error!(%error, "what the predecessor knew of direct connections does not parse");
                self.adopt();
            }
        }
    }

    /// All pods that were captured are known: verdicts and connections in the kernel are judged.
    pub(crate) fn settle(&self) {
        self.send(Message::Settle);
    }

    /// A pod is captured, or its settings have changed.
    pub(crate) fn pod_captured(&self, sockets: PodSockets, settings: Option<PodSettings>) {
        self.send(Message::Captured(Box::new((sockets, settings))));
    }

    /// A pod is about to be captured no more. Its verdicts are gone when this returns, and its connections too unless they may
    /// go on for `drain`. Blocks, not for long.
    pub(crate) fn pod_leaves(&self, cookie: u64, drain: Drain) {
        let (done, left) = mpsc::channel();
        self.send(Message::Leaves { cookie, drain, done });
        if self.handle.get().is_some() && left.recv_timeout(PATIENCE).is_err() {
            tracing::warn!("the direct path did not let a pod go in time");
        }
    }

    /// Whether direct connections of the pod go on; where that cannot be told, they do. Blocks, not for long.
    pub(crate) fn lingers(&self, cookie: u64) -> bool {
        if self.handle.get().is_none() {
            return false;
        }
        let (reply, count) = mpsc::channel();
        self.send(Message::Count { cookie, reply });
        count.recv_timeout(PATIENCE).map_or(true, |count| count > 0)
    }

    /// Stands still and writes everything down. Blocks, not for long.
    pub(super) fn freeze(&self) -> Option<Value> {
        self.handle.get()?;
        let (reply, written) = mpsc::channel();
        self.send(Message::Freeze(reply));
        let written = written.recv_timeout(PATIENCE).ok()?;
        serde_json::to_value(written).ok()
    }

    /// Goes on after all.
    pub(super) fn go_on(&self) {
        self.send(Message::GoOn);
    }

    /// Ends. Verdicts are out of force, connections go on.
    pub(crate) fn end(&self) {
        let (done, ended) = mpsc::channel();
        self.send(Message::End(done));
        if self.handle.get().is_some() && ended.recv_timeout(PATIENCE).is_err() {
            tracing::debug!("the keeper of the direct path had ended");
        }
    }

    /// Both sides' views of the open connections.
    pub(super) async fn connections(&self) -> Vec<ConnectionView> {
        if self.handle.get().is_none() {
            return Vec::new();
        }
        let (reply, views) = oneshot::channel();
        self.send(Message::List(reply));
        views.await.unwrap_or_default()
    }

    /// Whether `from` (an address, `NAMESPACE/NAME` or a uid) would reach `to` directly; none when one of them is no pod of
    /// this node.
    pub(crate) async fn explain(
        &self,
        from: &str,
        to: &str,
        port: u16,
    ) -> Option<DirectExplanation> {
        self.handle.get()?;
        let (reply, explained) = oneshot::channel();
        let (from, to) = (from.to_owned(), to.to_owned());
        self.send(Message::Explain { from, to, port, reply });
        explained.await.ok().flatten()
    }

    /// How it stands; none without a kernel's side.
    pub(crate) fn status(&self) -> Option<DirectStatus> {
        let state = &self.handle.get()?.state;
        Some(DirectStatus {
            setting: state.setting,
            active: state.is_active(),
            lacking: state.lacking.clone(),
            verdicts: state.verdicts.load(Ordering::Relaxed),
            virtual_addresses: state.vips.load(Ordering::Relaxed),
            open: state.open.load(Ordering::Relaxed),
            cut: state.cut.load(Ordering::Relaxed),
        })
    }
}

impl State {
    fn is_active(&self) -> bool {
        self.in_effect() == SameNode::Direct
    }

    /// What is done: the setting, where the kernel has what it needs.
    fn in_effect(&self) -> SameNode {
        if self.lacking.is_some() { SameNode::Tunnel } else { self.setting }
    }
}

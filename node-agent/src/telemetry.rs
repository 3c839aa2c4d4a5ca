//! Drains what the workers report about flows into metrics and the access log, on a thread of its own.

mod limit;
mod mailbox;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_runtime::{AccessLog, FlowMeter, OpenFlow};
use mesh_telemetry::{FlowBytes, FlowFacts, FlowPath, FlowRecord};

use crate::dataplane::{FlowEvent, FlowSink, policy_ref};
use limit::{LineBudget, LineKind};
use mailbox::{Full, GATHER, Letters, Mailbox, mailbox};

/// Reports waiting at most; beyond that they are dropped and counted, since a worker never waits.
const QUEUE: usize = 65_536;

/// What waits in the queue.
#[derive(Debug)]
enum Letter {
    Event(FlowEvent),
    /// Everything before this is to be counted, and the end of the channel to be told so.
    Flush(Sender<()>),
}

/// Takes reports from the workers.
#[derive(Debug)]
pub(crate) struct FlowReports {
    mailbox: Mailbox<Letter>,
}

impl FlowSink for FlowReports {
    fn report(&self, event: FlowEvent) {
        if let Err(Full) = self.mailbox.put(Letter::Event(event)) {
            metrics::counter!("culvert_flow_reports_dropped_total").increment(1);
        }
    }
}

impl FlowReports {
    /// Waits until everything that was reported is counted and logged, for `patience` at most. Blocks.
    pub(crate) fn flush(&self, patience: Duration) {
        let (done, flushed) = channel();
        if self.mailbox.put(Letter::Flush(done)).is_err() || flushed.recv_timeout(patience).is_err()
        {
            tracing::warn!("some reports about flows were not counted in time");
        }
    }

    /// Starts the thread. It ends when the last [`FlowReports`] is gone and everything reported is counted.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(
        meter: Arc<FlowMeter>,
        access: AccessLog,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let (mailbox, letters) = mailbox(QUEUE);
        let thread = std::thread::Builder::new().name("telemetry".to_owned()).spawn(move || {
            let (open, lines) = (HashMap::new(), LineBudget::default());
            Ledger { meter, access, open, lines }.keep(&letters);
        })?;
        Ok((Self { mailbox }, thread))
    }
}

/// Open flows by what is said about them: flows of the same facts count alike, so which of them a report is about
/// does not matter.
struct Ledger {
    meter: Arc<FlowMeter>,
    access: AccessLog,
    open: HashMap<FlowFacts, Vec<Counted>>,
    lines: LineBudget,
}

/// An open flow, and the bytes counted for it.
struct Counted {
    flow: OpenFlow,
    total: FlowBytes,
}

impl Ledger {
    fn keep(mut self, letters: &Letters<Letter>) {
        while let Some(events) = letters.take(self.lines.summary_due()) {
            for letter in events {
                match letter {
                    Letter::Event(event) => self.take(event),
                    Letter::Flush(done) => {
                        if done.send(()).is_err() {
                            tracing::debug!("whoever waited for the reports is gone");
                        }
                    }
                }
            }
            for (LineKind { direction, reason }, count) in self.lines.summary(Instant::now()) {
                tracing::warn!(?direction, %reason, count, "refusals that the access log left out");
            }
            std::thread::sleep(GATHER);
        }
    }

    /// Whether a refusal is written to the access log, which a flood must not fill.
    fn may_log(&mut self, kind: LineKind) -> bool {
        let may = self.lines.take(kind, Instant::now());
        if !may {
            metrics::counter!("culvert_access_log_lines_left_out_total", "reason" => kind.reason.as_str())
                .increment(1);
        }
        may
    }

    fn take(&mut self, event: FlowEvent) {
        match event {
            FlowEvent::Opened(facts) => {
                let path = if facts.mutual_tls { FlowPath::Tunnel } else { FlowPath::Plaintext };
                let flow = self.meter.opened((*facts).clone(), path);
                let counted = Counted { flow, total: FlowBytes::default() };
                self.open.entry((*facts).clone()).or_default().push(counted);
            }
            FlowEvent::TakenOver { facts, bytes } => {
                let path = if facts.mutual_tls { FlowPath::Tunnel } else { FlowPath::Plaintext };
                let flow = self.meter.taken_over((*facts).clone(), path, bytes);
                let counted = Counted { flow, total: bytes };
                self.open.entry((*facts).clone()).or_default().push(counted);
            }
            FlowEvent::Moved { facts, bytes } => {
                if let Some(counted) = self.open.get_mut(&*facts).and_then(|open| open.last_mut()) {
                    counted.add(bytes);
                }
            }
            FlowEvent::Closed { record, unreported, was_open } => {
                let kind = LineKind { direction: record.direction, reason: record.reason };
                if was_open || self.may_log(kind) {
                    self.access.flow(&record);
                }
                let counted = if was_open { self.pop(&record.facts) } else { None };
                match counted {
                    None => self.meter.refused(&record),
                    Some(mut counted) => {
                        counted.add(unreported);
                        let as_counted = FlowRecord { bytes: counted.total, ..*record };
                        self.meter.closed(counted.flow, &as_counted);
                    }
                }
            }
            FlowEvent::Denied(denial) => {
                let kind = LineKind { direction: denial.direction, reason: denial.reason };
                if self.may_log(kind) {
                    self.access.early_denial(&denial);
                }
                self.meter.early_denial(&denial);
            }
            FlowEvent::Noted { flow, pod, note } => {
                let policy = policy_ref(&note.rule);
                tracing::info!(
                    target: "policy", flow_id = %flow, %pod, kind = note.kind.as_str(), %policy,
                    "a policy that is not enforced matched"
                );
                self.meter.policy_note(note.kind.as_str(), &policy);
            }
        }
    }

    fn pop(&mut self, facts: &FlowFacts) -> Option<Counted> {
        let open = self.open.get_mut(facts)?;
        let counted = open.pop();
        if open.is_empty() {
            self.open.remove(facts);
        }
        counted
    }
}

impl Counted {
    fn add(&mut self, bytes: FlowBytes) {
        self.total.client_to_server += bytes.client_to_server;
        self.total.server_to_client += bytes.server_to_client;
        self.flow.moved(self.total);
    }
}

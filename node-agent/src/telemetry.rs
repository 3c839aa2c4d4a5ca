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
use mesh_telemetry::{FlowBytes, FlowFacts, FlowRecord, metric};

use crate::dataplane::{FlowEvent, FlowSink, policy_ref};
use limit::{LineBudget, LineKind};
use mailbox::{Full, GATHER, Letters, Mailbox, mailbox};

/// Reports waiting at most; beyond that they are dropped and counted, since a worker never waits.
///
/// What ends a flow that was counted as open is never dropped: it would count as open for ever. Of these there are no
/// more than open flows.
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
    fn report(&self, event: FlowEvent) -> bool {
        match event {
            FlowEvent::TakenOver { .. } | FlowEvent::Closed { was_open: true, .. } => {
                self.mailbox.put_beyond(Letter::Event(event));
                true
            }
            FlowEvent::Opened { .. }
            | FlowEvent::Moved { .. }
            | FlowEvent::Closed { was_open: false, .. }
            | FlowEvent::Noted { .. }
            | FlowEvent::Denied(_) => match self.mailbox.put(Letter::Event(event)) {
                Ok(()) => true,
                Err(Full) => {
                    metrics::counter!(metric::EVENTS_DROPPED.name, "queue" => "flow_reports")
                        .increment(1);
                    false
                }
            },
        }
    }
}

impl FlowReports {
    /// Waits until everything that was reported is counted and logged, for `patience` at most. Blocks.
    pub(crate) fn flush(&self, patience: Duration) {
        let (done, flushed) = channel();
        self.mailbox.put_beyond(Letter::Flush(done));
        if flushed.recv_timeout(patience).is_err() {
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
            Ledger::new(meter, access).keep(&letters);
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
    fn new(meter: Arc<FlowMeter>, access: AccessLog) -> Self {
        Self { meter, access, open: HashMap::new(), lines: LineBudget::default() }
    }

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
            let reason = kind.reason.as_str();
            metrics::counter!(metric::ACCESS_LOG_LEFT_OUT.name, "reason" => reason).increment(1);
        }
        may
    }

    fn take(&mut self, event: FlowEvent) {
        match event {
            FlowEvent::Opened { facts, path } => {
                let flow = self.meter.opened((*facts).clone(), path);
                let counted = Counted { flow, total: FlowBytes::default() };
                self.open.entry((*facts).clone()).or_default().push(counted);
            }
            FlowEvent::TakenOver { facts, path, bytes } => {
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

#[cfg(test)]
mod tests {
    use mesh_model::{CloseReason, Direction, FlowId, PodUid, Reporter};
    use mesh_runtime::FlowMeterConfig;
    use mesh_runtime::log::LineWriter;
    use mesh_telemetry::{EarlyDenial, FlowPath, LogFormat, WorkloadLabels};

    use super::*;

    fn facts(workload: &str) -> Arc<FlowFacts> {
        let mut facts = FlowFacts::unknown(Reporter::Source);
        facts.source =
            Some(WorkloadLabels { workload: workload.into(), ..WorkloadLabels::default() });
        Arc::new(facts)
    }

    fn closed(facts: &Arc<FlowFacts>, was_open: bool) -> FlowEvent {
        let record = FlowRecord {
            id: FlowId(1),
            pod: PodUid::new("p"),
            direction: Direction::Outbound,
            source: "10.0.0.1:1".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
            authority: None,
            facts: (**facts).clone(),
            path: FlowPath::Plaintext,
            bytes: FlowBytes { client_to_server: 9, server_to_client: 0 },
            duration: Duration::ZERO,
            reason: CloseReason::Complete,
            policy: None,
            detail: None,
            trace: None,
        };
        let unreported = record.bytes;
        FlowEvent::Closed { record: Box::new(record), unreported, was_open }
    }

    #[test]
    fn the_end_of_an_open_flow_is_counted_however_many_reports_wait() {
        let (mailbox, letters) = mailbox(4);
        let reports = FlowReports { mailbox };
        let (open, late) = (facts("open"), facts("late"));
        let bytes = FlowBytes { client_to_server: 1, server_to_client: 0 };
        assert!(
            reports.report(FlowEvent::Opened { facts: Arc::clone(&open), path: FlowPath::Tunnel })
        );
        let denial = || {
            FlowEvent::Denied(EarlyDenial {
                source: "10.0.0.1:1".parse().unwrap(),
                destination: "10.0.0.2:15008".parse().unwrap(),
                direction: Direction::InboundTunnel,
                reason: CloseReason::TlsFailure,
                detail: None,
            })
        };
        while reports.report(denial()) {}
        // What can be left out is, and says so.
        assert!(!reports.report(FlowEvent::Moved { facts: Arc::clone(&open), bytes }));
        assert!(
            !reports.report(FlowEvent::Opened { facts: Arc::clone(&late), path: FlowPath::Tunnel })
        );
        assert!(!reports.report(closed(&late, false)));
        // What would leave a flow open for ever cannot.
        assert!(reports.report(closed(&open, true)));
        drop(reports);

        let meter = Arc::new(FlowMeter::new(FlowMeterConfig::default()));
        let (writer, _flush) = LineWriter::start(io::sink(), 64).unwrap();
        let mut ledger =
            Ledger::new(Arc::clone(&meter), AccessLog::new(writer, LogFormat::default()));
        for letter in letters.take(None).unwrap() {
            let Letter::Event(event) = letter else { panic!("nobody flushes") };
            ledger.take(event);
        }
        assert!(ledger.open.is_empty());
        let text = meter.render(Instant::now());
        let line = |metric: &str| {
            text.lines().find(|line| line.starts_with(&format!("{metric}{{"))).unwrap_or_default()
        };
        assert!(line(metric::TCP_CONNECTIONS_CLOSED.name).ends_with("} 1"), "{text}");
        assert!(line(metric::TCP_RECEIVED_BYTES.name).ends_with("} 9"), "{text}");
        assert!(!text.contains("late"), "{text}");
        assert_eq!(meter.render(Instant::now() + FlowMeterConfig::default().idle), "");
    }
}

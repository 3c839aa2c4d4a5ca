//! The direct connections that are open, and what both reporters say of them when they end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_authorize::RuleRef;
use mesh_direct::{Pair, Pod};
use mesh_ebpf::{DirectClose, DirectEnd, DirectFlow};
use mesh_model::{CloseReason, Direction, FlowId};
use mesh_telemetry::{FlowBytes, FlowPath, FlowRecord};
use serde::{Deserialize, Serialize};

use super::judge::{Name, Sides};
use crate::dataplane::flows::{ConnectionView, FlowEvent};
use crate::dataplane::shared::FlowSink;
use crate::dataplane::telemetry::policy_ref;

/// One open connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) pair: Pair,
    /// The virtual address that was dialled, if one was.
    pub(super) vip: Option<SocketAddr>,
    /// Its names at source and destination.
    pub(super) ids: [FlowId; 2],
    /// By the kernel's monotonic clock.
    pub(super) opened_at: Duration,
    pub(super) sides: Arc<Sides>,
    pub(super) rule: Option<RuleRef>,
    pub(super) client: Option<DirectClose>,
    pub(super) server: Option<DirectClose>,
    /// Who closed first.
    pub(super) first: Option<DirectEnd>,
    /// It was ended by force, and why.
    pub(super) cut: Option<(CloseReason, Option<RuleRef>)>,
    /// Looks at the kernel's table that found nothing of it.
    pub(super) missed: u8,
    /// Whether its beginning was reported, at source and destination.
    pub(super) announced: [bool; 2],
}

impl Connection {
    /// One side's socket has closed; true when both have.
    pub(super) fn closed(&mut self, end: DirectEnd, close: DirectClose) -> bool {
        self.first.get_or_insert(end);
        match end {
            DirectEnd::Client => self.client = Some(close),
            DirectEnd::Server => self.server = Some(close),
        }
        self.client.is_some() && self.server.is_some()
    }

    /// One end is known to have closed.
    pub(super) const fn has_closed(&self) -> bool {
        self.first.is_some()
    }

    fn bytes(&self) -> FlowBytes {
        let sent = |close: Option<DirectClose>| close.map_or(0, |close| close.sent_octets);
        FlowBytes { client_to_server: sent(self.client), server_to_client: sent(self.server) }
    }

    /// How it ended. Of two sockets that both ended without order, the first one to close has reset the other.
    fn reason(&self) -> CloseReason {
        if let Some((reason, _)) = self.cut {
            return reason;
        }
        let orderly = |close: Option<DirectClose>| close.map(|close| close.orderly);
        match (orderly(self.client), orderly(self.server), self.first) {
            (Some(true), Some(true), _) => CloseReason::Complete,
            (Some(false), Some(true), _) => CloseReason::ClientReset,
            (Some(true), Some(false), _) => CloseReason::ServerReset,
            (Some(false), Some(false), Some(DirectEnd::Server)) => CloseReason::ServerReset,
            (Some(false), Some(false), _) => CloseReason::ClientReset,
            // The other end's pod was let go, or the kernel could not tell.
            (None, _, _) | (_, None, _) => CloseReason::Drained,
        }
    }

    fn record(&self, flow: &DirectFlow, end: DirectEnd, at: Duration) -> FlowRecord {
        let (id, facts, pod, direction) = match end {
            DirectEnd::Client => {
                (self.ids[0], &self.sides.source, &self.sides.client, Direction::Outbound)
            }
            DirectEnd::Server => (
                self.ids[1],
                &self.sides.destination,
                &self.sides.server,
                Direction::InboundPlaintext,
            ),
        };
        let rule = match &self.cut {
            Some((_, rule)) => rule.as_ref().or(self.rule.as_ref()),
            None => self.rule.as_ref(),
        };
        FlowRecord {
            id,
            pod: pod.uid.clone(),
            direction,
            source: flow.client,
            destination: flow.target,
            authority: None,
            facts: (**facts).clone(),
            path: FlowPath::Direct,
            bytes: self.bytes(),
            duration: at.saturating_sub(self.opened_at),
            reason: self.reason(),
            policy: rule.map(policy_ref),
            detail: None,
            trace: None,
        }
    }
}

/// All that are open.
#[derive(Debug, Default)]
pub(super) struct Connections {
    open: BTreeMap<DirectFlow, Connection>,
}

/// A connection on its way to a successor process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct WrittenConnection {
    client: SocketAddr,
    target: SocketAddr,
    /// Agents that knew of no virtual addresses say nothing.
    #[serde(default)]
    vip: Option<SocketAddr>,
    cookies: [u64; 2],
    ids: [FlowId; 2],
    opened_at: Duration,
    sides: Sides,
    rule: Option<RuleRef>,
    /// Octets and order of what has closed.
    closed: [Option<(u64, bool)>; 2],
    server_was_first: bool,
    cut: Option<(CloseReason, Option<RuleRef>)>,
}

impl Connections {
    pub(super) fn len(&self) -> usize {
        self.open.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub(super) fn get_mut(&mut self, flow: &DirectFlow) -> Option<&mut Connection> {
        self.open.get_mut(flow)
    }

    pub(super) fn contains(&self, flow: &DirectFlow) -> bool {
        self.open.contains_key(flow)
    }

    /// A connection is open; `taken_over` when it was reported before, by another process.
    pub(super) fn opened(
        &mut self,
        flow: DirectFlow,
        mut connection: Connection,
        taken_over: bool,
        sink: &dyn FlowSink,
    ) {
        let Sides { source, destination, .. } = &*connection.sides;
        connection.announced = [source, destination].map(|facts| {
            let (facts, path) = (Arc::clone(facts), FlowPath::Direct);
            sink.report(if taken_over {
                FlowEvent::TakenOver { facts, path, bytes: FlowBytes::default() }
            } else {
                FlowEvent::Opened { facts, path }
            })
        });
        self.open.insert(flow, connection);
    }

    /// A connection has ended: both records. What it was, when it was known.
    pub(super) fn ended(
        &mut self,
        flow: &DirectFlow,
        at: Duration,
        sink: &dyn FlowSink,
    ) -> Option<Connection> {
        let connection = self.open.remove(flow)?;
        report(&connection, flow, at, true, sink);
        Some(connection)
    }

    /// How many have an end in the pod.
    pub(super) fn count_of(&self, pod: Pod) -> usize {
        let is_its = |one: &&Connection| one.pair.client == pod || one.pair.server == pod;
        self.open.values().filter(is_its).count()
    }

    /// Notes what the kernel has of those that are `meant`; connections of which it had nothing twice have ended without
    /// being told of.
    pub(super) fn compare(
        &mut self,
        known: &BTreeSet<DirectFlow>,
        meant: impl Fn(&Pair) -> bool,
    ) -> Vec<DirectFlow> {
        let mut gone = Vec::new();
        for (flow, connection) in &mut self.open {
            if !meant(&connection.pair) {
                continue;
            }
            connection.missed = if known.contains(flow) { 0 } else { connection.missed + 1 };
            if connection.missed >= 2 {
                gone.push(*flow);
            }
        }
        gone
    }

    pub(super) fn written(&self) -> Vec<WrittenConnection> {
        let closed = |close: Option<DirectClose>| close.map(|one| (one.sent_octets, one.orderly));
        let write = |(flow, connection): (&DirectFlow, &Connection)| WrittenConnection {
            client: flow.client,
            target: flow.target,
            vip: connection.vip,
            cookies: [connection.pair.client.0, connection.pair.server.0],
            ids: connection.ids,
            opened_at: connection.opened_at,
            sides: (*connection.sides).clone(),
            rule: connection.rule.clone(),
            closed: [closed(connection.client), closed(connection.server)],
            server_was_first: connection.first == Some(DirectEnd::Server),
            cut: connection.cut.clone(),
        };
        self.open.iter().map(write).collect()
    }

    /// Both sides' views, in the order of addresses.
    pub(super) fn views(&self, now: Duration) -> Vec<ConnectionView> {
        let mut views = Vec::with_capacity(2 * self.open.len());
        for (flow, connection) in &self.open {
            for end in [DirectEnd::Client, DirectEnd::Server] {
                let record = connection.record(flow, end, now);
                let Sides { client, server, .. } = &*connection.sides;
                let (Name { namespace, name, .. }, destination) = match end {
                    DirectEnd::Client => (client, connection.vip.unwrap_or(flow.target)),
                    DirectEnd::Server => (server, flow.target),
                };
                views.push(ConnectionView {
                    id: record.id.to_string(),
                    direction: record.direction,
                    pod: record.pod,
                    pod_namespace: Arc::clone(namespace),
                    pod_name: Arc::clone(name),
                    client: flow.client,
                    destination,
                    source_principal: record.facts.source_principal,
                    destination_principal: record.facts.destination_principal,
                    service: record.facts.service.map(|service| service.hostname.to_string()),
                    path: FlowPath::Direct,
                    rule: connection.rule.as_ref().map(ToString::to_string),
                    established: true,
                    bytes: record.bytes,
                    age_ms: u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX),
                });
            }
        }
        views
    }
}

impl WrittenConnection {
    pub(super) fn read(self) -> (DirectFlow, Connection) {
        let flow = DirectFlow { client: self.client, target: self.target };
        let [client, server] = self.closed.map(|closed| {
            closed.map(|(sent_octets, orderly)| DirectClose { sent_octets, orderly })
        });
        let first = match (client, server, self.server_was_first) {
            (None, None, _) => None,
            (_, _, true) => Some(DirectEnd::Server),
            (_, _, false) => Some(DirectEnd::Client),
        };
        let connection = Connection {
            pair: pair(&flow, Pod(self.cookies[0]), Pod(self.cookies[1])),
            vip: self.vip,
            ids: self.ids,
            opened_at: self.opened_at,
            sides: Arc::new(self.sides),
            rule: self.rule,
            client,
            server,
            first,
            cut: self.cut,
            missed: 0,
            announced: [false; 2],
        };
        (flow, connection)
    }
}

/// The pair of a connection.
pub(super) const fn pair(flow: &DirectFlow, client: Pod, server: Pod) -> Pair {
    Pair { client, client_address: flow.client.ip(), server, target: flow.target }
}

/// A connection that the server's port refused: never open, and recorded by both sides.
pub(super) fn refused(
    connection: &Connection,
    flow: &DirectFlow,
    at: Duration,
    sink: &dyn FlowSink,
) {
    report(connection, flow, at, false, sink);
}

fn report(
    connection: &Connection,
    flow: &DirectFlow,
    at: Duration,
    was_open: bool,
    sink: &dyn FlowSink,
) {
    let sides = [DirectEnd::Client, DirectEnd::Server].into_iter().zip(connection.announced);
    for (end, announced) in sides {
        let record = Box::new(connection.record(flow, end, at));
        let unreported = record.bytes;
        let was_open = was_open && announced;
        sink.report(FlowEvent::Closed { record, unreported, was_open });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::{PodUid, Reporter};
    use mesh_telemetry::FlowFacts;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Heard(Mutex<Vec<FlowEvent>>);

    impl FlowSink for Heard {
        fn report(&self, event: FlowEvent) -> bool {
            self.0.lock().unwrap().push(event);
            true
        }
    }

    fn flow() -> DirectFlow {
        DirectFlow {
            client: "10.0.0.1:4000".parse().unwrap(),
            target: "10.0.0.2:80".parse().unwrap(),
        }
    }

    fn connection() -> Connection {
        let name = |name: &str| Name {
            uid: PodUid::new(name),
            namespace: "shop".into(),
            name: name.into(),
        };
        Connection {
            pair: pair(&flow(), Pod(1), Pod(2)),
            vip: Some("10.96.0.1:80".parse().unwrap()),
            ids: [FlowId(7), FlowId(8)],
            opened_at: Duration::from_secs(10),
            sides: Arc::new(Sides {
                client: name("cart"),
                server: name("stock"),
                source: Arc::new(FlowFacts::unknown(Reporter::Source)),
                destination: Arc::new(FlowFacts::unknown(Reporter::Destination)),
            }),
            rule: None,
            client: None,
            server: None,
            first: None,
            cut: None,
            missed: 0,
            announced: [false; 2],
        }
    }

    const fn close(sent_octets: u64, orderly: bool) -> DirectClose {
        DirectClose { sent_octets, orderly }
    }

    #[test]
    fn the_end_names_whoever_brought_it() {
        use DirectEnd::{Client, Server};
        let check = |ends: &[(DirectEnd, bool)], expected: CloseReason| {
            let mut one = connection();
            for (end, orderly) in ends {
                one.closed(*end, close(1, *orderly));
            }
            assert_eq!(one.reason(), expected, "{ends:?}");
        };
        check(&[(Client, true), (Server, true)], CloseReason::Complete);
        check(&[(Client, false), (Server, false)], CloseReason::ClientReset);
        check(&[(Server, false), (Client, false)], CloseReason::ServerReset);
        check(&[(Client, true), (Server, false)], CloseReason::ServerReset);
        check(&[(Server, true), (Client, false)], CloseReason::ClientReset);
        check(&[(Server, true)], CloseReason::Drained);
        let mut cut = connection();
        cut.closed(Client, close(1, false));
        cut.cut = Some((CloseReason::PolicyChanged, None));
        assert_eq!(cut.reason(), CloseReason::PolicyChanged);
    }

    /// A connection goes through three processes' hands: each reporter tells it once, whole.
    #[test]
    fn a_connection_that_was_handed_over_is_told_once() {
        let sink = Heard::default();
        let mut first = Connections::default();
        first.opened(flow(), connection(), false, &sink);
        assert_eq!(
            (first.count_of(Pod(1)), first.count_of(Pod(2)), first.count_of(Pod(3))),
            (1, 1, 0)
        );
        first.get_mut(&flow()).unwrap().closed(DirectEnd::Server, close(70, true));
        let written = serde_json::to_string(&first.written()).unwrap();
        let written: Vec<WrittenConnection> = serde_json::from_str(&written).unwrap();
        assert_eq!(written[0].vip, connection().vip);
        let mut second = Connections::default();
        for (flow, connection) in written.into_iter().map(WrittenConnection::read) {
            second.opened(flow, connection, true, &sink);
        }
        assert!(second.get_mut(&flow()).unwrap().closed(DirectEnd::Client, close(30, true)));
        assert!(second.ended(&flow(), Duration::from_secs(12), &sink).is_some());
        assert!(second.ended(&flow(), Duration::from_secs(12), &sink).is_none());
        let heard = sink.0.into_inner().unwrap();
        let records: Vec<_> = heard
            .iter()
            .filter_map(|event| match event {
                FlowEvent::Closed { record, .. } => Some(record),
                FlowEvent::Opened { .. }
                | FlowEvent::TakenOver { .. }
                | FlowEvent::Moved { .. }
                | FlowEvent::Noted { .. }
                | FlowEvent::Denied(_) => None,
            })
            .collect();
        assert_eq!((heard.len(), records.len()), (6, 2));
        for record in records {
            let bytes = FlowBytes { client_to_server: 30, server_to_client: 70 };
            assert_eq!((record.bytes, record.reason), (bytes, CloseReason::Complete));
            assert_eq!(record.duration, Duration::from_secs(2));
        }
    }

    #[test]
    fn what_the_kernel_has_no_more_has_ended_at_the_second_look() {
        let sink = Heard::default();
        let mut connections = Connections::default();
        connections.opened(flow(), connection(), false, &sink);
        let (none, there) = (BTreeSet::new(), BTreeSet::from([flow()]));
        assert_eq!(connections.compare(&none, |_| true), []);
        assert_eq!(connections.compare(&there, |_| true), []);
        assert_eq!(connections.compare(&none, |_| true), []);
        assert_eq!(connections.compare(&none, |_| false), []);
        assert_eq!(connections.compare(&none, |_| true), [flow()]);
    }
}

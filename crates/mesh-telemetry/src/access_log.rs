//! The access log: one line per connection.

use std::fmt::{self, Write as _};
use std::time::SystemTime;

use mesh_model::{CloseReason, Direction};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::record::{EarlyDenial, FlowPath, FlowRecord};

/// How lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Tabs and `key=value`, for people.
    #[default]
    Text,
    /// One JSON object per line, for programs.
    Json,
}

/// Text that names no format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a log format: {text:?}; text and json are")]
pub struct InvalidLogFormat {
    /// What was given.
    pub text: String,
}

impl std::str::FromStr for LogFormat {
    type Err = InvalidLogFormat;

    fn from_str(text: &str) -> Result<Self, InvalidLogFormat> {
        match text {
            "text" | "plain" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(InvalidLogFormat { text: other.to_owned() }),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// The log's name, in JSON its `scope`.
pub const SCOPE: &str = "access";

/// One field of a line.
enum Field {
    /// Written as it is: addresses, numbers, words.
    Bare(String),
    /// Written in quotes: names and everything from outside.
    Quoted(String),
    /// A number, also in JSON.
    Number(u64),
}

/// Fields in their order; absent ones are not in the list.
pub(crate) struct Fields(Vec<(&'static str, Field)>);

impl Fields {
    pub(crate) fn with_capacity(fields: usize) -> Self {
        Self(Vec::with_capacity(fields))
    }

    pub(crate) fn bare(&mut self, key: &'static str, value: impl fmt::Display) {
        self.0.push((key, Field::Bare(value.to_string())));
    }

    pub(crate) fn quoted(&mut self, key: &'static str, value: Option<&str>) {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            self.0.push((key, Field::Quoted(value.to_owned())));
        }
    }

    pub(crate) fn number(&mut self, key: &'static str, value: u64) {
        self.0.push((key, Field::Number(value)));
    }
}

/// Whether the line of a flow that ended so is an error; it is for information otherwise. What counts as failed in
/// metrics is one: an end that resets a connection of its own has no less got what it wanted.
#[must_use]
pub fn is_failure(reason: CloseReason) -> bool {
    reason.response_flags() != "-"
}

/// The line of a flow that has ended, with its newline; `ended_at` stands in front.
///
/// Source: the fields up to `error` and their order are istio/ztunnel's (`src/proxy/metrics.rs`); `flow.id`, `path`,
/// `reason`, `policy`, `rule` and `trace.id` are ours.
#[must_use]
pub fn flow_line(record: &FlowRecord, ended_at: SystemTime, format: LogFormat) -> String {
    let level = if is_failure(record.reason) { "error" } else { "info" };
    line(ended_at, level, "connection complete", &flow_fields(record), format)
}

/// The line of a connection that did not become a flow.
#[must_use]
pub fn early_denial_line(denial: &EarlyDenial, at: SystemTime, format: LogFormat) -> String {
    let mut fields = Fields(Vec::with_capacity(5));
    fields.bare("src.addr", denial.source);
    fields.bare("dst.addr", denial.destination);
    fields.quoted("direction", Some(direction(denial.direction)));
    fields.quoted("error", error(denial.reason, denial.detail.as_deref()).as_deref());
    fields.bare("reason", denial.reason);
    line(at, "warn", "connection failed", &fields, format)
}

fn flow_fields(record: &FlowRecord) -> Fields {
    let facts = &record.facts;
    let mut fields = Fields(Vec::with_capacity(24));
    fields.bare("src.addr", record.source);
    if let Some(source) = &facts.source {
        fields.quoted("src.workload", Some(pod_or_service(&source.pod, &source.canonical_service)));
        fields.quoted("src.namespace", Some(&source.namespace));
    }
    fields.quoted("src.identity", facts.source_principal.as_ref().map(|id| id.as_str()));
    fields.quoted("src.cluster", facts.source.as_ref().map(|source| &*source.cluster));
    fields.bare("dst.addr", record.destination);
    if let Some(authority) = &record.authority {
        fields.bare("dst.hbone_addr", authority);
    }
    fields.quoted("dst.service", facts.service.as_ref().map(|service| &*service.hostname));
    if let Some(destination) = &facts.destination {
        let name = pod_or_service(&destination.pod, &destination.canonical_service);
        fields.quoted("dst.workload", Some(name));
        fields.quoted("dst.namespace", Some(&destination.namespace));
    }
    fields.quoted("dst.identity", facts.destination_principal.as_ref().map(|id| id.as_str()));
    fields.quoted("dst.cluster", facts.destination.as_ref().map(|workload| &*workload.cluster));
    fields.quoted("direction", Some(direction(record.direction)));
    fields.number("bytes_sent", record.bytes.sent_by_local(record.direction));
    fields.number("bytes_recv", record.bytes.received_by_local(record.direction));
    fields.quoted("duration", Some(&format!("{}ms", record.duration.as_millis())));
    fields.quoted("error", error(record.reason, record.detail.as_deref()).as_deref());
    fields.bare("flow.id", record.id);
    if record.path != FlowPath::None {
        fields.bare("path", record.path.as_str());
    }
    fields.bare("reason", record.reason);
    if let Some(policy) = &record.policy {
        fields.quoted("policy", Some(&policy.described()));
        if let Some(rule) = policy.rule {
            fields.number("rule", u64::try_from(rule).unwrap_or(u64::MAX));
        }
    }
    if let Some(trace) = record.trace {
        fields.bare("trace.id", format_args!("{:032x}", trace.trace_id()));
    }
    fields
}

fn pod_or_service<'a>(pod: &'a str, canonical_service: &'a str) -> &'a str {
    if pod.is_empty() { canonical_service } else { pod }
}

const fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "outbound",
        Direction::InboundTunnel | Direction::InboundPlaintext => "inbound",
    }
}

/// The `error` field. Where Istio has a wording that people search for, ours begins the same way.
fn error(reason: CloseReason, detail: Option<&str>) -> Option<String> {
    let words = match reason {
        CloseReason::Complete | CloseReason::Drained => return detail.map(str::to_owned),
        CloseReason::PolicyDenied | CloseReason::PolicyMissing | CloseReason::EgressDenied => {
            "connection closed due to policy rejection"
        }
        CloseReason::PolicyChanged => "connection closed due to policy change",
        CloseReason::PeerDenied => "http status: 401 Unauthorized",
        CloseReason::TunnelConnectFailed => {
            "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008"
        }
        CloseReason::NoHealthyUpstream => "no healthy upstream",
        CloseReason::WaypointUnavailable => "unknown waypoint",
        CloseReason::GatewayUnavailable => "unknown gateway",
        CloseReason::LoopRefused => "attempted recursive call to ourselves",
        CloseReason::ClientReset => "connection reset by the client",
        CloseReason::ServerReset => "connection reset by the server",
        CloseReason::WrongDestination => "destination is not this workload",
        CloseReason::NoSuchPort => "no such port",
        CloseReason::UnknownWorkload => "unknown source workload",
        CloseReason::UnknownDestination => "no pod is known at this address of the cluster",
        CloseReason::NotSynced => "policies were not received yet",
        CloseReason::ConnectRefused => "connection refused",
        CloseReason::ConnectTimeout => "connection timed out",
        CloseReason::ConnectFailed => "connection failed",
        CloseReason::TlsFailure => "tls handshake failed",
        CloseReason::WrongIdentity => "peer proved another identity than expected",
        CloseReason::CertRevoked => "peer certificate is revoked",
        CloseReason::NoCertificate => "no certificate for this workload",
        CloseReason::ProtocolError => "http2 or hbone protocol error",
        CloseReason::TunnelClosed => "tunnel closed",
        CloseReason::PeerRefused => "peer refused the connection",
        CloseReason::Overloaded => "out of resources",
        CloseReason::TimedOut => "peer stopped answering",
        CloseReason::Internal => "internal error",
    };
    Some(match detail {
        Some(detail) => format!("{words}: {detail}"),
        None => words.to_owned(),
    })
}

pub(crate) fn line(
    at: SystemTime,
    level: &'static str,
    message: &'static str,
    fields: &Fields,
    format: LogFormat,
) -> String {
    let time = jiff::Timestamp::try_from(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let mut line = match format {
        LogFormat::Text => text(time, level, message, fields),
        LogFormat::Json => json(time, level, message, fields),
    };
    line.push('\n');
    line
}

fn text(time: jiff::Timestamp, level: &str, message: &str, fields: &Fields) -> String {
    let mut line = format!("{time:.6}\t{level}\t{SCOPE}\t{message}\t");
    for (position, (key, field)) in fields.0.iter().enumerate() {
        if position > 0 {
            line.push(' ');
        }
        line.push_str(key);
        line.push('=');
        match field {
            Field::Bare(value) => line.extend(value.chars().filter(|c| !c.is_control())),
            // JSON's quoting: control characters cannot break the line apart.
            Field::Quoted(value) => line.push_str(&Value::from(value.as_str()).to_string()),
            Field::Number(value) => write!(line, "{value}").expect("a String takes everything"),
        }
    }
    line
}

fn json(time: jiff::Timestamp, level: &str, message: &str, fields: &Fields) -> String {
    // A map would sort its keys; the order is part of the format.
    let mut line = String::with_capacity(512);
    let mut member = |key: &str, value: &Value| {
        line.push(if line.is_empty() { '{' } else { ',' });
        write!(line, "{}:{value}", Value::from(key)).expect("a String takes everything");
    };
    member("level", &level.into());
    member("time", &format!("{time:.6}").into());
    member("scope", &SCOPE.into());
    member("message", &message.into());
    for (key, field) in &fields.0 {
        match field {
            Field::Bare(value) | Field::Quoted(value) => member(key, &value.as_str().into()),
            Field::Number(value) => member(key, &(*value).into()),
        }
    }
    line.push('}');
    line
}

/// A flow that lives, as `culvert connections` shows it: the log's fields without an end.
#[must_use]
pub fn live_fields(record: &FlowRecord) -> Map<String, Value> {
    flow_fields(record)
        .0
        .into_iter()
        .filter(|(key, _)| !matches!(*key, "reason" | "error"))
        .map(|(key, field)| {
            let value = match field {
                Field::Bare(value) | Field::Quoted(value) => Value::from(value),
                Field::Number(value) => Value::from(value),
            };
            (key.to_owned(), value)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use mesh_model::{Fault, FlowId, PodUid, Reporter, SpiffeId};

    use super::*;
    use crate::labels::{FlowFacts, ServiceLabels, WorkloadLabels};
    use crate::record::{FlowBytes, PolicyRef};
    use crate::traceparent::TraceParent;

    fn at() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123)
    }

    fn record() -> FlowRecord {
        let workload = |pod: &str| WorkloadLabels {
            pod: pod.into(),
            namespace: "shop".into(),
            cluster: "Kubernetes".into(),
            canonical_service: "canon".into(),
            ..WorkloadLabels::default()
        };
        FlowRecord {
            id: FlowId(0x2a),
            pod: PodUid::new("u"),
            direction: Direction::Outbound,
            source: "10.0.0.1:4711".parse().unwrap(),
            destination: "10.0.0.2:15008".parse().unwrap(),
            authority: Some("10.0.0.2:8080".into()),
            facts: FlowFacts {
                reporter: Reporter::Source,
                source: Some(workload("web-0")),
                source_principal: SpiffeId::new("cluster.local", "shop", "web").ok(),
                destination: Some(workload("")),
                destination_principal: SpiffeId::new("cluster.local", "shop", "cart").ok(),
                service: Some(ServiceLabels {
                    hostname: "cart.shop.svc.cluster.local".into(),
                    namespace: "shop".into(),
                    name: "cart".into(),
                }),
                mutual_tls: true,
            },
            path: FlowPath::Tunnel,
            bytes: FlowBytes { client_to_server: 10, server_to_client: 20 },
            duration: Duration::from_micros(123_456),
            reason: CloseReason::PolicyDenied,
            policy: Some(PolicyRef {
                policy: "AuthorizationPolicy shop/allow-cart".into(),
                problem: None,
                rule: Some(1),
            }),
            detail: None,
            trace: None,
        }
    }

    #[test]
    fn a_text_line_has_its_fields_in_order() {
        assert_eq!(
            flow_line(&record(), at(), LogFormat::Text),
            "2023-11-14T22:13:20.123000Z\terror\taccess\tconnection complete\tsrc.addr=10.0.0.1:4711 \
             src.workload=\"web-0\" src.namespace=\"shop\" src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" \
             src.cluster=\"Kubernetes\" dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:8080 \
             dst.service=\"cart.shop.svc.cluster.local\" dst.workload=\"canon\" dst.namespace=\"shop\" \
             dst.identity=\"spiffe://cluster.local/ns/shop/sa/cart\" dst.cluster=\"Kubernetes\" \
             direction=\"outbound\" bytes_sent=10 bytes_recv=20 duration=\"123ms\" \
             error=\"connection closed due to policy rejection\" flow.id=000000000000002a path=tunnel \
             reason=policy_denied policy=\"AuthorizationPolicy shop/allow-cart\" rule=1\n"
        );
    }

    #[test]
    fn a_json_line_is_one_object_with_the_same_fields() {
        let mut record = record();
        record.reason = CloseReason::Complete;
        record.policy = None;
        record.trace = Some(TraceParent::new(1, 2));
        let line = flow_line(&record, at(), LogFormat::Json);
        assert!(line.ends_with("}\n") && line.matches('\n').count() == 1);
        assert!(line.starts_with(r#"{"level":"info","time":"2023-11-14T22:13:20.123000Z","scope":"access","message":"connection complete","src.addr":"10.0.0.1:4711","src.workload":"web-0""#), "{line}");
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["bytes_sent"], 10);
        assert_eq!(value["reason"], "complete");
        assert_eq!(value["trace.id"], "00000000000000000000000000000001");
        assert!(value.get("error").is_none() && value.get("policy").is_none());
    }

    #[test]
    fn nothing_from_outside_breaks_a_line() {
        let mut record = record();
        record.detail = Some(Arc::from("a\nb\t\"c\" \u{7f}"));
        record.authority = Some(Arc::from("evil\n:1"));
        for format in [LogFormat::Text, LogFormat::Json] {
            let line = flow_line(&record, at(), format);
            assert_eq!(line.matches('\n').count(), 1, "{line}");
        }
    }

    #[test]
    fn an_end_that_resets_its_own_connection_is_no_error() {
        let mut record = record();
        for reason in CloseReason::ALL {
            record.reason = *reason;
            let ended_well = matches!(
                reason,
                CloseReason::Complete
                    | CloseReason::Drained
                    | CloseReason::ClientReset
                    | CloseReason::ServerReset
            );
            assert_eq!(is_failure(*reason), !ended_well, "{reason}");
            let line = flow_line(&record, at(), LogFormat::Text);
            let level = if ended_well { "\tinfo\t" } else { "\terror\t" };
            assert!(line.contains(level), "{line}");
        }
    }

    #[test]
    fn an_early_denial_says_little_and_warns() {
        let denial = EarlyDenial {
            source: "10.0.0.1:1".parse().unwrap(),
            destination: "10.0.0.2:15008".parse().unwrap(),
            direction: Direction::InboundTunnel,
            reason: CloseReason::TlsFailure,
            detail: Some("no certificate".into()),
        };
        assert_eq!(
            early_denial_line(&denial, at(), LogFormat::Text),
            "2023-11-14T22:13:20.123000Z\twarn\taccess\tconnection failed\tsrc.addr=10.0.0.1:1 \
             dst.addr=10.0.0.2:15008 direction=\"inbound\" error=\"tls handshake failed: no certificate\" \
             reason=tls_failure\n"
        );
    }

    #[test]
    fn every_reason_but_a_good_end_has_an_error_text() {
        for reason in CloseReason::ALL {
            let text = error(*reason, None);
            assert_eq!(text.is_none(), reason.fault() == Fault::None, "{reason}");
        }
    }
}

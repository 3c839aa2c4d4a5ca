//! What a waypoint says about a request: its labels and its access-log line.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;

use crate::access_log::{Fields, LogFormat, line};
use crate::labels::{LabelValue, ServiceLabels, UNKNOWN, WorkloadLabels};
use crate::record::PolicyRef;

/// Who asked whom: everything the labels of requests are made of but the outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RequestFacts {
    /// The client, as far as the index knows it.
    pub source: WorkloadLabels,
    /// What the client proved to be.
    pub source_principal: Option<SpiffeId>,
    /// The server that was chosen.
    pub destination: WorkloadLabels,
    /// What the server proved to be.
    pub destination_principal: Option<SpiffeId>,
    /// The service that was meant.
    pub service: ServiceLabels,
    /// True for gRPC.
    pub grpc: bool,
}

impl RequestFacts {
    /// The labels, with the outcome. Source: Istio's standard metrics, wire.md §6.3.
    #[must_use]
    pub fn labels(
        &self,
        status: u16,
        grpc_status: Option<u16>,
        flags: &'static str,
    ) -> Vec<(&'static str, LabelValue)> {
        let known = |text: &Arc<str>| match text.is_empty() {
            true => LabelValue::Static(UNKNOWN),
            false => LabelValue::Shared(Arc::clone(text)),
        };
        let principal = |id: &Option<SpiffeId>| match id {
            Some(id) => LabelValue::Shared(id.as_str().into()),
            None => LabelValue::Static(UNKNOWN),
        };
        let (source, destination, service) = (&self.source, &self.destination, &self.service);
        let mut labels = vec![
            ("reporter", LabelValue::Static("waypoint")),
            ("source_workload", known(&source.workload)),
            ("source_canonical_service", known(&source.canonical_service)),
            ("source_canonical_revision", known(&source.canonical_revision)),
            ("source_workload_namespace", known(&source.namespace)),
            ("source_principal", principal(&self.source_principal)),
            ("source_app", known(&source.app)),
            ("source_version", known(&source.canonical_revision)),
            ("source_cluster", known(&source.cluster)),
            ("destination_service", known(&service.hostname)),
            ("destination_service_namespace", known(&service.namespace)),
            ("destination_service_name", known(&service.name)),
            ("destination_workload", known(&destination.workload)),
            ("destination_canonical_service", known(&destination.canonical_service)),
            ("destination_canonical_revision", known(&destination.canonical_revision)),
            ("destination_workload_namespace", known(&destination.namespace)),
            ("destination_principal", principal(&self.destination_principal)),
            ("destination_app", known(&destination.app)),
            ("destination_version", known(&destination.canonical_revision)),
            ("destination_cluster", known(&destination.cluster)),
            ("request_protocol", LabelValue::Static(if self.grpc { "grpc" } else { "http" })),
            ("response_code", LabelValue::Shared(status.to_string().into())),
            ("response_flags", LabelValue::Static(flags)),
            ("connection_security_policy", LabelValue::Static("mutual_tls")),
        ];
        if self.grpc {
            let status = grpc_status.map(|status| status.to_string().into());
            let value = status.map_or(LabelValue::Static(UNKNOWN), LabelValue::Shared);
            labels.push(("grpc_response_status", value));
        }
        labels
    }
}

/// One request from its head to the end of its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestRecord {
    /// Who asked whom.
    pub facts: RequestFacts,
    /// The address the request came from.
    pub source: SocketAddr,
    /// What was dialled: address and port, or host and port.
    pub dialled: Arc<str>,
    /// Its method.
    pub method: String,
    /// `:authority`, or the Host header.
    pub authority: String,
    /// Its path and query as they came.
    pub raw_path: String,
    /// Its path in normal form, where that differs; what routes and policies saw.
    pub path: Option<String>,
    /// `HTTP/1.1` or `HTTP/2`.
    pub version: &'static str,
    /// The route and rule it went by.
    pub route: Option<String>,
    /// The endpoint it went to.
    pub upstream: Option<SocketAddr>,
    /// Attempts beyond the first.
    pub retries: u32,
    /// The answer's status; 0 when there was none.
    pub status: u16,
    /// The answer's gRPC status.
    pub grpc_status: Option<u16>,
    /// Bytes of its body.
    pub request_bytes: u64,
    /// Bytes of the answer's body.
    pub response_bytes: u64,
    /// From its head to the end of the answer.
    pub duration: Duration,
    /// Until the answer's head came from the server.
    pub first_byte: Option<Duration>,
    /// Why it was answered here, or did not end well: one word; none for an answer of the server.
    pub reason: Option<&'static str>,
    /// The same for people.
    pub detail: Option<String>,
    /// Envoy's flags for that; `-` when it ended well.
    pub flags: &'static str,
    /// The policy that refused it, or that allowed it.
    pub policy: Option<PolicyRef>,
    /// Who sent it, by its token: `issuer/subject`.
    pub request_principal: Option<String>,
}

impl RequestRecord {
    /// True when the waypoint did not pass on an answer of the server.
    #[must_use]
    pub const fn is_refused(&self) -> bool {
        self.reason.is_some()
    }
}

/// The line of a request, with its newline; `ended_at` stands in front.
#[must_use]
pub fn request_line(record: &RequestRecord, ended_at: SystemTime, format: LogFormat) -> String {
    let mut fields = Fields::with_capacity(28);
    let facts = &record.facts;
    fields.bare("src.addr", record.source);
    fields.quoted("src.workload", Some(&facts.source.pod));
    fields.quoted("src.namespace", Some(&facts.source.namespace));
    fields.quoted("src.identity", facts.source_principal.as_ref().map(SpiffeId::as_str));
    fields.quoted("request.principal", record.request_principal.as_deref());
    fields.bare("dst.addr", &record.dialled);
    fields.quoted("dst.service", Some(&facts.service.hostname));
    fields.quoted("method", Some(&record.method));
    fields.quoted("authority", Some(&record.authority));
    fields.quoted("path", Some(&record.raw_path));
    fields.quoted("path.normal", record.path.as_deref());
    fields.bare("version", record.version);
    fields.number("status", record.status.into());
    if let Some(status) = record.grpc_status {
        fields.number("grpc_status", status.into());
    }
    fields.quoted("route", record.route.as_deref());
    if let Some(upstream) = record.upstream {
        fields.bare("upstream", upstream);
    }
    fields.quoted("upstream.workload", Some(&facts.destination.pod));
    if record.retries > 0 {
        fields.number("retries", record.retries.into());
    }
    fields.number("bytes_recv", record.request_bytes);
    fields.number("bytes_sent", record.response_bytes);
    fields.quoted("duration", Some(&millis(record.duration)));
    fields.quoted("first_byte", record.first_byte.map(millis).as_deref());
    if let Some(reason) = record.reason {
        fields.bare("reason", reason);
    }
    fields.quoted("error", record.detail.as_deref());
    if let Some(policy) = &record.policy {
        fields.quoted("policy", Some(&policy.policy));
        if let Some(rule) = policy.rule {
            fields.number("rule", u64::try_from(rule).unwrap_or(u64::MAX));
        }
    }
    let level = if record.is_refused() { "warn" } else { "info" };
    line(ended_at, level, "request complete", &fields, format)
}

fn millis(duration: Duration) -> String {
    format!("{}.{:03}ms", duration.as_millis(), duration.subsec_micros() % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_both_forms_of_the_path_and_cannot_be_broken() {
        let record = RequestRecord {
            facts: RequestFacts::default(),
            source: "10.0.0.1:5000".parse().unwrap(),
            dialled: "10.96.0.1:80".into(),
            method: "GET".into(),
            authority: "a\nb".into(),
            raw_path: "/%61dmin".into(),
            path: Some("/admin".into()),
            version: "HTTP/1.1",
            route: None,
            upstream: None,
            retries: 0,
            status: 403,
            grpc_status: None,
            request_bytes: 0,
            response_bytes: 5,
            duration: Duration::from_micros(1_234),
            first_byte: None,
            reason: Some("policy_denied"),
            detail: None,
            flags: "-",
            policy: Some(PolicyRef {
                policy: "AuthorizationPolicy shop/p".into(),
                problem: None,
                rule: Some(1),
            }),
            request_principal: None,
        };
        let line = request_line(&record, SystemTime::UNIX_EPOCH, LogFormat::Text);
        assert_eq!(line.lines().count(), 1, "{line}");
        for part in [
            "path=\"/%61dmin\"",
            "path.normal=\"/admin\"",
            "status=403",
            "duration=\"1.234ms\"",
            "reason=policy_denied",
            "policy=\"AuthorizationPolicy shop/p\" rule=1",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        let labels = record.facts.labels(403, None, "-");
        let value = |name: &str| {
            labels.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str().to_owned())
        };
        assert_eq!(value("reporter").as_deref(), Some("waypoint"));
        assert_eq!(value("response_code").as_deref(), Some("403"));
        assert_eq!(value("grpc_response_status"), None);
    }
}

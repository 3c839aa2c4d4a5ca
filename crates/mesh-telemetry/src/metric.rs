//! The names of metrics, as they are scraped.

/// What a metric's value means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution over buckets.
    Histogram,
}

/// One metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its name in the exposition.
    pub name: &'static str,
    /// What its value means.
    pub kind: MetricKind,
    /// One line for people.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $constant:ident = $name:literal, $kind:ident, $help:literal;)+) => {
        $($(#[doc = $doc])+ pub const $constant: Metric = Metric {
            name: $name,
            kind: MetricKind::$kind,
            help: $help,
        };)+

        /// Every metric, in the order of its definition.
        pub const ALL: &[Metric] = &[$($constant,)+];
    };
}

metrics! {
    // Istio's names, read by Kiali and by Istio's dashboards.

    /// Labels: traffic, `response_flags="-"`.
    TCP_CONNECTIONS_OPENED = "istio_tcp_connections_opened_total", Counter, "TCP connections opened";
    /// Labels: traffic, with the final flags.
    TCP_CONNECTIONS_CLOSED = "istio_tcp_connections_closed_total", Counter, "TCP connections closed";
    /// Labels: traffic, with the final flags; only counted when they are not `-`.
    TCP_CONNECTIONS_FAILED = "istio_tcp_connections_failed_total", Counter, "TCP connections that failed";
    /// Bytes from client to server, whoever reports. Labels: traffic, `response_flags="-"`.
    TCP_RECEIVED_BYTES = "istio_tcp_received_bytes_total", Counter, "bytes of the request direction, client to server";
    /// Bytes from server to client, whoever reports. Labels: traffic, `response_flags="-"`.
    TCP_SENT_BYTES = "istio_tcp_sent_bytes_total", Counter, "bytes of the response direction, server to client";
    /// Labels: `reporter`.
    TCP_SOCKETS_OPEN = "istio_tcp_sockets_open", Gauge, "connections open now";
    /// Labels: requests.
    REQUESTS = "istio_requests_total", Counter, "requests that a waypoint answered or passed on";
    /// Labels: requests.
    REQUEST_DURATION = "istio_request_duration_milliseconds", Histogram, "from a request's head to the end of its answer";
    /// Labels: requests.
    REQUEST_BYTES = "istio_request_bytes", Histogram, "bytes of a request's body";
    /// Labels: requests.
    RESPONSE_BYTES = "istio_response_bytes", Histogram, "bytes of an answer's body";
    /// Labels: all `source_*`, `hostname`.
    ON_DEMAND_DNS = "istio_on_demand_dns_total", Counter, "host names of workloads resolved for a connection";
    /// Labels: `reporter`.
    CRL_REJECTIONS = "istio_crl_policy_rejections_total", Counter, "connections refused or cut for a revoked certificate";
    /// Labels: `reason` (ConnectionError, Error, Reconnect, Complete).
    XDS_TERMINATIONS = "istio_xds_connection_terminations_total", Counter, "configuration streams that ended";
    /// Labels: `url`.
    XDS_MESSAGES = "istio_xds_message_total", Counter, "configuration messages received";
    /// Labels: `url`.
    XDS_MESSAGE_BYTES = "istio_xds_message_bytes_total", Counter, "bytes of configuration messages received";
    /// Labels: [`DNS_LABELS`].
    DNS_REQUESTS = "istio_dns_requests_total", Counter, "DNS queries of pods";
    /// Labels: [`DNS_LABELS`].
    DNS_UPSTREAM_REQUESTS = "istio_dns_upstream_requests_total", Counter, "DNS queries forwarded";
    /// Labels: [`DNS_LABELS`].
    DNS_UPSTREAM_FAILURES = "istio_dns_upstream_failures_total", Counter, "forwarded DNS queries without an answer";
    /// Labels: [`DNS_LABELS`]; buckets [`DNS_SECONDS_BUCKETS`].
    DNS_UPSTREAM_SECONDS = "istio_dns_upstream_request_duration_seconds", Histogram, "time until a resolver answered";
    /// Always 1. Labels: `component`, `tag`.
    BUILD = "istio_build", Gauge, "version of this program";

    // Ours.

    /// Labels: `reporter`, `path`, `reason` ([`CloseReason`](mesh_model::CloseReason)).
    FLOWS_CLOSED = "culvert_flows_closed_total", Counter, "connections ended, by reason";
    /// Labels: `reporter`, `reason`, `policy`, `rule`.
    DENIALS = "culvert_denials_total", Counter, "connections refused, by deciding policy and rule";
    /// Labels: `note` (audit, dry_run), `policy`, `rule`.
    POLICY_NOTES = "culvert_policy_notes_total", Counter, "connections matched by AUDIT or dry-run policies";
    /// Labels: `direction`, `reason`.
    EARLY_DENIALS = "culvert_early_denials_total", Counter, "connections ended before they became a flow";
    /// Labels: `path`.
    FLOWS_OPEN = "culvert_flows_open", Gauge, "connections open now, by path";
    /// Labels: `role` (client, server).
    TUNNELS_OPEN = "culvert_tunnels_open", Gauge, "tunnels open now";
    /// Labels: `role`, `reason`.
    TUNNELS_CLOSED = "culvert_tunnels_closed_total", Counter, "tunnels ended, by reason";
    /// Labels: `role`, `result` (ok, or a close reason).
    HANDSHAKES = "culvert_tls_handshakes_total", Counter, "TLS handshakes of tunnels, by result";
    /// Labels: `phase` (enrolled, pending, draining, excluded, closed).
    PODS = "culvert_pods", Gauge, "pods of this node known to the agent";
    /// No labels.
    INTERFACES_UNGUARDED = "culvert_interfaces_unguarded", Gauge, "interfaces that pods got after enrolment and that no guard can stand on";
    /// Labels: `request` (enroll, unenroll, check, gc, list, status; unreadable), `result` (ok, excluded, retry, refused).
    ENROLMENTS = "culvert_enrolment_requests_total", Counter, "enrolment requests, by result";
    /// No labels.
    CONTROLLER_CONNECTED = "culvert_controller_connected", Gauge, "1 while the configuration stream is up";
    /// No labels.
    INDEX_REVISION = "culvert_index_revision", Gauge, "revision of the configuration in use";
    /// Labels: `type` (workload, service, policy).
    RESOURCES = "culvert_resources", Gauge, "configuration resources held";
    /// Labels: `type` (mesh, pod, authorization, address).
    RESOURCES_REJECTED = "culvert_resources_rejected_total", Counter, "configuration resources refused as invalid";
    /// Labels: `state` (valid, expired).
    CERTIFICATES = "culvert_certificates", Gauge, "certificates of this node's pods";
    /// No labels.
    CERTIFICATE_EXPIRY = "culvert_certificate_next_expiry_timestamp_seconds", Gauge, "when the first certificate in use expires, Unix time";
    /// Labels: `result` (ok, or a reason).
    CERTIFICATE_REQUESTS = "culvert_certificate_requests_total", Counter, "certificate requests, by result";
    /// No labels.
    KEPT_KEYS = "culvert_kept_keys", Gauge, "keys that outlive this process in the kernel's memory";
    /// No labels.
    KEPT_KEYS_RESTORED = "culvert_kept_keys_restored_total", Counter, "keys of an earlier process that are used";
    /// Labels: `reason` (damaged, no_pod, or why peers would refuse the certificate).
    KEPT_KEYS_IGNORED = "culvert_kept_keys_ignored_total", Counter, "keys of an earlier process that are not used";
    /// Labels: `reason` (full, too_large, kernel).
    KEPT_KEYS_FAILED = "culvert_kept_keys_failed_total", Counter, "keys that could not be kept, read or wiped";
    /// Labels: `outcome` (answered, forwarded, cached, refused, failed).
    DNS_QUERIES = "culvert_dns_queries_total", Counter, "DNS queries of pods, by outcome";
    /// No labels.
    DIRECT_VERDICTS = "culvert_direct_verdicts", Gauge, "same-node verdicts held by the kernel";
    /// No labels.
    DIRECT_CUT = "culvert_direct_connections_cut_total", Counter, "same-node connections cut because what allowed them has gone";
    /// Labels: `queue` (flow_reports, identities).
    EVENTS_DROPPED = "culvert_events_dropped_total", Counter, "events dropped because a bounded queue was full";
    /// No labels.
    LOG_LINES_DROPPED = "culvert_log_lines_dropped_total", Counter, "log lines dropped because the sink was slow";
    /// No labels.
    SERIES_FOLDED = "culvert_series_folded_total", Counter, "flows counted without their source because there are too many time series";

    /// Labels: `kind` (allocated, active, metadata, resident, mapped, retained).
    MEMORY_BYTES = "culvert_memory_bytes", Gauge, "memory as the allocator counts it";
    /// Labels: `reason`.
    ACCESS_LOG_LEFT_OUT = "culvert_access_log_lines_left_out_total", Counter, "refusals without a line of their own, because they came in a flood";
    /// Kept by the kernel over all agents' lives. Labels: `event`.
    CAPTURE_EVENTS = "culvert_capture_total", Counter, "what the programs in the kernel did";
    /// No labels.
    LIVE_FLOWS_CUT = "culvert_live_flows_cut_total", Counter, "open connections cut because policy, trust or workload changed";
    /// No labels.
    CONNECTIONS_SHED = "culvert_connections_shed_total", Counter, "connections reset because there were no descriptors left";
    /// No labels.
    LISTENERS_ENDED = "culvert_listeners_ended_total", Counter, "listeners of the agent that were ended from inside their pods, and opened again";
    /// No labels.
    ENGINES_STUCK = "culvert_engines_stuck", Gauge, "engines that do not turn";
    /// No labels.
    DATA_PLANE_SOCKETS = "culvert_data_plane_sockets", Gauge, "sockets in use by the data plane";
    /// No labels.
    DATA_PLANE_SOCKET_LIMIT = "culvert_data_plane_socket_limit", Gauge, "sockets that the data plane may use";
    /// No labels.
    SOURCE_FALLBACKS = "culvert_source_fallbacks_total", Counter, "connections to applications that do not show the client's address";
    /// No labels.
    AGENT_PORTS_TAKEN = "culvert_agent_ports_taken_total", Counter, "pods not captured because a process in them holds a port of the agent";
    /// No labels.
    GUARDS_RESTORED = "culvert_guards_restored_total", Counter, "guards of pods that another tool had removed";
    /// No labels.
    PODS_REPAIRED = "culvert_pods_repaired_total", Counter, "pods whose settings were put right again";
    /// Labels: `file`.
    STATE_FILES_REFUSED = "culvert_state_files_refused_total", Counter, "files of the agent's state that could not be read";

    // The controller's.

    /// No labels.
    CONTROLLER_OBJECTS = "culvert_controller_objects", Gauge, "objects in force";
    /// No labels.
    CONTROLLER_KEPT = "culvert_controller_kept_objects", Gauge, "objects kept in their last good version";
    /// No labels.
    CONTROLLER_SOURCE_MISSING = "culvert_controller_source_missing", Gauge, "1 while the source of objects is not there";
    /// Labels: `kind`.
    CONTROLLER_SOURCE_ERRORS = "culvert_controller_source_errors_total", Counter, "objects of a kind that could not be followed";
    /// Labels: `kind`.
    CONTROLLER_REFUSED = "culvert_controller_refused_objects", Gauge, "objects that cannot be used";
    /// No labels.
    CONTROLLER_DENYING = "culvert_controller_denying_policies", Gauge, "policies that cannot be read and refuse in their place";
    /// No labels.
    CONTROLLER_CHANGES = "culvert_controller_resource_changes_total", Counter, "configuration resources changed or removed";
    /// No labels.
    CONTROLLER_STREAMS = "culvert_controller_streams", Gauge, "configuration streams of agents";
    /// Labels: `kind`.
    CONTROLLER_PUSHES = "culvert_controller_pushes_total", Counter, "responses sent to agents";
    /// Labels: `kind`.
    CONTROLLER_PUSHED = "culvert_controller_pushed_resources_total", Counter, "resources in responses sent to agents";
    /// Labels: `kind`.
    CONTROLLER_NACKS = "culvert_controller_nacks_total", Counter, "responses that an agent refused";
    /// No labels.
    CONTROLLER_SLOW_AGENTS = "culvert_controller_slow_agents_total", Counter, "streams ended because the agent did not read";
    /// No labels.
    CONTROLLER_JOINS = "culvert_controller_joins_total", Counter, "nodes that joined by token";
    /// Labels: `reason`.
    CONTROLLER_UNAUTHENTICATED = "culvert_controller_unauthenticated_total", Counter, "callers that did not prove who they are";
    /// No labels.
    CONTROLLER_CONNECTIONS_SHED = "culvert_controller_connections_shed_total", Counter, "connections closed because too many had not proved a node";
    /// Labels: `reason`.
    CONTROLLER_EVENTS = "culvert_controller_events_total", Counter, "Events written for an operator";
    /// No labels.
    CONTROLLER_LEADER = "culvert_controller_leader", Gauge, "1 while this replica holds the Lease";
    /// No labels.
    CONTROLLER_CERTIFICATES = "culvert_controller_certificates_total", Counter, "certificates issued";
    /// Labels: `reason`.
    CONTROLLER_CERTIFICATES_REFUSED = "culvert_controller_certificates_refused_total", Counter, "certificates refused";
    /// No labels.
    CONTROLLER_REVOCATIONS_KEPT = "culvert_controller_revocations_kept", Gauge, "1 while the file of revocations cannot be read and the last one is in force";
    /// No labels.
    CONTROLLER_CA_ERRORS = "culvert_controller_ca_errors_total", Counter, "failures to read or write the authority's state";

    // The waypoint.

    /// Labels: `reason`, `rule` (the policy's, else empty).
    WAYPOINT_REFUSED = "culvert_waypoint_refused_total", Counter, "requests and connections that the waypoint did not pass on or cut off";
    /// Labels: `reason`.
    WAYPOINT_TUNNELS_REFUSED = "culvert_waypoint_tunnels_refused_total", Counter, "tunnels refused or cut by the waypoint";
    /// Labels: `reason`.
    WAYPOINT_STREAMS_REFUSED = "culvert_waypoint_streams_refused_total", Counter, "streams of tunnels refused by the waypoint";
    /// Labels: `reason` (too_many, body_too_large).
    WAYPOINT_MIRRORS_SKIPPED = "culvert_waypoint_mirrors_skipped_total", Counter, "copies of requests that were not sent";
    /// Labels: `outcome` (read, failed).
    WAYPOINT_KEY_READS = "culvert_waypoint_key_reads_total", Counter, "readings of issuers' keys";
    /// No labels.
    WAYPOINT_STREAMS = "culvert_waypoint_streams", Gauge, "streams of tunnels open now";
    /// Labels: `kind` (tunnel, http1, http2).
    WAYPOINT_UPSTREAM_CONNECTIONS = "culvert_waypoint_upstream_connections", Gauge, "connections to servers kept by the waypoint";

    // The process. Source: Prometheus client conventions.

    /// No labels.
    PROCESS_RESIDENT_BYTES = "process_resident_memory_bytes", Gauge, "resident memory";
    /// No labels.
    PROCESS_OPEN_FDS = "process_open_fds", Gauge, "open file descriptors";
    /// No labels.
    PROCESS_MAX_FDS = "process_max_fds", Gauge, "limit of open file descriptors";
    /// No labels.
    PROCESS_THREADS = "process_threads", Gauge, "threads";
    /// No labels.
    PROCESS_CPU_SECONDS = "process_cpu_seconds_total", Counter, "processor time used, user and system";
    /// No labels.
    PROCESS_START = "process_start_time_seconds", Gauge, "when the process started, Unix time";
}

/// Labels of the DNS metrics.
pub const DNS_LABELS: [&str; 4] = [
    "request_query_type",
    "request_protocol",
    "source_canonical_service",
    "source_canonical_revision",
];

/// Buckets of [`DNS_UPSTREAM_SECONDS`], seconds. Source: istio/ztunnel `src/dns/metrics.rs`.
pub const DNS_SECONDS_BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Buckets of the histograms of requests, milliseconds and bytes. Source: Envoy's defaults, which Istio leaves in place.
pub const REQUEST_BUCKETS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2500.0, 5e3, 1e4, 3e4, 6e4, 3e5,
    6e5, 1.8e6, 3.6e6,
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_counters_end_in_total() {
        let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL.iter().filter(|metric| metric.kind == MetricKind::Counter) {
            assert!(metric.name.ends_with("_total"), "{}", metric.name);
        }
    }
}

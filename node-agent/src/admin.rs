//! What the agent tells about itself, and the little that can be changed while it runs.

mod dump;

use std::sync::Arc;
use std::time::SystemTime;

use http::StatusCode;
use mesh_enroll::EnrollReply;
use mesh_runtime::log::LogHandle;
use mesh_runtime::metric::CONTENT_TYPE;
use mesh_runtime::{Metrics, Readiness, Reply, Request, Routes};
use mesh_telemetry::{Metric, metric};
use serde_json::json;
use tokio::sync::watch;

use crate::allocator::AllocatorBytes;
use crate::capture::KernelGate;
use crate::control::ads::Standing;
use crate::dataplane::{DataPlane, TunnelRole, TunnelStats};
use crate::enrolment::enroller::Enroller;
use crate::error::error_chain;
use crate::picture::Picture;
use crate::upgrade::Upgrade;

/// Most policies that are listed as refusing in the place of unreadable ones.
const MAX_DENYING: usize = 100;

/// What the admin interface looks at.
#[derive(Clone)]
pub(crate) struct Desk {
    /// This agent's name among those that follow one another.
    pub(crate) instance: Option<String>,
    /// This node's name.
    pub(crate) node: String,
    /// The data plane's picture.
    pub(crate) picture: Arc<Picture>,
    /// The data plane.
    pub(crate) data_plane: Arc<DataPlane>,
    /// The pods.
    pub(crate) enroller: Arc<Enroller>,
    /// The kernel's side.
    pub(crate) gate: Arc<KernelGate>,
    /// The controller.
    pub(crate) standing: watch::Receiver<Standing>,
    /// Whether everything is up.
    pub(crate) readiness: Readiness,
    /// Metrics.
    pub(crate) metrics: Metrics,
    /// The log level.
    pub(crate) log: LogHandle,
    /// Successors that were asked for.
    pub(crate) upgrade: Upgrade,
}

impl Desk {
    /// Readiness alone, for every address.
    pub(crate) fn ready_routes(&self) -> Routes {
        let (readiness, enroller) = (self.readiness.clone(), Arc::clone(&self.enroller));
        let instance = self.instance.clone();
        Routes::new().get("/healthz/ready", move |request| {
            // A probe of another agent that shares the port: one that is to succeed this one, or has been succeeded.
            let other =
                request.query("instance").filter(|asked| Some(*asked) != instance.as_deref());
            let reply = match other {
                Some(_) => {
                    Reply::error(StatusCode::SERVICE_UNAVAILABLE, "another agent serves this node")
                }
                None => ready(&readiness, enroller.pending()),
            };
            async move { reply }
        })
    }

    /// Metrics alone, for scrapers.
    pub(crate) fn metrics_routes(&self) -> Routes {
        self.add_metrics(Routes::new())
    }

    /// Everything, for this machine.
    pub(crate) fn admin_routes(&self) -> Routes {
        let routes = self.add_metrics(self.ready_routes());
        let routes = self.add_views(routes);
        let (shown, changed) = (self.log.clone(), self.log.clone());
        let (last, upgrade) = (self.upgrade.clone(), self.upgrade.clone());
        routes
            .get("/logging", move |_request| {
                let reply = level(&shown);
                async move { reply }
            })
            .post("/logging", move |request| {
                let reply = change_level(&changed, &request);
                async move { reply }
            })
            .get("/upgrade", move |_request| {
                let reply = Reply::json(&last.last());
                async move { reply }
            })
            .post("/upgrade", move |request| {
                let reply = start_successor(&upgrade, &request);
                async move { reply }
            })
    }

    fn add_metrics(&self, routes: Routes) -> Routes {
        let (one, other) = (self.clone(), self.clone());
        let render = |desk: Self| async move {
            desk.observe().await;
            Reply::with(StatusCode::OK, CONTENT_TYPE, desk.metrics.render())
        };
        routes
            .get("/metrics", move |_request| render(one.clone()))
            .get("/stats/prometheus", move |_request| render(other.clone()))
    }

    fn add_views(&self, routes: Routes) -> Routes {
        let [dump, certs, connections, pods, stats, status, direct] =
            std::array::from_fn(|_| self.clone());
        routes
            .get("/memory", |_request| async { memory() })
            .get("/config_dump", move |_request| {
                let desk = dump.clone();
                async move { Reply::json(&desk.config_dump().await) }
            })
            .get("/certs", move |_request| {
                let desk = certs.clone();
                async move { Reply::json(&dump::certificates(&desk.picture.snapshot())) }
            })
            .get("/connections", move |_request| {
                let desk = connections.clone();
                async move { Reply::json(&desk.data_plane.connections().await) }
            })
            .get("/pods", move |_request| {
                let desk = pods.clone();
                async move { Reply::json(&desk.enroller.list_all()) }
            })
            .get("/stats", move |_request| {
                let desk = stats.clone();
                async move { Reply::json(&desk.stats()) }
            })
            .get("/same-node", move |request: Request| {
                let desk = direct.clone();
                async move { desk.explain_direct(&request).await }
            })
            .get("/status", move |_request| {
                let desk = status.clone();
                async move { Reply::json(&desk.status()) }
            })
    }

    async fn config_dump(&self) -> serde_json::Value {
        let connections = self.data_plane.connections().await;
        let mut dump =
            dump::config(&self.picture.snapshot(), &self.enroller.list(), &connections, &self.node);
        dump["config"]["sameNode"] = json!(self.data_plane.direct().status());
        dump
    }

    /// Counters of the data plane and of the kernel's side of capture.
    fn stats(&self) -> serde_json::Value {
        let capture = self.gate.capture().counters();
        json!({
            "dataPlane": self.data_plane.stats(),
            "sameNode": self.data_plane.direct().status(),
            "capture": capture.unwrap_or_else(|error| {
                tracing::debug!(%error, "the counters of capture cannot be read");
                std::collections::BTreeMap::new()
            }),
        })
    }

    fn status(&self) -> serde_json::Value {
        let standing = self.standing.borrow().clone();
        let snapshot = self.picture.snapshot();
        let features = self.gate.capture().features();
        let policies = &snapshot.policies;
        let unread = policies.policies().filter(|policy| policy.origin.unreadable.is_some());
        let denying: Vec<String> = unread
            .map(|policy| policy.origin.to_string())
            .chain(
                policies
                    .unreadable()
                    .map(|one| format!("{} (unreadable: {})", one.name, one.reason)),
            )
            .take(MAX_DENYING)
            .collect();
        let EnrollReply::Pods { pods } = (EnrollReply::Pods { pods: self.enroller.list_all() })
        else {
            return serde_json::Value::Null;
        };
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "node": self.node,
            "ready": self.readiness.is_ready(),
            "waitingFor": self.readiness.waiting_for(),
            "podsPending": self.enroller.pending(),
            "controller": {
                "connected": standing.connected,
                "synced": standing.synced,
                "lastError": standing.last_error,
            },
            "capture": {
                "cgroupOrder": features.cgroup_order.to_string(),
                "guard": features.guard.to_string(),
                "cgroupRoot": features.cgroup_root,
                "adopted": features.adopted,
            },
            "sameNode": self.data_plane.direct().status(),
            "pods": pods,
            "workloads": snapshot.index.workloads().len(),
            "services": snapshot.index.services().len(),
            "policies": snapshot.policies.policies().len(),
            "denying": denying,
            "certificates": snapshot.svids.len(),
            "indexRevision": snapshot.index.revision().0,
            "policyRevision": snapshot.policies.revision().0,
        })
    }

    /// Whether a connection of this node's pods goes directly: `from`, `to` and `port` as `culvert explain` has them.
    async fn explain_direct(&self, request: &Request) -> Reply {
        let port = request.query("port").and_then(|port| port.parse().ok());
        let (Some(from), Some(to), Some(port)) = (request.query("from"), request.query("to"), port)
        else {
            return Reply::error(StatusCode::BAD_REQUEST, "give ?from=POD&to=POD&port=NUMBER");
        };
        match self.data_plane.direct().explain(from, to, port).await {
            Some(explained) => Reply::json(&explained),
            None => Reply::error(StatusCode::NOT_FOUND, "not both are captured pods of this node"),
        }
    }

    /// Sets the gauges that are read off at scraping.
    async fn observe(&self) {
        let desk = self.clone();
        let counted = tokio::task::spawn_blocking(move || desk.observe_now()).await;
        if let Err(error) = counted {
            tracing::debug!(%error, "gauges were not read");
        }
    }

    fn observe_now(&self) {
        let snapshot = self.picture.snapshot();
        gauge(&metric::INDEX_REVISION, snapshot.index.revision().0);
        let connected = u64::from(self.standing.borrow().connected);
        gauge(&metric::CONTROLLER_CONNECTED, connected);
        for (kind, count) in [
            ("workload", snapshot.index.workloads().len()),
            ("service", snapshot.index.services().len()),
            ("policy", snapshot.policies.policies().len()),
        ] {
            metrics::gauge!(metric::RESOURCES.name, "type" => kind).set(number(count));
        }
        let pods = self.enroller.list_all();
        for phase in [
            mesh_enroll::PodPhase::Enrolled,
            mesh_enroll::PodPhase::Pending,
            mesh_enroll::PodPhase::Draining,
            mesh_enroll::PodPhase::Excluded,
            mesh_enroll::PodPhase::Closed,
        ] {
            let count = pods.iter().filter(|pod| pod.phase == phase).count();
            metrics::gauge!(metric::PODS.name, "phase" => phase.as_str()).set(number(count));
        }
        let now = SystemTime::now();
        let expired = snapshot.svids.values().filter(|svid| !svid.is_usable(now)).count();
        let valid = snapshot.svids.len() - expired;
        metrics::gauge!(metric::CERTIFICATES.name, "state" => "valid").set(number(valid));
        metrics::gauge!(metric::CERTIFICATES.name, "state" => "expired").set(number(expired));
        if let Some(first) = snapshot.svids.values().map(|svid| svid.not_after()).min() {
            let seconds = first.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            gauge(&metric::CERTIFICATE_EXPIRY, seconds.as_secs());
        }
        match self.gate.capture().counters() {
            Ok(counters) => {
                for (name, value) in counters {
                    metrics::counter!(metric::CAPTURE_EVENTS.name, "event" => name).absolute(value);
                }
            }
            Err(error) => tracing::debug!(%error, "the counters of capture cannot be read"),
        }
        match AllocatorBytes::now() {
            Ok(bytes) => bytes.observe(),
            Err(error) => tracing::debug!(%error, "the allocator's counts cannot be read"),
        }
        if let Some(direct) = self.data_plane.direct().status() {
            metrics::gauge!(metric::DIRECT_VERDICTS.name).set(number(direct.verdicts));
            metrics::counter!(metric::DIRECT_CUT.name).absolute(direct.cut);
        }
        let stats = self.data_plane.stats();
        metrics::counter!(metric::LIVE_FLOWS_CUT.name).absolute(stats.live_cut);
        metrics::counter!(metric::CONNECTIONS_SHED.name).absolute(stats.shed);
        metrics::counter!(metric::LISTENERS_ENDED.name).absolute(stats.listeners_ended);
        gauge(&metric::ENGINES_STUCK, stats.stuck_workers as u64);
        gauge(&metric::DATA_PLANE_SOCKETS, stats.sockets);
        gauge(&metric::DATA_PLANE_SOCKET_LIMIT, stats.socket_limit);
        metrics::counter!(metric::SOURCE_FALLBACKS.name).absolute(stats.source_fallbacks);
        for (role, tunnels) in stats.tunnels {
            observe_tunnels(role, &tunnels);
        }
    }
}

fn observe_tunnels(role: TunnelRole, tunnels: &TunnelStats) {
    let role = role.as_str();
    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
    metrics::gauge!(metric::TUNNELS_OPEN.name, "role" => role).set(tunnels.open as f64);
    for (reason, count) in &tunnels.closed {
        let reason = reason.as_str();
        metrics::counter!(metric::TUNNELS_CLOSED.name, "role" => role, "reason" => reason)
            .absolute(*count);
    }
    metrics::counter!(metric::HANDSHAKES.name, "role" => role, "result" => "ok")
        .absolute(tunnels.handshakes_ok);
    for (reason, count) in &tunnels.handshakes_failed {
        let result = reason.as_str();
        metrics::counter!(metric::HANDSHAKES.name, "role" => role, "result" => result)
            .absolute(*count);
    }
}

/// A pod that cannot be captured stays refused or out of the mesh and is tried again; it makes no other pod wait, and so
/// not the node unready. It is told all the same.
fn ready(readiness: &Readiness, pending_pods: usize) -> Reply {
    let text = match pending_pods {
        0 => format!("{readiness}\n"),
        count => format!("{readiness}\n{count} pods cannot be captured yet: culvert pod list\n"),
    };
    if readiness.is_ready() {
        Reply::text(text)
    } else {
        // Source: ztunnel answers 500 with the same words.
        Reply::with(StatusCode::INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", text)
    }
}

/// The body is the path of the program; empty: the one that runs, from where it was started.
fn start_successor(upgrade: &Upgrade, request: &Request) -> Reply {
    let Ok(program) = std::str::from_utf8(&request.body) else {
        return Reply::error(StatusCode::BAD_REQUEST, "the path is not UTF-8");
    };
    match upgrade.start(program.trim()) {
        Ok(started) => Reply::json(&started),
        Err(refused) => Reply::error(StatusCode::CONFLICT, &error_chain(&refused)),
    }
}

/// What the allocator holds, and what the kernel counts of this process.
fn memory() -> Reply {
    match AllocatorBytes::now() {
        Ok(allocator) => Reply::json(&json!({
            "allocator": allocator,
            "residentBytes": mesh_runtime::process::resident_bytes(),
        })),
        Err(error) => Reply::error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn level(log: &LogHandle) -> Reply {
    match log.filter() {
        Ok(filter) => Reply::json(&json!({ "level": filter })),
        Err(error) => Reply::error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn change_level(log: &LogHandle, request: &Request) -> Reply {
    let done = match (request.query("reset"), request.query("level")) {
        (Some(_), _) => log.reset_filter(),
        (None, Some(filter)) => log.set_filter(filter),
        (None, None) => {
            return Reply::error(StatusCode::BAD_REQUEST, "give ?level=FILTER or ?reset");
        }
    };
    match done {
        Ok(()) => level(log),
        Err(error) => Reply::error(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

fn gauge(metric: &Metric, value: u64) {
    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
    metrics::gauge!(metric.name).set(value as f64);
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
const fn number(count: usize) -> f64 {
    count as f64
}

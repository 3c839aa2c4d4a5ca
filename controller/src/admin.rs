//! The admin server's pages.
//!
//! `/ready` · `/metrics` · `/status` · `/config_dump` · `/explain?from=NS/NAME&to=HOST_OR_IP&port=N[&method=M&path=P&headers=LINES]` · `/logging`
//! (`GET` shows the filter; `POST ?level=FILTER` or `?reset` changes it, over the Unix socket only).

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::StatusCode;
use mesh_authorize::Policy;
use mesh_model::{Service, Workload};
use mesh_resolve::ResolveSettings;
use mesh_route::Route;
use mesh_runtime::{LogHandle, Metrics, Readiness, Reply, Request, Routes, metric};
use serde::Serialize;
use serde_json::{Value, json};

use crate::explain::{AskedRequest, Question, answer};
use crate::index::PodSettings;
use crate::mesh::SharedMesh;

/// What probes and scrapers may see from outside: `/ready` and `/metrics`.
#[must_use]
pub fn status_routes(readiness: Readiness, metrics: Metrics) -> Routes {
    Routes::new()
        .get("/ready", move |_| {
            let reply = ready(&readiness);
            async move { reply }
        })
        .get("/metrics", move |_| {
            let text = metrics.render();
            async move { Reply::with(StatusCode::OK, metric::CONTENT_TYPE, text) }
        })
}

fn ready(readiness: &Readiness) -> Reply {
    let status =
        if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Reply::with(status, "text/plain; charset=utf-8", format!("{readiness}\n"))
}

/// The pages over `mesh`.
#[must_use]
pub fn routes(mesh: &SharedMesh, readiness: Readiness, metrics: Metrics, log: LogHandle) -> Routes {
    let (of_status, of_dump, of_explain) = (Arc::clone(mesh), Arc::clone(mesh), Arc::clone(mesh));
    let set_log = log.clone();
    status_routes(readiness, metrics)
        .get("/status", move |_| {
            let reply = Reply::json(&of_status.status());
            async move { reply }
        })
        .get("/config_dump", move |_| {
            let reply = Reply::json(&config_dump(&of_dump));
            async move { reply }
        })
        .get("/explain", move |request| {
            let reply = explained(&of_explain, &request);
            async move { reply }
        })
        .get("/logging", move |_| {
            let reply = log_level(&log);
            async move { reply }
        })
        .post("/logging", move |request| {
            let reply = change_log(&set_log, &request);
            async move { reply }
        })
}

fn log_level(log: &LogHandle) -> Reply {
    match log.filter() {
        Ok(filter) => Reply::json(&json!({ "level": filter })),
        Err(error) => Reply::error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn change_log(log: &LogHandle, request: &Request) -> Reply {
    let changed = match (request.query("level"), request.query("reset")) {
        (Some(filter), _) => log.set_filter(filter),
        (None, Some(_)) => log.reset_filter(),
        (None, None) => {
            return Reply::error(
                StatusCode::BAD_REQUEST,
                "give level=FILTER, such as info or mesh_controller=debug, or reset",
            );
        }
    };
    match changed {
        Ok(()) => log_level(log),
        Err(error) => Reply::error(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

fn explained(mesh: &SharedMesh, request: &Request) -> Reply {
    let (Some(from), Some(to)) = (request.query("from"), request.query("to")) else {
        return Reply::error(
            StatusCode::BAD_REQUEST,
            "give from=NAMESPACE/NAME, to=HOST_OR_ADDRESS and port=PORT",
        );
    };
    let Some(port) =
        request.query("port").and_then(|port| port.parse().ok()).filter(|port| *port != 0)
    else {
        return Reply::error(StatusCode::BAD_REQUEST, "give port=PORT, from 1 to 65535");
    };
    let asked = request.query("method").zip(request.query("path")).map(|(method, path)| {
        let lines = request.query("headers").unwrap_or_default().lines();
        AskedRequest {
            method: method.to_owned(),
            path: path.to_owned(),
            headers: lines
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
                .collect(),
        }
    });
    let question = Question { from: from.to_owned(), to: to.to_owned(), port, request: asked };
    let (now, wall) = (Instant::now(), SystemTime::now());
    match answer(&mesh.picture(), &ResolveSettings::default(), &question, now, wall) {
        Ok(mut answer) => {
            answer.warnings.extend(mesh.warnings());
            Reply::json(&answer)
        }
        Err(error) => Reply::error(StatusCode::NOT_FOUND, &error.to_string()),
    }
}

#[derive(Debug, Serialize)]
struct ConfigDump {
    workloads: Vec<Arc<Workload>>,
    services: Vec<Arc<Service>>,
    policies: Vec<Arc<Policy>>,
    frontends: Vec<Value>,
    routes: Vec<Route>,
    authentications: Vec<Arc<mesh_jwt::RequestAuthentication>>,
    pods: Vec<Value>,
    published: Vec<(String, usize)>,
}

fn config_dump(mesh: &SharedMesh) -> ConfigDump {
    let published = mesh.store().counts();
    mesh.with_index(|index| ConfigDump {
        workloads: index.workloads().cloned().collect(),
        services: index.services().cloned().collect(),
        policies: index.policies().cloned().collect(),
        frontends: index
            .frontends()
            .map(|one| json!({ "config": one.config, "waypoints": one.waypoints }))
            .collect(),
        routes: index.routes().map(|one| one.route.clone()).collect(),
        authentications: index.authentications().cloned().collect(),
        pods: index.pods().map(|pod| pod_dump(pod)).collect(),
        published: published
            .into_iter()
            .map(|(kind, count)| (kind.type_url().to_owned(), count))
            .collect(),
    })
}

fn pod_dump(pod: &PodSettings) -> Value {
    json!({
        "uid": pod.uid,
        "namespace": pod.key.namespace,
        "name": pod.key.name,
        "node": pod.node,
        "serviceAccount": pod.service_account,
        "mode": pod.mode,
        "probePorts": pod.probe_ports,
        "dnsCapture": pod.capture.dns_capture,
        "bypassInbound": pod.capture.bypass_inbound,
        "tunnelSameNode": pod.tunnel_same_node,
    })
}

//! The pages: readiness, metrics, and for this machine alone what is served and by which routes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::StatusCode;
use mesh_runtime::metric::CONTENT_TYPE;
use mesh_runtime::{LogHandle, Metrics, Readiness, Reply, Request, Routes};
use mesh_telemetry::metric;
use serde_json::json;

use crate::keys::KeyStore;
use crate::picture::Picture;
use crate::worker::{Common, Worker};

/// What the pages show.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) picture: Arc<Picture>,
    pub(crate) keys: Arc<KeyStore>,
    pub(crate) common: Arc<Common>,
    pub(crate) workers: Vec<Arc<Worker>>,
    pub(crate) readiness: Readiness,
    pub(crate) metrics: Metrics,
    pub(crate) log: LogHandle,
}

impl Parts {
    pub(crate) fn ready(&self) -> Routes {
        let readiness = self.readiness.clone();
        let page = move |_| {
            let is_ready = readiness.is_ready();
            let status = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            let reply = Reply::with(status, "text/plain; charset=utf-8", format!("{readiness}\n"));
            async move { reply }
        };
        Routes::new().get("/ready", page.clone()).get("/healthz/ready", page)
    }

    pub(crate) fn metrics(&self) -> Routes {
        let parts = self.clone();
        Routes::new().get("/metrics", move |_| {
            parts.gauges();
            let text = parts.metrics.render();
            async move { Reply::with(StatusCode::OK, CONTENT_TYPE, text) }
        })
    }

    pub(crate) fn all(&self) -> Routes {
        let (of_metrics, of_status, of_dump) = (self.clone(), self.clone(), self.clone());
        let (of_ready, log, set_log) = (self.readiness.clone(), self.log.clone(), self.log.clone());
        Routes::new()
            .get("/ready", move |_| {
                let reply = Reply::text(format!("{of_ready}\n"));
                async move { reply }
            })
            .get("/metrics", move |_| {
                of_metrics.gauges();
                let text = of_metrics.metrics.render();
                async move { Reply::with(StatusCode::OK, CONTENT_TYPE, text) }
            })
            .get("/status", move |_| {
                let reply = of_status.status();
                async move { reply }
            })
            .get("/config_dump", move |_| {
                let reply = of_dump.dump();
                async move { reply }
            })
            .get("/logging", move |_| {
                let reply = match log.filter() {
                    Ok(filter) => Reply::text(format!("{filter}\n")),
                    Err(error) => {
                        Reply::error(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())
                    }
                };
                async move { reply }
            })
            .post("/logging", move |request: Request| {
                let reply = match request.query("level").map(|filter| set_log.set_filter(filter)) {
                    Some(Ok(())) => Reply::text("ok\n"),
                    Some(Err(error)) => Reply::error(StatusCode::BAD_REQUEST, &error.to_string()),
                    None => Reply::error(StatusCode::BAD_REQUEST, "give level=FILTER"),
                };
                async move { reply }
            })
    }

    #[expect(clippy::cast_precision_loss, reason = "gauges")]
    fn gauges(&self) {
        let streams = self.common.streams.load(Ordering::Relaxed);
        metrics::gauge!(metric::WAYPOINT_STREAMS.name).set(streams as f64);
        let mut sums = [0; 3];
        for worker in &self.workers {
            for (sum, count) in sums.iter_mut().zip(worker.pool.counts()) {
                *sum += count;
            }
        }
        for (kind, count) in ["tunnel", "http1", "http2"].into_iter().zip(sums) {
            metrics::gauge!(metric::WAYPOINT_UPSTREAM_CONNECTIONS.name, "kind" => kind)
                .set(count as f64);
        }
        for (kind, count) in self.picture.snapshot().counts() {
            metrics::gauge!(metric::RESOURCES.name, "type" => kind).set(count as f64);
        }
    }

    fn status(&self) -> Reply {
        let snapshot = self.picture.snapshot();
        Reply::json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "gateway": format!(
                "{}/{}", self.common.settings.gateway.namespace, self.common.settings.gateway.name
            ),
            "ready": self.readiness.is_ready(),
            "waitingFor": self.readiness.waiting_for(),
            "identity": snapshot.identity.as_ref().map(|identity| identity.svid.id().as_str().to_owned()),
            "knows": snapshot.counts(),
            "streams": self.common.streams.load(Ordering::Relaxed),
        }))
    }

    fn dump(&self) -> Reply {
        let snapshot = self.picture.snapshot();
        Reply::json(&json!({
            "frontends": snapshot.frontends().collect::<Vec<_>>(),
            "routes": snapshot.routes.routes().collect::<Vec<_>>(),
            "authentications": snapshot.authentications().collect::<Vec<_>>(),
            "keys": self.keys.dump(),
            "policies": snapshot.policies.policies().collect::<Vec<_>>(),
        }))
    }
}

//! One request: judged, routed, sent on, answered.

mod authenticate;
mod head;
mod judge;
mod outline;
mod upgrade;

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version as HttpVersion};
use http_body::Body as _;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use mesh_jwt::redacted;
use mesh_model::RequestPath;
use mesh_resolve::{ResolvedFlow, Route};
use mesh_route::{
    Answer, AnswerCause, Forward, FrontendName, Plan, RedirectScheme, RequestHead, Retry,
    Selection, ServiceRef, Timeouts,
};
use mesh_telemetry::{RequestFacts, RequestRecord, WorkloadLabels, metric};
use mesh_wire::AppProtocol;

use self::authenticate::{Authenticated, authenticate, headers_for};
use self::head::{Head, XFCC, check, hop_by_hop, hops, strip};
use self::outline::{Content, Outline};
use self::upgrade::Switch;
use crate::body::{AnswerBody, RequestBody};
use crate::control::random;
use crate::picture::Snapshot;
use crate::refusal::{REASON, Refusal};
use crate::stream::Dialled;
use crate::telemetry::{Report, grpc_status};
use crate::upstream::{Answered, Failed, Version, Way};

/// Largest body that is kept for a further attempt or for mirrors.
const MAX_KEPT: u64 = 64 * 1024;
/// Longest wait for a mirror.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(15);
/// Shortest wait between two attempts.
const MIN_BACKOFF: Duration = Duration::from_millis(25);

/// Answers a request.
pub(crate) async fn handle(
    dialled: &Arc<Dialled>,
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    let started = Instant::now();
    let snapshot = dialled.worker.common.picture.snapshot();
    let count = Arc::new(AtomicU64::new(0));
    let mut record = record(dialled, &snapshot, &request);
    let grpc = record.facts.grpc;
    let exchange = Exchange { dialled, snapshot: &snapshot, started, count: &count };
    match exchange.run(request, &mut record).await {
        Ok(Outcome::Server { mut response, lease, deadline }) => {
            record.status = response.status().as_u16();
            record.grpc_status = grpc_status(response.headers());
            let report = Report::new(record, started, Arc::clone(&count), exchange.access());
            let body = response.body_mut().take();
            let (parts, _) = response.into_parts();
            let body = match body {
                Some(body) => AnswerBody::server(body, lease, Some(report), deadline),
                // From here on it is another protocol's connection.
                None => {
                    let mut body = AnswerBody::own("", Some(report));
                    body.finish();
                    body
                }
            };
            Response::from_parts(parts, body)
        }
        Ok(Outcome::Own(answer)) => {
            record.status = answer.status.as_u16();
            let report = Report::new(record, started, Arc::clone(&count), exchange.access());
            let mut response = Response::new(AnswerBody::own("", Some(report)));
            *response.status_mut() = answer.status;
            *response.headers_mut() = answer.headers;
            finish_empty(response)
        }
        Err(refusal) => {
            record.reason = Some(refusal.reason);
            record.flags = refusal.flags;
            record.detail = Some(refusal.detail.clone());
            record.policy = refusal.policy.clone();
            record.status = if grpc { 200 } else { refusal.status.as_u16() };
            record.grpc_status = grpc.then(|| refusal.grpc_status());
            let hide = dialled.worker.common.settings.hide_reasons;
            let answer = refusal.answer(grpc, hide);
            Report::new(record, started, Arc::clone(&count), exchange.access()).finish();
            answer
        }
    }
}

/// An answer without body has ended already.
fn finish_empty(mut response: Response<AnswerBody>) -> Response<AnswerBody> {
    response.body_mut().finish();
    response
}

fn record(
    dialled: &Dialled,
    snapshot: &Snapshot,
    request: &Request<Incoming>,
) -> Box<RequestRecord> {
    let source = snapshot.index.workload_by_ip(&dialled.own.network, dialled.peer.address.ip());
    let grpc = request
        .headers()
        .get(http::header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    let uri = request.uri();
    Box::new(RequestRecord {
        facts: RequestFacts {
            source: source.map(|found| WorkloadLabels::from(&**found)).unwrap_or_default(),
            source_principal: Some(dialled.peer.identity.clone()),
            service: dialled.service().map(|service| (&**service).into()).unwrap_or_default(),
            grpc,
            ..RequestFacts::default()
        },
        source: dialled.client,
        dialled: dialled.authority.to_string().into(),
        method: request.method().to_string(),
        authority: String::new(),
        raw_path: uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
        path: None,
        version: match request.version() {
            HttpVersion::HTTP_2 => "HTTP/2",
            HttpVersion::HTTP_10 => "HTTP/1.0",
            _ => "HTTP/1.1",
        },
        route: None,
        upstream: None,
        retries: 0,
        status: 0,
        grpc_status: None,
        request_bytes: 0,
        response_bytes: 0,
        duration: Duration::ZERO,
        first_byte: None,
        reason: None,
        detail: None,
        flags: "-",
        policy: None,
        request_principal: None,
    })
}

/// What becomes of a request that is not refused.
enum Outcome {
    /// The server's answer; without body when the protocol was switched.
    Server {
        response: Response<Option<Incoming>>,
        lease: Option<crate::upstream::Lease>,
        deadline: Option<tokio::time::Instant>,
    },
    /// An answer that a route gave.
    Own(Answer),
}

struct Exchange<'e> {
    dialled: &'e Arc<Dialled>,
    snapshot: &'e Snapshot,
    started: Instant,
    count: &'e Arc<AtomicU64>,
}

/// Where a request goes, and how it is changed on the way.
struct Sending<'s> {
    /// The waypoints before this one.
    hops: u8,
    authenticated: Authenticated,
    /// A backend; none for what was dialled.
    backend: Option<&'s ServiceRef>,
    path: Option<String>,
    host: Option<&'s str>,
    timeouts: Timeouts,
    retry: Option<&'s Retry>,
    forward: Option<&'s Forward<'s>>,
}

impl Exchange<'_> {
    fn access(&self) -> mesh_runtime::AccessLog {
        self.dialled.worker.common.access.clone()
    }

    async fn run(
        &self,
        mut request: Request<Incoming>,
        record: &mut RequestRecord,
    ) -> Result<Outcome, Refusal> {
        let head = check(&request)?;
        head.authority.clone_into(&mut record.authority);
        let mut target = record.raw_path.clone();
        let (served, policies) = self.dialled.attached(self.snapshot)?;
        let mut switch = Switch::of(&mut request, &head.authority);
        let (mut parts, body) = request.into_parts();
        let hops = hops(&parts.headers)?;
        strip(&mut parts.headers);
        let names = self.dialled.authentications(self.snapshot, served.as_deref());
        let headers = &mut parts.headers;
        let (authenticated, changed) =
            Box::pin(authenticate(self.snapshot, Arc::clone(&names), headers, &target, record))
                .await?;
        if let Some(changed) = changed {
            target = changed;
        }
        if let Some(switch) = &mut switch {
            switch.authenticated(&target, &parts.headers, &authenticated);
        }
        let path = self.path(&target)?;
        let normal = path.target();
        if *normal != *target {
            record.path = Some(self.without_tokens(&names, &normal));
        }
        let judged =
            mesh_authorize::Request::new(&head.authority, &parts.method, &path, &parts.headers)
                .with_claims(authenticated.at(&names));
        judge::dialled(self.dialled, self.snapshot, &policies, &judged)?;
        let seen = RequestHead {
            method: &parts.method,
            authority: &head.authority,
            path: &path,
            headers: &parts.headers,
        };
        let port = self.dialled.authority.port();
        let frontend: Option<&FrontendName> = served.as_ref().map(|served| &served.config.frontend);
        let namespace = Some(self.dialled.peer.identity.namespace());
        let selection = match frontend {
            Some(frontend) => self.snapshot.routes.select(frontend, port, namespace, &seen),
            None => Selection::Unrouted,
        };
        match selection {
            Selection::Unrouted => {
                let sending = Sending {
                    hops,
                    authenticated,
                    backend: None,
                    path: None,
                    host: None,
                    timeouts: Timeouts::default(),
                    retry: None,
                    forward: None,
                };
                self.send(parts, body, &head, &path, sending, switch, record).await
            }
            Selection::NotFound => Err(Refusal::new(
                "no_route",
                StatusCode::NOT_FOUND,
                "NR",
                "no rule of the routes at this service matches",
            )),
            Selection::Selected(selected) => {
                let rule = selected.rule();
                let named = rule.name.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
                let place = selected.rule_index();
                record.route = Some(format!("{} rule {place}{named}", selected.route().name));
                match selected.plan(&seen, RedirectScheme::Http, &mut random) {
                    Plan::Answer(answer) => own_answer(answer),
                    Plan::Forward(forward) => {
                        let sending = Sending {
                            hops,
                            authenticated,
                            backend: Some(forward.backend),
                            path: forward.path.clone(),
                            host: forward.host,
                            timeouts: forward.timeouts,
                            retry: forward.retry,
                            forward: Some(&forward),
                        };
                        self.send(parts, body, &head, &path, sending, switch, record).await
                    }
                }
            }
        }
    }

    /// A path and query for logs, in which tokens have no place.
    fn without_tokens(&self, names: &[Arc<str>], target: &str) -> String {
        let known = names.iter().filter_map(|name| self.snapshot.authentications.get(name));
        let rules: Vec<_> = known.map(|one| &one.rules).collect();
        redacted(&rules, target).unwrap_or_else(|| target.to_owned())
    }

    /// A path and query in the form that is judged, routed and sent.
    fn path<'t>(&self, target: &'t str) -> Result<RequestPath<'t>, Refusal> {
        RequestPath::parse(target, self.dialled.worker.common.settings.paths())
            .map_err(|error| Refusal::bad_request("bad_path", error.to_string()))
    }

    #[expect(clippy::too_many_arguments, reason = "what a request is made of, taken apart once")]
    async fn send(
        &self,
        mut parts: Parts,
        body: Incoming,
        head: &Head,
        path: &RequestPath<'_>,
        sending: Sending<'_>,
        switch: Option<Switch>,
        record: &mut RequestRecord,
    ) -> Result<Outcome, Refusal> {
        let overall = deadline(self.started, sending.timeouts.request);
        self.prepare(&mut parts.headers, head, &sending, switch.as_ref());
        let target = match &sending.path {
            Some(changed) => match path.query() {
                Some(query) => format!("{changed}?{query}"),
                None => changed.clone(),
            },
            None => path.target().into_owned(),
        };
        let authority = sending.host.unwrap_or(&head.authority).to_owned();
        let mirrors = sending.forward.map(|forward| forward.mirrors.clone()).unwrap_or_default();
        let keeps = sending.retry.is_some() || !mirrors.is_empty();
        let mut content = self.content(body, keeps).await?;
        let client_version = parts.version;
        let outline = Outline {
            method: parts.method,
            target,
            authority,
            headers: parts.headers,
            client_version,
            hops: sending.hops,
            authenticated: sending.authenticated.clone(),
        };
        if let Content::Kept(bytes) = &content {
            for mirror in mirrors {
                self.mirror(mirror, &outline, bytes);
            }
        } else if !mirrors.is_empty() {
            metrics::counter!(metric::WAYPOINT_MIRRORS_SKIPPED.name, "reason" => "body_too_large")
                .increment(mirrors.len() as u64);
        }
        let mut attempts_left = sending.retry.map_or(0, |retry| retry.attempts);
        // Where nothing of a request was sent, another endpoint is tried once, whatever the route says.
        let mut reconnects_left = 2_u32;
        let mut attempt = 0_u32;
        loop {
            let attempt_deadline =
                earlier(overall, deadline(Instant::now(), sending.timeouts.backend_request));
            let again = content.again();
            let outcome = self
                .attempt(
                    &outline,
                    content.take(),
                    sending.backend,
                    switch.as_ref(),
                    attempt_deadline,
                    record,
                )
                .await;
            let failure = match outcome {
                Ok((answered, way)) => {
                    let status = answered.response.status().as_u16();
                    let wanted = sending.retry.is_some_and(|retry| retry.codes.contains(&status));
                    if wanted && attempts_left > 0 && again {
                        None
                    } else {
                        record.upstream = Some(way.address());
                        record.first_byte = Some(self.started.elapsed());
                        return self.answered(
                            answered,
                            &sending,
                            outline,
                            switch,
                            attempt_deadline,
                        );
                    }
                }
                Err(failed) => Some(failed),
            };
            // None: a status that the route wants tried again.
            let mut counts = true;
            if let Some(AttemptFailed { refusal, unsent, stale, unprocessed }) = failure {
                let timed_out = refusal.reason == "request_timeout";
                let is_over =
                    timed_out && overall.is_some_and(|at| at <= tokio::time::Instant::now());
                // Each took its time already.
                if refusal.reason == "connect_timeout" {
                    reconnects_left = reconnects_left.min(1);
                }
                // Otherwise it may have been done, and would be done twice (RFC 9110 §9.2.2).
                let is_harmless = unprocessed || outline.method.is_idempotent();
                if let Some(body) = unsent.filter(|_| reconnects_left > 0 && !timed_out) {
                    content = Content::Unsent(body);
                    reconnects_left -= 1;
                    counts = false;
                } else if (stale || unprocessed) && is_harmless && again && reconnects_left > 0 {
                    reconnects_left -= 1;
                    counts = false;
                } else if attempts_left == 0
                    || !again
                    || is_over
                    || !is_harmless
                    || !refusal.may_pass()
                {
                    return Err(refusal);
                }
            }
            if counts {
                attempts_left -= 1;
                record.retries += 1;
                let least = sending.retry.and_then(|retry| retry.backoff).unwrap_or(MIN_BACKOFF);
                let pause = least.saturating_mul(1 << attempt.min(6));
                let jitter = pause.mul_f64((random() % 1000) as f64 / 4000.0);
                attempt += 1;
                let pause = tokio::time::sleep(pause + jitter);
                match overall {
                    Some(at) => {
                        if tokio::time::timeout_at(at, pause).await.is_err() {
                            return Err(timeout("the request took too long"));
                        }
                    }
                    None => pause.await,
                }
            }
        }
    }

    /// The body, whole if it is wanted and small.
    async fn content(&self, body: Incoming, keep: bool) -> Result<Content, Refusal> {
        if body.is_end_stream() {
            return Ok(Content::Kept(Bytes::new()));
        }
        let is_small = body.size_hint().upper().is_some_and(|bytes| bytes <= MAX_KEPT);
        if !keep || !is_small {
            return Ok(Content::Stream(Some(RequestBody::stream(body, Arc::clone(self.count)))));
        }
        let limit = usize::try_from(MAX_KEPT).unwrap_or(usize::MAX);
        let collected = Limited::new(body, limit)
            .collect()
            .await
            .map_err(|error| Refusal::bad_request("body_cut_off", error.to_string()))?;
        let bytes = collected.to_bytes();
        self.count.store(bytes.len() as u64, Ordering::Relaxed);
        Ok(Content::Kept(bytes))
    }

    /// Changes the headers of a request on its way to the server.
    fn prepare(
        &self,
        headers: &mut HeaderMap,
        head: &Head,
        sending: &Sending<'_>,
        switch: Option<&Switch>,
    ) {
        headers.remove(http::header::EXPECT);
        headers.remove(HOST);
        if head.chunked {
            headers.remove(CONTENT_LENGTH);
        }
        for modifier in sending.forward.iter().flat_map(|forward| forward.request_headers) {
            modifier.apply(headers);
        }
        // After the route's changes: nobody else says who the client is.
        let own = self.dialled.own.identity();
        let client = &self.dialled.peer.identity;
        let by = own.as_ref().map_or("", |id| id.as_str());
        headers.remove(XFCC);
        if let Ok(value) = HeaderValue::from_str(&format!("By={by};URI={}", client.as_str())) {
            headers.insert(XFCC, value);
        }
        if let Some(switch) = switch {
            switch.request(headers);
        }
    }

    async fn attempt(
        &self,
        outline: &Outline,
        body: RequestBody,
        backend: Option<&ServiceRef>,
        switch: Option<&Switch>,
        deadline: Option<tokio::time::Instant>,
        record: &mut RequestRecord,
    ) -> Result<(Answered, Way), AttemptFailed> {
        let (resolved, version) = match self.target(backend, outline, switch).await {
            Ok(target) => target,
            Err(refusal) => return Err(AttemptFailed::unknown(refusal)),
        };
        if let Some(peer) = &resolved.peer {
            record.facts.destination = WorkloadLabels::from(&**peer);
        }
        record.facts.destination_principal = match &resolved.route {
            Route::Tunnel(tunnel) | Route::ViaWaypoint { tunnel, .. } => {
                tunnel.expected.first().cloned()
            }
            Route::Passthrough { .. } | Route::Deliver { .. } => None,
        };
        let way = match Way::of(&resolved.route) {
            Ok(way) => way,
            Err(refusal) => return Err(AttemptFailed::unknown(refusal)),
        };
        let headers = self.headers_at(backend, outline);
        let request = match outline.request(&headers, &resolved.route, version, body) {
            Ok(request) => request,
            Err(refusal) => return Err(AttemptFailed::unknown(refusal)),
        };
        let pool = &self.dialled.worker.pool;
        let forwarded = self.dialled.forwarded();
        let sent = pool.send(self.snapshot, &way, version, &forwarded, request);
        let outcome = match deadline {
            None => sent.await,
            Some(at) => match tokio::time::timeout_at(at, sent).await {
                Ok(outcome) => outcome,
                Err(_elapsed) => {
                    let refusal = timeout("the server took too long to answer");
                    return Err(AttemptFailed::unknown(refusal));
                }
            },
        };
        match outcome {
            Ok(answered) => Ok((answered, way)),
            Err(Failed { refusal, unsent, stale, unprocessed }) => {
                record.upstream = Some(way.address());
                let unsent = unsent.map(Request::into_body);
                Err(AttemptFailed { refusal, unsent, stale, unprocessed })
            }
        }
    }

    /// An endpoint, and what to speak to it.
    async fn target(
        &self,
        backend: Option<&ServiceRef>,
        outline: &Outline,
        switch: Option<&Switch>,
    ) -> Result<(ResolvedFlow, Version), Refusal> {
        let follow = match outline.client_version {
            HttpVersion::HTTP_2 => Version::Http2,
            _ => Version::Http1,
        };
        let (resolved, protocol) = match backend {
            None => {
                let (served, _) = self.dialled.attached(self.snapshot)?;
                let port = self.dialled.authority.port();
                let protocol = served.map_or(AppProtocol::Detect, |served| served.protocol(port));
                (self.dialled.endpoint(self.snapshot).await?, protocol)
            }
            Some(backend) => {
                let service = judge::backend(self.dialled, self.snapshot, backend, outline)?;
                let served = self.snapshot.served(&service.key);
                let protocol =
                    served.map_or(AppProtocol::Detect, |served| served.protocol(backend.port));
                (self.dialled.endpoint_of(self.snapshot, service, backend.port).await?, protocol)
            }
        };
        let version = match protocol {
            _ if switch.is_some() => Version::Http1,
            AppProtocol::Http1 => Version::Http1,
            AppProtocol::Http2 => Version::Http2,
            AppProtocol::Detect | AppProtocol::Tcp => follow,
        };
        Ok((resolved, version))
    }

    /// The headers that what a request is sent to may see.
    fn headers_at<'o>(
        &self,
        backend: Option<&ServiceRef>,
        outline: &'o Outline,
    ) -> Cow<'o, HeaderMap> {
        let service = backend.and_then(|backend| self.snapshot.backend(backend));
        match service {
            Some(service) => headers_for(self.snapshot, &service.key, outline),
            None => Cow::Borrowed(&outline.headers),
        }
    }

    /// Sends a copy elsewhere; nobody sees its answer.
    fn mirror(&self, mirror: &ServiceRef, outline: &Outline, bytes: &Bytes) {
        let Ok(place) = Arc::clone(&self.dialled.worker.mirrors).try_acquire_owned() else {
            metrics::counter!(metric::WAYPOINT_MIRRORS_SKIPPED.name, "reason" => "too_many")
                .increment(1);
            return;
        };
        let (dialled, mirror, outline) =
            (Arc::clone(self.dialled), mirror.clone(), outline.clone());
        let bytes = bytes.clone();
        tokio::spawn(async move {
            let _place = place;
            let snapshot = dialled.worker.common.picture.snapshot();
            let count = Arc::default();
            let exchange = Exchange {
                dialled: &dialled,
                snapshot: &snapshot,
                started: Instant::now(),
                count: &count,
            };
            let copy = async {
                let (resolved, version) = exchange.target(Some(&mirror), &outline, None).await?;
                let way = Way::of(&resolved.route)?;
                let headers = exchange.headers_at(Some(&mirror), &outline);
                let body = RequestBody::whole(bytes);
                let request = outline.request(&headers, &resolved.route, version, body)?;
                let pool = &dialled.worker.pool;
                let forwarded = dialled.forwarded();
                let sent = pool.send(&snapshot, &way, version, &forwarded, request).await;
                let answered = sent.map_err(|failed| failed.refusal)?;
                // Read to its end, so that the connection can be used again.
                let mut body =
                    AnswerBody::server(answered.response.into_body(), answered.lease, None, None);
                while let Some(Ok(_frame)) = body.frame().await {}
                Ok::<_, Refusal>(())
            };
            match tokio::time::timeout(MIRROR_TIMEOUT, copy).await {
                Ok(Ok(())) => {}
                Ok(Err(refusal)) => {
                    tracing::debug!(reason = refusal.reason, detail = %refusal.detail, "mirror failed");
                }
                Err(_elapsed) => tracing::debug!("mirror took too long"),
            }
        });
    }

    fn answered(
        &self,
        answered: Answered,
        sending: &Sending<'_>,
        outline: Outline,
        switch: Option<Switch>,
        deadline: Option<tokio::time::Instant>,
    ) -> Result<Outcome, Refusal> {
        let Answered { mut response, lease } = answered;
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let upstream = switched.then(|| hyper::upgrade::on(&mut response));
        let headers = response.headers_mut();
        let upgrade = headers.get(http::header::UPGRADE).cloned();
        hop_by_hop(headers);
        // The reasons of this waypoint are its own to give.
        headers.remove(REASON);
        headers.remove(crate::refusal::DENIED_BY);
        if let Some(forward) = sending.forward {
            for modifier in forward.response_headers {
                modifier.apply(headers);
            }
            for name in forward.cors_headers.keys() {
                headers.remove(name);
            }
            headers.extend(forward.cors_headers.clone());
        }
        let Some(upstream) = upstream else {
            let response = response.map(Some);
            return Ok(Outcome::Server { response, lease, deadline });
        };
        let Some(switch) = switch else {
            let detail = "the server switched protocols without being asked";
            return Err(Refusal { flags: "UPE", ..Refusal::unavailable("protocol_error", detail) });
        };
        switch.answer(headers, upgrade);
        let onward = sending.backend.map(|backend| (backend.clone(), outline));
        switch.join(Arc::clone(self.dialled), upstream, onward);
        Ok(Outcome::Server { response: response.map(|_| None), lease: None, deadline: None })
    }
}

fn own_answer(answer: Answer) -> Result<Outcome, Refusal> {
    match &answer.cause {
        AnswerCause::Redirect | AnswerCause::Preflight => Ok(Outcome::Own(answer)),
        AnswerCause::InvalidReference { reason } => {
            Err(Refusal::new("invalid_reference", answer.status, "NC", reason.to_string()))
        }
        AnswerCause::NoBackend => {
            Err(Refusal::new("no_backend", answer.status, "NC", "the rule has no backend"))
        }
    }
}

/// As [`Failed`], with the body alone.
struct AttemptFailed {
    refusal: Refusal,
    unsent: Option<RequestBody>,
    stale: bool,
    unprocessed: bool,
}

impl AttemptFailed {
    /// Of which nothing more can be said.
    const fn unknown(refusal: Refusal) -> Self {
        Self { refusal, unsent: None, stale: false, unprocessed: false }
    }
}

fn timeout(detail: &str) -> Refusal {
    Refusal::new("request_timeout", StatusCode::GATEWAY_TIMEOUT, "UT", detail)
}

fn deadline(from: Instant, timeout: Option<Duration>) -> Option<tokio::time::Instant> {
    let timeout = timeout.filter(|timeout| !timeout.is_zero())?;
    Some(tokio::time::Instant::from_std(from) + timeout)
}

fn earlier(
    first: Option<tokio::time::Instant>,
    second: Option<tokio::time::Instant>,
) -> Option<tokio::time::Instant> {
    match (first, second) {
        (Some(first), Some(second)) => Some(first.min(second)),
        (first, second) => first.or(second),
    }
}

//! What is answered in a server's place, and why.

use http::header::{CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, Response, StatusCode};
use mesh_authorize::Denial;
use mesh_telemetry::PolicyRef;

use crate::body::AnswerBody;

/// Why a request is answered here.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Refusal {
    /// One word, for logs, metrics and the answer.
    pub(crate) reason: &'static str,
    /// The status, for HTTP.
    pub(crate) status: StatusCode,
    /// Envoy's response flags.
    pub(crate) flags: &'static str,
    /// For people.
    pub(crate) detail: String,
    /// The policy that refused.
    pub(crate) policy: Option<PolicyRef>,
}

/// The header that names the reason.
pub(crate) const REASON: HeaderName = HeaderName::from_static("culvert-reason");
/// The header that names the policy and rule.
pub(crate) const DENIED_BY: HeaderName = HeaderName::from_static("culvert-denied-by");

impl Refusal {
    pub(crate) fn new(
        reason: &'static str,
        status: StatusCode,
        flags: &'static str,
        detail: impl Into<String>,
    ) -> Self {
        Self { reason, status, flags, detail: detail.into(), policy: None }
    }

    /// The client's fault.
    pub(crate) fn bad_request(reason: &'static str, detail: impl Into<String>) -> Self {
        Self::new(reason, StatusCode::BAD_REQUEST, "DPE", detail)
    }

    /// No server to send to.
    pub(crate) fn unavailable(reason: &'static str, detail: impl Into<String>) -> Self {
        Self::new(reason, StatusCode::SERVICE_UNAVAILABLE, "UH", detail)
    }

    /// Whether the same request may fare better a moment later, at another endpoint.
    pub(crate) fn may_pass(&self) -> bool {
        matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT)
    }

    /// A policy's.
    pub(crate) fn denied(denial: &Denial) -> Self {
        let policy = denial.rule.as_ref().map(|rule| PolicyRef {
            policy: format!("{} {}/{}", rule.origin.kind, rule.origin.namespace, rule.origin.name)
                .into(),
            problem: rule.origin.unreadable.clone(),
            rule: rule.rule_index,
        });
        Self {
            policy,
            ..Self::new(denial.reason.as_str(), StatusCode::FORBIDDEN, "-", denial.to_string())
        }
    }

    /// The headers that say why.
    fn headers(&self, headers: &mut HeaderMap) {
        headers.insert(REASON, HeaderValue::from_static(self.reason));
        let named = self.policy.as_ref().map(|policy| HeaderValue::from_str(&policy.to_string()));
        if let Some(Ok(policy)) = named {
            headers.insert(DENIED_BY, policy);
        }
    }

    /// The answer's head and text: in gRPC's form for gRPC, which knows no other.
    pub(crate) fn answer(&self, grpc: bool, hide_reasons: bool) -> Response<AnswerBody> {
        let text = if grpc { String::new() } else { format!("{}\n", self.reason) };
        let mut response = Response::new(AnswerBody::own(text, None));
        let headers = response.headers_mut();
        if grpc {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(self.grpc_status()));
            headers.insert("grpc-message", HeaderValue::from_static(self.reason));
        } else {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            // Source: RFC 6750 §3.
            let plain = HeaderValue::from_static("Bearer error=\"invalid_token\"");
            let why =
                format!("Bearer error=\"invalid_token\", error_description=\"{}\"", self.reason);
            let told = HeaderValue::from_str(&why).ok().filter(|_| !hide_reasons);
            headers.insert(WWW_AUTHENTICATE, told.unwrap_or(plain));
        }
        if !hide_reasons {
            self.headers(headers);
        }
        if !grpc {
            *response.status_mut() = self.status;
        }
        response
    }

    /// The status in gRPC's numbers. Source: Gateway API `GRPCRoute`, and the gRPC project's table of HTTP statuses.
    pub(crate) fn grpc_status(&self) -> u16 {
        match self.status.as_u16() {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 => 8,
            504 => 4,
            _ => 14,
        }
    }
}

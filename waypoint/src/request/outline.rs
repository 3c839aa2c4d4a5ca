//! A request as it is sent on, once or several times.

use bytes::Bytes;
use http::header::{HOST, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version as HttpVersion};
use http_body::Body as _;
use mesh_resolve::Route;

use super::authenticate::Authenticated;
use super::head::HOPS;
use crate::body::RequestBody;
use crate::refusal::Refusal;
use crate::upstream::Version;

/// A request without its body.
#[derive(Clone)]
pub(super) struct Outline {
    pub(super) method: Method,
    pub(super) target: String,
    pub(super) authority: String,
    pub(super) headers: HeaderMap,
    pub(super) client_version: HttpVersion,
    /// The waypoints before this one.
    pub(super) hops: u8,
    /// What its tokens proved.
    pub(super) authenticated: Authenticated,
}

impl Outline {
    /// The request with `headers` and a body, in the form of `version`, for a way by `route`.
    pub(super) fn request(
        &self,
        headers: &HeaderMap,
        route: &Route,
        version: Version,
        body: RequestBody,
    ) -> Result<Request<RequestBody>, Refusal> {
        let invalid = |error: &dyn std::fmt::Display| {
            Refusal::bad_request("bad_path", format!("it cannot be sent on: {error}"))
        };
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        request.headers_mut().clone_from(headers);
        if let Route::ViaWaypoint { .. } = route {
            request.headers_mut().insert(HOPS, HeaderValue::from(u16::from(self.hops) + 1));
        }
        match version {
            Version::Http1 => {
                *request.uri_mut() = self
                    .target
                    .parse()
                    .map_err(|error| invalid(&error as &http::uri::InvalidUri))?;
                let host =
                    HeaderValue::from_str(&self.authority).map_err(|error| invalid(&error))?;
                request.headers_mut().insert(HOST, host);
                // Of methods that seldom have a body hyper sends none whose length is not known, unless it is told how.
                if !request.body().is_end_stream() && request.body().size_hint().exact().is_none() {
                    let chunked = HeaderValue::from_static("chunked");
                    request.headers_mut().insert(TRANSFER_ENCODING, chunked);
                }
            }
            Version::Http2 => {
                *request.uri_mut() = Uri::builder()
                    .scheme("http")
                    .authority(self.authority.as_str())
                    .path_and_query(self.target.as_str())
                    .build()
                    .map_err(|error| invalid(&error))?;
                *request.version_mut() = HttpVersion::HTTP_2;
            }
        }
        Ok(request)
    }
}

/// A request's body between attempts.
pub(super) enum Content {
    /// It is here, and can be sent any number of times.
    Kept(Bytes),
    /// It comes as it comes, and can be sent once.
    Stream(Option<RequestBody>),
    /// It came back untouched.
    Unsent(RequestBody),
}

impl Content {
    /// Whether it can be sent again after this time.
    pub(super) const fn again(&self) -> bool {
        matches!(self, Self::Kept(_))
    }

    pub(super) fn take(&mut self) -> RequestBody {
        let empty = || RequestBody::whole(Bytes::new());
        match std::mem::replace(self, Self::Stream(None)) {
            Self::Kept(bytes) => {
                *self = Self::Kept(bytes.clone());
                RequestBody::whole(bytes)
            }
            Self::Stream(body) => body.unwrap_or_else(empty),
            Self::Unsent(body) => body,
        }
    }
}

//! Paths and what answers them.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::Full;
use serde::Serialize;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `POST`; a `HEAD` is shown as `GET`.
    pub method: Method,
    /// The path, without query.
    pub path: String,
    /// The body; empty for most.
    pub body: Bytes,
    query: Vec<(String, String)>,
}

impl Request {
    pub(super) fn new(method: Method, path: &str, query: &str, body: Bytes) -> Self {
        let query = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                (decode(key), decode(value))
            })
            .collect();
        Self { method, path: path.to_owned(), body, query }
    }

    /// The first value of a query parameter; empty when it stands without one.
    #[must_use]
    pub fn query(&self, key: &str) -> Option<&str> {
        self.query.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }
}

/// Percent decoding; what is malformed stays as it is.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        let encoded = (*byte == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match encoded {
            Some(decoded) => {
                bytes.push(decoded);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(if *byte == b'+' { b' ' } else { *byte });
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// The type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: Bytes,
    allow: Option<&'static str>,
    /// The body is compressed.
    gzip: bool,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
}

impl Reply {
    /// 200 with text.
    #[must_use]
    pub fn text(text: impl Into<Bytes>) -> Self {
        Self::with(StatusCode::OK, "text/plain; charset=utf-8", text)
    }

    /// 200 with `value` as indented JSON; 500 when it cannot be written as JSON.
    #[must_use]
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Self {
        match serde_json::to_vec_pretty(value) {
            Ok(mut json) => {
                json.push(b'\n');
                Self::with(StatusCode::OK, "application/json", json)
            }
            Err(error) => {
                Self::error(StatusCode::INTERNAL_SERVER_ERROR, &format!("cannot encode: {error}"))
            }
        }
    }

    /// An error, as JSON `{"error": text}`.
    #[must_use]
    pub fn error(status: StatusCode, text: &str) -> Self {
        Self { status, ..Self::json(&ErrorBody { error: text }) }
    }

    /// Any body.
    #[must_use]
    pub fn with(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status, content_type, body: body.into(), allow: None, gzip: false }
    }

    /// The same reply with its body as gzip.
    pub(super) fn gzipped(self, body: Bytes) -> Self {
        Self { body, gzip: true, ..self }
    }

    pub(super) fn into_response(self) -> http::Response<Full<Bytes>> {
        let mut response = http::Response::new(Full::new(self.body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
        headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
        if self.gzip {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        if let Some(allow) = self.allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

type Answer = Pin<Box<dyn Future<Output = Reply> + Send>>;

pub(super) struct Route {
    pub(super) handler: Box<dyn Fn(Request) -> Answer + Send + Sync>,
    pub(super) slow: bool,
}

/// Exact paths and their handlers. Unknown paths are 404, other methods 405.
#[derive(Default)]
pub struct Routes {
    routes: BTreeMap<String, Methods>,
}

#[derive(Default)]
struct Methods {
    get: Option<Route>,
    post: Option<Route>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.routes.keys()).finish()
    }
}

impl Routes {
    /// No routes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers `GET` of `path`. A second handler of the same path replaces the first.
    #[must_use]
    pub fn get<H, F>(self, path: &str, handler: H) -> Self
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = Reply> + Send + 'static,
    {
        self.add(path, handler, false, |methods| &mut methods.get)
    }

    /// As [`get`](Self::get), for answers that take up to two minutes, such as profiles.
    #[must_use]
    pub fn get_slow<H, F>(self, path: &str, handler: H) -> Self
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = Reply> + Send + 'static,
    {
        self.add(path, handler, true, |methods| &mut methods.get)
    }

    /// Answers `POST` of `path`; only reached over the Unix socket.
    #[must_use]
    pub fn post<H, F>(self, path: &str, handler: H) -> Self
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = Reply> + Send + 'static,
    {
        self.add(path, handler, false, |methods| &mut methods.post)
    }

    /// The paths, in order: what an index page lists.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.routes.keys().map(String::as_str)
    }

    fn add<H, F>(
        mut self,
        path: &str,
        handler: H,
        slow: bool,
        slot: impl FnOnce(&mut Methods) -> &mut Option<Route>,
    ) -> Self
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = Reply> + Send + 'static,
    {
        let handler = Box::new(move |request| Box::pin(handler(request)) as Answer);
        *slot(self.routes.entry(path.to_owned()).or_default()) = Some(Route { handler, slow });
        self
    }

    pub(super) fn find(&self, method: &Method, path: &str) -> Result<&Route, Reply> {
        let Some(methods) = self.routes.get(path) else {
            return Err(Reply::error(StatusCode::NOT_FOUND, "no such path"));
        };
        let route = match *method {
            Method::GET => methods.get.as_ref(),
            Method::POST => methods.post.as_ref(),
            _ => None,
        };
        route.ok_or_else(|| {
            let allow = match (methods.get.is_some(), methods.post.is_some()) {
                (true, true) => "GET, HEAD, POST",
                (true, false) => "GET, HEAD",
                (false, _) => "POST",
            };
            let refusal = Reply::error(StatusCode::METHOD_NOT_ALLOWED, "not with this method");
            Reply { allow: Some(allow), ..refusal }
        })
    }
}

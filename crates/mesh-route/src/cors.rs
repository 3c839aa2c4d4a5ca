//! Which other origins a browser may let use an answer. Source: GEP-1767, the Fetch standard §3.2.

use std::str::FromStr;
use std::sync::Arc;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method};
use serde::{Deserialize, Serialize};

use crate::request::RequestHead;

/// What browsers are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cors {
    /// Origins that may.
    pub origins: Vec<CorsOrigin>,
    /// With credentials.
    pub credentials: bool,
    /// Methods they may use.
    pub methods: WordList,
    /// Request headers they may send.
    pub headers: WordList,
    /// Headers of the answer they may read.
    pub expose: WordList,
    /// How long a browser may remember. Seconds, at least 1; the API's default is 5.
    pub max_age_s: u32,
}

/// An origin that may use answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CorsOrigin {
    /// `*`.
    Any,
    /// `https://a.example:8443`. Case of scheme and host does not count.
    Exact(Arc<str>),
    /// `https://*.example`: whatever is between these two, but not nothing.
    Between(Arc<str>, Arc<str>),
}

impl FromStr for CorsOrigin {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.split_once('*') {
            Some(("", "")) => Self::Any,
            Some((start, end)) => Self::Between(start.into(), end.into()),
            None => Self::Exact(text.into()),
        })
    }
}

impl CorsOrigin {
    fn contains(&self, origin: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(one) => one.eq_ignore_ascii_case(origin),
            Self::Between(start, end) => {
                let origin = origin.as_bytes();
                let longer = origin.len() > start.len() + end.len();
                longer
                    && origin[..start.len()].eq_ignore_ascii_case(start.as_bytes())
                    && origin[origin.len() - end.len()..].eq_ignore_ascii_case(end.as_bytes())
            }
        }
    }
}

/// Methods or header names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WordList {
    /// `*` is among them.
    pub any: bool,
    /// The others with `, ` between; none when there are none.
    #[serde(with = "crate::text::header_value")]
    pub words: Option<HeaderValue>,
}

impl WordList {
    /// The value of a header that lists them. With credentials a browser takes `*` literally, so what it `asked` for is
    /// said in its place.
    fn value(&self, credentials: bool, asked: Option<&HeaderValue>) -> Option<HeaderValue> {
        match (self.any, credentials) {
            (true, false) => Some(HeaderValue::from_static("*")),
            (true, true) => asked.cloned(),
            (false, _) => self.words.clone(),
        }
    }
}

impl Cors {
    /// True for a question that is asked before a request, which is answered in the server's place.
    #[must_use]
    pub fn is_preflight(request: &RequestHead<'_>) -> bool {
        request.method == Method::OPTIONS
            && request.headers.contains_key(ORIGIN)
            && request.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
    }

    /// The headers of the answer to a preflight; none of them when the origin may not.
    #[must_use]
    pub fn preflight_headers(&self, request: &RequestHead<'_>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if !self.allow_origin(request, &mut headers) {
            return headers;
        }
        let asked = |name| request.headers.get(name);
        let lists = [
            (ACCESS_CONTROL_ALLOW_METHODS, &self.methods, asked(ACCESS_CONTROL_REQUEST_METHOD)),
            (ACCESS_CONTROL_ALLOW_HEADERS, &self.headers, asked(ACCESS_CONTROL_REQUEST_HEADERS)),
        ];
        for (name, list, asked) in lists {
            if let Some(value) = list.value(self.credentials, asked) {
                headers.insert(name, value);
            }
        }
        headers.insert(ACCESS_CONTROL_MAX_AGE, self.max_age_s.into());
        headers
    }

    /// Headers that are set on the answer to any other request; none of them when the origin may not.
    #[must_use]
    pub fn response_headers(&self, request: &RequestHead<'_>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if self.allow_origin(request, &mut headers)
            && let Some(value) = self.expose.value(self.credentials, None)
        {
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, value);
        }
        headers
    }

    fn allow_origin(&self, request: &RequestHead<'_>, headers: &mut HeaderMap) -> bool {
        let Some(origin) = request.headers.get(ORIGIN) else { return false };
        let Ok(text) = origin.to_str() else { return false };
        if !self.origins.iter().any(|one| one.contains(text)) {
            return false;
        }
        if self.origins.contains(&CorsOrigin::Any) && !self.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        } else {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            headers.insert(VARY, HeaderValue::from_static("origin"));
        }
        if self.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::{PathNormalization, RequestPath};

    use super::*;

    fn words(words: &'static str) -> WordList {
        WordList { any: words == "*", words: Some(HeaderValue::from_static(words)) }
    }

    fn cors(origins: &[&str], credentials: bool, list: &'static str) -> Cors {
        Cors {
            origins: origins.iter().map(|origin| origin.parse().unwrap()).collect(),
            credentials,
            methods: words(list),
            headers: words(list),
            expose: words(list),
            max_age_s: 5,
        }
    }

    fn answers(cors: &Cors, origin: &'static str) -> (HeaderMap, HeaderMap) {
        let path = RequestPath::parse("/", PathNormalization::default()).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(ORIGIN, HeaderValue::from_static(origin));
        headers.insert(ACCESS_CONTROL_REQUEST_METHOD, HeaderValue::from_static("PUT"));
        headers.insert(ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue::from_static("x-a"));
        let request = RequestHead {
            method: &Method::OPTIONS,
            authority: "a",
            path: &path,
            headers: &headers,
        };
        assert!(Cors::is_preflight(&request));
        (cors.preflight_headers(&request), cors.response_headers(&request))
    }

    #[test]
    fn origins_are_told_what_they_may() {
        let list = "https://a.example";
        let (preflight, response) = answers(&cors(&[list], false, "PUT, GET"), list);
        assert_eq!(preflight[ACCESS_CONTROL_ALLOW_ORIGIN], list);
        assert_eq!(preflight[VARY], "origin");
        assert_eq!(preflight[ACCESS_CONTROL_ALLOW_METHODS], "PUT, GET");
        assert_eq!(preflight[ACCESS_CONTROL_MAX_AGE], "5");
        assert!(!preflight.contains_key(ACCESS_CONTROL_ALLOW_CREDENTIALS));
        assert_eq!(response[ACCESS_CONTROL_EXPOSE_HEADERS], "PUT, GET");

        let (preflight, response) = answers(&cors(&["*"], false, "*"), list);
        assert_eq!(preflight[ACCESS_CONTROL_ALLOW_ORIGIN], "*");
        assert_eq!(preflight[ACCESS_CONTROL_ALLOW_METHODS], "*");
        assert_eq!(response[ACCESS_CONTROL_EXPOSE_HEADERS], "*");

        let (preflight, response) = answers(&cors(&["*"], true, "*"), list);
        assert_eq!(preflight[ACCESS_CONTROL_ALLOW_ORIGIN], list);
        assert_eq!(preflight[ACCESS_CONTROL_ALLOW_CREDENTIALS], "true");
        assert_eq!(preflight[ACCESS_CONTROL_ALLOW_METHODS], "PUT");
        assert_eq!(preflight[ACCESS_CONTROL_ALLOW_HEADERS], "x-a");
        assert!(!response.contains_key(ACCESS_CONTROL_EXPOSE_HEADERS));
    }

    #[test]
    fn other_origins_are_told_nothing() {
        for (origins, origin, may) in [
            (&["https://*.example"][..], "https://a.b.example", true),
            (&["https://*.example"], "HTTPS://A.EXAMPLE", true),
            (&["https://*.example"], "https://.example", false),
            (&["https://*.example"], "http://a.example", false),
            (&["https://a.example"], "https://a.example:8443", false),
            (&["https://a.example"], "null", false),
            (&[], "https://a.example", false),
        ] {
            let (preflight, response) = answers(&cors(origins, true, "*"), origin);
            assert_eq!(!preflight.is_empty(), may, "{origins:?} {origin}");
            assert_eq!(!response.is_empty(), may, "{origins:?} {origin}");
        }
    }
}

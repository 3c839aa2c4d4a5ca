//! Filters of rules and backends.

use http::{HeaderName, HeaderValue, StatusCode};
use mesh_route::{
    Cors, CorsOrigin, Filters, Fraction, HeaderModifier, Mirror, PathModifier, Redirect,
    RedirectScheme, Rewrite, WordList,
};
use serde::Deserialize;

use super::target;
use crate::manifest::metadata::{InvalidField, Metadata, port};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawFilter {
    #[serde(rename = "type")]
    kind: String,
    request_header_modifier: Option<RawHeaders>,
    response_header_modifier: Option<RawHeaders>,
    request_redirect: Option<RawRedirect>,
    url_rewrite: Option<RawRewrite>,
    request_mirror: Option<RawMirror>,
    cors: Option<RawCors>,
    extension_ref: Option<RawExtension>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeaders {
    set: Option<Vec<RawHeader>>,
    add: Option<Vec<RawHeader>>,
    remove: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    name: String,
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRedirect {
    scheme: Option<String>,
    hostname: Option<String>,
    path: Option<RawModifier>,
    port: Option<i64>,
    status_code: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRewrite {
    hostname: Option<String>,
    path: Option<RawModifier>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawModifier {
    #[serde(rename = "type")]
    kind: String,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawMirror {
    backend_ref: RawReference,
    percent: Option<u32>,
    fraction: Option<RawFraction>,
}

#[derive(Debug, Deserialize)]
struct RawReference {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFraction {
    numerator: u32,
    denominator: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawCors {
    allow_origins: Option<Vec<String>>,
    allow_credentials: Option<bool>,
    allow_methods: Option<Vec<String>>,
    allow_headers: Option<Vec<String>>,
    expose_headers: Option<Vec<String>>,
    max_age: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct RawExtension {
    kind: String,
    name: String,
}

/// Reads the filters of a rule or backend.
pub(super) fn filters(
    raw: Option<Vec<RawFilter>>,
    path: &str,
    meta: &Metadata,
) -> Result<Filters, InvalidField> {
    let mut filters = Filters::default();
    let mut seen: Vec<String> = Vec::new();
    for (index, raw) in raw.unwrap_or_default().into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        if raw.kind != "RequestMirror" && seen.contains(&raw.kind) {
            let problem = format!("a second {}", raw.kind);
            return Err(InvalidField::new(&path, problem, "join the two"));
        }
        seen.push(raw.kind.clone());
        raw.add_to(&mut filters, &path, meta)?;
    }
    Ok(filters)
}

impl RawFilter {
    fn add_to(
        self,
        filters: &mut Filters,
        path: &str,
        meta: &Metadata,
    ) -> Result<(), InvalidField> {
        let missing = |field: &str| {
            let field = format!("{path}.{field}");
            InvalidField::new(&field, "is missing", "write what the filter is to do")
        };
        match self.kind.as_str() {
            "RequestHeaderModifier" => {
                let field = "requestHeaderModifier";
                let raw = self.request_header_modifier.ok_or_else(|| missing(field))?;
                filters.request_headers = raw.parse(&format!("{path}.{field}"))?;
            }
            "ResponseHeaderModifier" => {
                let field = "responseHeaderModifier";
                let raw = self.response_header_modifier.ok_or_else(|| missing(field))?;
                filters.response_headers = raw.parse(&format!("{path}.{field}"))?;
            }
            "RequestRedirect" => {
                let raw = self.request_redirect.ok_or_else(|| missing("requestRedirect"))?;
                filters.redirect = Some(raw.parse(&format!("{path}.requestRedirect"))?);
            }
            "URLRewrite" => {
                let raw = self.url_rewrite.ok_or_else(|| missing("urlRewrite"))?;
                let path = format!("{path}.urlRewrite");
                let host = host(raw.hostname, &path)?;
                let to = raw.path.map(|raw| modifier(raw, &path)).transpose()?;
                filters.rewrite = Some(Rewrite { host, path: to });
            }
            "RequestMirror" => {
                let raw = self.request_mirror.ok_or_else(|| missing("requestMirror"))?;
                let path = format!("{path}.requestMirror");
                let to = raw.backend_ref;
                let target = target(
                    to.group.as_deref(),
                    to.kind.as_deref(),
                    to.namespace.as_deref(),
                    &to.name,
                    to.port,
                    &format!("{path}.backendRef"),
                    meta,
                )?;
                let share = match (raw.percent, raw.fraction) {
                    (None, None) => Fraction::ALL,
                    (Some(percent), None) => Fraction { numerator: percent, denominator: 100 },
                    (None, Some(raw)) => Fraction {
                        numerator: raw.numerator,
                        denominator: raw.denominator.unwrap_or(100),
                    },
                    (Some(_), Some(_)) => {
                        let problem = "percent and fraction are both given";
                        return Err(InvalidField::new(&path, problem, "use one of the two"));
                    }
                };
                filters.mirrors.push(Mirror { target, share });
            }
            "CORS" => {
                let raw = self.cors.ok_or_else(|| missing("cors"))?;
                filters.cors = Some(raw.parse(&format!("{path}.cors"))?);
            }
            "ExtensionRef" => {
                let named = self.extension_ref.map(|raw| format!("{} {}", raw.kind, raw.name));
                let named = named.unwrap_or_else(|| "nothing".to_owned());
                let reason = format!("{path} refers to {named}, which is not supported");
                filters.unresolved = Some(reason.into());
            }
            other => {
                filters.unresolved =
                    Some(format!("{path} is of type {other}, which is not supported").into());
            }
        }
        Ok(())
    }
}

impl RawHeaders {
    fn parse(self, path: &str) -> Result<HeaderModifier, InvalidField> {
        let pairs = |list: Option<Vec<RawHeader>>, field: &str| {
            list.unwrap_or_default()
                .into_iter()
                .map(|raw| {
                    let value = HeaderValue::from_str(&raw.value).map_err(|_source| {
                        let problem = format!("{:?} is no header's value", raw.value);
                        InvalidField::new(
                            &format!("{path}.{field}"),
                            problem,
                            "use visible characters",
                        )
                    })?;
                    Ok((header(&raw.name, &format!("{path}.{field}"))?, value))
                })
                .collect::<Result<Vec<_>, InvalidField>>()
        };
        Ok(HeaderModifier {
            set: pairs(self.set, "set")?,
            add: pairs(self.add, "add")?,
            remove: self
                .remove
                .unwrap_or_default()
                .iter()
                .map(|name| header(name, &format!("{path}.remove")))
                .collect::<Result<_, _>>()?,
        })
    }
}

/// Headers by which requests are framed and routed, which a filter may not touch.
const FRAMING: [&str; 8] = [
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "upgrade",
    "te",
    "keep-alive",
    "proxy-connection",
];

fn header(name: &str, path: &str) -> Result<HeaderName, InvalidField> {
    let parsed = name.parse::<HeaderName>().ok();
    parsed.filter(|name| !FRAMING.contains(&name.as_str())).ok_or_else(|| {
        let problem = format!("{name:?} is no header that a filter may change");
        InvalidField::new(path, problem, "name another header; the host is changed by URLRewrite")
    })
}

/// A host without wildcard, as the API demands here.
fn host(text: Option<String>, path: &str) -> Result<Option<std::sync::Arc<str>>, InvalidField> {
    let Some(text) = text else { return Ok(None) };
    match text.parse() {
        Ok(mesh_route::Hostname::Exact(host)) => Ok(Some(host)),
        Ok(mesh_route::Hostname::Below(_)) | Err(_) => Err(InvalidField::new(
            &format!("{path}.hostname"),
            format!("{text:?} is no hostname"),
            "write example.org",
        )),
    }
}

fn modifier(raw: RawModifier, path: &str) -> Result<PathModifier, InvalidField> {
    let text = match raw.kind.as_str() {
        "ReplaceFullPath" => raw.replace_full_path.map(|text| PathModifier::Full(text.into())),
        "ReplacePrefixMatch" => {
            raw.replace_prefix_match.map(|text| PathModifier::Prefix(text.into()))
        }
        _ => None,
    };
    let usable = text.filter(|modifier| match modifier {
        PathModifier::Full(text) | PathModifier::Prefix(text) => {
            text.len() <= 1024
                && text.bytes().all(|byte| byte.is_ascii_graphic())
                && !text.contains(['?', '#'])
        }
    });
    usable.ok_or_else(|| {
        InvalidField::new(
            &format!("{path}.path"),
            "no path to put in place",
            "use type ReplaceFullPath or ReplacePrefixMatch, with the field of that name",
        )
    })
}

impl RawRedirect {
    fn parse(self, path: &str) -> Result<Redirect, InvalidField> {
        let scheme = match self.scheme.as_deref() {
            None => None,
            Some("http") => Some(RedirectScheme::Http),
            Some("https") => Some(RedirectScheme::Https),
            Some(other) => {
                let problem = format!("{other:?} is not known");
                let field = format!("{path}.scheme");
                return Err(InvalidField::new(&field, problem, "use http or https"));
            }
        };
        let code = self.status_code.unwrap_or(302);
        let status = StatusCode::from_u16(code)
            .ok()
            .filter(|_| matches!(code, 301 | 302 | 303 | 307 | 308))
            .ok_or_else(|| {
                let field = format!("{path}.statusCode");
                let problem = format!("{code} is no redirect");
                InvalidField::new(&field, problem, "use 301, 302, 303, 307 or 308")
            })?;
        Ok(Redirect {
            scheme,
            host: host(self.hostname, path)?,
            port: self.port.map(|number| port(&format!("{path}.port"), number)).transpose()?,
            path: self.path.map(|raw| modifier(raw, path)).transpose()?,
            status,
        })
    }
}

impl RawCors {
    fn parse(self, path: &str) -> Result<Cors, InvalidField> {
        let origins = self.allow_origins.unwrap_or_default();
        let words = |list: Option<Vec<String>>, field: &str| {
            let list = list.unwrap_or_default();
            let named: Vec<_> =
                list.iter().map(String::as_str).filter(|word| *word != "*").collect();
            let words = (!named.is_empty())
                .then(|| HeaderValue::from_str(&named.join(", ")))
                .transpose()
                .map_err(|_source| {
                    let field = format!("{path}.{field}");
                    InvalidField::new(&field, "holds what no header may", "use methods or headers")
                })?;
            Ok::<_, InvalidField>(WordList { any: list.len() != named.len(), words })
        };
        Ok(Cors {
            origins: origins
                .iter()
                .map(|text| match text.parse::<CorsOrigin>() {
                    Ok(origin) => origin,
                    Err(never) => match never {},
                })
                .collect(),
            credentials: self.allow_credentials.unwrap_or(false),
            methods: words(self.allow_methods, "allowMethods")?,
            headers: words(self.allow_headers, "allowHeaders")?,
            expose: words(self.expose_headers, "exposeHeaders")?,
            max_age_s: self.max_age.unwrap_or(5).max(1),
        })
    }
}

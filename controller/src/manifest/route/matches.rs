//! Matches of routes.

use http::Method;
use mesh_route::{GrpcMatch, HeaderMatch, HttpMatch, PathMatch, QueryMatch, RouteMatch, TextMatch};
use serde::Deserialize;

use super::{Matching, indexed};
use crate::manifest::metadata::InvalidField;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawHttpMatch {
    path: Option<RawPath>,
    headers: Option<Vec<RawNamed>>,
    query_params: Option<Vec<RawNamed>>,
    method: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawGrpcMatch {
    method: Option<RawGrpcMethod>,
    headers: Option<Vec<RawNamed>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPath {
    #[serde(rename = "type")]
    kind: Option<String>,
    value: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGrpcMethod {
    #[serde(rename = "type")]
    kind: Option<String>,
    service: Option<String>,
    method: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNamed {
    #[serde(rename = "type")]
    kind: Option<String>,
    name: String,
    value: String,
}

impl Matching for RawHttpMatch {
    fn parse(self, path: &str) -> Result<RouteMatch, InvalidField> {
        let method = self
            .method
            .map(|text| {
                text.parse::<Method>().map_err(|_source| {
                    let field = format!("{path}.method");
                    InvalidField::new(&field, format!("{text:?} is no method"), "use GET, POST, …")
                })
            })
            .transpose()?;
        let query = self.query_params.unwrap_or_default();
        Ok(RouteMatch::Http(HttpMatch {
            path: self.path.map(|raw| path_match(raw, &format!("{path}.path"))).transpose()?,
            method,
            headers: headers(self.headers, path)?,
            query: indexed(&format!("{path}.queryParams"), query, |path, raw| {
                Ok(QueryMatch { name: raw.name.into(), value: text(raw.kind, raw.value, path)? })
            })?,
        }))
    }
}

impl Matching for RawGrpcMatch {
    fn parse(self, path: &str) -> Result<RouteMatch, InvalidField> {
        let mut parsed =
            GrpcMatch { headers: headers(self.headers, path)?, ..GrpcMatch::default() };
        if let Some(raw) = self.method {
            let path = format!("{path}.method");
            let of = |value: Option<String>| {
                value.map(|value| text(raw.kind.clone(), value, &path)).transpose()
            };
            parsed.service = of(raw.service)?;
            parsed.method = of(raw.method)?;
        }
        Ok(RouteMatch::Grpc(parsed))
    }
}

fn path_match(raw: RawPath, path: &str) -> Result<PathMatch, InvalidField> {
    let value = raw.value.unwrap_or_else(|| "/".to_owned());
    Ok(match raw.kind.as_deref() {
        Some("Exact") => PathMatch::Exact(value.into()),
        None | Some("PathPrefix") => PathMatch::Prefix(value.into()),
        Some("RegularExpression") => PathMatch::Regex(value.into()),
        Some(other) => return Err(unknown(path, other, "Exact, PathPrefix or RegularExpression")),
    })
}

fn headers(raw: Option<Vec<RawNamed>>, path: &str) -> Result<Vec<HeaderMatch>, InvalidField> {
    indexed(&format!("{path}.headers"), raw.unwrap_or_default(), |path, raw| {
        let name = raw.name.parse().map_err(|_source| {
            let field = format!("{path}.name");
            InvalidField::new(
                &field,
                format!("{:?} is no header", raw.name),
                "write a header's name",
            )
        })?;
        Ok(HeaderMatch { name, value: text(raw.kind, raw.value, path)? })
    })
}

fn text(kind: Option<String>, value: String, path: &str) -> Result<TextMatch, InvalidField> {
    match kind.as_deref() {
        None | Some("Exact") => Ok(TextMatch::Exact(value.into())),
        Some("RegularExpression") => Ok(TextMatch::Regex(value.into())),
        Some(other) => Err(unknown(path, other, "Exact or RegularExpression")),
    }
}

fn unknown(path: &str, kind: &str, known: &str) -> InvalidField {
    InvalidField::new(
        &format!("{path}.type"),
        format!("{kind:?} is not known"),
        format!("use {known}"),
    )
}

//! Matches in the form in which they are looked for.

use std::cmp::Reverse;

use http::{HeaderName, Method};
use mesh_model::{EncodedSlashes, PathNormalization, PathParameters, RequestPath};

use crate::pattern::{InvalidPattern, Pattern};
use crate::precedence::{PathClass, Precedence};
use crate::request::RequestHead;
use crate::route::{
    GrpcMatch, HeaderMatch, HttpMatch, PathMatch, Route, RouteMatch, Rule, TextMatch,
};
use crate::table::RouteProblem;

/// A route and its compiled matches.
#[derive(Debug)]
pub(crate) struct CompiledRoute {
    pub(crate) source: Route,
    /// The matches of each rule; a rule without any has the one that always holds.
    pub(crate) matches: Box<[Box<[CompiledMatch]>]>,
}

#[derive(Debug)]
pub(crate) struct CompiledMatch {
    pub(crate) path: PathTest,
    method: Option<Method>,
    pub(crate) headers: Box<[(HeaderName, TextTest)]>,
    pub(crate) query: Box<[(Box<str>, TextTest)]>,
    pub(crate) precedence: Precedence,
}

/// Paths in normal form.
#[derive(Debug)]
pub(crate) enum PathTest {
    Exact(Box<str>),
    /// Without a slash at its end; empty for the root.
    Prefix(Box<str>),
    Regex(Pattern),
    Grpc {
        service: Option<TextTest>,
        method: Option<TextTest>,
    },
}

#[derive(Debug)]
pub(crate) enum TextTest {
    Exact(Box<str>),
    Regex(Pattern),
}

impl CompiledRoute {
    pub(crate) fn new(source: Route) -> Result<Self, (usize, RouteProblem)> {
        let matches = source
            .rules
            .iter()
            .enumerate()
            .map(|(index, rule)| compile_rule(rule, &source).map_err(|problem| (index, problem)))
            .collect::<Result<_, _>>()?;
        Ok(Self { source, matches })
    }
}

fn compile_rule(rule: &Rule, route: &Route) -> Result<Box<[CompiledMatch]>, RouteProblem> {
    let filters = &rule.filters;
    if filters.redirect.is_some() && filters.rewrite.is_some() {
        return Err(RouteProblem::RedirectAndRewrite);
    }
    if rule.backends.iter().any(|one| one.filters.redirect.is_some() || one.filters.cors.is_some())
    {
        return Err(RouteProblem::BackendFilter);
    }
    let always = match route.name.kind {
        crate::RouteKind::Http => RouteMatch::Http(HttpMatch::default()),
        crate::RouteKind::Grpc => RouteMatch::Grpc(GrpcMatch::default()),
    };
    let matches =
        if rule.matches.is_empty() { std::slice::from_ref(&always) } else { &rule.matches };
    matches.iter().map(CompiledMatch::new).collect()
}

impl CompiledMatch {
    fn new(of: &RouteMatch) -> Result<Self, RouteProblem> {
        match of {
            RouteMatch::Http(of) => Self::http(of),
            RouteMatch::Grpc(of) => Self::grpc(of),
        }
    }

    fn http(of: &HttpMatch) -> Result<Self, RouteProblem> {
        let path = match &of.path {
            None => PathTest::Prefix("".into()),
            Some(PathMatch::Exact(path)) => PathTest::Exact(normal(path)?.into()),
            Some(PathMatch::Prefix(path)) => {
                PathTest::Prefix(normal(path)?.trim_end_matches('/').into())
            }
            Some(PathMatch::Regex(pattern)) => PathTest::Regex(regex(pattern)?),
        };
        let headers = headers(&of.headers)?;
        let mut query: Vec<(Box<str>, TextTest)> = Vec::new();
        for one in &of.query {
            if query.iter().all(|(name, _)| **name != *one.name) {
                query.push(((*one.name).into(), TextTest::new(&one.value)?));
            }
        }
        let (class, length) = match &path {
            PathTest::Exact(path) => (PathClass::Exact, path.chars().count()),
            PathTest::Prefix(path) => (PathClass::Prefix, path.chars().count()),
            PathTest::Regex(pattern) => (PathClass::Regex, pattern.length()),
            PathTest::Grpc { .. } => (PathClass::Grpc, 0),
        };
        let precedence = Precedence {
            path: class,
            path_length: Reverse(length),
            method_length: Reverse(usize::from(of.method.is_some())),
            headers: Reverse(headers.len()),
            query: Reverse(query.len()),
        };
        Ok(Self { path, method: of.method.clone(), headers, query: query.into(), precedence })
    }

    fn grpc(of: &GrpcMatch) -> Result<Self, RouteProblem> {
        let service = of.service.as_ref().map(TextTest::new).transpose()?;
        let method = of.method.as_ref().map(TextTest::new).transpose()?;
        let headers = headers(&of.headers)?;
        let precedence = Precedence {
            path: PathClass::Grpc,
            path_length: Reverse(service.as_ref().map_or(0, TextTest::length)),
            method_length: Reverse(method.as_ref().map_or(0, TextTest::length)),
            headers: Reverse(headers.len()),
            query: Reverse(0),
        };
        let path = PathTest::Grpc { service, method };
        Ok(Self { path, method: None, headers, query: Box::default(), precedence })
    }

    /// Whether everything holds. Exact paths and prefixes are left to the index, which found this match by them.
    pub(crate) fn holds(&self, request: &RequestHead<'_>) -> bool {
        self.path.holds(request.path.path())
            && self.method.as_ref().is_none_or(|method| method == request.method)
            && self
                .headers
                .iter()
                .all(|(name, test)| request.header(name).is_some_and(|value| test.holds(&value)))
            && self
                .query
                .iter()
                .all(|(name, test)| request.query(name).is_some_and(|value| test.holds(&value)))
    }
}

impl PathTest {
    fn holds(&self, path: &str) -> bool {
        match self {
            Self::Exact(_) | Self::Prefix(_) => true,
            Self::Regex(pattern) => pattern.matches(path.as_bytes()),
            Self::Grpc { service: None, method: None } => true,
            Self::Grpc { service, method } => {
                let Some((one, two)) = path.strip_prefix('/').and_then(|path| path.split_once('/'))
                else {
                    return false;
                };
                let holds = |test: &Option<TextTest>, text: &str| {
                    test.as_ref().is_none_or(|test| test.holds(text.as_bytes()))
                };
                !two.contains('/') && holds(service, one) && holds(method, two)
            }
        }
    }
}

impl TextTest {
    fn new(of: &TextMatch) -> Result<Self, RouteProblem> {
        Ok(match of {
            TextMatch::Exact(text) => Self::Exact((**text).into()),
            TextMatch::Regex(pattern) => Self::Regex(regex(pattern)?),
        })
    }

    fn holds(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(wanted) => wanted.as_bytes() == text,
            Self::Regex(pattern) => pattern.matches(text),
        }
    }

    fn length(&self) -> usize {
        match self {
            Self::Exact(text) => text.chars().count(),
            Self::Regex(pattern) => pattern.length(),
        }
    }

    pub(crate) const fn exact(&self) -> Option<&str> {
        match self {
            Self::Exact(text) => Some(text),
            Self::Regex(_) => None,
        }
    }
}

/// Of two about the same header the first counts.
fn headers(of: &[HeaderMatch]) -> Result<Box<[(HeaderName, TextTest)]>, RouteProblem> {
    let mut headers: Vec<(HeaderName, TextTest)> = Vec::new();
    for one in of {
        if headers.iter().all(|(name, _)| *name != one.name) {
            headers.push((one.name.clone(), TextTest::new(&one.value)?));
        }
    }
    Ok(headers.into())
}

fn regex(pattern: &str) -> Result<Pattern, RouteProblem> {
    Pattern::new(pattern).map_err(|source: InvalidPattern| RouteProblem::Pattern {
        pattern: pattern.chars().take(256).collect(),
        source,
    })
}

/// The path in the form that requests have. Encoded slashes and parameters match if the waypoint lets them through.
fn normal(path: &str) -> Result<String, RouteProblem> {
    let rules = PathNormalization {
        encoded_slashes: EncodedSlashes::Keep,
        parameters: PathParameters::Keep,
        ..PathNormalization::default()
    };
    match RequestPath::parse(path, rules) {
        Ok(normal) if normal.query().is_none() && path.starts_with('/') => {
            Ok(normal.path().to_owned())
        }
        Ok(_) => Err(RouteProblem::Path { path: path.chars().take(256).collect(), source: None }),
        Err(source) => {
            Err(RouteProblem::Path { path: path.chars().take(256).collect(), source: Some(source) })
        }
    }
}

//! Security policies that are refused: what of them can be read all the same, so that they fail closed where they belong.
//!
//! What is readable narrows whom the refusal hits, never what is refused: a selector counts when it is whole, else the
//! namespace does; a namespace that is given and cannot be read stands for the mesh. A policy that was only to be noted
//! (AUDIT, dry run) refuses nobody.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::metadata::{InvalidField, Metadata, NameRule, Selector, check_name};
use super::policy::{PolicyTarget, readable_targets};
use super::{Kind, ObjectKey};

/// Longest reason, in characters: it stands in log lines and metrics.
const MAX_REASON: usize = 160;
/// Stands for a field whose value cannot be read.
const ILLEGIBLE: Value = Value::Bool(false);

/// An AuthorizationPolicy, PeerAuthentication or RequestAuthentication that is refused and has no good version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnreadablePolicy {
    /// What kind of object it is.
    pub kind: Kind,
    /// Namespace and name as far as they can be read; both may be empty.
    pub meta: Metadata,
    /// Whom it may have been about.
    pub reach: Reach,
    /// Why it is refused, for people.
    pub reason: Arc<str>,
}

/// Whom a policy that cannot be read may have been about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Every workload: not even the namespace can be read.
    Mesh,
    /// Every workload of its namespace; of the mesh, if that is the root namespace.
    Namespace,
    /// Workloads with these labels.
    Selected(Selector),
    /// The endpoints of these.
    Attached(Vec<PolicyTarget>),
}

impl UnreadablePolicy {
    /// What can be read of a refused object. `None` when it is no security policy, or one that was to refuse nobody.
    #[must_use]
    pub fn of(value: &Value, reason: &InvalidField) -> Option<Self> {
        let field = reason.field();
        let separator = if field.is_empty() { "" } else { ": " };
        Self::new(value, &format!("{field}{separator}{}", reason.problem))
    }

    /// As [`of`](Self::of), of what is left of a document with broken syntax.
    #[must_use]
    pub fn new(value: &Value, reason: &str) -> Option<Self> {
        let kind = kind(value)?;
        let metadata = value.get("metadata");
        let text = |name| metadata.and_then(|metadata| metadata.get(name)).and_then(Value::as_str);
        let annotation = |name| {
            metadata?.get("annotations")?.get(name)?.as_str().filter(|value| *value == "true")
        };
        let is_dry_run = ["culvert.dev/dry-run", "istio.io/dry-run"].map(annotation);
        let spec = value.get("spec");
        let is_audit = spec.and_then(|spec| spec.get("action")).and_then(Value::as_str);
        if kind == Kind::AuthorizationPolicy
            && (is_audit == Some("AUDIT") || is_dry_run.iter().any(Option::is_some))
        {
            return None;
        }
        let is_name = |rule| move |name: &&str| check_name("", name, rule).is_ok();
        let name = text("name").filter(is_name(NameRule::Subdomain)).unwrap_or_default();
        let namespace = match metadata {
            None | Some(Value::Null) => Some("default"),
            Some(Value::Object(fields)) => match fields.get("namespace") {
                None | Some(Value::Null) => Some("default"),
                Some(Value::String(text)) if text.is_empty() => Some("default"),
                Some(_) => text("namespace").filter(is_name(NameRule::Label)),
            },
            Some(_) => None,
        };
        let meta = Metadata {
            name: name.into(),
            namespace: namespace.unwrap_or_default().into(),
            ..Metadata::default()
        };
        let reach = match namespace {
            None => Reach::Mesh,
            Some(_) => reach(kind, spec, &meta),
        };
        Some(Self { kind, meta, reach, reason: shortened(reason) })
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        ObjectKey {
            kind: self.kind,
            namespace: self.meta.namespace.clone(),
            name: self.meta.name.clone(),
        }
    }

    /// This and another object of the same key: whatever either may have been about.
    #[must_use]
    pub fn joined(self, other: &Self) -> Self {
        let reach = match (self.reach, &other.reach) {
            (own, others) if own == *others => own,
            (Reach::Mesh, _) | (_, Reach::Mesh) => Reach::Mesh,
            (Reach::Namespace | Reach::Selected(_) | Reach::Attached(_), _) => Reach::Namespace,
        };
        Self { reach, ..self }
    }
}

fn kind(value: &Value) -> Option<Kind> {
    let name = value.get("kind")?.as_str()?;
    let api_version = match value.get("apiVersion") {
        Some(Value::String(text)) => text.as_str(),
        Some(_) | None => "security.istio.io/v1",
    };
    Kind::of(api_version, name).filter(|kind| Kind::POLICIES.contains(kind))
}

fn reach(kind: Kind, spec: Option<&Value>, meta: &Metadata) -> Reach {
    let Some(Value::Object(spec)) = spec else { return Reach::Namespace };
    let known: &[&str] = if kind == Kind::PeerAuthentication {
        &["selector", "mtls", "portLevelMtls"]
    } else if kind == Kind::RequestAuthentication {
        &["selector", "targetRef", "targetRefs", "jwtRules"]
    } else {
        &["selector", "targetRef", "targetRefs", "rules", "action", "provider"]
    };
    // A field that is not known may be a misspelt selector.
    if spec.keys().any(|key| !known.contains(&key.as_str())) {
        return Reach::Namespace;
    }
    let attached = ["targetRef", "targetRefs"].iter().any(|key| spec.contains_key(*key));
    match (spec.get("selector"), attached) {
        (Some(selector), false) => labels(selector).map_or(Reach::Namespace, Reach::Selected),
        (None, true) => readable_targets(spec, meta).map_or(Reach::Namespace, Reach::Attached),
        (None, false) | (Some(_), true) => Reach::Namespace,
    }
}

/// The labels of a selector that is whole and says something.
fn labels(selector: &Value) -> Option<Selector> {
    let selector = selector.as_object().filter(|fields| fields.len() == 1)?;
    let labels = selector.get("matchLabels")?.as_object().filter(|labels| !labels.is_empty())?;
    let text = |(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned()));
    labels.iter().map(text).collect::<Option<BTreeMap<_, _>>>().map(Selector)
}

fn shortened(reason: &str) -> Arc<str> {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut text: String = reason.chars().take(MAX_REASON).map(plain).collect();
    if reason.chars().nth(MAX_REASON).is_some() {
        text.push('…');
    }
    text.into()
}

/// The fields of a YAML document with broken syntax that are whole by themselves, two levels deep. A field that is not, or
/// that is given twice, is there and cannot be read. `parse` reads a part of the text.
pub(super) fn whole_fields(text: &str, parse: &dyn Fn(&str) -> Option<Value>) -> Option<Value> {
    let mut fields = fields(text, 0, parse)?;
    for block in ["metadata", "spec"] {
        let found = fields.entry(block).or_insert(ILLEGIBLE);
        if *found == ILLEGIBLE
            && let Some(inner) = block_of(text, block)
            && let Some(inner) = inner_fields(inner, parse)
        {
            *found = Value::Object(inner);
        }
    }
    Some(Value::Object(fields))
}

fn inner_fields(text: &str, parse: &dyn Fn(&str) -> Option<Value>) -> Option<Map<String, Value>> {
    let inner = text.split_once('\n').map(|(_, inner)| inner)?;
    let lines = || inner.lines().filter(|line| !is_filler(line)).map(indent);
    let depth = lines().next().filter(|depth| *depth > 0)?;
    // Lines that stand out to the left belong to nobody knows what.
    if lines().any(|other| other < depth) {
        return None;
    }
    fields(inner, depth, parse)
}

fn fields(
    text: &str,
    depth: usize,
    parse: &dyn Fn(&str) -> Option<Value>,
) -> Option<Map<String, Value>> {
    let mut fields = Map::new();
    for (key, block) in blocks(text, depth) {
        let whole =
            parse(block).filter(|value| value.as_object().is_some_and(|all| all.len() == 1));
        let value = whole.and_then(|mut value| value.get_mut(key).map(Value::take));
        let value = if fields.contains_key(key) { ILLEGIBLE } else { value.unwrap_or(ILLEGIBLE) };
        fields.insert(key.to_owned(), value);
    }
    (!fields.is_empty()).then_some(fields)
}

/// The text of a top-level block that appears once.
fn block_of<'t>(text: &'t str, wanted: &str) -> Option<&'t str> {
    let mut found = blocks(text, 0).into_iter().filter(|(key, _)| *key == wanted);
    found.next().map(|(_, block)| block).filter(|_| found.next().is_none())
}

/// `key:` at `depth`, each with its lines up to the next.
fn blocks(text: &str, depth: usize) -> Vec<(&str, &str)> {
    let mut starts: Vec<(&str, usize)> = Vec::new();
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        if let Some((key, _)) = line.trim_start().split_once(':')
            && indent(line) == depth
            && !is_filler(line)
            && !key.is_empty()
            && key.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            starts.push((key, offset));
        }
        offset += line.len();
    }
    let ends = starts.iter().skip(1).map(|(_, start)| *start).chain([text.len()]);
    starts.iter().zip(ends).map(|((key, start), end)| (*key, &text[*start..end])).collect()
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start_matches(' ').len()
}

/// Blank lines, comments and markers.
fn is_filler(line: &str) -> bool {
    let text = line.trim();
    text.is_empty() || text.starts_with('#') || line.starts_with("---")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Format, documents};

    const HEAD: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n";

    /// What a broken document comes down to: namespace, name and reach.
    fn read(manifest: &str) -> Option<(String, String, Reach)> {
        let documents = documents(manifest, Format::Yaml);
        let error = documents.into_iter().next().unwrap().unwrap_err();
        let policy = UnreadablePolicy::new(&error.whole_fields?, &error.problem)?;
        Some((policy.meta.namespace.to_string(), policy.meta.name.to_string(), policy.reach))
    }

    fn selected(key: &str, value: &str) -> Reach {
        Reach::Selected(Selector([(key.to_owned(), value.to_owned())].into()))
    }

    #[test]
    fn broken_syntax_leaves_what_is_whole() {
        let meta = "metadata:\n  name: p\n  namespace: shop\n";
        let selector = "  selector:\n    matchLabels: {app: web}\n";
        let of = |reach| Some(("shop".to_owned(), "p".to_owned(), reach));
        for (text, expected) in [
            (format!("{HEAD}{meta}spec:\n{selector}  rules: [\n"), of(selected("app", "web"))),
            (format!("{HEAD}{meta}spec:\n  rules: [\n{selector}"), of(selected("app", "web"))),
            (
                format!(
                    "{HEAD}{meta}spec:\n  selector:\n    matchLabels: {{app: web\n  rules: []\n"
                ),
                of(Reach::Namespace),
            ),
            (format!("{HEAD}{meta}spec:\n{selector}{selector}"), of(Reach::Namespace)),
            (format!("{HEAD}{meta}spec:\n{selector} rules: [\n"), of(Reach::Namespace)),
            (format!("{HEAD}{meta}spec: {{\n"), of(Reach::Namespace)),
            (
                format!(
                    "{HEAD}metadata:\n  namespace: shop\n  name: p\n  labels: [\n  annotations: {{}}\nspec:\n{selector}"
                ),
                of(selected("app", "web")),
            ),
            (
                format!("{HEAD}metadata: {{name: p\nspec:\n{selector}"),
                Some((String::new(), String::new(), Reach::Mesh)),
            ),
            (format!("{HEAD}{meta}spec:\n  action: AUDIT\n  rules: [\n"), None),
            (format!("kind: [\n{meta}spec:\n{selector}"), None),
            (format!("apiVersion: v1\nkind: Pod\n{meta}spec: [\n"), None),
            ("{{- if .Values.policies }}\n".to_owned(), None),
        ] {
            assert_eq!(read(&text), expected, "{text}");
        }
    }

    #[test]
    fn the_reason_is_one_short_line() {
        let value = serde_json::json!({"kind": "PeerAuthentication"});
        let policy = UnreadablePolicy::new(&value, &format!("a\nb{}", "x".repeat(500))).unwrap();
        assert!(
            policy.reason.starts_with("a b") && policy.reason.chars().count() == MAX_REASON + 1
        );
        assert_eq!((&*policy.meta.namespace, policy.reach), ("default", Reach::Namespace));
    }
}

//! AuthorizationPolicy and PeerAuthentication. Fields that are not known are refused here, not ignored: a restriction
//! that is overlooked would widen the policy.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_authorize::PathTemplate;
use mesh_model::IpPrefix;
use serde::Deserialize;

use super::metadata::{InvalidField, Metadata, Selector, port};

/// What a policy does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    /// Allow it, and refuse what no ALLOW policy matches.
    Allow,
    /// Refuse it.
    Deny,
    /// Only note it.
    Audit,
    /// Ask an external authorizer, which only a waypoint can.
    Custom,
}

/// An object that a policy is attached to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PolicyTarget {
    /// A Service of the policy's namespace.
    Service(Arc<str>),
    /// A ServiceEntry of the policy's namespace.
    ServiceEntry(Arc<str>),
    /// A Gateway or GatewayClass, by kind and name.
    Gateway(Arc<str>, Arc<str>),
}

/// An AuthorizationPolicy, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Metadata.
    pub meta: Metadata,
    /// Workloads it selects; `None` for all of its scope.
    pub selector: Option<Selector>,
    /// Objects it is attached to instead of workloads.
    pub targets: Vec<PolicyTarget>,
    /// What it does.
    pub action: PolicyAction,
    /// Annotation `istio.io/dry-run` or `culvert.dev/dry-run`.
    pub dry_run: bool,
    /// Its rules.
    pub rules: Vec<PolicyRule>,
}

/// One rule; its three parts are AND-ed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyRule {
    /// Sources, OR-ed; empty means any.
    pub from: Vec<Source>,
    /// Operations, OR-ed; empty means any.
    pub to: Vec<Operation>,
    /// Conditions, AND-ed.
    pub when: Vec<Condition>,
}

/// A list and its `not` twin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Twin<T> {
    /// One of these; empty means any.
    pub any_of: Vec<T>,
    /// None of these.
    pub none_of: Vec<T>,
}

impl<T> Default for Twin<T> {
    fn default() -> Self {
        Self { any_of: Vec::new(), none_of: Vec::new() }
    }
}

impl<T> Twin<T> {
    /// True when neither list says anything.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }
}

/// Attributes of the client; AND-ed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Principals, without `spiffe://`.
    pub principals: Twin<String>,
    /// Namespaces.
    pub namespaces: Twin<String>,
    /// Service accounts as (namespace, name).
    pub service_accounts: Twin<(String, String)>,
    /// Trust domains.
    pub trust_domains: Twin<String>,
    /// Addresses.
    pub ip_blocks: Twin<IpPrefix>,
    /// `issuer/subject` of the request's token.
    pub request_principals: Twin<String>,
    /// Fields that only a waypoint can judge.
    pub l7_fields: Vec<&'static str>,
    /// Fields that nobody judges yet.
    pub unjudged: Vec<&'static str>,
}

/// Attributes of the request; AND-ed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operation {
    /// Destination ports.
    pub ports: Twin<u16>,
    /// Hosts.
    pub hosts: Twin<String>,
    /// Methods.
    pub methods: Twin<String>,
    /// Paths; those with braces are templates of segments.
    pub paths: Twin<String>,
    /// Which fields there are that only a waypoint can judge.
    pub l7_fields: Vec<&'static str>,
}

/// A condition of `when`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `source.ip`.
    SourceIp(Twin<IpPrefix>),
    /// `destination.ip`.
    DestinationIp(Twin<IpPrefix>),
    /// `destination.port`.
    DestinationPort(Twin<u16>),
    /// `source.namespace`.
    Namespace(Twin<String>),
    /// `source.principal`.
    Principal(Twin<String>),
    /// `source.serviceAccount` as (namespace, name).
    ServiceAccount(Twin<(String, String)>),
    /// `source.trustDomain`.
    TrustDomain(Twin<String>),
    /// `request.headers[NAME]`, which only a waypoint can judge.
    Header {
        /// The key as written.
        key: String,
        /// The header, in lower case.
        name: Arc<str>,
        /// Its values.
        values: Twin<String>,
    },
    /// `request.auth.principal`, which only a waypoint can judge.
    RequestPrincipal(Twin<String>),
    /// `request.auth.audiences`, `.presenter` or `.claims[A][B]`, which only a waypoint can judge.
    Claim {
        /// The key as written.
        key: String,
        /// The claim's name, and the names inside it.
        path: Arc<[Arc<str>]>,
        /// Its values.
        values: Twin<String>,
    },
    /// A key that nobody judges yet.
    L7(String),
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct RawAuthorizationPolicy {
    #[serde(default)]
    spec: RawSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSpec {
    selector: Option<RawSelector>,
    target_ref: Option<RawTargetRef>,
    target_refs: Option<Vec<RawTargetRef>>,
    rules: Option<Vec<Option<RawRule>>>,
    action: Option<String>,
    provider: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawSelector {
    pub(super) match_labels: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawTargetRef {
    group: Option<String>,
    kind: String,
    name: String,
    namespace: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRule {
    from: Option<Vec<RawFrom>>,
    to: Option<Vec<RawTo>>,
    when: Option<Vec<RawCondition>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFrom {
    source: Option<RawSource>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTo {
    operation: Option<RawOperation>,
}

type Strings = Option<Vec<String>>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawSource {
    principals: Strings,
    not_principals: Strings,
    request_principals: Strings,
    not_request_principals: Strings,
    namespaces: Strings,
    not_namespaces: Strings,
    ip_blocks: Strings,
    not_ip_blocks: Strings,
    remote_ip_blocks: Strings,
    not_remote_ip_blocks: Strings,
    service_accounts: Strings,
    not_service_accounts: Strings,
    trust_domains: Strings,
    not_trust_domains: Strings,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawOperation {
    hosts: Strings,
    not_hosts: Strings,
    ports: Option<Vec<Text>>,
    not_ports: Option<Vec<Text>>,
    methods: Strings,
    not_methods: Strings,
    paths: Strings,
    not_paths: Strings,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawCondition {
    key: String,
    values: Option<Vec<Text>>,
    not_values: Option<Vec<Text>>,
}

/// Text; a number is read as its digits, since ports are often written so.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Text {
    Number(u64),
    Text(String),
}

impl From<Text> for String {
    fn from(text: Text) -> Self {
        match text {
            Text::Number(number) => number.to_string(),
            Text::Text(text) => text,
        }
    }
}

fn texts(list: Option<Vec<Text>>) -> Strings {
    list.map(|list| list.into_iter().map(Into::into).collect())
}

impl RawAuthorizationPolicy {
    pub(super) fn parse(self, meta: Metadata) -> Result<AuthorizationPolicy, InvalidField> {
        let spec = self.spec;
        let action = match spec.action.as_deref() {
            None | Some("ALLOW") => PolicyAction::Allow,
            Some("DENY") => PolicyAction::Deny,
            Some("AUDIT") => PolicyAction::Audit,
            Some("CUSTOM") => PolicyAction::Custom,
            Some(other) => {
                return Err(InvalidField::new(
                    "spec.action",
                    format!("{other:?} is not known"),
                    "use ALLOW, DENY, AUDIT or CUSTOM",
                ));
            }
        };
        if spec.provider.is_some() != (action == PolicyAction::Custom) {
            return Err(InvalidField::new(
                "spec.provider",
                "provider and action CUSTOM need each other",
                "give both or neither",
            ));
        }
        let targets = targets(spec.target_ref, spec.target_refs, &meta)?;
        if spec.selector.is_some() && !targets.is_empty() {
            return Err(InvalidField::new(
                "spec.selector",
                "given together with targetRefs",
                "use one of the two",
            ));
        }
        let mut rules = Vec::new();
        for (index, rule) in spec.rules.unwrap_or_default().into_iter().enumerate() {
            rules.push(parse_rule(
                rule.unwrap_or_default(),
                &format!("spec.rules[{index}]"),
                &meta,
            )?);
        }
        if rules.is_empty() && matches!(action, PolicyAction::Deny | PolicyAction::Custom) {
            return Err(InvalidField::new(
                "spec.rules",
                "a DENY or CUSTOM policy without rules matches nothing",
                "add a rule; `- {}` matches everything",
            ));
        }
        let dry_run = match meta
            .annotation("culvert.dev/dry-run")
            .or_else(|| meta.annotation("istio.io/dry-run"))
        {
            None | Some("false") => false,
            Some("true") => true,
            Some(other) => {
                return Err(InvalidField::new(
                    "metadata.annotations",
                    format!("dry-run is {other:?}"),
                    "use \"true\" or \"false\"",
                ));
            }
        };
        let selector =
            spec.selector.map(|selector| Selector(selector.match_labels.unwrap_or_default()));
        Ok(AuthorizationPolicy { selector, targets, action, dry_run, rules, meta })
    }
}

/// The targets of a spec that may be refused otherwise; `None` when they cannot be read, or there are none.
pub(super) fn readable_targets(
    spec: &serde_json::Map<String, serde_json::Value>,
    meta: &Metadata,
) -> Option<Vec<PolicyTarget>> {
    let one = spec.get("targetRef").map(RawTargetRef::deserialize).transpose().ok()?;
    let many = spec.get("targetRefs").map(Vec::<RawTargetRef>::deserialize).transpose().ok()?;
    targets(one, many, meta).ok().filter(|targets| !targets.is_empty())
}

pub(super) fn targets(
    one: Option<RawTargetRef>,
    many: Option<Vec<RawTargetRef>>,
    meta: &Metadata,
) -> Result<Vec<PolicyTarget>, InvalidField> {
    let mut targets = Vec::new();
    let single = one.into_iter().map(|target| ("spec.targetRef".to_owned(), target));
    let listed = many.into_iter().flatten().enumerate();
    for (path, target) in
        single.chain(listed.map(|(index, target)| (format!("spec.targetRefs[{index}]"), target)))
    {
        if target.namespace.as_deref().is_some_and(|namespace| namespace != &*meta.namespace) {
            return Err(InvalidField::new(
                &format!("{path}.namespace"),
                "a policy can be attached to objects of its own namespace only",
                "move the policy to that namespace",
            ));
        }
        let group = target.group.unwrap_or_default();
        targets.push(match (group.as_str(), target.kind.as_str()) {
            ("" | "core", "Service") => PolicyTarget::Service(target.name.into()),
            ("networking.istio.io", "ServiceEntry") => PolicyTarget::ServiceEntry(target.name.into()),
            ("gateway.networking.k8s.io", "Gateway" | "GatewayClass") => {
                PolicyTarget::Gateway(target.kind.into(), target.name.into())
            }
            (group, kind) => {
                return Err(InvalidField::new(
                    &format!("{path}.kind"),
                    format!("a policy cannot be attached to {kind} of group {group:?}"),
                    "use Service, ServiceEntry (networking.istio.io), Gateway or GatewayClass (gateway.networking.k8s.io)",
                ));
            }
        });
    }
    if targets.len() > 16 {
        return Err(InvalidField::new(
            "spec.targetRefs",
            "more than 16 targets",
            "split the policy",
        ));
    }
    targets.sort();
    targets.dedup();
    Ok(targets)
}

fn parse_rule(raw: RawRule, path: &str, meta: &Metadata) -> Result<PolicyRule, InvalidField> {
    let mut rule = PolicyRule::default();
    for (index, from) in raw.from.unwrap_or_default().into_iter().enumerate() {
        let path = format!("{path}.from[{index}].source");
        rule.from.push(source(from.source.unwrap_or_default(), &path, meta)?);
    }
    for (index, to) in raw.to.unwrap_or_default().into_iter().enumerate() {
        let path = format!("{path}.to[{index}].operation");
        rule.to.push(operation(to.operation.unwrap_or_default(), &path)?);
    }
    for (index, when) in raw.when.unwrap_or_default().into_iter().enumerate() {
        rule.when.push(condition(when, &format!("{path}.when[{index}]"), meta)?);
    }
    Ok(rule)
}

fn source(raw: RawSource, path: &str, meta: &Metadata) -> Result<Source, InvalidField> {
    let l7_fields = [
        ("requestPrincipals", &raw.request_principals),
        ("notRequestPrincipals", &raw.not_request_principals),
    ];
    let unjudged = [
        ("remoteIpBlocks", &raw.remote_ip_blocks),
        ("notRemoteIpBlocks", &raw.not_remote_ip_blocks),
    ];
    let (l7_fields, unjudged) = (given(l7_fields), given(unjudged));
    let source = Source {
        principals: strings(raw.principals, raw.not_principals, path, "rincipals")?,
        namespaces: strings(raw.namespaces, raw.not_namespaces, path, "amespaces")?,
        service_accounts: accounts(raw.service_accounts, raw.not_service_accounts, path, meta)?,
        trust_domains: strings(raw.trust_domains, raw.not_trust_domains, path, "rustDomains")?,
        ip_blocks: blocks(raw.ip_blocks, raw.not_ip_blocks, path)?,
        request_principals: strings(
            raw.request_principals,
            raw.not_request_principals,
            path,
            "equestPrincipals",
        )?,
        l7_fields,
        unjudged,
    };
    if !source.service_accounts.is_empty()
        && (!source.principals.is_empty() || !source.namespaces.is_empty())
    {
        return Err(InvalidField::new(
            &format!("{path}.serviceAccounts"),
            "given together with principals or namespaces",
            "use serviceAccounts alone, or principals and namespaces",
        ));
    }
    if source == Source::default() {
        return Err(InvalidField::new(
            path,
            "a source without any field",
            "give it a field, or leave `from` out to mean any source",
        ));
    }
    Ok(source)
}

/// The fields that say something.
fn given<const N: usize>(fields: [(&'static str, &Strings); N]) -> Vec<&'static str> {
    let said = |list: &Strings| list.as_ref().is_some_and(|list| !list.is_empty());
    fields.into_iter().filter(|(_, list)| said(list)).map(|(name, _)| name).collect()
}

fn operation(raw: RawOperation, path: &str) -> Result<Operation, InvalidField> {
    let l7_fields = [
        ("hosts", &raw.hosts),
        ("notHosts", &raw.not_hosts),
        ("methods", &raw.methods),
        ("notMethods", &raw.not_methods),
        ("paths", &raw.paths),
        ("notPaths", &raw.not_paths),
    ];
    let l7_fields = given(l7_fields);
    let operation = Operation {
        ports: ports(texts(raw.ports), texts(raw.not_ports), path)?,
        hosts: strings(raw.hosts, raw.not_hosts, path, "osts")?,
        methods: strings(raw.methods, raw.not_methods, path, "ethods")?,
        paths: paths(raw.paths, raw.not_paths, path)?,
        l7_fields,
    };
    if operation == Operation::default() {
        return Err(InvalidField::new(
            path,
            "an operation without any field",
            "give it a field, or leave `to` out to mean any operation",
        ));
    }
    Ok(operation)
}

fn condition(raw: RawCondition, path: &str, meta: &Metadata) -> Result<Condition, InvalidField> {
    let (values, not_values) = (texts(raw.values), texts(raw.not_values));
    if values.iter().chain(&not_values).all(Vec::is_empty) {
        return Err(InvalidField::new(
            path,
            "neither values nor notValues",
            "give at least one value",
        ));
    }
    Ok(match raw.key.as_str() {
        "source.ip" => Condition::SourceIp(blocks(values, not_values, path)?),
        "destination.ip" => Condition::DestinationIp(blocks(values, not_values, path)?),
        "destination.port" => Condition::DestinationPort(ports(values, not_values, path)?),
        "source.namespace" => Condition::Namespace(strings(values, not_values, path, "alues")?),
        "source.principal" => Condition::Principal(strings(values, not_values, path, "alues")?),
        "source.serviceAccount" => {
            Condition::ServiceAccount(accounts(values, not_values, path, meta)?)
        }
        "source.trustDomain" => Condition::TrustDomain(strings(values, not_values, path, "alues")?),
        key if key.starts_with("request.headers[") => {
            let name = key.strip_prefix("request.headers[").and_then(|key| key.strip_suffix(']'));
            let name = name.and_then(|name| name.parse::<http::HeaderName>().ok());
            let name = name.ok_or_else(|| {
                let path = format!("{path}.key");
                InvalidField::new(
                    &path,
                    format!("{key:?} names no header"),
                    "write request.headers[NAME]",
                )
            })?;
            let name = name.as_str().into();
            let values = strings(values, not_values, path, "alues")?;
            Condition::Header { key: raw.key, name, values }
        }
        "request.auth.principal" => {
            Condition::RequestPrincipal(strings(values, not_values, path, "alues")?)
        }
        "request.auth.audiences" | "request.auth.presenter" => {
            let name = if raw.key.ends_with("audiences") { "aud" } else { "azp" };
            let values = strings(values, not_values, path, "alues")?;
            Condition::Claim { path: [Arc::from(name)].into(), key: raw.key, values }
        }
        key if key.starts_with("request.auth.claims[") => {
            let claim = claim_path(key).ok_or_else(|| {
                InvalidField::new(
                    &format!("{path}.key"),
                    format!("{key:?} names no claim"),
                    "write request.auth.claims[NAME], or request.auth.claims[NAME][NAME]",
                )
            })?;
            let values = strings(values, not_values, path, "alues")?;
            Condition::Claim { path: claim, key: raw.key, values }
        }
        key if ["remote.ip", "connection.sni"].contains(&key)
            || key.starts_with("experimental.envoy.filters.") =>
        {
            Condition::L7(raw.key)
        }
        key => {
            return Err(InvalidField::new(
                &format!("{path}.key"),
                format!("{key:?} is not known"),
                "use one of the keys of AuthorizationPolicy conditions, such as source.principal or destination.port",
            ));
        }
    })
}

/// The names in `request.auth.claims[A][B]`.
fn claim_path(key: &str) -> Option<Arc<[Arc<str>]>> {
    let inside = key.strip_prefix("request.auth.claims[")?.strip_suffix(']')?;
    let names: Vec<Arc<str>> = inside.split("][").map(Arc::from).collect();
    let is_name = |name: &Arc<str>| !name.is_empty() && !name.contains(['[', ']']);
    (names.len() <= 16 && names.iter().all(is_name)).then(|| names.into())
}

/// `tail` names the field after its first letter, so that the path is right for the plain and for the `not` form.
fn strings(
    any_of: Strings,
    none_of: Strings,
    path: &str,
    tail: &str,
) -> Result<Twin<String>, InvalidField> {
    let twin = Twin { any_of: any_of.unwrap_or_default(), none_of: none_of.unwrap_or_default() };
    if twin.any_of.iter().chain(&twin.none_of).any(|text| text.is_empty()) {
        return Err(InvalidField::new(
            path,
            format!("an empty value in …{tail}"),
            "remove it; \"*\" means any",
        ));
    }
    let stars = |text: &str| text.matches('*').count();
    if let Some(text) = twin.any_of.iter().chain(&twin.none_of).find(|text| {
        stars(text) > 1 || (stars(text) == 1 && !text.starts_with('*') && !text.ends_with('*'))
    }) {
        return Err(InvalidField::new(
            path,
            format!("{text:?} is no pattern"),
            "use one * at one end, or \"*\" alone",
        ));
    }
    Ok(twin)
}

/// Texts, or templates of segments, which have braces.
fn paths(any_of: Strings, none_of: Strings, path: &str) -> Result<Twin<String>, InvalidField> {
    let is_template = |text: &String| text.contains('{') || text.contains('}');
    let (templates, any_of): (Vec<_>, Vec<_>) =
        any_of.unwrap_or_default().into_iter().partition(is_template);
    let (not_templates, none_of): (Vec<_>, Vec<_>) =
        none_of.unwrap_or_default().into_iter().partition(is_template);
    for text in templates.iter().chain(&not_templates) {
        text.parse::<PathTemplate>().map_err(|error| {
            InvalidField::new(path, error.to_string(), "use {*} for a segment and {**} for many")
        })?;
    }
    let mut twin = strings(Some(any_of), Some(none_of), path, "aths")?;
    twin.any_of.extend(templates);
    twin.none_of.extend(not_templates);
    Ok(twin)
}

fn accounts(
    any_of: Strings,
    none_of: Strings,
    path: &str,
    meta: &Metadata,
) -> Result<Twin<(String, String)>, InvalidField> {
    let parse = |list: Strings| -> Result<Vec<_>, InvalidField> {
        list.unwrap_or_default()
            .into_iter()
            .map(|text| {
                let (namespace, name) = text.split_once('/').unwrap_or((&meta.namespace, &text));
                if namespace.is_empty()
                    || name.is_empty()
                    || text.contains('*')
                    || name.contains('/')
                {
                    return Err(InvalidField::new(
                        path,
                        format!("{text:?} is no service account"),
                        "write namespace/name or name, without wildcards",
                    ));
                }
                Ok((namespace.to_owned(), name.to_owned()))
            })
            .collect()
    };
    Ok(Twin { any_of: parse(any_of)?, none_of: parse(none_of)? })
}

fn blocks(any_of: Strings, none_of: Strings, path: &str) -> Result<Twin<IpPrefix>, InvalidField> {
    let parse = |list: Strings| -> Result<Vec<_>, InvalidField> {
        list.unwrap_or_default()
            .into_iter()
            .map(|text| {
                text.parse().map_err(|_source| {
                    InvalidField::new(
                        path,
                        format!("{text:?} is neither an IP address nor a CIDR"),
                        "write 10.0.0.1 or 10.0.0.0/8",
                    )
                })
            })
            .collect()
    };
    Ok(Twin { any_of: parse(any_of)?, none_of: parse(none_of)? })
}

fn ports(any_of: Strings, none_of: Strings, path: &str) -> Result<Twin<u16>, InvalidField> {
    let parse = |list: Strings| -> Result<Vec<_>, InvalidField> {
        list.unwrap_or_default()
            .into_iter()
            .map(|text| {
                text.parse().ok().filter(|port| *port != 0).ok_or_else(|| {
                    InvalidField::new(
                        path,
                        format!("{text:?} is no port"),
                        "use numbers from 1 to 65535",
                    )
                })
            })
            .collect()
    };
    Ok(Twin { any_of: parse(any_of)?, none_of: parse(none_of)? })
}

/// A PeerAuthentication mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MtlsMode {
    /// As the next level says.
    #[default]
    Unset,
    /// Plaintext is accepted (also `DISABLE`: an agent always accepts the tunnel).
    Permissive,
    /// Plaintext is refused.
    Strict,
}

/// A PeerAuthentication, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Metadata.
    pub meta: Metadata,
    /// Workloads it selects; `None` for its whole namespace, or mesh.
    pub selector: Option<Selector>,
    /// Its mode.
    pub mode: MtlsMode,
    /// Modes of single workload ports.
    pub ports: BTreeMap<u16, MtlsMode>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct RawPeerAuthentication {
    #[serde(default)]
    spec: RawPeerSpec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPeerSpec {
    selector: Option<RawSelector>,
    mtls: Option<RawMtls>,
    port_level_mtls: Option<BTreeMap<String, Option<RawMtls>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMtls {
    mode: Option<String>,
}

impl RawPeerAuthentication {
    pub(super) fn parse(self, meta: Metadata) -> Result<PeerAuthentication, InvalidField> {
        let spec = self.spec;
        let selector = spec
            .selector
            .and_then(|selector| selector.match_labels)
            .filter(|labels| !labels.is_empty())
            .map(Selector);
        let mut ports = BTreeMap::new();
        for (key, mtls) in spec.port_level_mtls.unwrap_or_default() {
            let path = format!("spec.portLevelMtls.{key}");
            let number = key.parse().map_err(|_source| {
                InvalidField::new(
                    &path,
                    format!("{key:?} is no port"),
                    "use the workload's port number as key",
                )
            })?;
            ports.insert(port(&path, number)?, mode(mtls, &path)?);
        }
        if selector.is_none() && !ports.is_empty() {
            return Err(InvalidField::new(
                "spec.portLevelMtls",
                "needs a selector",
                "add selector.matchLabels",
            ));
        }
        Ok(PeerAuthentication { selector, mode: mode(spec.mtls, "spec.mtls")?, ports, meta })
    }
}

fn mode(raw: Option<RawMtls>, path: &str) -> Result<MtlsMode, InvalidField> {
    match raw.unwrap_or_default().mode.as_deref() {
        None | Some("UNSET") => Ok(MtlsMode::Unset),
        Some("DISABLE" | "PERMISSIVE") => Ok(MtlsMode::Permissive),
        Some("STRICT") => Ok(MtlsMode::Strict),
        Some(other) => Err(InvalidField::new(
            &format!("{path}.mode"),
            format!("{other:?} is not known"),
            "use UNSET, DISABLE, PERMISSIVE or STRICT",
        )),
    }
}

//! Policies in their wire form.
//!
//! Two things travel as extensions, each so that a peer that ignores extensions errs on the strict side:
//! AUDIT policies go as dry-run ALLOW (never enforced), and a match on trust domains as a match that is never true in
//! an ALLOW policy and one without that condition in a DENY policy.
//!
//! A policy that does not convert is not simply left out, which would open what it closes: [`unreadable`] says whom it
//! may have been about.

use mesh_authorize::{
    Action, ClaimMatch, Clause, HeaderMatch, Match, PathMatch, Policy, PolicyKind, PolicyName,
    PolicyOrigin, PolicyScope, RequestMatch, Rule, ServiceAccountMatch, StringMatch,
    UnreadablePolicy,
};
use mesh_model::IpPrefix;
use prost::Message as _;
use prost_types::Any;

use crate::address::{ip_bytes, port, prefix, two_parts};
use crate::error::{InvalidResource, Problem, each, known, required};
use crate::kind::ResourceKind;
use crate::pb::workload::Extension;
use crate::pb::{discovery, mesh, security as pb};
use crate::workload::text;

/// Name of the extension that says where a policy comes from.
const POLICY_EXTENSION: &str = "culvert.dev/policy";
/// Name of the extension that holds a match's exact meaning.
const MATCH_EXTENSION: &str = "culvert.dev/match";
const POLICY_EXTENSION_URL: &str = "type.googleapis.com/culvert.mesh.v1.PolicyExtension";
const MATCH_EXTENSION_URL: &str = "type.googleapis.com/culvert.mesh.v1.MatchExtension";
/// No connection has it: a match on it is never true, one on its absence always.
const NO_PORT: u32 = 0;

impl TryFrom<&pb::Authorization> for Policy {
    type Error = InvalidResource;

    fn try_from(wire: &pb::Authorization) -> Result<Self, InvalidResource> {
        let (namespace, name) =
            (required("namespace", &wire.namespace)?, required("name", &wire.name)?);
        let joined = format!("{namespace}/{name}");
        if two_parts(&joined).is_none() {
            return Err(InvalidResource::new("name", Problem::Name { text: joined }));
        }
        let name = PolicyName::new(namespace, name);
        let extension = policy_extension(&wire.extensions)?;
        let mut action = match known("action", wire.action)? {
            pb::Action::Allow => Action::Allow,
            pb::Action::Deny => Action::Deny,
        };
        let mut dry_run = wire.dry_run;
        if let Some(extension) = extension.as_ref().filter(|extension| extension.audit) {
            action = Action::Audit;
            dry_run = extension.audit_dry_run;
        }
        Ok(Self {
            origin: origin(&name, extension.as_ref())?,
            name,
            scope: match known("scope", wire.scope)? {
                pb::Scope::Global => PolicyScope::Global,
                pb::Scope::Namespace => PolicyScope::Namespace,
                pb::Scope::WorkloadSelector => PolicyScope::Workload,
            },
            action,
            dry_run,
            rules: each("rules", &wire.rules, |rule| {
                Ok(Rule { clauses: each("clauses", &rule.clauses, clause)? })
            })?,
        })
    }
}

/// What is known of a policy that does not convert. None when it was to be noted only, not enforced.
pub(crate) fn unreadable(
    resource: &discovery::Resource,
    error: &InvalidResource,
) -> Option<UnreadablePolicy> {
    let content = resource
        .resource
        .as_ref()
        .filter(|any| any.type_url == ResourceKind::Authorization.type_url())
        .and_then(|any| pb::Authorization::decode(any.value.as_slice()).ok());
    if content.as_ref().is_some_and(|content| content.dry_run) {
        return None;
    }
    // Its scope counts only if it is what its name says: otherwise the namespace is anybody's guess.
    let named = content.filter(|content| {
        two_parts(&resource.name) == Some((content.namespace.as_str(), content.name.as_str()))
    });
    let scope = match named.map(|content| pb::Scope::try_from(content.scope)) {
        Some(Ok(pb::Scope::Namespace)) => PolicyScope::Namespace,
        Some(Ok(pb::Scope::WorkloadSelector)) => PolicyScope::Workload,
        Some(Ok(pb::Scope::Global) | Err(_)) | None => PolicyScope::Global,
    };
    let name = policy_name(&resource.name);
    Some(UnreadablePolicy { name, scope, reason: error.to_string().into() })
}

/// The key behind a resource's name, whatever its shape; different names have different keys.
pub(crate) fn policy_name(name: &str) -> PolicyName {
    match name.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() => PolicyName::new(namespace, name),
        Some(_) | None => PolicyName::new("", name),
    }
}

fn extension<M: prost::Message + Default>(
    field: &str,
    extension: &Extension,
    type_url: &str,
) -> Result<M, InvalidResource> {
    let Some(config) = &extension.config else {
        return Err(InvalidResource::new(field, Problem::Missing));
    };
    if config.type_url != type_url {
        let type_url = config.type_url.clone();
        return Err(InvalidResource::new(field, Problem::OtherType { type_url }));
    }
    M::decode(config.value.as_slice())
        .map_err(|_malformed| InvalidResource::new(field, Problem::Undecodable))
}

/// Our extension of a policy. Others say nothing about whom it allows and are passed over.
fn policy_extension(
    extensions: &[Extension],
) -> Result<Option<mesh::PolicyExtension>, InvalidResource> {
    extensions
        .iter()
        .find(|extension| extension.name == POLICY_EXTENSION)
        .map(|found| extension("extensions", found, POLICY_EXTENSION_URL))
        .transpose()
}

fn origin(
    name: &PolicyName,
    extension: Option<&mesh::PolicyExtension>,
) -> Result<PolicyOrigin, InvalidResource> {
    use mesh::policy_extension::Kind;
    let Some(extension) = extension else {
        return Ok(PolicyOrigin {
            kind: PolicyKind::AuthorizationPolicy,
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            unreadable: None,
        });
    };
    let unreadable = extension.unreadable.as_str();
    Ok(PolicyOrigin {
        kind: match known("extensions.kind", extension.kind)? {
            Kind::Unspecified => {
                return Err(InvalidResource::new("extensions.kind", Problem::Missing));
            }
            Kind::AuthorizationPolicy => PolicyKind::AuthorizationPolicy,
            Kind::PeerAuthentication => PolicyKind::PeerAuthentication,
            Kind::Synthetic => PolicyKind::Synthetic,
        },
        namespace: extension.namespace.as_str().into(),
        name: extension.name.as_str().into(),
        unreadable: (!unreadable.is_empty()).then(|| unreadable.into()),
    })
}

fn clause(wire: &pb::Clause) -> Result<Clause, InvalidResource> {
    Ok(Clause { matches: each("matches", &wire.matches, attributes)? })
}

fn attributes(wire: &pb::Match) -> Result<Match, InvalidResource> {
    let mut exact = None;
    for found in &wire.extensions {
        // An unknown extension may narrow whom the match is about; guessing would open what was closed.
        if found.name != MATCH_EXTENSION {
            let name = found.name.clone();
            return Err(InvalidResource::new("extensions", Problem::UnknownExtension { name }));
        }
        exact = Some(extension::<mesh::MatchExtension>("extensions", found, MATCH_EXTENSION_URL)?);
    }
    let Some(exact) = exact else { return plain_attributes(wire) };
    let plain = exact.r#match.unwrap_or_default();
    if !plain.extensions.is_empty() {
        let name = plain.extensions[0].name.clone();
        return Err(InvalidResource::new("extensions", Problem::UnknownExtension { name }));
    }
    Ok(Match {
        trust_domains: each("trust_domains", &exact.trust_domains, string_match)?,
        not_trust_domains: each("not_trust_domains", &exact.not_trust_domains, string_match)?,
        request: exact.request.as_ref().map(request).transpose()?.unwrap_or_default(),
        ..plain_attributes(&plain)?
    })
}

fn request(wire: &mesh::RequestMatch) -> Result<RequestMatch, InvalidResource> {
    let strings = |field, list: &[pb::StringMatch]| each(field, list, string_match);
    Ok(RequestMatch {
        hosts: strings("request.hosts", &wire.hosts)?,
        not_hosts: strings("request.not_hosts", &wire.not_hosts)?,
        methods: strings("request.methods", &wire.methods)?,
        not_methods: strings("request.not_methods", &wire.not_methods)?,
        paths: each("request.paths", &wire.paths, path_match)?,
        not_paths: each("request.not_paths", &wire.not_paths, path_match)?,
        headers: each("request.headers", &wire.headers, |wire| {
            let header = HeaderMatch {
                name: required("name", &wire.name)?.into(),
                values: strings("values", &wire.values)?,
                not_values: strings("not_values", &wire.not_values)?,
            };
            // One that asks nothing would be no condition where one was meant.
            if header.values.is_empty() && header.not_values.is_empty() {
                return Err(InvalidResource::new("values", Problem::Missing));
            }
            Ok(header)
        })?,
        principals: strings("request.principals", &wire.principals)?,
        not_principals: strings("request.not_principals", &wire.not_principals)?,
        claims: each("request.claims", &wire.claims, |wire| {
            let claim = ClaimMatch {
                path: each("path", &wire.path, |name| Ok(required("", name)?.into()))?.into(),
                values: strings("values", &wire.values)?,
                not_values: strings("not_values", &wire.not_values)?,
            };
            if claim.path.is_empty() || (claim.values.is_empty() && claim.not_values.is_empty()) {
                return Err(InvalidResource::new("values", Problem::Missing));
            }
            Ok(claim)
        })?,
    })
}

fn path_match(wire: &mesh::PathMatch) -> Result<PathMatch, InvalidResource> {
    use mesh::path_match::Match;
    match &wire.r#match {
        None => Err(InvalidResource::new("match", Problem::Missing)),
        Some(Match::Text(text)) => Ok(PathMatch::Text(string_match(text)?)),
        Some(Match::Template(template)) => template
            .parse()
            .map(PathMatch::Template)
            .map_err(|_invalid| InvalidResource::new("template", Problem::Undecodable)),
    }
}

fn plain_attributes(wire: &pb::Match) -> Result<Match, InvalidResource> {
    let ports = |field, list: &[u32]| each(field, list, |value| port("", *value));
    Ok(Match {
        namespaces: each("namespaces", &wire.namespaces, string_match)?,
        not_namespaces: each("not_namespaces", &wire.not_namespaces, string_match)?,
        principals: each("principals", &wire.principals, string_match)?,
        not_principals: each("not_principals", &wire.not_principals, string_match)?,
        source_ips: each("source_ips", &wire.source_ips, ip_block)?,
        not_source_ips: each("not_source_ips", &wire.not_source_ips, ip_block)?,
        destination_ips: each("destination_ips", &wire.destination_ips, ip_block)?,
        not_destination_ips: each("not_destination_ips", &wire.not_destination_ips, ip_block)?,
        destination_ports: ports("destination_ports", &wire.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &wire.not_destination_ports)?,
        service_accounts: each("service_accounts", &wire.service_accounts, account)?,
        not_service_accounts: each("not_service_accounts", &wire.not_service_accounts, account)?,
        ..Match::default()
    })
}

fn string_match(wire: &pb::StringMatch) -> Result<StringMatch, InvalidResource> {
    use pb::string_match::MatchType;
    match &wire.match_type {
        None => Err(InvalidResource::new("match_type", Problem::Missing)),
        Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(text.as_str().into())),
        Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text.as_str().into())),
        Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text.as_str().into())),
        Some(MatchType::Presence(())) => Ok(StringMatch::Presence),
    }
}

/// ztunnel drops an address it cannot read, and a list of only such addresses restricts nobody; here it is refused.
fn ip_block(wire: &pb::Address) -> Result<IpPrefix, InvalidResource> {
    prefix("address", &wire.address, wire.length)
}

fn account(wire: &pb::ServiceAccountMatch) -> Result<ServiceAccountMatch, InvalidResource> {
    Ok(ServiceAccountMatch {
        namespace: required("namespace", &wire.namespace)?.into(),
        service_account: required("serviceAccount", &wire.service_account)?.into(),
    })
}

impl From<&Policy> for pb::Authorization {
    fn from(policy: &Policy) -> Self {
        use mesh::policy_extension::Kind;
        let audit = policy.action == Action::Audit;
        let extension = mesh::PolicyExtension {
            kind: match policy.origin.kind {
                PolicyKind::AuthorizationPolicy => Kind::AuthorizationPolicy,
                PolicyKind::PeerAuthentication => Kind::PeerAuthentication,
                PolicyKind::Synthetic => Kind::Synthetic,
            }
            .into(),
            namespace: text(&policy.origin.namespace),
            name: text(&policy.origin.name),
            audit,
            audit_dry_run: audit && policy.dry_run,
            unreadable: policy.origin.unreadable.as_ref().map(text).unwrap_or_default(),
        };
        let action = match policy.action {
            Action::Allow | Action::Audit => pb::Action::Allow,
            Action::Deny => pb::Action::Deny,
        };
        Self {
            name: text(&policy.name.name),
            namespace: text(&policy.name.namespace),
            scope: match policy.scope {
                PolicyScope::Global => pb::Scope::Global,
                PolicyScope::Namespace => pb::Scope::Namespace,
                PolicyScope::Workload => pb::Scope::WorkloadSelector,
            }
            .into(),
            action: action.into(),
            rules: policy
                .rules
                .iter()
                .map(|rule| pb::Rule {
                    clauses: rule.clauses.iter().map(|c| clause_to_wire(c, action)).collect(),
                })
                .collect(),
            dry_run: audit || policy.dry_run,
            extensions: vec![Extension {
                name: POLICY_EXTENSION.to_owned(),
                config: Some(Any {
                    type_url: POLICY_EXTENSION_URL.to_owned(),
                    value: extension.encode_to_vec(),
                }),
            }],
        }
    }
}

fn clause_to_wire(clause: &Clause, action: pb::Action) -> pb::Clause {
    pb::Clause { matches: clause.matches.iter().map(|m| match_to_wire(m, action)).collect() }
}

fn match_to_wire(attributes: &Match, action: pb::Action) -> pb::Match {
    let plain = plain_to_wire(attributes);
    let request = &attributes.request;
    let is_plain = attributes.trust_domains.is_empty()
        && attributes.not_trust_domains.is_empty()
        && request.is_empty();
    if is_plain {
        return plain;
    }
    let exact = mesh::MatchExtension {
        r#match: Some(plain.clone()),
        trust_domains: strings(&attributes.trust_domains),
        not_trust_domains: strings(&attributes.not_trust_domains),
        request: (!request.is_empty()).then(|| request_to_wire(request)),
    };
    let mut outer = match action {
        pb::Action::Allow => pb::Match { destination_ports: vec![NO_PORT], ..pb::Match::default() },
        pb::Action::Deny if plain == pb::Match::default() => {
            pb::Match { not_destination_ports: vec![NO_PORT], ..pb::Match::default() }
        }
        pb::Action::Deny => plain,
    };
    outer.extensions = vec![Extension {
        name: MATCH_EXTENSION.to_owned(),
        config: Some(Any {
            type_url: MATCH_EXTENSION_URL.to_owned(),
            value: exact.encode_to_vec(),
        }),
    }];
    outer
}

fn request_to_wire(request: &RequestMatch) -> mesh::RequestMatch {
    mesh::RequestMatch {
        hosts: strings(&request.hosts),
        not_hosts: strings(&request.not_hosts),
        methods: strings(&request.methods),
        not_methods: strings(&request.not_methods),
        paths: request.paths.iter().map(path_to_wire).collect(),
        not_paths: request.not_paths.iter().map(path_to_wire).collect(),
        headers: request
            .headers
            .iter()
            .map(|header| mesh::HeaderMatch {
                name: text(&header.name),
                values: strings(&header.values),
                not_values: strings(&header.not_values),
            })
            .collect(),
        principals: strings(&request.principals),
        not_principals: strings(&request.not_principals),
        claims: request
            .claims
            .iter()
            .map(|claim| mesh::ClaimMatch {
                path: claim.path.iter().map(text).collect(),
                values: strings(&claim.values),
                not_values: strings(&claim.not_values),
            })
            .collect(),
    }
}

fn path_to_wire(path: &PathMatch) -> mesh::PathMatch {
    use mesh::path_match::Match;
    mesh::PathMatch {
        r#match: Some(match path {
            PathMatch::Text(text) => Match::Text(string_to_wire(text)),
            PathMatch::Template(template) => Match::Template(template.to_string()),
        }),
    }
}

fn plain_to_wire(attributes: &Match) -> pb::Match {
    let ports = |list: &[u16]| list.iter().copied().map(u32::from).collect();
    pb::Match {
        namespaces: strings(&attributes.namespaces),
        not_namespaces: strings(&attributes.not_namespaces),
        principals: strings(&attributes.principals),
        not_principals: strings(&attributes.not_principals),
        source_ips: ip_blocks(&attributes.source_ips),
        not_source_ips: ip_blocks(&attributes.not_source_ips),
        destination_ips: ip_blocks(&attributes.destination_ips),
        not_destination_ips: ip_blocks(&attributes.not_destination_ips),
        destination_ports: ports(&attributes.destination_ports),
        not_destination_ports: ports(&attributes.not_destination_ports),
        service_accounts: accounts(&attributes.service_accounts),
        not_service_accounts: accounts(&attributes.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn strings(list: &[StringMatch]) -> Vec<pb::StringMatch> {
    list.iter().map(string_to_wire).collect()
}

fn string_to_wire(item: &StringMatch) -> pb::StringMatch {
    use pb::string_match::MatchType;
    pb::StringMatch {
        match_type: Some(match item {
            StringMatch::Exact(value) => MatchType::Exact(text(value)),
            StringMatch::Prefix(value) => MatchType::Prefix(text(value)),
            StringMatch::Suffix(value) => MatchType::Suffix(text(value)),
            StringMatch::Presence => MatchType::Presence(()),
        }),
    }
}

fn ip_blocks(list: &[IpPrefix]) -> Vec<pb::Address> {
    list.iter()
        .map(|block| pb::Address {
            address: ip_bytes(block.network()),
            length: block.length().into(),
        })
        .collect()
}

fn accounts(list: &[ServiceAccountMatch]) -> Vec<pb::ServiceAccountMatch> {
    list.iter()
        .map(|account| pb::ServiceAccountMatch {
            namespace: text(&account.namespace),
            service_account: text(&account.service_account),
        })
        .collect()
}

//! What each waypoint serves: the services bound to it, and its own Gateway, with the policies attached to them.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_model::{GatewayDestination, NamespacedHostname};
use mesh_route::{FrontendKind, FrontendName};
use mesh_wire::{AppProtocol, FrontendConfig, FrontendPortConfig, waypoint_node};

use super::authentications;
use super::objects::{Key, in_namespace};
use super::policies::Target;
use super::services::{kubernetes_hostname, waypoint};
use super::unreadable;
use super::workloads::View;
use crate::manifest::Kind;
use crate::manifest::gateway::{ISTIO_WAYPOINT_CLASS, WAYPOINT_CLASS};
use crate::manifest::metadata::Metadata;
use crate::manifest::policy::PolicyTarget;
use crate::manifest::service::Port;

/// What a waypoint serves, and which waypoints do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// It.
    pub config: FrontendConfig,
    /// The waypoints that see it, as callers; see [`waypoint_node`].
    pub waypoints: BTreeSet<Arc<str>>,
}

/// The object behind a frontend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum FrontendSource {
    Target(Target),
    Gateway(Key),
}

impl FrontendSource {
    pub(super) fn name(&self) -> FrontendName {
        let (kind, key) = match self {
            Self::Target(Target::Service(key)) => (FrontendKind::Service, key),
            Self::Target(Target::ServiceEntry(key)) => (FrontendKind::ServiceEntry, key),
            Self::Gateway(key) => (FrontendKind::Gateway, key),
        };
        FrontendName { kind, namespace: key.namespace.clone(), name: key.name.clone() }
    }
}

/// The frontend of an object; none for what no waypoint serves.
pub(super) fn of(view: View<'_>, source: &FrontendSource) -> Option<Frontend> {
    match source {
        FrontendSource::Target(target) => of_target(view, target),
        FrontendSource::Gateway(key) => of_gateway(view, key),
    }
}

fn of_target(view: View<'_>, target: &Target) -> Option<Frontend> {
    let key = target.key();
    let gateway = bound(view, target)?;
    let (hosts, ports) = match target {
        Target::Service(key) => {
            let service = view.objects.services.get(key).filter(|one| !one.external_name)?;
            (vec![kubernetes_hostname(key, view.settings).hostname], &service.ports)
        }
        Target::ServiceEntry(key) => {
            let entry = view.objects.service_entries.get(key)?;
            (entry.hosts.clone(), &entry.ports)
        }
    };
    let attached = in_namespace(&view.objects.authorizations, &key.namespace)
        .filter(|(_, policy)| Target::of(policy).any(|one| one == *target))
        .map(|(key, _)| key.to_string().into());
    let config = FrontendConfig {
        frontend: FrontendSource::Target(target.clone()).name(),
        hosts,
        ports: ports.iter().map(port).collect(),
        policies: attached.collect(),
        authentications: authentications::of_target(view, target),
        workload_authentications: Vec::new(),
    };
    Some(Frontend { config, waypoints: [caller(&gateway)].into() })
}

fn of_gateway(view: View<'_>, key: &Key) -> Option<Frontend> {
    let gateway = view.objects.gateway_objects.get(key);
    let class = gateway.map_or(WAYPOINT_CLASS, |gateway| &*gateway.class);
    if !is_waypoint_class(view, class) {
        return None;
    }
    let root = &view.settings.root_namespace;
    let is_meant = |target: &PolicyTarget, namespace: &str| match target {
        PolicyTarget::Gateway(kind, name) if **kind == *"Gateway" => {
            **name == *key.name && *namespace == *key.namespace
        }
        PolicyTarget::Gateway(_, name) => **name == *class && *namespace == **root,
        PolicyTarget::Service(_) | PolicyTarget::ServiceEntry(_) => false,
    };
    let namespaces: BTreeSet<&str> = [&*key.namespace, &**root].into();
    let mut policies: BTreeSet<Arc<str>> = namespaces
        .iter()
        .flat_map(|namespace| in_namespace(&view.objects.authorizations, namespace))
        .filter(|(at, policy)| policy.targets.iter().any(|one| is_meant(one, &at.namespace)))
        .map(|(at, _)| at.to_string().into())
        .collect();
    let unreadable = view.objects.unreadable.values();
    for policy in unreadable.filter(|policy| policy.kind != Kind::RequestAuthentication) {
        if unreadable::gateways(policy).any(|target| is_meant(target, &policy.meta.namespace)) {
            policies.insert(unreadable::name(view, policy, None).to_string().into());
        }
    }
    // One that is gone, with policies still attached to it: whoever stands in its place must not be open.
    if gateway.is_none() && !named(view).contains(key) {
        return None;
    }
    let (authentications, workload_authentications) =
        authentications::of_gateway(view, key, &is_meant);
    let config = FrontendConfig {
        authentications,
        workload_authentications,
        frontend: FrontendSource::Gateway(key.clone()).name(),
        hosts: Vec::new(),
        ports: Vec::new(),
        policies: policies.into_iter().collect(),
    };
    Some(Frontend { config, waypoints: [caller(key)].into() })
}

/// True for the classes whose Gateways are waypoints.
pub(super) fn is_waypoint_class(view: View<'_>, class: &str) -> bool {
    class == WAYPOINT_CLASS || (class == ISTIO_WAYPOINT_CLASS && view.settings.istio_labels)
}

/// The waypoint as it proves itself to the controller.
pub(super) fn caller(gateway: &Key) -> Arc<str> {
    waypoint_node(&gateway.namespace, &gateway.name).into()
}

/// The Gateway that a target is bound to.
pub(super) fn bound(view: View<'_>, target: &Target) -> Option<Key> {
    let key = target.key();
    let meta: &Metadata = match target {
        Target::Service(key) => &view.objects.services.get(key)?.meta,
        Target::ServiceEntry(key) => &view.objects.service_entries.get(key)?.meta,
    };
    let address = waypoint(meta, key, view.objects, view.settings)?;
    match address.destination {
        GatewayDestination::Hostname(NamespacedHostname { namespace, hostname }) => {
            let name = hostname.split('.').next().unwrap_or_default();
            Some(Key::new(&namespace, name))
        }
        GatewayDestination::Address(_) => None,
    }
}

/// The Gateways that policies are attached to, whether they are there or not.
fn named(view: View<'_>) -> BTreeSet<Key> {
    let of = |targets: &[PolicyTarget], namespace: &Arc<str>| {
        let gateways = targets.iter().filter_map(|target| match target {
            PolicyTarget::Gateway(kind, name) if **kind == *"Gateway" => {
                Some(Key { namespace: Arc::clone(namespace), name: Arc::clone(name) })
            }
            PolicyTarget::Gateway(..)
            | PolicyTarget::Service(_)
            | PolicyTarget::ServiceEntry(_) => None,
        });
        gateways.collect::<Vec<_>>()
    };
    let readable = view.objects.authorizations.values();
    let readable = readable.flat_map(|policy| of(&policy.targets, &policy.meta.namespace));
    let unreadable = view.objects.unreadable.values().flat_map(|policy| {
        let targets: Vec<_> = unreadable::gateways(policy).cloned().collect();
        of(&targets, &policy.meta.namespace)
    });
    let authentications = view.objects.authentications.values();
    let authentications =
        authentications.flat_map(|object| of(&object.targets, &object.meta.namespace));
    readable.chain(unreadable).chain(authentications).collect()
}

/// Where a Gateway that is a waypoint may be named by policies: the sources whose policies change with `policy`'s targets.
pub(super) fn gateways_of<'p>(
    view: View<'p>,
    targets: &'p [PolicyTarget],
    namespace: &'p str,
) -> impl Iterator<Item = FrontendSource> + 'p {
    targets
        .iter()
        .filter_map(move |target| match target {
            PolicyTarget::Gateway(kind, name) if **kind == *"Gateway" => {
                Some(vec![FrontendSource::Gateway(Key::new(namespace, name))])
            }
            PolicyTarget::Gateway(..) => {
                let all = view.objects.gateway_objects.keys().cloned().chain(named(view));
                Some(all.map(FrontendSource::Gateway).collect())
            }
            PolicyTarget::Service(_) | PolicyTarget::ServiceEntry(_) => None,
        })
        .flatten()
}

fn port(port: &Port) -> FrontendPortConfig {
    FrontendPortConfig {
        port: port.number,
        name: port.name.as_str().into(),
        protocol: AppProtocol::of(port.app_protocol.as_deref(), &port.name),
    }
}

//! `config_dump` and the certificates, in the shape that istioctl and Kiali read.
//!
//! Source: ztunnel's admin interface (reference/wire.md §8.3); where it has no field for what we know, ours are added.

use std::collections::BTreeMap;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_authorize::{Action, Policy, PolicyScope};
use mesh_enroll::{EnrolledPod, PodPhase};
use mesh_identity::Svid;
use mesh_model::{
    Direction, GatewayAddress, GatewayDestination, HealthStatus, LoadBalancingMode, NetworkMode,
    Service, TunnelProtocol, Visibility, Workload, WorkloadKind,
};
use serde_json::{Value, json};

use crate::dataplane::{ConnectionView, Snapshot};

/// The whole configuration in force.
pub(super) fn config(
    snapshot: &Snapshot,
    pods: &[EnrolledPod],
    connections: &[ConnectionView],
    node: &str,
) -> Value {
    let workloads: Vec<Value> = snapshot.index.workloads().map(|one| workload(one)).collect();
    let services: Vec<Value> =
        snapshot.index.services().map(|one| service(one, snapshot)).collect();
    let policies: Vec<Value> = snapshot.policies.policies().map(policy).collect();
    json!({
        "workloads": workloads,
        "services": services,
        "policies": policies,
        "stagedServices": {},
        "staticConfig": {},
        "version": { "version": env!("CARGO_PKG_VERSION"), "component": "culvert-agent" },
        "config": { "localNode": node },
        "certificates": certificates(snapshot),
        "workloadState": workload_state(pods, connections),
        // The exact objects, for `culvert explain`: what is above is a view of them.
        "culvert": {
            "indexRevision": snapshot.index.revision(),
            "policyRevision": snapshot.policies.revision(),
            "workloads": snapshot.index.workloads().collect::<Vec<_>>(),
            "services": snapshot.index.services().collect::<Vec<_>>(),
            "policies": snapshot.policies.policies().collect::<Vec<_>>(),
            "unreadablePolicies": snapshot.policies.unreadable().collect::<Vec<_>>(),
        },
    })
}

/// The certificates in use, without their keys.
pub(super) fn certificates(snapshot: &Snapshot) -> Vec<Value> {
    let now = SystemTime::now();
    snapshot
        .svids
        .values()
        .map(|svid| {
            let roots: Vec<Value> = snapshot
                .trust
                .roots(svid.id().trust_domain())
                .map(|root| json!({ "pem": pem(root) }))
                .collect();
            json!({
                "identity": svid.id().as_str(),
                "state": if svid.is_usable(now) { "Available" } else { "Expired" },
                "certChain": chain(svid),
                "rootCerts": roots,
            })
        })
        .collect()
}

fn chain(svid: &Svid) -> Vec<Value> {
    let mut chain: Vec<Value> =
        svid.chain().iter().map(|certificate| json!({ "pem": pem(certificate) })).collect();
    for (certificate, serial) in chain.iter_mut().zip(svid.serials()) {
        let serial: String = serial.iter().map(|byte| format!("{byte:02x}")).collect();
        certificate["serialNumber"] = serial.into();
    }
    if let Some(leaf) = chain.first_mut() {
        leaf["validFrom"] = time(svid.not_before()).into();
        leaf["expirationTime"] = time(svid.not_after()).into();
    }
    chain
}

/// PEM once more in base64, as ztunnel has it.
fn pem(der: &[u8]) -> String {
    let body = BASE64.encode(der);
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in body.as_bytes().chunks(64) {
        text.push_str(&String::from_utf8_lossy(line));
        text.push('\n');
    }
    text.push_str("-----END CERTIFICATE-----\n");
    BASE64.encode(text)
}

fn time(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_beyond| "unknown".to_owned(), |at| at.to_string())
}

fn workload(workload: &Workload) -> Value {
    let services: BTreeMap<String, Value> = workload
        .services
        .iter()
        .map(|(key, ports)| {
            let ports: BTreeMap<String, u16> = ports
                .iter()
                .map(|port| (port.service_port.to_string(), port.target_port))
                .collect();
            (key.to_string(), json!(ports))
        })
        .collect();
    json!({
        "workloadIps": workload.addresses,
        "waypoint": workload.waypoint.as_ref().map(gateway),
        "networkGateway": workload.network_gateway.as_ref().map(gateway),
        "protocol": match workload.tunnel_protocol {
            TunnelProtocol::None => "TCP",
            TunnelProtocol::Hbone => "HBONE",
        },
        "networkMode": match workload.network_mode {
            NetworkMode::Standard => "Standard",
            NetworkMode::HostNetwork => "HostNetwork",
        },
        "uid": workload.uid.as_str(),
        "name": workload.name,
        "namespace": workload.namespace,
        "trustDomain": workload.trust_domain,
        "serviceAccount": workload.service_account,
        "network": workload.network.as_str(),
        "workloadName": workload.workload_name,
        "workloadType": match workload.kind {
            WorkloadKind::Deployment => "deployment",
            WorkloadKind::CronJob => "cronjob",
            WorkloadKind::Pod => "pod",
            WorkloadKind::Job => "job",
        },
        "canonicalName": workload.canonical_name,
        "canonicalRevision": workload.canonical_revision,
        "hostname": workload.hostname,
        "node": workload.node,
        "nativeTunnel": workload.native_tunnel,
        "applicationTunnel": workload.application_tunnel,
        "authorizationPolicies": workload.authorization_policies,
        "status": match workload.status {
            HealthStatus::Healthy => "Healthy",
            HealthStatus::Unhealthy => "Unhealthy",
        },
        "clusterId": workload.cluster_id,
        "locality": workload.locality,
        "services": services,
        "capacity": workload.capacity,
    })
}

fn service(service: &Service, snapshot: &Snapshot) -> Value {
    let ports: BTreeMap<String, u16> = service
        .ports
        .iter()
        .map(|port| (port.service_port.to_string(), port.target_port))
        .collect();
    let endpoints: BTreeMap<&str, Value> = snapshot
        .index
        .endpoints(&service.key)
        .map(|endpoint| {
            let ports: BTreeMap<String, u16> = endpoint
                .services
                .get(&service.key)
                .into_iter()
                .flatten()
                .map(|port| (port.service_port.to_string(), port.target_port))
                .collect();
            let uid = endpoint.uid.as_str();
            let status = match endpoint.status {
                HealthStatus::Healthy => "Healthy",
                HealthStatus::Unhealthy => "Unhealthy",
            };
            (uid, json!({ "workloadUid": uid, "port": ports, "status": status }))
        })
        .collect();
    let vips: Vec<String> = service.vips.iter().map(ToString::to_string).collect();
    let cidr_vips: Vec<String> =
        service.cidr_vips.iter().map(|(network, prefix)| format!("{network}/{prefix}")).collect();
    let weighted: Vec<Value> = service
        .weighted_waypoints
        .iter()
        .map(|one| json!({ "destination": gateway(&one.destination), "weight": one.weight }))
        .collect();
    json!({
        "name": service.name,
        "namespace": service.key.namespace,
        "hostname": service.key.hostname,
        "vips": vips,
        "cidrVips": cidr_vips,
        "ports": ports,
        "endpoints": endpoints,
        "subjectAltNames": service.subject_alt_names,
        "waypoint": service.waypoint.as_ref().map(gateway),
        "weightedWaypoints": weighted,
        "loadBalancer": {
            "routingPreferences": service.load_balancing.routing_preference,
            "mode": match service.load_balancing.mode {
                LoadBalancingMode::Standard => "Standard",
                LoadBalancingMode::Strict => "Strict",
                LoadBalancingMode::Failover => "Failover",
                LoadBalancingMode::Passthrough => "Passthrough",
            },
            "healthPolicy": service.load_balancing.health_policy,
        },
        "ipFamilies": service.ip_families,
        "canonical": service.canonical,
        "visibility": match service.visibility {
            Visibility::Public => "Public",
            Visibility::Namespace => "Namespace",
        },
    })
}

fn gateway(gateway: &GatewayAddress) -> Value {
    let destination = match &gateway.destination {
        GatewayDestination::Hostname(key) => key.to_string(),
        GatewayDestination::Address(address) => address.to_string(),
    };
    json!({ "destination": destination, "hboneMtlsPort": gateway.hbone_port })
}

fn policy(policy: &Policy) -> Value {
    json!({
        "name": policy.name.name,
        "namespace": policy.name.namespace,
        "scope": match policy.scope {
            PolicyScope::Global => "Global",
            PolicyScope::Namespace => "Namespace",
            PolicyScope::Workload => "WorkloadSelector",
        },
        "action": match policy.action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
            Action::Audit => "Audit",
        },
        "rules": policy.rules,
        "dryRun": policy.dry_run,
        "origin": policy.origin.to_string(),
    })
}

fn workload_state(pods: &[EnrolledPod], connections: &[ConnectionView]) -> Value {
    let mut state = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.phase != PodPhase::Excluded) {
        let of_pod = connections.iter().filter(|one| one.pod == pod.pod.uid);
        let (outbound, inbound): (Vec<_>, Vec<_>) =
            of_pod.partition(|one| one.direction == Direction::Outbound);
        let view = |one: &ConnectionView| {
            json!({
                "src": one.client,
                "originalDst": one.service,
                "actualDst": one.destination,
                "protocol": one.path,
            })
        };
        let info = json!({
            "name": pod.pod.name.name(),
            "namespace": pod.pod.name.namespace(),
            "serviceAccount": pod.pod.service_account,
        });
        let phase = if pod.phase == PodPhase::Enrolled { "Up" } else { "Pending" };
        state.insert(
            pod.pod.uid.as_str().to_owned(),
            json!({
                "state": phase,
                "connections": {
                    "inbound": inbound.into_iter().map(view).collect::<Vec<_>>(),
                    "outbound": outbound.into_iter().map(view).collect::<Vec<_>>(),
                },
                "info": info,
            }),
        );
    }
    json!(state)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use imbl::OrdMap;
    use mesh_authorize::PolicySet;
    use mesh_identity::{CaConfig, CaCore, IssuedAnswer, TrustBundle, csr};
    use mesh_model::SpiffeId;
    use mesh_resolve::{ResolveSettings, WorkloadIndex};

    use super::*;

    /// Every text in `value`, and what it is the base64 form of, PEM bodies included.
    fn contents(value: &Value, found: &mut Vec<Vec<u8>>) {
        match value {
            Value::String(text) => add(text.as_bytes().to_vec(), found),
            Value::Array(values) => values.iter().for_each(|value| contents(value, found)),
            Value::Object(fields) => fields.values().for_each(|value| contents(value, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn add(bytes: Vec<u8>, found: &mut Vec<Vec<u8>>) {
        if let Ok(text) = std::str::from_utf8(&bytes) {
            let body: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
            if body.len() > 40
                && let Ok(decoded) = BASE64.decode(body)
            {
                add(decoded, found);
            }
        }
        found.push(bytes);
    }

    #[test]
    fn the_dump_shows_certificates_and_no_key() {
        let now = SystemTime::now();
        let ca = CaCore::create("cluster.local", CaConfig::default(), now).unwrap();
        let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
        let (key, request) = csr(&id).unwrap();
        let chain = ca.sign(&request, &id, Duration::ZERO, now).unwrap();
        let svid = IssuedAnswer::check(&chain, &id, key, now).unwrap().svid;
        let private = svid.key().to_pkcs8();
        // The scalar: an OCTET STRING of 32 bytes behind version 1. Source: RFC 5915 §3.
        let marker = [2, 1, 1, 4, 32];
        let at = private.windows(5).position(|window| window == marker).unwrap() + 5;
        let scalar = private[at..at + 32].to_vec();
        let leaf = svid.chain()[0].to_vec();
        let snapshot = Snapshot {
            index: WorkloadIndex::default(),
            policies: PolicySet::default(),
            synced: true,
            settings: ResolveSettings::default(),
            trust: Arc::new(
                TrustBundle::from_pem("cluster.local", &ca.root_bundle_pem(), "").unwrap(),
            ),
            svids: OrdMap::unit(id, Arc::new(svid)),
        };
        let mut found = Vec::new();
        contents(&config(&snapshot, &[], &[], "n"), &mut found);
        let holds = |wanted: &[u8]| {
            found.iter().any(|bytes| bytes.windows(wanted.len()).any(|window| window == wanted))
        };
        assert!(holds(&leaf), "the test must see what is in the dump");
        assert!(!holds(&scalar) && !holds(b"PRIVATE KEY"));
        let hexadecimal: String = scalar.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!holds(hexadecimal.as_bytes()));
        let numbers = format!("{:?}", &scalar[..8]).replace(' ', "");
        let text = serde_json::to_string(&config(&snapshot, &[], &[], "n")).unwrap();
        assert!(!text.contains(numbers.trim_matches(['[', ']'])));
    }
}

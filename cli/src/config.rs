//! `culvert config`: what a daemon holds of the mesh.

use mesh_authorize::{Action, Policy, PolicyScope};
use mesh_model::{
    GatewayAddress, GatewayDestination, HealthStatus, NetworkMode, Service, TunnelProtocol,
    Workload,
};
use serde::Deserialize;
use serde_json::Value;

use crate::admin::AdminClient;
use crate::arguments::{ConfigArgs, Daemon, Output, Part, Reach};
use crate::failure::{Ending, Failure};
use crate::show::{self, Columns};
use crate::status::nearest;

/// The objects themselves; the agent has them in a part of its own, beside the view that other tools read.
#[derive(Debug, Deserialize)]
struct Held {
    workloads: Vec<Workload>,
    services: Vec<Service>,
    policies: Vec<Policy>,
}

#[derive(Debug, Deserialize)]
struct AgentDump {
    culvert: Held,
}

/// Asks the agent, or the controller, and prints.
///
/// # Errors
/// When it cannot be asked.
pub(crate) fn run(args: &ConfigArgs, reach: &Reach, output: Output) -> Result<Ending, Failure> {
    let daemon = args.daemon.unwrap_or_else(|| nearest(reach));
    let client = AdminClient::new(daemon, reach);
    let body = client.get("/config_dump")?;
    match output {
        Output::Json => match key(args.part) {
            None => show::raw(&body)?,
            Some(key) => {
                let dump: Value = client.read(&body)?;
                show::json(dump.get(key).unwrap_or(&Value::Null))?;
            }
        },
        Output::Table => {
            let held = match daemon {
                Daemon::Agent => client.read::<AgentDump>(&body)?.culvert,
                Daemon::Controller => client.read::<Held>(&body)?,
            };
            show::text(&render(args.part, &held))?;
        }
    }
    Ok(Ending::Yes)
}

const fn key(part: Part) -> Option<&'static str> {
    match part {
        Part::All => None,
        Part::Workloads => Some("workloads"),
        Part::Services => Some("services"),
        Part::Policies => Some("policies"),
    }
}

fn render(part: Part, held: &Held) -> String {
    match part {
        Part::All => [workloads(held), services(held), policies(held)].join("\n"),
        Part::Workloads => workloads(held),
        Part::Services => services(held),
        Part::Policies => policies(held),
    }
}

fn workloads(held: &Held) -> String {
    let mut columns = Columns::new(&[
        "WORKLOAD",
        "ADDRESSES",
        "PROTOCOL",
        "NODE",
        "SERVICE ACCOUNT",
        "WAYPOINT",
        "HEALTH",
        ">POLICIES",
    ]);
    for one in &held.workloads {
        let protocol = match (one.tunnel_protocol, one.network_mode) {
            (TunnelProtocol::Hbone, _) => "HBONE",
            (TunnelProtocol::None, NetworkMode::Standard) => "TCP",
            (TunnelProtocol::None, NetworkMode::HostNetwork) => "TCP, host network",
        };
        let health = match one.status {
            HealthStatus::Healthy => "healthy",
            HealthStatus::Unhealthy => "unhealthy",
        };
        columns.row([
            format!("{}/{}", one.namespace, one.name),
            joined(&one.addresses),
            protocol.to_owned(),
            one.node.to_string(),
            one.service_account.to_string(),
            gateway(one.waypoint.as_ref()),
            health.to_owned(),
            one.authorization_policies.len().to_string(),
        ]);
    }
    columns.render()
}

fn services(held: &Held) -> String {
    let mut columns =
        Columns::new(&["SERVICE", "HOST", "ADDRESSES", "PORTS", ">ENDPOINTS", "WAYPOINT"]);
    for one in &held.services {
        let ports: Vec<String> = one
            .ports
            .iter()
            .map(|port| match port.target_port {
                0 => format!("{}->by endpoint", port.service_port),
                target => format!("{}->{target}", port.service_port),
            })
            .collect();
        let ranges = one.cidr_vips.iter().map(|(_, range)| range.to_string());
        let addresses: Vec<String> =
            one.vips.iter().map(|vip| vip.ip.to_string()).chain(ranges).collect();
        let endpoints =
            held.workloads.iter().filter(|workload| workload.services.contains_key(&one.key));
        columns.row([
            format!("{}/{}", one.key.namespace, one.name),
            one.key.hostname.to_string(),
            addresses.join(","),
            ports.join(","),
            endpoints.count().to_string(),
            gateway(one.waypoint.as_ref()),
        ]);
    }
    columns.render()
}

fn policies(held: &Held) -> String {
    let mut columns = Columns::new(&["POLICY", "SCOPE", "ACTION", ">RULES", "ENFORCED"]);
    for one in &held.policies {
        let scope = match one.scope {
            PolicyScope::Global => "mesh",
            PolicyScope::Namespace => "namespace",
            PolicyScope::Workload => "workloads",
        };
        let enforced = match (one.action, one.dry_run) {
            (_, true) => "no, dry run",
            (Action::Audit, false) => "no, audit",
            (Action::Allow | Action::Deny, false) => "yes",
        };
        columns.row([
            one.origin.to_string(),
            scope.to_owned(),
            one.action.as_str().to_owned(),
            one.rules.len().to_string(),
            enforced.to_owned(),
        ]);
    }
    columns.render()
}

fn gateway(gateway: Option<&GatewayAddress>) -> String {
    gateway.map_or_else(String::new, |gateway| match &gateway.destination {
        GatewayDestination::Hostname(key) => key.to_string(),
        GatewayDestination::Address(address) => address.to_string(),
    })
}

fn joined<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

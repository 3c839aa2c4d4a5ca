//! `culvert connections`: what is open on this node.

use serde::Deserialize;
use serde_json::Value;

use crate::admin::AdminClient;
use crate::arguments::{ConnectionsArgs, Daemon, Output, Reach};
use crate::failure::{Ending, Failure};
use crate::show::{self, Columns};

#[derive(Debug, Deserialize)]
struct Connection {
    direction: String,
    pod_namespace: String,
    pod_name: String,
    client: String,
    destination: String,
    source_principal: Option<String>,
    destination_principal: Option<String>,
    service: Option<String>,
    path: String,
    rule: Option<String>,
    established: bool,
    bytes: Bytes,
    age_ms: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Bytes {
    client_to_server: u64,
    server_to_client: u64,
}

/// Asks the agent and prints.
///
/// # Errors
/// When it cannot be asked.
pub(crate) fn run(
    args: &ConnectionsArgs,
    reach: &Reach,
    output: Output,
) -> Result<Ending, Failure> {
    let agent = AdminClient::new(Daemon::Agent, reach);
    let body = agent.get("/connections")?;
    match (output, &args.pod) {
        (Output::Json, None) => show::raw(&body)?,
        (Output::Json, Some(pod)) => {
            let all: Vec<Value> = agent.read(&body)?;
            let of_pod = |one: &&Value| {
                let text = |key: &str| one.get(key).and_then(Value::as_str).unwrap_or_default();
                *pod == format!("{}/{}", text("pod_namespace"), text("pod_name"))
            };
            show::json(&all.iter().filter(of_pod).collect::<Vec<_>>())?;
        }
        (Output::Table, pod) => {
            let mut connections: Vec<Connection> = agent.read(&body)?;
            connections.retain(|one| pod.as_ref().is_none_or(|pod| *pod == one.pod()));
            connections.sort_by_key(|one| (one.pod(), std::cmp::Reverse(one.age_ms)));
            show::text(&render(&connections))?;
        }
    }
    Ok(Ending::Yes)
}

impl Connection {
    fn pod(&self) -> String {
        format!("{}/{}", self.pod_namespace, self.pod_name)
    }

    /// Who is at the far end, as well as it is known.
    fn peer(&self) -> String {
        let principal = if self.direction == "Outbound" {
            &self.destination_principal
        } else {
            &self.source_principal
        };
        principal.clone().unwrap_or_default()
    }

    fn way(&self) -> &str {
        if self.direction == "Outbound" { "out" } else { "in" }
    }

    /// What the pod sent and received, as the access log counts them.
    fn sent_and_received(&self) -> (u64, u64) {
        let Bytes { client_to_server, server_to_client } = self.bytes;
        if self.direction == "Outbound" {
            (client_to_server, server_to_client)
        } else {
            (server_to_client, client_to_server)
        }
    }

    fn target(&self) -> String {
        match &self.service {
            Some(service) => format!("{} ({service})", self.destination),
            None => self.destination.clone(),
        }
    }
}

fn render(connections: &[Connection]) -> String {
    if connections.is_empty() {
        return "no open connections\n".to_owned();
    }
    let mut columns = Columns::new(&[
        "POD",
        "WAY",
        "CLIENT",
        "DESTINATION",
        "PATH",
        "PEER",
        ">SENT",
        ">RECEIVED",
        ">AGE",
        "RULE",
    ]);
    for one in connections {
        let path =
            if one.established { one.path.clone() } else { format!("{} (opening)", one.path) };
        let (sent, received) = one.sent_and_received();
        columns.row([
            one.pod(),
            one.way().to_owned(),
            one.client.clone(),
            one.target(),
            path,
            one.peer(),
            show::bytes(sent),
            show::bytes(received),
            show::span(one.age_ms / 1000),
            one.rule.clone().unwrap_or_default(),
        ]);
    }
    columns.render()
}

//! What both nodes count of a known transfer: connections and bytes to the unit, each series once and under all its labels.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_netns::process::{in_namespace, run};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{PodSpec, manifest};
use serde_json::Value;

use crate::mesh::{LogFromNow, Mesh, inside, sum_of};

const QUESTION: &[u8; 11] = b"eleven byte";
const ANSWER: &[u8; 22] = b"twenty-two bytes back.";
/// Where the answer is given.
const PORT: u16 = 7300;
const SERVICE: &str = "10.96.0.31";
/// Far longer than a transfer takes.
const LIMIT: Duration = Duration::from_secs(20);
/// Connections within which both replicas of a service are surely met.
const ENOUGH: u64 = 64;

/// Answers in a pod for as long as this program runs.
fn serve(netns: &str) -> anyhow::Result<()> {
    let listener = inside(netns, || Ok(TcpListener::bind(("0.0.0.0", PORT))?))?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut question = Vec::new();
            let answered =
                stream.read_to_end(&mut question).and_then(|_length| stream.write_all(ANSWER));
            if let Err(error) = answered {
                eprintln!("traffic: {error}");
            }
        }
    });
    Ok(())
}

/// Moves eleven bytes there and twenty-two back.
fn transfer(mesh: &Mesh, pod: &str, target: SocketAddr) -> anyhow::Result<()> {
    inside(mesh.lab.pod(pod).netns(), || {
        let mut stream = TcpStream::connect_timeout(&target, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(QUESTION)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        ensure!(answer == ANSWER, "{} bytes came back", answer.len());
        Ok(())
    })
}

/// Waits until an agent knows pods as captured, and a service. Trying it out would be counted.
fn known(mesh: &Mesh, node: &str, pods: &[&str], service: Option<&str>) -> anyhow::Result<()> {
    let node = mesh.lab.node(node);
    until(&format!("{pods:?} being known as captured"), PATIENCE, || {
        let mut curl = in_namespace(Some(node.netns()), "curl");
        let dump = run(curl.args(["-sS", "http://127.0.0.1:15000/config_dump"]), PATIENCE)?;
        let dump: Value = serde_json::from_str(&dump.output()?)?;
        let list = |kind: &str| dump[kind].as_array().cloned().unwrap_or_default();
        let captured = |pod: &&str| {
            list("workloads").iter().any(|one| one["name"] == **pod && one["protocol"] == "HBONE")
        };
        let has_service = |name: &str| {
            let all = list("services");
            let found = all.iter().find(|one| one["name"] == name);
            let endpoints = found.and_then(|one| one["endpoints"].as_object());
            endpoints.is_some_and(|endpoints| endpoints.len() == pods.len())
        };
        Ok((pods.iter().all(captured) && service.is_none_or(has_service)).then_some(()))
    })
}

/// A scrape's series by metric and labels; each may stand there once.
fn scrape(mesh: &Mesh, node: &str) -> anyhow::Result<BTreeMap<String, f64>> {
    let text = mesh.lab.node(node).metrics()?;
    let mut series = BTreeMap::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
        let twice = series.insert(name.to_owned(), value.parse()?).is_some();
        ensure!(!twice, "a series comes twice, and Prometheus drops it: {line}");
    }
    Ok(series)
}

/// The only series of `metric` from and to these workloads, with its value.
fn only<'s>(
    series: &'s BTreeMap<String, f64>,
    metric: &str,
    (reporter, from, to): (&str, &str, &str),
) -> anyhow::Result<Option<(&'s str, f64)>> {
    let parts = [
        format!("reporter=\"{reporter}\""),
        format!("source_workload=\"{from}\""),
        format!("destination_workload=\"{to}\""),
    ];
    let of_pair: Vec<_> = series
        .iter()
        .filter(|(name, _)| {
            name.starts_with(&format!("{metric}{{")) && parts.iter().all(|part| name.contains(part))
        })
        .collect();
    ensure!(of_pair.len() < 2, "more than one series of {metric}: {of_pair:#?}");
    Ok(of_pair.first().map(|(name, value)| (name.as_str(), **value)))
}

/// Waits until a reporter has counted `connections` as closed, then compares all that it has counted.
fn check(
    mesh: &Mesh,
    (node, reporter): (&str, &str),
    (from, to): (&str, &str),
    connections: u64,
    expected: &BTreeSet<String>,
) -> anyhow::Result<()> {
    let pair = (reporter, from, to);
    let count = |value: u64| -> f64 { u32::try_from(value).map_or(f64::NAN, f64::from) };
    let series = until(&format!("{reporter} counting all as closed"), PATIENCE, || {
        let series = scrape(mesh, node)?;
        let closed = only(&series, "istio_tcp_connections_closed_total", pair)?;
        let all = closed.is_some_and(|(_, value)| value >= count(connections));
        Ok(all.then_some(series))
    })?;
    for (metric, value) in [
        ("istio_tcp_connections_opened_total", connections),
        ("istio_tcp_connections_closed_total", connections),
        ("istio_tcp_received_bytes_total", connections * 11),
        ("istio_tcp_sent_bytes_total", connections * 22),
    ] {
        let (name, counted) = only(&series, metric, pair)?
            .with_context(|| format!("{reporter} has no series of {metric}"))?;
        ensure!(
            (counted - count(value)).abs() < 0.5,
            "{reporter} counted {counted} of {value}: {name}"
        );
        let (_, labels) = name.trim_end_matches('}').split_once('{').context("no labels")?;
        let labels: BTreeSet<String> =
            labels.split("\",").map(|label| label.trim_end_matches('"').to_owned()).collect();
        let wrong: Vec<_> = labels.symmetric_difference(expected).collect();
        ensure!(wrong.is_empty(), "{metric} of {reporter} differs in {wrong:#?}: {name}");
    }
    let failed = only(&series, "istio_tcp_connections_failed_total", pair)?;
    ensure!(failed.is_none(), "failures are counted: {failed:?}");
    Ok(())
}

/// All labels of traffic from `mesh/client` on a. Source: istio/ztunnel `src/proxy/metrics.rs`.
fn labels(reporter: &str, server: &str, zone: &str, service: Option<&str>) -> BTreeSet<String> {
    let id = |account: &str| format!("spiffe://cluster.local/ns/mesh/sa/{account}");
    let (client_id, server_id) = (id("client"), id(server));
    let hostname = service.map(|name| format!("{name}.mesh.svc.cluster.local"));
    [
        ("reporter", reporter),
        ("source_workload", "client"),
        ("source_canonical_service", "client"),
        ("source_canonical_revision", "latest"),
        ("source_workload_namespace", "mesh"),
        ("source_principal", &client_id),
        ("source_app", "client"),
        ("source_version", "latest"),
        ("source_cluster", "Kubernetes"),
        ("destination_service", hostname.as_deref().unwrap_or("unknown")),
        ("destination_service_namespace", service.map_or("unknown", |_| "mesh")),
        ("destination_service_name", service.unwrap_or("unknown")),
        ("destination_workload", server),
        ("destination_canonical_service", server),
        ("destination_canonical_revision", "latest"),
        ("destination_workload_namespace", "mesh"),
        ("destination_principal", &server_id),
        ("destination_app", server),
        ("destination_version", "latest"),
        ("destination_cluster", "Kubernetes"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
        ("source_region", "lab"),
        ("source_zone", "a"),
        ("destination_region", "lab"),
        ("destination_zone", zone),
    ]
    .map(|(name, value)| format!("{name}=\"{value}"))
    .into()
}

/// A service with two replicas: both nodes count its connections and bytes exactly, in one series each.
pub(crate) fn replicas_count_as_one(mesh: &mut Mesh) -> anyhow::Result<()> {
    let service_ip: IpAddr = SERVICE.parse()?;
    let service = manifest::service("mesh", "pair", "pair", &[service_ip], &[("tcp", 80, PORT)]);
    mesh.lab.apply(&service)?;
    for pod in ["pair-1", "pair-2"] {
        let spec = PodSpec::new("mesh", pod).app("pair").service_account("pair");
        let spec = spec.label("service.istio.io/workload-name", "pair");
        serve(mesh.lab.run_pod("b", spec)?.netns())?;
    }
    let target = SocketAddr::new(service_ip, 80);
    for node in ["a", "b"] {
        known(mesh, node, &["pair-1", "pair-2"], Some("pair"))?;
    }
    let log = LogFromNow::of(mesh, "b")?;
    let mut made = 0;
    let met = |pod: &str| -> anyhow::Result<bool> {
        Ok(!log.lines(&[&format!("dst.workload=\"{pod}\""), "reason=complete"])?.is_empty())
    };
    while !(met("pair-1")? && met("pair-2")?) {
        ensure!(made < ENOUGH, "{made} connections and one replica was never met");
        transfer(mesh, "client", target)?;
        made += 1;
    }
    for side in [("a", "source"), ("b", "destination")] {
        let expected = labels(side.1, "pair", "b", Some("pair"));
        check(mesh, side, ("client", "pair"), made, &expected)?;
    }
    for pod in ["pair-1", "pair-2"] {
        mesh.lab.delete_pod(pod)?;
    }
    mesh.lab.delete(&service)
}

/// Handshakes, tunnels and enrolments are counted at both ends, and what is counted is explained.
pub(crate) fn what_agents_count_of_themselves(mesh: &mut Mesh) -> anyhow::Result<()> {
    ensure!(mesh.reaches("client", mesh.server())?, "the client does not reach the server");
    for (node, role) in [("a", "client"), ("b", "server")] {
        let text = mesh.lab.node(node).metrics()?;
        for (metric, labels) in [
            (
                "culvert_tls_handshakes_total",
                &[("role", role), ("result", "ok")] as &[(&str, &str)],
            ),
            ("culvert_tunnels_open", &[("role", role)]),
            ("culvert_enrolment_requests_total", &[("request", "enroll"), ("result", "ok")]),
        ] {
            let count = sum_of(&text, metric, labels);
            ensure!(count >= 1.0, "{metric} of node {node}, {labels:?}: {count}");
        }
        let explained: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next())
            .collect();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let name = line.split(' ').next().unwrap_or_default();
            ensure!(explained.contains(name), "{name} has no HELP");
        }
    }
    Ok(())
}

/// Two pods of one node: both ends are reported, each with both identities, one connection and its bytes.
pub(crate) fn both_ends_of_one_node(mesh: &mut Mesh) -> anyhow::Result<()> {
    let pod = mesh.lab.run_pod("a", PodSpec::new("mesh", "near"))?;
    let target = SocketAddr::new(pod.ipv4, PORT);
    serve(pod.netns())?;
    known(mesh, "a", &["near"], None)?;
    transfer(mesh, "client", target)?;
    for side in [("a", "source"), ("a", "destination")] {
        check(mesh, side, ("client", "near"), 1, &labels(side.1, "near", "a", None))?;
    }
    mesh.lab.delete_pod("near")
}

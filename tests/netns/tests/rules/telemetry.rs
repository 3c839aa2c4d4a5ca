//! What is scraped: Istio's label set to the letter, compressed for whoever wants it; and what the allocator holds.

use anyhow::{Context as _, ensure};
use mesh_netns::Node;
use mesh_netns::process::{in_namespace, run};
use mesh_netns::wait::{PATIENCE, until};
use serde_json::Value;

use crate::mesh::{Mesh, sum_of};

/// Labels of traffic between known workloads, in order. Source: istio/ztunnel `src/proxy/metrics.rs`.
const LABELS: [&str; 27] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];

const COUNTERS: [&str; 4] = [
    "istio_tcp_connections_opened_total",
    "istio_tcp_connections_closed_total",
    "istio_tcp_received_bytes_total",
    "istio_tcp_sent_bytes_total",
];

/// Names and values of a series' labels; values hold neither quotes nor commas here.
fn labels(series: &str) -> Option<Vec<(&str, &str)>> {
    let (_, rest) = series.split_once('{')?;
    let (labels, _) = rest.rsplit_once('}')?;
    labels.split("\",").map(|label| label.trim_end_matches('"').split_once("=\"")).collect()
}

/// Both ends count one connection under the same labels, in Istio's order, each value that is known in its place.
pub(crate) fn istios_labels(mesh: &mut Mesh) -> anyhow::Result<()> {
    ensure!(mesh.reaches("client", mesh.server())?, "the client does not reach the server");
    for (node, reporter) in [("a", "source"), ("b", "destination")] {
        for counter in COUNTERS {
            let series = until(&format!("{counter} of {reporter}"), PATIENCE, || {
                let metrics = mesh.lab.node(node).metrics()?;
                let parts = [
                    format!("reporter=\"{reporter}\""),
                    "source_workload=\"client\"".to_owned(),
                    "destination_workload=\"server\"".to_owned(),
                    "response_flags=\"-\"".to_owned(),
                ];
                let of_both = metrics.lines().find(|line| {
                    line.starts_with(&format!("{counter}{{"))
                        && parts.iter().all(|part| line.contains(part))
                });
                Ok(of_both.map(str::to_owned))
            })?;
            let labels = labels(&series).with_context(|| series.clone())?;
            let names: Vec<&str> = labels.iter().map(|(name, _)| *name).collect();
            ensure!(names == LABELS, "{counter} of {reporter}: {names:?}");
            for (name, value) in [
                ("source_principal", "spiffe://cluster.local/ns/mesh/sa/client"),
                ("destination_principal", "spiffe://cluster.local/ns/mesh/sa/server"),
                ("source_workload_namespace", "mesh"),
                ("source_canonical_revision", "latest"),
                ("destination_app", "server"),
                ("source_cluster", "Kubernetes"),
                ("destination_cluster", "Kubernetes"),
                ("request_protocol", "tcp"),
                ("connection_security_policy", "mutual_tls"),
                ("source_zone", "a"),
                ("destination_zone", "b"),
            ] {
                ensure!(labels.contains(&(name, value)), "{name} is not {value}: {series}");
            }
        }
    }
    Ok(())
}

fn curl(node: &Node, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = in_namespace(Some(node.netns()), "curl");
    run(command.args(["-sS", "-m", "20"]).args(arguments), PATIENCE)?.output()
}

/// A scraper that accepts gzip gets it, and the same text as one that does not.
pub(crate) fn scrapes_are_compressed(mesh: &mut Mesh) -> anyhow::Result<()> {
    const URL: &str = "http://127.0.0.1:15020/metrics";
    let node = mesh.lab.node("a");
    let head = curl(node, &["-D", "-", "-o", "/dev/null", "-H", "accept-encoding: gzip", URL])?;
    ensure!(head.to_lowercase().contains("content-encoding: gzip"), "{head}");
    let size = |arguments: &[&str]| -> anyhow::Result<u64> {
        let fixed = ["-o", "/dev/null", "-w", "%{size_download}"];
        Ok(curl(node, &[&fixed, arguments, &[URL]].concat())?.trim().parse()?)
    };
    let (plain, gzip) = (size(&[])?, size(&["-H", "accept-encoding: gzip"])?);
    ensure!(gzip * 3 < plain, "{gzip} of {plain} bytes");
    let text = curl(node, &["--compressed", URL])?;
    ensure!(sum_of(&text, "istio_build", &[("component", "culvert-agent")]) > 0.0, "{text}");
    Ok(())
}

/// What the allocator holds is told, and fits what the kernel counts.
pub(crate) fn memory(mesh: &mut Mesh) -> anyhow::Result<()> {
    let node = mesh.lab.node("a");
    let told: Value = serde_json::from_str(&curl(node, &["http://127.0.0.1:15000/memory"])?)?;
    let bytes = |kind: &str| told["allocator"][kind].as_u64().unwrap_or_default();
    let (allocated, active, resident) = (bytes("allocated"), bytes("active"), bytes("resident"));
    ensure!(allocated > 100_000 && allocated <= active && active <= resident, "{told:#}");
    let process = told["residentBytes"].as_u64().context("no resident memory")?;
    ensure!(resident < 2 * process, "the allocator holds more than the process: {told:#}");
    let metrics = node.metrics()?;
    for kind in ["allocated", "active", "resident"] {
        let counted = sum_of(&metrics, "culvert_memory_bytes", &[("kind", kind)]);
        ensure!(counted > 100_000.0, "culvert_memory_bytes of {kind}: {counted}");
    }
    Ok(())
}

//! What a pod's annotations take out of capture, and nothing else.

use std::net::SocketAddr;

use anyhow::ensure;
use mesh_netns::process::run;
use mesh_netns::servers::ports;
use mesh_netns::wait::PATIENCE;
use mesh_netns::{PodSpec, Sniffer};

use crate::mesh::Mesh;

/// A pod's excluded port is reached in the clear, every other one of the same server in a tunnel; a pod that excludes nothing
/// reaches both in a tunnel.
pub(crate) fn excluded_outbound_ports(mesh: &mut Mesh) -> anyhow::Result<()> {
    let excluded = ports::HTTP2.to_string();
    let spec = PodSpec::new("mesh", "picky");
    mesh.lab.run_pod("a", spec.annotation("culvert.dev/exclude-outbound-ports", &excluded))?;
    mesh.wait_for("picky", mesh.server())?;
    let sniffer = Sniffer::start_for(
        mesh.lab.wire(),
        "br0",
        mesh.lab.folder(),
        "excluded-ports",
        "tcp and net 10.77.0.0/16",
    )?;
    let server = mesh.lab.pod("server").ipv4;
    for pod in ["picky", "client"] {
        for (port, version) in
            [(ports::HTTP, "--http1.1"), (ports::HTTP2, "--http2-prior-knowledge")]
        {
            let mut curl = mesh.lab.pod(pod).command("curl");
            let url = format!("http://{}/", SocketAddr::new(server, port));
            let answer = run(curl.args(["-sS", "-m", "20", version, &url]), PATIENCE)?.output()?;
            // In the clear too the application sees the pod.
            let expected = format!("hello from server to {}", mesh.lab.pod(pod).ipv4);
            ensure!(answer.trim() == expected, "{pod} to {url}: {answer}");
        }
    }
    let seen = sniffer.finish()?;
    let packets = |filter: &str| seen.packets(filter);
    let picky = mesh.lab.pod("picky").ipv4;
    let clear = packets(&format!("host {picky} and host {server} and port {excluded}"))?;
    ensure!(!clear.is_empty(), "the excluded port was not reached in the clear");
    let tunnelled = packets(&format!("host {picky} and port 15008"))?;
    ensure!(!tunnelled.is_empty(), "nothing of the pod was seen in a tunnel");
    let others = packets(&format!("not port 15008 and not (host {picky} and port {excluded})"))?;
    let shown = &others[..others.len().min(5)];
    ensure!(others.is_empty(), "{} packets in the clear: {shown:?}", others.len());
    mesh.lab.delete_pod("picky")
}

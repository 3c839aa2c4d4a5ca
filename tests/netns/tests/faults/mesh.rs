//! The lab of this suite.

use std::net::SocketAddr;

pub(crate) use mesh_netns::Held;
use mesh_netns::process::{Finished, run};
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, LabConfig, Pod, PodSpec, Process, manifest};

use crate::watch::SECRET;

/// Two nodes; `mesh/server` on b; on a `mesh/client`, `mesh/mate`, who serves as well, and `plain/stranger` and
/// `plain/neighbour`, who are not in the mesh.
pub(crate) struct Mesh {
    pub(crate) lab: Lab,
    _servers: Vec<Process>,
}

impl AsRef<Lab> for Mesh {
    fn as_ref(&self) -> &Lab {
        &self.lab
    }
}

impl Mesh {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut lab = Lab::start(LabConfig::two_nodes("flt"))?;
        lab.apply(&manifest::namespace("mesh", &[("culvert.dev/dataplane-mode", "ambient")]))?;
        lab.apply(&manifest::namespace("plain", &[]))?;
        let bin_dir = lab.bin_dir().to_owned();
        let mut servers = Vec::new();
        for (node, name) in [("b", "server"), ("a", "mate")] {
            let server = lab.run_pod(node, PodSpec::new("mesh", name))?;
            servers.push(servers::nginx(server)?);
            servers.push(servers::peer(server, &bin_dir)?);
        }
        lab.run_pod("a", PodSpec::new("mesh", "client"))?;
        lab.run_pod("a", PodSpec::new("plain", "stranger"))?;
        lab.run_pod("a", PodSpec::new("plain", "neighbour"))?;
        let mesh = Self { lab, _servers: servers };
        mesh.wait_for("client")?;
        mesh.wait_for("stranger")?;
        Ok(mesh)
    }

    pub(crate) fn pod(&self, name: &str) -> &Pod {
        self.lab.pod(name)
    }

    /// Where a pod would be dialled, IPv4 and IPv6.
    pub(crate) fn targets(&self, pod: &str, port: u16) -> [SocketAddr; 2] {
        let pod = self.pod(pod);
        [pod.ipv4, pod.ipv6].map(|ip| SocketAddr::new(ip, port))
    }

    /// The web servers of both nodes, by both families, asked for what no sniffer may see.
    pub(crate) fn urls(&self) -> Vec<String> {
        let servers = ["server", "mate"].map(|pod| self.targets(pod, ports::HTTP));
        servers.as_flattened().iter().map(|target| format!("http://{target}/{SECRET}")).collect()
    }

    /// One request of a pod to every one of the web servers.
    pub(crate) fn curl(&self, pod: &str) -> anyhow::Result<Finished> {
        let mut curl = self.pod(pod).command("curl");
        run(curl.args(["-sS", "-g", "-m", "10", "--fail-early"]).args(self.urls()), PATIENCE)
    }

    /// Waits until a pod reaches all of the web servers.
    pub(crate) fn wait_for(&self, pod: &str) -> anyhow::Result<()> {
        until(&format!("{pod} reaching the servers"), PATIENCE, || {
            Ok(self.curl(pod)?.success().then_some(()))
        })
    }

    /// Runs a verb of the lab's peer in a pod.
    pub(crate) fn peer(&self, pod: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let mut peer = self.pod(pod).command(&self.peer_program());
        run(peer.args(arguments), PATIENCE)?.output()
    }

    fn peer_program(&self) -> String {
        self.lab.bin_dir().join("culvert-lab-peer").to_string_lossy().into_owned()
    }

    pub(crate) fn restart_agent(&mut self, node: &str) -> anyhow::Result<()> {
        self.restart_agent_with(node, &[])
    }

    pub(crate) fn restart_agent_with(&mut self, node: &str, extra: &[&str]) -> anyhow::Result<()> {
        let index = self.lab.node_index(node);
        self.lab.start_agent_with(index, extra)?;
        self.lab.node_mut(node).wait_ready()
    }

    /// Opens quiet connections of a pod to one of the lab's peers.
    pub(crate) fn hold(&self, pod: &str, target: SocketAddr, count: u32) -> anyhow::Result<Held> {
        Held::open(&self.lab, self.pod(pod), target, count)
    }
}

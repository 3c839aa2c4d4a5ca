//! The control plane: etcd, API server, controller manager and scheduler, behind the nodes' bridge.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::addresses::{API_SERVER, Families};
use super::layout::Layout;
use super::mounts;
use super::network;
use super::supervisor::{Supervisor, wait_until};
use crate::command::succeeds;

/// Process 1 of the control plane.
pub(super) fn boot(layout: &Layout) -> anyhow::Result<()> {
    mounts::filesystem("proc", Path::new("/proc"), "")?;
    network::bridge(layout.plan())?;
    // Pods reach the API server with their own addresses, and it answers them.
    network::pod_routes(layout.plan(), layout.nodes, 0)?;
    let mut supervisor = Supervisor::new(layout.logs(), "control-plane".to_owned());
    supervisor.start("etcd", etcd(layout))?;
    supervisor.start("apiserver", api_server(layout))?;
    // The others end when they do not find it, and would lose a second to each attempt.
    wait_until("the API server", Duration::from_secs(120), || Ok(serves("livez")))?;
    supervisor.start("controller-manager", controller_manager(layout))?;
    supervisor.start("scheduler", scheduler(layout))?;
    supervisor.run()
}

/// True when the API server answers `endpoint`; asked from the control plane or a node.
pub(super) fn serves(endpoint: &str) -> bool {
    let url = format!("https://{API_SERVER}:6443/{endpoint}");
    succeeds(Command::new("curl").args(["-skf", "-m", "2", "-o", "/dev/null", &url]))
}

fn etcd(layout: &Layout) -> Command {
    let mut etcd = Command::new("etcd");
    etcd.arg("--data-dir").arg(layout.machine("etcd"));
    // A cluster that does not outlive its machine needs no disk barrier per write.
    etcd.args(["--unsafe-no-fsync", "--log-level", "warn"]);
    etcd.args(["--listen-client-urls", "http://127.0.0.1:2379"]);
    etcd.args(["--advertise-client-urls", "http://127.0.0.1:2379"]);
    etcd.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
    etcd.args(["--initial-advertise-peer-urls", "http://127.0.0.1:2380"]);
    etcd.args(["--initial-cluster", "default=http://127.0.0.1:2380"]);
    etcd
}

fn api_server(layout: &Layout) -> Command {
    let credentials = layout.credentials();
    let mut server = Command::new("kube-apiserver");
    let mut file = |flag: &str, name: &str| {
        server.arg(format!("--{flag}={}", credentials.path(name).display()));
    };
    file("tls-cert-file", "apiserver.crt");
    file("tls-private-key-file", "apiserver.key");
    file("client-ca-file", "ca.crt");
    file("token-auth-file", "tokens.csv");
    file("kubelet-client-certificate", "kubelet-client.crt");
    file("kubelet-client-key", "kubelet-client.key");
    file("service-account-key-file", "service-accounts.key");
    file("service-account-signing-key-file", "service-accounts.key");
    server.args([
        "--etcd-servers=http://127.0.0.1:2379",
        match layout.families {
            Families::V4 => "--bind-address=0.0.0.0",
            Families::Dual => "--bind-address=::",
        },
        &format!("--advertise-address={API_SERVER}"),
        "--secure-port=6443",
        &format!("--service-cluster-ip-range={}", layout.plan().service_ranges()),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        "--kubelet-preferred-address-types=InternalIP",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--profiling=false",
    ]);
    server
}

fn controller_manager(layout: &Layout) -> Command {
    let credentials = layout.credentials();
    let mut manager = Command::new("kube-controller-manager");
    let mut file = |flag: &str, path: &Path| {
        manager.arg(format!("--{flag}={}", path.display()));
    };
    file("kubeconfig", &credentials.kubeconfig("controller-manager"));
    file("root-ca-file", &credentials.path("ca.crt"));
    file("service-account-private-key-file", &credentials.path("service-accounts.key"));
    file("cluster-signing-cert-file", &credentials.path("ca.crt"));
    file("cluster-signing-key-file", &credentials.path("ca.key"));
    manager.args([
        "--leader-elect=false",
        // With the default of 20 requests a second its own start takes five seconds.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        "--use-service-account-credentials",
        "--allocate-node-cidrs=false",
        &format!("--service-cluster-ip-range={}", layout.plan().service_ranges()),
        // A node that is switched off is seen within ten seconds instead of forty.
        "--node-monitor-grace-period=10s",
        "--node-monitor-period=1s",
        "--profiling=false",
    ]);
    manager
}

fn scheduler(layout: &Layout) -> Command {
    let kubeconfig = layout.credentials().kubeconfig("scheduler");
    let mut scheduler = Command::new("kube-scheduler");
    scheduler.arg(format!("--kubeconfig={}", kubeconfig.display()));
    scheduler.args(["--leader-elect=false", "--kube-api-qps=500", "--kube-api-burst=1000"]);
    scheduler.arg("--profiling=false");
    scheduler
}

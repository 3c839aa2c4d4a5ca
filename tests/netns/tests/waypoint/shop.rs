//! The lab of this suite, and the questions that all its parts ask.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_netns::lab::CONTROLLER_IP;
use mesh_netns::peer::ports as peer;
use mesh_netns::pod::Pod;
use mesh_netns::process::{Finished, run};
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Lab, LabConfig, PodSpec, Process, manifest};
use serde_json::{Value, json};

/// What puts a namespace into the mesh.
pub(crate) const AMBIENT: (&str, &str) = ("culvert.dev/dataplane-mode", "ambient");
/// Where the server that tells what it sees is.
pub(crate) const SEEN: u16 = 7100;
/// The service of both versions.
pub(crate) const CART: &str = "10.96.1.1";

/// Two nodes. Namespace `shop` is behind its waypoint: `cart` is `v1` on b, with `v1` and `v2` as services of their own, v2 on a.
/// Clients on a: `shop/client` and `plain/stranger`, who is not in the mesh.
pub(crate) struct Shop {
    pub(crate) lab: Lab,
    servers: Vec<Process>,
    waypoints: BTreeMap<String, Process>,
}

impl AsRef<Lab> for Shop {
    fn as_ref(&self) -> &Lab {
        &self.lab
    }
}

/// A server that answers with what it saw, as JSON; `/status/N` answers N, `/slow` after 3 s, `/flaky` 503 twice of three times,
/// `/drop` never.
const SERVER: &str = r#"
import json, sys, time, http.server, socketserver
name = sys.argv[1]
flaky = 0
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self):
        global flaky
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length).decode("latin-1")
        status = 200
        if self.path.startswith("/drop"):
            print(self.command, self.path, flush=True)
            self.close_connection = True
            return
        if self.path.startswith("/status/"): status = int(self.path[8:])
        if self.path.startswith("/slow"): time.sleep(3)
        if self.path.startswith("/flaky"):
            flaky += 1
            status = 200 if flaky % 3 == 0 else 503
        text = json.dumps({"server": name, "method": self.command, "path": self.path, "body": body, "peer": self.client_address[0],
            "headers": [[k.lower(), v] for k, v in self.headers.items()]}).encode() + b"\n"
        self.send_response(status)
        self.send_header("x-server", name)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer
    def log_message(self, *_): print(self.command, self.path, flush=True)
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 1024
Server(("0.0.0.0", 7100), Handler).serve_forever()
"#;

impl Shop {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut lab = Lab::start(LabConfig::two_nodes("way"))?;
        lab.apply(&manifest::namespace(
            "shop",
            &[AMBIENT, ("culvert.dev/use-waypoint", "waypoint")],
        ))?;
        lab.apply(&manifest::namespace("plain", &[]))?;
        lab.apply(&manifest::namespace("other", &[AMBIENT]))?;
        lab.apply(&manifest::waypoint("shop", "waypoint"))?;
        let ip = |text: &str| text.parse::<IpAddr>();
        let served = [
            ("http", 80, ports::HTTP),
            ("web", 81, ports::HTTP),
            ("http2-web", 82, ports::HTTP2),
            ("seen", 83, SEEN),
            ("http-seen", 84, SEEN),
            ("grpc", 90, peer::GRPC),
            ("http-ws", 91, peer::WEBSOCKET),
            ("tcp-echo", 92, peer::ECHO),
            ("first", 93, peer::SERVER_FIRST),
            ("http-reset", 94, peer::RESET),
            ("http-none", 95, 7999),
            ("http-garbage", 96, peer::SERVER_FIRST),
        ];
        for (name, app, vip) in
            [("cart", "v1", CART), ("v1", "v1", "10.96.1.2"), ("v2", "v2", "10.96.1.3")]
        {
            lab.apply(&manifest::service("shop", name, app, &[ip(vip)?], &served))?;
        }
        let hbone = [("hbone", 15008, 15008)];
        lab.apply(&manifest::service(
            "shop",
            "waypoint",
            "waypoint",
            &[ip("10.96.1.100")?],
            &hbone,
        ))?;
        lab.run_pod("a", PodSpec::new("shop", "client"))?;
        lab.run_pod("a", PodSpec::new("other", "visitor"))?;
        lab.run_pod("a", PodSpec::new("plain", "stranger"))?;
        let mut shop = Self { lab, servers: Vec::new(), waypoints: BTreeMap::new() };
        shop.run_server("b", "v1")?;
        shop.run_server("a", "v2")?;
        shop.run_waypoint("waypoint")?;
        until("the client reaching the service through the waypoint", PATIENCE, || {
            Ok(shop.get("client", "http://10.96.1.1/", &[])?.success().then_some(()))
        })
        .with_context(|| format!("waypoint:\n{}", shop.log_tail(40)))?;
        Ok(shop)
    }

    fn run_server(&mut self, node: &str, name: &str) -> anyhow::Result<()> {
        let bin_dir = self.lab.bin_dir().to_owned();
        let pod = self.lab.run_pod(node, PodSpec::new("shop", name))?;
        self.servers.push(servers::nginx(pod)?);
        self.servers.push(servers::peer(pod, &bin_dir)?);
        self.servers.push(serve_seen(self.lab.pod(name))?);
        Ok(())
    }

    /// Runs a pod of the waypoint, and the waypoint in it by its one command.
    pub(crate) fn run_waypoint(&mut self, name: &str) -> anyhow::Result<()> {
        let spec = PodSpec::new("shop", name)
            .app("waypoint")
            .service_account("waypoint")
            .label("culvert.dev/dataplane-mode", "none")
            .label("gateway.networking.k8s.io/gateway-name", "waypoint");
        self.lab.run_pod("b", spec)?;
        self.start_waypoint(name)
    }

    /// Starts the waypoint in its pod and waits until it is ready.
    pub(crate) fn start_waypoint(&mut self, name: &str) -> anyhow::Result<()> {
        self.start_waypoint_with(name, &[])
    }

    /// The same with further arguments.
    pub(crate) fn start_waypoint_with(&mut self, name: &str, extra: &[&str]) -> anyhow::Result<()> {
        let token =
            self.lab.controller_command(&["token", "create", "--waypoint", "shop/waypoint"])?;
        let pod = self.lab.pod(name);
        let file = pod.folder().join("join-token");
        std::fs::write(&file, token)?;
        let program = self.lab.bin_dir().join("culvert-waypoint");
        let mut command = pod.command(&program.to_string_lossy());
        command
            .args(["--gateway", "shop/waypoint"])
            .args(["--controller", &format!("https://{CONTROLLER_IP}:15012")])
            .arg("--controller-root")
            .arg(self.lab.controller_root())
            .arg("--join-token-file")
            .arg(&file)
            .arg("--state-dir")
            .arg(pod.folder().join("state"))
            .args(["--detect-ms", "1000", "--drain-seconds", "5"])
            .args(extra)
            .env("RUST_BACKTRACE", "1");
        let process = pod.start("waypoint", &mut command)?;
        self.waypoints.insert(name.to_owned(), process);
        until("the waypoint being ready", PATIENCE, || {
            let ready = "curl -sf -m 2 http://127.0.0.1:15021/ready";
            Ok(self.lab.pod(name).shell(ready)?.success().then_some(()))
        })
        .with_context(|| format!("waypoint:\n{}", self.log_tail(40)))
    }

    /// The process of a pod of the waypoint.
    pub(crate) fn waypoint(&mut self, name: &str) -> anyhow::Result<&mut Process> {
        self.waypoints.get_mut(name).context("no waypoint runs")
    }

    /// Ends the waypoint in a pod and deletes the pod.
    pub(crate) fn delete_waypoint(&mut self, name: &str) -> anyhow::Result<()> {
        self.waypoints.remove(name);
        self.lab.delete_pod(name)
    }

    /// Says of a pod that it is ready, or is not.
    pub(crate) fn set_ready(&self, name: &str, ready: bool) -> anyhow::Result<()> {
        let file = self.lab.manifests().join(format!("Pod.shop.{name}.json"));
        let mut object: Value = serde_json::from_str(&std::fs::read_to_string(file)?)?;
        let word = if ready { "True" } else { "False" };
        object["status"]["conditions"] = json!([{ "type": "Ready", "status": word }]);
        self.lab.apply(&object)
    }

    pub(crate) fn log(&self) -> String {
        self.waypoints.get("waypoint").map_or_else(String::new, Process::log)
    }

    pub(crate) fn log_tail(&self, lines: usize) -> String {
        self.waypoints.get("waypoint").map_or_else(String::new, |process| process.log_tail(lines))
    }

    /// Waits for a line of the waypoint's log, among those after the first `skip` bytes, that holds every one of `parts`.
    pub(crate) fn line(&self, skip: usize, parts: &[&str]) -> anyhow::Result<String> {
        until(&format!("a line with {parts:?}"), Duration::from_secs(15), || {
            let log = self.log();
            let new = log.get(skip..).unwrap_or_default();
            let found = new.lines().find(|line| parts.iter().all(|part| line.contains(part)));
            Ok(found.map(str::to_owned))
        })
    }

    /// The waypoint's metrics.
    pub(crate) fn metrics(&self) -> anyhow::Result<String> {
        self.lab.pod("waypoint").shell("curl -sf -m 5 http://127.0.0.1:15020/metrics")?.output()
    }

    /// The sum of a metric's series that hold every one of `labels`.
    pub(crate) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<f64> {
        let text = self.metrics()?;
        let wanted: Vec<String> =
            labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
        let series = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        let found = series.filter(|line| wanted.iter().all(|label| line.contains(label)));
        Ok(found.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// Runs curl in a pod; `extra` goes before the address.
    pub(crate) fn get(&self, pod: &str, url: &str, extra: &[&str]) -> anyhow::Result<Finished> {
        let mut curl = self.lab.pod(pod).command("curl");
        run(curl.args(["-sS", "-m", "10"]).args(extra).arg(url), PATIENCE)
    }

    /// The status that curl gets; 0 when it gets none.
    pub(crate) fn status(&self, pod: &str, url: &str, extra: &[&str]) -> anyhow::Result<u16> {
        let mut arguments = vec!["-o", "/dev/null", "-w", "%{http_code}"];
        arguments.extend(extra);
        Ok(self.get(pod, url, &arguments)?.stdout.trim().parse().unwrap_or(0))
    }

    /// What the server at [`SEEN`] saw of a request of the client to `cart`.
    pub(crate) fn seen(&self, path: &str, extra: &[&str]) -> anyhow::Result<Value> {
        let got = self.get("client", &format!("http://{CART}:83{path}"), extra)?;
        serde_json::from_str(&got.stdout).with_context(|| format!("{}{}", got.stdout, got.stderr))
    }

    /// Runs a verb of the lab's peer in a pod.
    pub(crate) fn ask(&self, pod: &str, arguments: &[&str]) -> anyhow::Result<Finished> {
        let program = self.lab.bin_dir().join("culvert-lab-peer");
        let mut command = self.lab.pod(pod).command(&program.to_string_lossy());
        run(command.args(arguments), PATIENCE)
    }

    /// Applies an object, waits until `condition` holds, looks, and deletes the object whatever came of it.
    pub(crate) fn with(
        &mut self,
        object: &Value,
        what: &str,
        condition: impl Fn(&Self) -> anyhow::Result<bool>,
        look: impl FnOnce(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.lab.apply(object)?;
        let in_force = until(what, PATIENCE, || Ok(condition(self)?.then_some(())));
        let outcome = in_force.and_then(|()| look(self));
        self.lab.delete(object)?;
        let gone =
            until(
                "the object being gone again",
                PATIENCE,
                || Ok((!condition(self)?).then_some(())),
            );
        outcome.and(gone)
    }
}

/// Starts the server that tells what it sees.
pub(crate) fn serve_seen(pod: &Pod) -> anyhow::Result<Process> {
    let mut python = pod.command("python3");
    let process = pod.start("seen", python.args(["-c", SERVER, &pod.spec.name]))?;
    servers::listening(pod, SEEN)?;
    Ok(process)
}

/// A header that the server saw.
pub(crate) fn header<'s>(seen: &'s Value, name: &str) -> Option<&'s str> {
    let headers = seen["headers"].as_array()?;
    headers.iter().find(|pair| pair[0] == name).and_then(|pair| pair[1].as_str())
}

/// Fails unless `left` is `right`.
pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(
    what: &str,
    left: T,
    right: T,
) -> anyhow::Result<()> {
    ensure!(left == right, "{what}: {left:?}, not {right:?}");
    Ok(())
}

/// The spec of a policy attached to a service.
pub(crate) fn at_service(name: &str, action: &str, rules: &Value) -> Value {
    json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": name }], "action": action, "rules": rules })
}

/// An address of the lab.
pub(crate) fn target(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}

//! `cargo xtask demo`: the mesh shown step by step, each step with its proof.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a demonstration prints")]

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use mesh_netns::process::Finished;
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, interruption, is_interrupted, until};
use mesh_netns::{Lab, LabConfig, Pod, PodSpec, Process, Sniffer, manifest};
use serde_json::json;

const NAME: &str = "demo";
const WEB_VIP: &str = "10.96.0.10";

/// Two nodes, pods and real programs talking through Culvert.
#[derive(Debug, Parser)]
struct Arguments {
    /// Leave everything running and print commands to try.
    #[arg(long)]
    keep: bool,
    /// Take down a demo that was left running.
    #[arg(long)]
    stop: bool,
    /// Left over by a demo that was interrupted twice.
    #[arg(long, hide = true)]
    interrupted: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.stop {
        Lab::remove_leftovers(&config().name)?;
        if arguments.interrupted {
            // A program that was just making something may have ended after the first look.
            std::thread::sleep(Duration::from_millis(300));
            Lab::remove_leftovers(&config().name)?;
            std::process::exit(INTERRUPTED);
        }
        println!("the demo is gone");
        return Ok(());
    }
    ensure!(
        !Lab::exists(&config().name),
        "a demo runs, or was left running: cargo xtask demo --stop takes it down"
    );
    watch_signals()?;
    let started = Instant::now();
    if let Err(error) = (Demo { step: 0 }).run(arguments.keep) {
        // A lab that was still being built is not whole enough to take itself down.
        Lab::remove_leftovers(&config().name)?;
        if is_interrupted() {
            eprintln!("interrupted; everything is taken down");
            std::process::exit(INTERRUPTED);
        }
        return Err(error);
    }
    println!("\ndone in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// What a shell says of a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

fn config() -> LabConfig {
    LabConfig::two_nodes(NAME)
}

/// The first signal ends the demo at its next step or wait, and takes everything down; a second takes everything down
/// at once, whatever is going on.
fn watch_signals() -> anyhow::Result<()> {
    let interruption = interruption();
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
    ])?;
    std::thread::spawn(move || {
        for _signal in signals.forever() {
            if interruption.swap(true, Ordering::Relaxed) {
                // In this program's place, so that nothing of it goes on making what is taken down.
                let failed =
                    Command::new("/proc/self/exe").args(["--stop", "--interrupted"]).exec();
                eprintln!("not everything is gone: {failed}; run cargo xtask demo --stop");
                std::process::exit(INTERRUPTED);
            }
        }
    });
    Ok(())
}

struct Demo {
    step: u32,
}

/// Ends the demo when a signal came.
fn go_on() -> anyhow::Result<()> {
    ensure!(!is_interrupted(), "interrupted");
    Ok(())
}

impl Demo {
    fn step(&mut self, text: &str) -> anyhow::Result<()> {
        go_on()?;
        self.step += 1;
        println!("\n{}. {text}", self.step);
        Ok(())
    }

    fn run(&mut self, keep: bool) -> anyhow::Result<()> {
        self.step("Two nodes on one wire, each with an agent; a controller that reads a folder of manifests")?;
        let mut lab = Lab::start(config())?;
        for node in ["a", "b"] {
            let node = lab.node(node);
            proof(&format!(
                "node {} ({}) is ready, pods in {}",
                node.name, node.ipv4, node.subnet4
            ));
        }

        self.step("Namespace shop joins the mesh by its label; three pods start, made by standard CNI plugins")?;
        lab.apply(&manifest::namespace("shop", &[("culvert.dev/dataplane-mode", "ambient")]))?;
        lab.apply(&manifest::service(
            "shop",
            "web",
            "web",
            &[WEB_VIP.parse()?],
            &[("http", 80, ports::HTTP)],
        ))?;
        lab.run_pod("a", PodSpec::new("shop", "client"))?;
        lab.run_pod("a", PodSpec::new("shop", "intruder"))?;
        let web = lab.run_pod("b", PodSpec::new("shop", "web"))?;
        let _nginx: Process = servers::nginx(web)?;
        for name in ["client", "intruder", "web"] {
            let pod = lab.pod(name);
            proof(&format!("shop/{name} on node {} has {} and {}", pod.node, pod.ipv4, pod.ipv6));
        }

        self.step("curl asks nginx on the other node by its service's name, while a sniffer listens on the wire")?;
        let sniffer = Sniffer::start(lab.wire(), "br0", lab.folder(), "wire")?;
        let answer = until("the service answering", PATIENCE, || {
            let answer = curl(lab.pod("client"))?;
            Ok(answer.success().then_some(answer.stdout))
        })?;
        proof(&format!("nginx answered: {}", answer.trim()));
        let client = lab.pod("client").ipv4.to_string();
        ensure!(answer.contains(&client), "nginx did not see the client's own address {client}");
        proof("nginx saw the client pod's own address");
        let line = until("the destination's access log", PATIENCE, || {
            Ok(log_line(&lab, "b", "inbound", "client"))
        })?;
        proof(&format!("node b's access log: {line}"));
        let capture = sniffer.finish()?;
        let pods = "net 10.77.0.0/16 and tcp";
        let all = capture.packets(pods)?;
        let other = capture.packets(&format!("{pods} and not port 15008"))?;
        ensure!(!all.is_empty(), "the sniffer saw no packet between the pods");
        ensure!(other.is_empty(), "TCP outside the tunnel: {other:?}");
        ensure!(!capture.contains(b"hello from web")?, "the answer was on the wire in the clear");
        proof(&format!(
            "{} packets between the pods, all on port 15008, no byte of the answer in the clear",
            all.len()
        ));

        self.step(
            "A policy lets only the service account client in; the refusal is explained by name",
        )?;
        lab.apply(&manifest::authorization_policy(
            "shop",
            "web-allow",
            &json!({
                "selector": { "matchLabels": { "app": "web" } },
                "action": "ALLOW",
                "rules": [{ "from": [{ "source": { "principals": ["cluster.local/ns/shop/sa/client"] } }] }],
            }),
        ))?;
        until("the intruder being refused", PATIENCE, || {
            Ok((!curl(lab.pod("intruder"))?.success()).then_some(()))
        })?;
        let allowed = curl(lab.pod("client"))?;
        ensure!(allowed.success(), "the client is refused too: {}", allowed.stderr);
        proof("client: still answered");
        proof(&format!("intruder: {}", curl(lab.pod("intruder"))?.stderr.trim()));
        let line = until("the denial in the access log", PATIENCE, || {
            Ok(log_line(&lab, "b", "web-allow", "intruder"))
        })?;
        proof(&format!("node b's access log: {line}"));
        let explained = lab.culvert(&["explain", "shop/intruder", "->", "web.shop:80"])?;
        for line in explained.stdout.lines().chain(explained.stderr.lines()) {
            proof(line);
        }
        ensure!(explained.stdout.contains("web-allow"), "explain does not name the policy");

        self.step("Node a's agent is killed with -9: new connections are refused, nothing leaks")?;
        let sniffer = Sniffer::start(lab.wire(), "br0", lab.folder(), "wire-down")?;
        lab.node_mut("a").kill_agent();
        let started = Instant::now();
        let refused = get(lab.pod("client"), WEB_VIP)?;
        ensure!(!refused.success(), "the connection went through without an agent");
        proof(&format!(
            "client after {} ms: {}",
            started.elapsed().as_millis(),
            refused.stderr.trim()
        ));
        let leaked =
            sniffer.finish()?.packets("src net 10.77.1.0/24 and tcp and not port 15008")?;
        ensure!(leaked.is_empty(), "leaked: {leaked:?}");
        proof("the sniffer saw no TCP from node a's pods");

        self.step("The agent starts again, adopts the pinned programs, and everything works")?;
        let index = lab.node_index("a");
        lab.start_agent(index)?;
        lab.node_mut("a").wait_ready()?;
        let answer = until("the client being answered", PATIENCE, || {
            let answer = curl(lab.pod("client"))?;
            Ok(answer.success().then_some(answer.stdout))
        })?;
        proof(&format!("nginx answered: {}", answer.trim()));

        go_on()?;
        if keep {
            hints(&lab);
            std::mem::forget(_nginx);
            lab.leave_running();
        }
        Ok(())
    }
}

fn proof(text: &str) {
    println!("   {text}");
}

fn curl(pod: &Pod) -> anyhow::Result<Finished> {
    get(pod, "web.shop")
}

fn get(pod: &Pod, host: &str) -> anyhow::Result<Finished> {
    let mut command = pod.command("curl");
    command.args(["-sS", "-4", "-m", "5", &format!("http://{host}/")]);
    mesh_netns::process::run(&mut command, Duration::from_secs(10)).context("curl")
}

/// The last line of a node's access log that holds both words.
fn log_line(lab: &Lab, node: &str, first: &str, second: &str) -> Option<String> {
    lab.node(node)
        .agent_log(500)
        .lines()
        .rev()
        .find(|line| line.contains("access") && line.contains(first) && line.contains(second))
        .map(str::to_owned)
}

fn hints(lab: &Lab) {
    let bin = lab.bin_dir().display();
    let a = lab.node("a");
    println!("\nEverything keeps running. Try:");
    println!("  ip netns exec {} curl -s http://web.shop/", lab.pod("client").netns());
    println!("  CULVERT_RUN_DIR={} {bin}/culvert status", a.run_dir().display());
    println!("  CULVERT_RUN_DIR={} {bin}/culvert connections", a.run_dir().display());
    println!(
        "  CULVERT_CONTROLLER_SOCKET={} {bin}/culvert explain 'shop/intruder -> web.shop:80'",
        lab.controller_socket().display()
    );
    println!("  ls {}    # change a policy and watch", lab.manifests().display());
    println!("and take it down with: cargo xtask demo --stop");
}

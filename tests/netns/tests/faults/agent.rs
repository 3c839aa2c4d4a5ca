//! The agent or the controller is not there, or comes back.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_netns::process::run;
use mesh_netns::servers::ports;
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{Pod, PodSpec, Traffic, manifest, net};
use serde_json::{Value, json};

use crate::mesh::Mesh;
use crate::watch::{Scope, Watch};

/// How soon a refusal comes.
const AT_ONCE: Duration = Duration::from_millis(100);
/// The worst of several may take. Less than TCP's first retry, which is after a second.
const WORST: Duration = Duration::from_millis(500);

/// With the agent dead a new connection is refused within 100 ms and nothing leaves in the clear.
pub(crate) fn dead_refuses_and_nothing_leaks(mesh: &mut Mesh) -> anyhow::Result<()> {
    let watch = Watch::start(&mesh.lab, "dead")?;
    mesh.lab.node_mut("a").kill_agent();
    for target in
        mesh.targets("server", ports::HTTP).iter().chain(&mesh.targets("mate", ports::HTTP))
    {
        let mut took = Vec::new();
        for _ in 0..10 {
            // A lost packet and its retry would take a second.
            let said = mesh.peer("client", &["closed", &target.to_string(), "900"])?;
            let (how, micros) = said.trim().split_once(' ').context("no time")?;
            ensure!(how == "refused", "the connection to {target} was {how}");
            took.push(Duration::from_micros(micros.parse()?));
        }
        // As a rule at once; the worst may have met a machine that was busy for a moment, but nothing that was tried again.
        took.sort();
        let (median, worst) = (took[took.len() / 2], took[took.len() - 1]);
        ensure!(median < AT_ONCE && worst < WORST, "{target} was refused after {took:?}");
    }
    watch.finish()?.nothing_in_the_clear(&Scope::All)?;
    // The same when the pod is the one that is called, from outside the mesh.
    for target in mesh.targets("mate", ports::HTTP) {
        let said = mesh.peer("stranger", &["closed", &target.to_string(), "900"])?;
        ensure!(said.starts_with("refused "), "from outside {target} was {said}");
    }
    mesh.restart_agent("a")?;
    mesh.wait_for("client")
}

/// Connections made again and again while the agent is killed and started: each is tunnelled or refused.
pub(crate) fn restarts_under_traffic_never_leak(mesh: &mut Mesh) -> anyhow::Result<()> {
    let watch = Watch::start(&mesh.lab, "restarts")?;
    let traffic = Traffic::start(mesh, "client", "restarts", &mesh.urls().join(" "))?;
    for _ in 0..3 {
        traffic.more(4, "hello from")?;
        mesh.lab.node_mut("a").kill_agent();
        traffic.more(8, "curl: ")?;
        mesh.restart_agent("a")?;
        mesh.wait_for("client")?;
    }
    traffic.more(4, "hello from")?;
    traffic.finish()?;
    let seen = watch.finish()?;
    seen.nothing_in_the_clear(&Scope::All)?;
    let (between, inside) = seen.tunnelled(mesh)?;
    ensure!(between > 0 && inside > 0, "{between} and {inside} packets of tunnels");
    Ok(())
}

/// A pod that starts while its node's agent is away fails to start, retryably.
pub(crate) fn pod_does_not_start_without_one(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.node_mut("a").kill_agent();
    let refused = mesh.lab.run_pod("a", PodSpec::new("mesh", "early"));
    let message = match refused {
        Ok(_) => anyhow::bail!("the pod started in the clear"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(message.contains("\"code\": 11") || message.contains("\"code\":11"), "{message}");
    mesh.restart_agent("a")?;
    // From its first moment on.
    let watch = Watch::start(&mesh.lab, "early")?;
    mesh.lab.run_pod("a", PodSpec::new("mesh", "early"))?;
    let traffic = Traffic::start(mesh, "early", "early", &mesh.urls().join(" "))?;
    traffic.more(8, "hello from")?;
    traffic.finish()?;
    watch.finish()?.nothing_in_the_clear(&Scope::All)?;
    mesh.lab.delete_pod("early")
}

/// What a runtime asks beside ADD and DEL, of the agent that runs and of one that does not: CHECK of a pod that is as it was
/// left, STATUS, and GC, which takes sandboxes that are gone and none that lives.
pub(crate) fn runtime_checks_and_collects(mesh: &mut Mesh) -> anyhow::Result<()> {
    let call = |mesh: &Mesh, verb: &str, pod: &Pod, valid: Option<&[&Pod]>| {
        let mut chain = mesh.lab.node("a").chain.clone();
        chain.conflist["cniVersion"] = json!("1.1.0");
        let mut plugin = chain.conflist["plugins"][1].clone();
        if let Some(valid) = valid {
            let valid = valid
                .iter()
                .map(|pod| json!({ "containerID": pod.attachment.container_id, "ifname": "eth0" }));
            plugin["cni.dev/valid-attachments"] = valid.collect();
        }
        let left = json!({
            "cniVersion": "1.1.0",
            "interfaces": [{ "name": "eth0", "sandbox": pod.attachment.netns }],
            "ips": [{ "interface": 0, "address": format!("{}/24", pod.ipv4) }],
        });
        chain.call(verb, &plugin, &left, &pod.attachment)
    };
    let fails = |outcome: anyhow::Result<Value>, code: u32, what: &str| -> anyhow::Result<()> {
        let said = match outcome {
            Ok(said) => anyhow::bail!("{what} succeeds: {said}"),
            Err(error) => format!("{error:#}"),
        };
        let named = [format!("\"code\":{code},"), format!("\"code\": {code},")];
        ensure!(named.iter().any(|code| said.contains(code)), "{what}: {said}");
        Ok(())
    };
    let client = mesh.pod("client");
    call(mesh, "STATUS", client, None)?;
    call(mesh, "CHECK", client, None)?;
    call(mesh, "CHECK", mesh.pod("stranger"), None).context("of a pod outside the mesh")?;
    let elsewhere = call(mesh, "CHECK", mesh.pod("server"), None);
    fails(elsewhere, 101, "CHECK of a pod that this agent never saw")?;

    let enrolled = |mesh: &Mesh| mesh.lab.node("a").culvert(&["pod", "list"])?.output();
    // The agent looks for itself every second, but not three times in a row before the runtime.
    for name in ["gone-1", "gone-2", "gone-3"] {
        let pod = mesh.lab.run_pod("a", PodSpec::new("mesh", name))?;
        net::remove(pod.netns())?;
        let valid = [mesh.pod("client"), mesh.pod("mate")];
        call(mesh, "GC", mesh.pod("client"), Some(&valid))?;
        // The namespace lives until the agent's own sockets in it are closed; until then it stays captured.
        until("the collection", PATIENCE, || {
            let left = enrolled(mesh)?;
            let is_in_mesh = left.lines().any(|l| l.contains(name) && !l.contains(" closed "));
            ensure!(!is_in_mesh, "{name} was not collected: {left}");
            Ok((!left.contains(name)).then_some(()))
        })?;
        mesh.lab.delete_pod(name)?;
    }
    // A list that leaves out pods which live, as that of another network does.
    call(mesh, "GC", mesh.pod("client"), Some(&[]))?;
    let left = enrolled(mesh)?;
    ensure!(left.contains("client") && left.contains("mate"), "pods that live are gone: {left}");
    call(mesh, "CHECK", mesh.pod("client"), None).context("after the collection")?;
    fails(call(mesh, "GC", mesh.pod("client"), None), 7, "GC without a list")?;

    mesh.lab.node_mut("a").kill_agent();
    fails(call(mesh, "STATUS", mesh.pod("client"), None), 51, "STATUS without an agent")?;
    fails(call(mesh, "CHECK", mesh.pod("client"), None), 11, "CHECK without an agent")?;
    fails(call(mesh, "GC", mesh.pod("client"), Some(&[])), 11, "GC without an agent")?;
    mesh.restart_agent("a")?;
    call(mesh, "STATUS", mesh.pod("client"), None)?;
    call(mesh, "CHECK", mesh.pod("client"), None).context("after the agent came back")?;
    mesh.wait_for("client")
}

/// The controller is away: traffic goes on, also new connections, and none in the clear.
pub(crate) fn controller_away_changes_nothing(mesh: &mut Mesh) -> anyhow::Result<()> {
    let watch = Watch::start(&mesh.lab, "alone")?;
    let traffic = Traffic::start(mesh, "client", "alone", &mesh.urls().join(" "))?;
    mesh.lab.kill_controller();
    traffic.more(20, "hello from")?;
    mesh.lab.start_controller()?;
    traffic.more(8, "hello from")?;
    traffic.finish_whole()?;
    watch.finish()?.nothing_in_the_clear(&Scope::All)
}

/// The controller is away and agents die: their successors go on with the keys that the kernel kept. One that may keep none
/// refuses, and says why.
pub(crate) fn keys_outlive_an_agent(mesh: &mut Mesh) -> anyhow::Result<()> {
    let pin = mesh.lab.node("a").bpffs().join("kept-v1");
    ensure!(pin.exists(), "nothing is kept at {}", pin.display());
    // What is heard is saved a moment later, and in order.
    let mark = manifest::service("mesh", "last-words", "server", &[], &[("http", 80, 8080)]);
    mesh.lab.apply(&mark)?;
    for node in ["a", "b"] {
        let saved = mesh.lab.node(node).state_dir().join("mesh-state");
        until("the state of the mesh being saved", PATIENCE, || {
            let Ok(state) = std::fs::read(&saved) else { return Ok(None) };
            Ok(state.windows(10).any(|words| words == b"last-words").then_some(()))
        })?;
    }
    mesh.lab.kill_controller();
    for node in ["a", "b"] {
        mesh.lab.node_mut(node).kill_agent();
    }
    for node in ["a", "b"] {
        mesh.restart_agent(node)?;
    }
    let watch = Watch::start(&mesh.lab, "orphans")?;
    let made = mesh.curl("client")?;
    ensure!(made.success(), "new connections: {}{}", made.stdout, made.stderr);
    let seen = watch.finish()?;
    seen.nothing_in_the_clear(&Scope::All)?;
    let (between, inside) = seen.tunnelled(mesh)?;
    ensure!(between > 0 && inside > 0, "{between} and {inside} packets of tunnels");
    let restored = "culvert_kept_keys_restored_total";
    let metrics = mesh.lab.node("a").metrics()?;
    ensure!(metrics.contains(&format!("{restored} 2\n")), "of client and mate: {metrics}");

    mesh.lab.node_mut("a").kill_agent();
    mesh.restart_agent_with("a", &["--keep-keys", "none"])?;
    ensure!(!pin.exists(), "{} is still there", pin.display());
    let watch = Watch::start(&mesh.lab, "keyless")?;
    let refused = mesh.curl("client")?;
    ensure!(!refused.success(), "made without a certificate: {}", refused.stdout);
    watch.finish()?.nothing_in_the_clear(&Scope::All)?;
    let client = format!("src.addr={}:", mesh.pod("client").ipv4);
    until("the log naming the reason", PATIENCE, || {
        let log = mesh.lab.node("a").agent_log(20);
        let named = log
            .lines()
            .any(|line| line.contains(&client) && line.contains("reason=no_certificate"));
        Ok(named.then_some(()))
    })
    .with_context(|| mesh.lab.node("a").agent_log(20))?;

    mesh.lab.start_controller()?;
    mesh.wait_for("client")?;
    mesh.lab.delete(&mark)?;
    mesh.lab.node_mut("a").kill_agent();
    mesh.restart_agent("a")?;
    mesh.wait_for("client")?;
    ensure!(pin.exists(), "nothing is kept at {}", pin.display());
    Ok(())
}

/// A process of a pod cannot bind the agent's ports, neither beside the agent nor while it is away.
pub(crate) fn pod_cannot_take_its_ports(mesh: &mut Mesh) -> anyhow::Result<()> {
    const TAKE: &str = "import socket,sys\n\
        for family, address in ((socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::'), (socket.AF_INET, sys.argv[1])):\n\
        \x20for port in (15001, 15006, 15008, 15053):\n\
        \x20\x20for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):\n\
        \x20\x20\x20thief = socket.socket(family, kind)\n\
        \x20\x20\x20thief.setsockopt(socket.SOL_SOCKET, 15, 1)\n\
        \x20\x20\x20try: thief.bind((address, port))\n\
        \x20\x20\x20except PermissionError: continue\n\
        \x20\x20\x20print('took', address, port, kind)\n\
        print('tried all')";
    let steal = |mesh: &Mesh| -> anyhow::Result<()> {
        let client = mesh.pod("client");
        let mut thief = client.command("python3");
        let said = run(thief.args(["-c", TAKE, &client.ipv4.to_string()]), PATIENCE)?.output()?;
        ensure!(said.trim() == "tried all", "{said}");
        Ok(())
    };
    steal(mesh).context("beside the agent")?;
    mesh.lab.node_mut("a").kill_agent();
    steal(mesh).context("while the agent is away")?;
    mesh.restart_agent("a")?;
    mesh.wait_for("client")
}

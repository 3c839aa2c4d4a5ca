//! A pod that runs comes into the mesh and leaves it again.

use std::time::{Instant, SystemTime};

use anyhow::{Context as _, ensure};
use mesh_netns::peer::ports as peer;
use mesh_netns::servers::ports;
use mesh_netns::wait::PATIENCE;
use mesh_netns::{Live, PodSpec, Traffic, manifest};

use crate::mesh::Mesh;
use crate::watch::{End, Scope, Watch};

pub(crate) const AMBIENT: (&str, &str) = ("culvert.dev/dataplane-mode", "ambient");

pub(crate) fn enroll(mesh: &Mesh) -> anyhow::Result<()> {
    let late = mesh.pod("late");
    let netns = format!("/run/netns/{}", late.netns());
    let arguments = [
        "pod",
        "enroll",
        "--netns",
        &netns,
        "--namespace",
        "later",
        "--name",
        "late",
        "--service-account",
        "late",
        "--uid",
        &late.uid,
        "--live",
    ];
    // The label travels from the folder over the controller to the agent.
    mesh_netns::wait::until("the pod being enrolled", PATIENCE, || {
        let enrolled = mesh.lab.node("a").culvert(&arguments)?;
        ensure!(enrolled.success(), "enroll: {}{}", enrolled.stdout, enrolled.stderr);
        Ok(Some(()))
    })
}

/// A pod is taken in, let go and taken in again while it makes connections. None fails; those that were open before
/// never notice; each that is opened while the pod is in the mesh is tunnelled, to its end.
pub(crate) fn in_and_out_under_traffic(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.apply(&manifest::namespace("later", &[]))?;
    mesh.lab.run_pod("a", PodSpec::new("later", "late"))?;
    let [target, target6] = mesh.targets("server", peer::IDLE);
    let own_end = End::of(mesh.pod("late"))?;
    let watch = Watch::start(&mesh.lab, "in-and-out")?;
    let began = SystemTime::now();
    let traffic = Traffic::start(mesh, "late", "in-and-out", &mesh.urls().join(" "))?;
    let plain = [mesh.hold("late", target, 20)?, mesh.hold("late", target6, 20)?];
    traffic.more(8, "hello from")?;

    mesh.lab.apply(&manifest::namespace("later", &[AMBIENT]))?;
    enroll(mesh)?;
    let enrolled = SystemTime::now();
    traffic.more(8, "hello from")?;
    let captured = [mesh.hold("late", target, 20)?, mesh.hold("late", target6, 20)?];
    for held in plain {
        let used = held.use_all()?;
        ensure!(used.is_ok(), "connections from before the enrolment were lost: {used:?}");
    }

    let unenrolling = SystemTime::now();
    let unenrolled = mesh.lab.node("a").culvert(&["pod", "unenroll", "later/late"])?;
    ensure!(unenrolled.success(), "unenroll: {}{}", unenrolled.stdout, unenrolled.stderr);
    traffic.more(8, "hello from")?;
    for held in captured {
        let used = held.use_all()?;
        ensure!(used.is_ok(), "connections from before the un-enrolment were lost: {used:?}");
    }

    enroll(mesh)?;
    let enrolled_again = SystemTime::now();
    traffic.more(8, "hello from")?;
    traffic.finish_whole()?;
    let seen = watch.finish()?;
    // A connection may have been begun before the switch, and have met the guard after it: a try.
    let scope = Scope::Left(&own_end);
    let outside = [began..enrolled, unenrolling..enrolled_again];
    let opened = seen.opened_within(mesh.pod("late"), &scope, "tcp", &outside)?;
    // The held ones of before, and half of the traffic's: the other half stays on its node.
    ensure!(opened >= 40 + 4 + 4, "only {opened} connections in the clear while outside");
    let (between, inside) = seen.tunnelled(mesh)?;
    ensure!(between > 0, "{between} and {inside} packets of tunnels");
    mesh.lab.delete_pod("late")?;
    mesh.lab.delete(&manifest::namespace("later", &[AMBIENT]))
}

/// A pod is taken in and let go while connections of every kind carry bytes, by both families: those from before, and those that
/// were begun while it was captured. None of them, and none that is begun meanwhile, is disturbed.
pub(crate) fn live_connections_never_notice(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.apply(&manifest::namespace("later", &[]))?;
    mesh.lab.run_pod("a", PodSpec::new("later", "late"))?;
    mesh.wait_for("late")?;
    let server = mesh.pod("server");
    let servers = [server.ipv4, server.ipv6];
    let live = || Live::start(&mesh.lab, mesh.pod("late"), ports::HTTP, servers);
    // A round of the traffic is a moment in which all of them move.
    let traffic = Traffic::start(mesh, "late", "live", &mesh.urls().join(" "))?;
    let plain = live()?;
    let begun = Instant::now();
    traffic.more(8, "hello from")?;
    mesh.lab.apply(&manifest::namespace("later", &[AMBIENT]))?;
    enroll(mesh)?;
    let mut moments = vec![("enrolled", begun.elapsed())];
    traffic.more(8, "hello from")?;
    let captured = live()?;
    traffic.more(8, "hello from")?;
    moments.push(("un-enrolling", begun.elapsed()));
    let unenrolled = mesh.lab.node("a").culvert(&["pod", "unenroll", "later/late"])?;
    ensure!(unenrolled.success(), "unenroll: {}{}", unenrolled.stdout, unenrolled.stderr);
    moments.push(("un-enrolled", begun.elapsed()));
    traffic.more(8, "hello from")?;
    let captured = captured.finish().context("begun while captured");
    let plain = plain.finish().context("begun before");
    captured.and(plain).with_context(|| format!("{moments:?}"))?;
    traffic.finish_whole()?;
    mesh.lab.delete_pod("late")?;
    mesh.lab.delete(&manifest::namespace("later", &[AMBIENT]))
}

/// Enrolling a captured pod's uid with another namespace, or its namespace under another sandbox's name, never lets the
/// pod out: the one is refused to an operator and leaves the old namespace closed for a runtime, the other touches nothing.
pub(crate) fn another_netns_lets_none_go(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.lab.run_pod("a", PodSpec::new("plain", "spare"))?;
    let [target, target6] = mesh.targets("server", peer::IDLE);
    let uid = mesh.pod("client").uid.clone();
    let path = |pod: &str| format!("/run/netns/{}", mesh.pod(pod).netns());
    let (own, spare) = (path("client"), path("spare"));
    let listed = |mesh: &Mesh| -> anyhow::Result<Vec<serde_json::Value>> {
        let list = mesh.lab.node("a").culvert(&["pod", "list", "-o", "json"])?;
        let pods: Vec<serde_json::Value> = serde_json::from_str(&list.output()?)?;
        Ok(pods.into_iter().filter(|pod| pod["pod"]["uid"] == uid.as_str()).collect())
    };
    let first = listed(mesh)?[0]["container_id"].as_str().context("no sandbox")?.to_owned();
    let enroll = |mesh: &Mesh, netns: &str, container: &str, live: bool| {
        let mut arguments = vec!["pod", "enroll", "--namespace", "mesh", "--name", "client"];
        arguments.extend(["--service-account", "client", "--uid", &uid, "--netns", netns]);
        arguments.extend(["--container-id", container]);
        arguments.extend(live.then_some("--live"));
        mesh.lab.node("a").culvert(&arguments)
    };
    let watch = Watch::start(&mesh.lab, "elsewhere")?;
    let traffic = Traffic::start(mesh, "client", "elsewhere", &mesh.urls().join(" "))?;
    traffic.more(4, "hello from")?;
    let held = [mesh.hold("client", target, 20)?, mesh.hold("client", target6, 20)?];

    let refused = enroll(mesh, &spare, &first, true)?;
    let expected = format!("uid {uid} is enrolled in netns {own}, which still lives");
    ensure!(!refused.success() && refused.stderr.contains(&expected), "{}", refused.stderr);
    let renamed = enroll(mesh, &own, "another-name", true)?;
    ensure!(renamed.success(), "another sandbox's name: {}", renamed.stderr);
    traffic.more(8, "hello from")?;
    traffic.finish_whole()?;
    for held in held {
        let used = held.use_all()?;
        ensure!(used.is_ok(), "connections were lost: {used:?}");
    }

    // As a runtime says that the pod has a new sandbox.
    let traffic = Traffic::start(mesh, "client", "left-behind", &mesh.urls().join(" "))?;
    traffic.more(4, "hello from")?;
    enroll(mesh, &spare, "new-sandbox", false)?.output()?;
    traffic.more(8, "curl: ")?;
    let phases = |mesh: &Mesh| -> anyhow::Result<Vec<String>> {
        Ok(listed(mesh)?.iter().map(|pod| pod["phase"].to_string()).collect())
    };
    let found = phases(mesh)?;
    ensure!(found == ["\"enrolled\"", "\"closed\""], "{found:?}");
    mesh.lab.node_mut("a").kill_agent();
    mesh.restart_agent("a")?;
    traffic.more(8, "curl: ")?;
    traffic.finish()?;
    let closed = mesh.curl("client")?;
    ensure!(!closed.success(), "the old sandbox reaches {}", closed.stdout);
    ensure!(phases(mesh)? == found, "a restart lost a sandbox: {:?}", listed(mesh)?);

    // And back again: the namespace was captured all the time.
    enroll(mesh, &own, &first, false)?.output()?;
    mesh.wait_for("client")?;
    watch.finish()?.nothing_in_the_clear(&Scope::All)?;
    let let_go =
        mesh.lab.node("a").culvert(&["pod", "unenroll", "--container-id", "new-sandbox"])?;
    ensure!(let_go.success(), "{}", let_go.stderr);
    ensure!(listed(mesh)?.len() == 1, "{:?}", listed(mesh)?);
    mesh.lab.delete_pod("spare")
}

/// A pod that the runtime has deleted and in which no process runs: whoever holds its namespace can enter it, and is refused
/// everything there. It goes with the namespace.
pub(crate) fn deleted_stays_captured(mesh: &mut Mesh) -> anyhow::Result<()> {
    let pins = |mesh: &Mesh| -> anyhow::Result<usize> {
        let mut found = 0;
        for layout in std::fs::read_dir(mesh.lab.node("a").bpffs())? {
            let pods = layout?.path().join("pods");
            found += if pods.is_dir() { std::fs::read_dir(pods)?.count() } else { 0 };
        }
        Ok(found)
    };
    let listed = |mesh: &Mesh| -> anyhow::Result<Vec<serde_json::Value>> {
        let list = mesh.lab.node("a").culvert(&["pod", "list", "-o", "json"])?;
        let pods: Vec<serde_json::Value> = serde_json::from_str(&list.output()?)?;
        Ok(pods.into_iter().filter(|pod| pod["pod"]["name"] == "ended").collect())
    };
    let before = pins(mesh)?;
    mesh.lab.run_pod("a", PodSpec::new("mesh", "ended"))?;
    mesh.wait_for("ended")?;
    ensure!(pins(mesh)? > before, "the pod has no pins");
    let watch = Watch::start(&mesh.lab, "ended")?;
    let chain = &mesh.lab.node("a").chain;
    let attachment = &mesh.pod("ended").attachment;
    for turn in ["first", "second"] {
        let asked = Instant::now();
        // The plugin of the network comes after it, so that the pod has its interface and addresses yet.
        chain.call("DEL", &chain.conflist["plugins"][1], &serde_json::Value::Null, attachment)?;
        let took = asked.elapsed();
        ensure!(took < PATIENCE, "the {turn} DEL took {took:?}");
        let phases: Vec<_> = listed(mesh)?.iter().map(|pod| pod["phase"].clone()).collect();
        ensure!(phases == ["closed"], "after the {turn} DEL: {phases:?}");
        let entered = mesh.curl("ended")?;
        ensure!(!entered.success(), "the deleted pod reaches {}", entered.stdout);
    }
    mesh.lab.node_mut("a").kill_agent();
    ensure!(!mesh.curl("ended")?.success(), "without an agent");
    mesh.restart_agent("a")?;
    ensure!(!mesh.curl("ended")?.success(), "after a restart");
    watch.finish()?.nothing_in_the_clear(&Scope::All)?;
    mesh.lab.delete_pod("ended")?;
    mesh_netns::wait::until("the namespace being let go", PATIENCE, || {
        Ok((listed(mesh)?.is_empty() && pins(mesh)? == before).then_some(()))
    })
}

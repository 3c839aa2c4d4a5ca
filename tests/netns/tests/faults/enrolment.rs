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

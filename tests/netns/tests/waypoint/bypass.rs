//! Every way around the waypoint is closed, by name.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use mesh_netns::servers::ports;
use mesh_netns::wait::{PATIENCE, until};

use mesh_netns::PodSpec;

use crate::shop::{CART, SEEN, Shop, equal, serve_seen, target};

/// The requests that have reached a server.
fn reached(shop: &Shop, pod: &str) -> anyhow::Result<usize> {
    let log = shop.lab.pod(pod).folder().join(format!("{pod}-seen.log"));
    Ok(std::fs::read_to_string(log)?.lines().filter(|line| line.contains("/bypass")).count())
}

/// Log lines of the agent of a node, from now on.
fn agent_log(shop: &Shop, node: &str) -> anyhow::Result<(PathBuf, usize)> {
    let file = shop.lab.folder().join(format!("node-{node}/agent.log"));
    let length = std::fs::read_to_string(&file)?.len();
    Ok((file, length))
}

fn tells((file, skip): &(PathBuf, usize), parts: &[&str]) -> anyhow::Result<bool> {
    let log = std::fs::read_to_string(file)?;
    let new = log.get(*skip..).unwrap_or_default();
    Ok(new.lines().any(|line| parts.iter().all(|part| line.contains(part))))
}

fn told(log: &(PathBuf, usize), parts: &[&str]) -> anyhow::Result<()> {
    until(
        &format!("the agent telling {parts:?}"),
        PATIENCE,
        || Ok(tells(log, parts)?.then_some(())),
    )
}

/// A client that dials `url` is refused, and nothing reaches either server.
fn closed(shop: &Shop, client: &str, url: &str) -> anyhow::Result<()> {
    let before = (reached(shop, "v1")?, reached(shop, "v2")?);
    let got = shop.get(client, url, &["-m", "5"])?;
    ensure!(!got.success(), "{client} reached {url}: {}", got.stdout);
    equal(url, (reached(shop, "v1")?, reached(shop, "v2")?), before)
}

/// A pod's own address, from another node and from the same one, with a tunnel.
pub(crate) fn by_pod_address(shop: &mut Shop) -> anyhow::Result<()> {
    for (pod, node) in [("v1", "b"), ("v2", "a")] {
        let log = agent_log(shop, node)?;
        let address = target(shop.lab.pod(pod).ipv4, SEEN);
        for client in ["client", "visitor"] {
            closed(shop, client, &format!("http://{address}/bypass"))?;
        }
        told(&log, &["not through the required waypoint"])?;
    }
    Ok(())
}

/// In plaintext, by pods that are not in the mesh and by a host outside.
pub(crate) fn in_plaintext(shop: &mut Shop) -> anyhow::Result<()> {
    for (pod, node) in [("v1", "b"), ("v2", "a")] {
        let log = agent_log(shop, node)?;
        let address = target(shop.lab.pod(pod).ipv4, SEEN);
        closed(shop, "stranger", &format!("http://{address}/bypass"))?;
        told(&log, &["not through the required waypoint"])?;
        let before = reached(shop, pod)?;
        let mut curl = mesh_netns::process::in_namespace(Some(shop.lab.outside()), "curl");
        curl.args(["-sS", "-m", "5", &format!("http://{address}/bypass")]);
        let got = mesh_netns::process::run(&mut curl, PATIENCE)?;
        ensure!(!got.success(), "from outside: {}", got.stdout);
        equal("requests from outside", reached(shop, pod)?, before)?;
    }
    Ok(())
}

/// A waypoint that was asked to end, and is not there: nobody goes on without it. It comes back without being asked.
pub(crate) fn waypoint_stopped(shop: &mut Shop) -> anyhow::Result<()> {
    shop.waypoint("waypoint")?.stop(std::time::Duration::from_secs(10))?;
    let url = format!("http://{CART}:83/bypass");
    closed(shop, "client", &url)?;
    closed(shop, "client", &format!("http://{}/bypass", target(shop.lab.pod("v1").ipv4, SEEN)))?;
    shop.start_waypoint("waypoint")?;
    until("the service being reached again", PATIENCE, || {
        Ok((shop.status("client", &format!("http://{CART}/"), &[])? == 200).then_some(()))
    })
}

/// A tunnel to the pod by another identity of the mesh than the waypoint's, though it asks as a waypoint would.
pub(crate) fn another_identity(shop: &mut Shop) -> anyhow::Result<()> {
    // The agents open the tunnel in the client's name; the client's agent is where `by_pod_address` was refused. Here a
    // pod that has the waypoint's labels and another service account is no endpoint of the waypoint's service.
    let impostor = PodSpec::new("shop", "impostor")
        .label("gateway.networking.k8s.io/gateway-name", "waypoint");
    shop.lab.run_pod("a", impostor)?;
    let outcome = (|| {
        until("the impostor being in the mesh", PATIENCE, || {
            Ok((shop.status("impostor", &format!("http://{CART}/"), &[])? == 200).then_some(()))
        })?;
        let log = agent_log(shop, "b")?;
        closed(
            shop,
            "impostor",
            &format!("http://{}/bypass", target(shop.lab.pod("v1").ipv4, SEEN)),
        )?;
        told(&log, &["sa/impostor", "not through the required waypoint"])
    })();
    shop.lab.delete_pod("impostor")?;
    outcome
}

/// The waypoint passes nothing on to what is not bound to it, and takes no plaintext.
pub(crate) fn no_open_proxy(shop: &mut Shop) -> anyhow::Result<()> {
    let waypoint = shop.lab.pod("waypoint").ipv4;
    for port in [15008, 80, ports::HTTP] {
        let got =
            shop.get("stranger", &format!("http://{}/", target(waypoint, port)), &["-m", "3"])?;
        ensure!(!got.success(), "port {port} answers: {}", got.stdout);
    }
    Ok(())
}

/// The waypoint's pod is gone: the client's agent names the waypoint, and nothing reaches the servers. A new one is found.
pub(crate) fn waypoint_deleted(shop: &mut Shop) -> anyhow::Result<()> {
    shop.delete_waypoint("waypoint")?;
    let log = agent_log(shop, "a")?;
    until("the waypoint being forgotten", PATIENCE, || {
        closed(shop, "client", &format!("http://{CART}:83/bypass"))?;
        Ok(tells(&log, &["waypoint_unavailable"])?.then_some(()))
    })?;
    closed(shop, "client", &format!("http://{CART}:83/bypass"))?;
    closed(shop, "stranger", &format!("http://{}/bypass", target(shop.lab.pod("v1").ipv4, SEEN)))?;
    shop.run_waypoint("waypoint")?;
    until("the service being reached again", PATIENCE, || {
        Ok((shop.status("client", &format!("http://{CART}/"), &[])? == 200).then_some(()))
    })
    .context("with a new waypoint")
}

/// A waypoint bound to a workload: its own address leads through it, and there is no other way.
pub(crate) fn of_a_workload(shop: &mut Shop) -> anyhow::Result<()> {
    let solo = PodSpec::new("other", "solo")
        .label("culvert.dev/use-waypoint", "waypoint")
        .label("culvert.dev/use-waypoint-namespace", "shop");
    shop.lab.run_pod("b", solo)?;
    let server = serve_seen(shop.lab.pod("solo"))?;
    let url = format!("http://{}/solo", target(shop.lab.pod("solo").ipv4, SEEN));
    let outcome = (|| {
        until("the workload being reached", PATIENCE, || {
            Ok((shop.status("visitor", &url, &[])? == 200).then_some(()))
        })?;
        let got = shop.get("visitor", &url, &[])?.stdout;
        let by = "By=spiffe://cluster.local/ns/shop/sa/waypoint;URI=spiffe://cluster.local/ns/other/sa/visitor";
        ensure!(got.contains(by), "not through the waypoint: {got}");
        let log = agent_log(shop, "b")?;
        let got = shop.get("stranger", &url, &["-m", "5"])?;
        ensure!(!got.success(), "in plaintext: {}", got.stdout);
        told(&log, &["not through the required waypoint"])
    })();
    drop(server);
    shop.lab.delete_pod("solo")?;
    outcome
}

/// The Gateway object is gone while its pods run: what policies hold there is not known, and so nothing is let through.
pub(crate) fn gateway_deleted(shop: &mut Shop) -> anyhow::Result<()> {
    let gateway = mesh_netns::manifest::waypoint("shop", "waypoint");
    let cart = format!("http://{CART}/");
    let before = (reached(shop, "v1")?, reached(shop, "v2")?);
    shop.lab.delete(&gateway)?;
    let refused = until("requests being refused", PATIENCE, || {
        let got = shop.get("client", &cart, &["-i"])?.stdout.to_lowercase();
        Ok(got.contains("culvert-reason: unknown_gateway").then_some(()))
    });
    let outcome = refused.and_then(|()| {
        let url = format!("http://{CART}:83/bypass");
        equal("a request", shop.status("client", &url, &[])?, 503)?;
        let tcp = shop.ask("client", &["client-half-close", &format!("{CART}:92")])?;
        ensure!(!tcp.success(), "a connection went through");
        equal("requests at servers", (reached(shop, "v1")?, reached(shop, "v2")?), before)
    });
    shop.lab.apply(&gateway)?;
    let back = until("the service being reached again", PATIENCE, || {
        Ok((shop.status("client", &cart, &[])? == 200).then_some(()))
    });
    outcome.and(back)
}

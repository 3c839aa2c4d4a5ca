//! Destinations that are not simply a pod by its address: names, ranges, entries that are no pods, the host's network,
//! and which endpoints of a service count.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use hickory_proto::rr::RecordType;
use mesh_netns::lab::{OUTSIDE_IP, OUTSIDE_IP6};
use mesh_netns::process::run;
use mesh_netns::servers::{self, ports};
use mesh_netns::wait::{PATIENCE, until};
use mesh_netns::{PodSpec, manifest};
use serde_json::{Value, json};

use crate::dns::{ELSEWHERE_V4, NOWHERE_NAME, OUTSIDE_NAME, looked_up, service_entry};
use crate::mesh::{AMBIENT, LogFromNow, Mesh, OUTSIDE_PORT, annotated, field, serve, sum_of};

/// Port of the web servers on the nodes' own network.
const HOST_PORT: u16 = 9002;

/// Runs `look` while the objects are there.
fn with<T>(
    mesh: &Mesh,
    objects: &[Value],
    look: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    for object in objects {
        mesh.lab.apply(object)?;
    }
    let outcome = look();
    for object in objects {
        mesh.lab.delete(object)?;
    }
    outcome
}

/// What a pod gets from a web server by one family; `None` when it gets nothing.
fn fetch(mesh: &Mesh, pod: &str, family: &str, host: &str) -> anyhow::Result<Option<String>> {
    let mut curl = mesh.lab.pod(pod).command("curl");
    let done =
        run(curl.args(["-sS", "-g", family, "-m", "20", &format!("http://{host}/")]), PATIENCE)?;
    Ok(done.success().then_some(done.stdout))
}

/// A name of the mesh is known when the pod's resolver, which knows another address, is no longer asked.
fn known(mesh: &Mesh, pod: &str, name: &str) -> anyhow::Result<IpAddr> {
    until(&format!("{name} being known"), PATIENCE, || {
        let found = looked_up(mesh, pod, &format!("{name}."), RecordType::A)?;
        Ok(found.into_iter().find(|ip| ip.to_string().starts_with("240.240.")))
    })
}

fn outside(port: u16) -> anyhow::Result<[SocketAddr; 2]> {
    Ok([SocketAddr::new(OUTSIDE_IP.parse()?, port), SocketAddr::new(OUTSIDE_IP6.parse()?, port)])
}

/// The line of a connection that went to `target` past the mesh.
fn passed_to(log: &LogFromNow, pod: &str, target: SocketAddr) -> anyhow::Result<String> {
    let line = log.line(&[
        "direction=\"outbound\"",
        &format!("src.workload=\"{pod}\""),
        &format!("dst.addr={target} "),
    ])?;
    ensure!(field(&line, "dst.identity").is_none(), "{target} has an identity: {line}");
    ensure!(field(&line, "error").is_none(), "{line}");
    Ok(line)
}

/// Resolution DNS: the mesh gives the pod an address, and asks the pod's own resolver where that leads, for each connection
/// and by its family. A name that is none refuses, and once the object is gone the name is the resolver's again.
pub(crate) fn by_their_names(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    let ports = json!([
        { "number": 80, "name": "http", "protocol": "TCP", "targetPort": OUTSIDE_PORT }
    ]);
    let own = service_entry(
        "by-its-name",
        &json!({
            "hosts": [OUTSIDE_NAME], "ports": ports, "resolution": "DNS", "location": "MESH_EXTERNAL",
        }),
    );
    let alias = service_entry(
        "by-another-name",
        &json!({
            "hosts": ["alias.example"], "resolution": "DNS", "location": "MESH_EXTERNAL",
            "ports": [{ "number": 80, "name": "http", "protocol": "TCP" }],
            "endpoints": [{ "address": OUTSIDE_NAME, "ports": { "http": OUTSIDE_PORT } }],
        }),
    );
    let nowhere = service_entry(
        "by-no-name",
        &json!({
            "hosts": ["lost.example"], "ports": ports, "resolution": "DNS", "location": "MESH_EXTERNAL",
            "endpoints": [{ "address": NOWHERE_NAME }],
        }),
    );
    let [outside4, outside6] = outside(OUTSIDE_PORT)?;
    let lookups = |mesh: &Mesh| -> anyhow::Result<f64> {
        let labels = [("hostname", OUTSIDE_NAME), ("source_workload", "client")];
        Ok(sum_of(&mesh.lab.node("a").metrics()?, "istio_on_demand_dns_total", &labels))
    };
    with(mesh, &[own, alias, nowhere], || {
        let before = lookups(mesh)?;
        for host in [OUTSIDE_NAME, "alias.example"] {
            known(mesh, "client", host)?;
            let asked = mesh.resolver.asked_about(OUTSIDE_NAME).len();
            for (family, target) in [("-4", outside4), ("-6", outside6)] {
                let log = LogFromNow::of(mesh, "a")?;
                let answer = fetch(mesh, "client", family, host)?
                    .with_context(|| format!("{host} {family} does not answer"))?;
                ensure!(answer.contains("hello from outside"), "{host} {family}: {answer}");
                let line = passed_to(&log, "client", target)?;
                ensure!(field(&line, "dst.service") == Some(host), "{line}");
            }
            let asked = mesh.resolver.asked_about(OUTSIDE_NAME).len() - asked;
            ensure!(asked == 4, "A and AAAA for two connections were asked for {asked} times");
        }
        let counted = lookups(mesh)? - before;
        ensure!(counted == 4.0, "{counted} lookups counted for four connections");
        known(mesh, "client", "lost.example")?;
        let log = LogFromNow::of(mesh, "a")?;
        let answer = fetch(mesh, "client", "-4", "lost.example")?;
        ensure!(answer.is_none(), "a name that does not exist answers {answer:?}");
        let client = format!("src.addr={}:", mesh.lab.pod("client").ipv4);
        let line = log.line(&[&client, NOWHERE_NAME])?;
        ensure!(field(&line, "reason") == Some("connect_failed"), "{line}");
        Ok(())
    })?;
    // The resolver's own answers again: the name went with its object, and so did the address.
    until("the names being the resolver's again", PATIENCE, || {
        let own = looked_up(mesh, "client", &format!("{OUTSIDE_NAME}."), RecordType::A)?;
        let alias = looked_up(mesh, "client", "alias.example.", RecordType::AAAA)?;
        let is_left = alias.iter().any(|ip| ip.to_string().starts_with("2001:2:"));
        Ok((own == [outside4.ip()] && !is_left).then_some(()))
    })
}

/// Ranges of addresses. With resolution NONE a range makes its addresses known and keeps what was dialled, on the entry's
/// ports alone; with STATIC all of it leads to the endpoints.
pub(crate) fn ranges(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    let before = manifest::namespace("far", &[AMBIENT]);
    let strict = annotated(before.clone(), &json!({ "culvert.dev/unknown-egress": "deny" }));
    mesh.lab.apply(&strict)?;
    let outcome = ranges_where_nothing_unknown_is_reached(mesh);
    mesh.lab.apply(&before)?;
    mesh.wait_for("visitor", outside(OUTSIDE_PORT)?[0])?;
    outcome
}

fn ranges_where_nothing_unknown_is_reached(mesh: &Mesh) -> anyhow::Result<()> {
    let targets = outside(OUTSIDE_PORT)?;
    let refused = |when: &str| {
        until(&format!("the unknown being refused {when}"), PATIENCE, || {
            let [v4, v6] =
                [mesh.reaches("visitor", targets[0])?, mesh.reaches("visitor", targets[1])?];
            Ok((!v4 && !v6).then_some(()))
        })
    };
    refused("before it is declared")?;
    let kept = service_entry(
        "kept",
        &json!({
            "hosts": ["kept.example"], "addresses": ["192.168.77.192/27", "fd77::200/120"],
            "ports": [{ "number": OUTSIDE_PORT, "name": "tcp", "protocol": "TCP" }],
            "resolution": "NONE", "location": "MESH_EXTERNAL",
        }),
    );
    let led = service_entry(
        "led",
        &json!({
            "hosts": ["led.example"], "addresses": ["10.97.8.0/24", "fd97:8::/64"],
            "ports": [{ "number": 80, "name": "http", "protocol": "TCP", "targetPort": OUTSIDE_PORT }],
            "resolution": "STATIC", "location": "MESH_EXTERNAL",
            "endpoints": [{ "address": OUTSIDE_IP }],
        }),
    );
    with(mesh, &[kept], || {
        for target in targets {
            mesh.wait_for("visitor", target)?;
            let log = LogFromNow::of(mesh, "a")?;
            ensure!(mesh.reaches("visitor", target)?, "{target} is reached once only");
            passed_to(&log, "visitor", target)?;
            // A port that the entry does not have makes nothing known.
            let log = LogFromNow::of(mesh, "a")?;
            let other = SocketAddr::new(target.ip(), OUTSIDE_PORT + 1);
            ensure!(!mesh.reaches("visitor", other)?, "{other} is reached");
            let line = log.line(&["src.workload=\"visitor\"", &format!("dst.addr={other} ")])?;
            ensure!(field(&line, "reason") == Some("egress_denied"), "{line}");
        }
        Ok(())
    })?;
    // Not before: an endpoint is known at all of its ports.
    with(mesh, &[led], || {
        for ip in ["10.97.8.1", "10.97.8.254", "fd97:8::7"] {
            let dialled = SocketAddr::new(ip.parse()?, 80);
            mesh.wait_for("visitor", dialled)?;
            let log = LogFromNow::of(mesh, "a")?;
            let answer = mesh.get("visitor", &dialled.to_string())?.context("no answer")?;
            ensure!(answer.contains("hello from outside"), "{dialled} answers {answer}");
            let line = passed_to(&log, "visitor", targets[0])?;
            ensure!(field(&line, "dst.service") == Some("led.example"), "{line}");
        }
        Ok(())
    })?;
    refused("after the entry has gone")
}

/// A WorkloadEntry is an endpoint of a Service and of a ServiceEntry as a pod is, with its own ports, by address or by name.
pub(crate) fn workload_entries(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    let entry = |name: &str, address: &str| {
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
            "metadata": { "name": name, "namespace": "mesh" },
            "spec": { "address": address, "labels": { "app": name }, "ports": { "http": OUTSIDE_PORT } },
        })
    };
    let vips: [IpAddr; 2] = ["10.96.0.80".parse()?, "fd96::80".parse()?];
    // The entry's own port counts, not the service's, where nobody listens.
    let service = manifest::service("mesh", "machine", "machine", &vips, &[("http", 80, 7)]);
    let by_name = service_entry(
        "machines",
        &json!({
            "hosts": ["machines.example"], "resolution": "DNS", "location": "MESH_INTERNAL",
            "ports": [{ "number": 80, "name": "http", "protocol": "TCP" }],
            "workloadSelector": { "labels": { "app": "named" } },
        }),
    );
    let [outside4, outside6] = outside(OUTSIDE_PORT)?;
    let objects = [entry("machine", OUTSIDE_IP), entry("named", OUTSIDE_NAME), service, by_name];
    with(mesh, &objects, || {
        for vip in vips {
            let dialled = SocketAddr::new(vip, 80);
            mesh.wait_for("client", dialled)?;
            let log = LogFromNow::of(mesh, "a")?;
            let answer = mesh.get("client", &dialled.to_string())?.context("no answer")?;
            ensure!(answer.contains("hello from outside"), "{dialled} answers {answer}");
            let line = passed_to(&log, "client", outside4)?;
            ensure!(field(&line, "dst.workload") == Some("machine"), "{line}");
        }
        known(mesh, "client", "machines.example")?;
        for (family, target) in [("-4", outside4), ("-6", outside6)] {
            let log = LogFromNow::of(mesh, "a")?;
            let answer = fetch(mesh, "client", family, "machines.example")?
                .with_context(|| format!("machines.example {family} does not answer"))?;
            ensure!(answer.contains("hello from outside"), "machines.example: {answer}");
            passed_to(&log, "client", target)?;
        }
        Ok(())
    })
}

/// `exportTo: ["."]`: the entry's name is known in its own namespace, and everybody else's resolver is asked.
pub(crate) fn of_one_namespace(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    let mut entry = service_entry(
        "private",
        &json!({
            "hosts": ["private.example"], "exportTo": ["."], "resolution": "STATIC",
            "ports": [{ "number": 80, "name": "http", "protocol": "TCP", "targetPort": OUTSIDE_PORT }],
            "location": "MESH_EXTERNAL", "endpoints": [{ "address": OUTSIDE_IP }],
        }),
    );
    entry["metadata"]["namespace"] = json!("far");
    with(mesh, &[entry], || {
        known(mesh, "visitor", "private.example")?;
        let answer = mesh.get("visitor", "private.example")?.context("no answer")?;
        ensure!(answer.contains("hello from outside"), "private.example answers {answer}");
        // The same agent, which knows the name.
        let found = looked_up(mesh, "client", "private.example.", RecordType::A)?;
        ensure!(found == [IpAddr::from(ELSEWHERE_V4)], "another namespace finds {found:?}");
        Ok(())
    })
}

/// Pods on their node's own network have no agent before them: they are reached in plaintext, on this node and another.
pub(crate) fn on_the_hosts_network(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    let mut objects = Vec::new();
    let mut dials = Vec::new();
    for (number, (node, name)) in [("a", "host-a"), ("b", "host-b")].into_iter().enumerate() {
        let node = mesh.lab.node(node);
        serve(node.netns(), HOST_PORT, name)?;
        objects.push(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": "mesh", "labels": { "app": name },
                "uid": format!("00000000-0000-4000-a000-{number:012}"),
            },
            "spec": {
                "nodeName": node.name, "hostNetwork": true, "serviceAccountName": name,
                "containers": [{ "name": "main" }],
            },
            "status": {
                "phase": "Running", "podIP": node.ipv4, "hostIP": node.ipv4,
                "podIPs": [{ "ip": node.ipv4 }, { "ip": node.ipv6 }],
                "conditions": [{ "type": "Ready", "status": "True" }],
            },
        }));
        let vips: [IpAddr; 2] =
            [format!("10.96.0.{}", 90 + number).parse()?, format!("fd96::9{number}").parse()?];
        objects.push(manifest::service("mesh", name, name, &vips, &[("http", 80, HOST_PORT)]));
        for (vip, own) in vips.into_iter().zip([node.ipv4, node.ipv6]) {
            dials.push((name, SocketAddr::new(vip, 80), SocketAddr::new(own, HOST_PORT)));
        }
    }
    with(mesh, &objects, || {
        for (name, vip, own) in dials {
            mesh.wait_for("client", vip)?;
            for dialled in [vip, own] {
                let log = LogFromNow::of(mesh, "a")?;
                let answer = mesh
                    .get("client", &dialled.to_string())?
                    .with_context(|| format!("{name} at {dialled} does not answer"))?;
                ensure!(answer.contains(&format!("hello from {name}")), "{dialled}: {answer}");
                passed_to(&log, "client", own)?;
            }
        }
        Ok(())
    })
}

/// Which of two replicas get a service's connections: the ready ones, those that have the port by its name, the near ones,
/// or those of the node alone.
pub(crate) fn endpoints_of_a_service(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mut nginx = Vec::new();
    for (node, name) in [("a", "near"), ("b", "away")] {
        let mut spec = PodSpec::new("mesh", name).app("pair");
        if name == "near" {
            spec.containers = json!([
                { "name": "main", "ports": [{ "name": "web", "containerPort": ports::HTTP }] }
            ]);
        }
        nginx.push(servers::nginx(mesh.lab.run_pod(node, spec)?)?);
    }
    let outcome = choices(mesh);
    drop(nginx);
    mesh.lab.delete_pod("near")?;
    mesh.lab.delete_pod("away")?;
    outcome
}

fn choices(mesh: &Mesh) -> anyhow::Result<()> {
    let http = [("http", 80, ports::HTTP)];
    let service = |name: &str, number: u8| -> anyhow::Result<Value> {
        let vips = [format!("10.96.1.{number}").parse()?, format!("fd96::1:{number}").parse()?];
        Ok(manifest::service("mesh", name, "pair", &vips, &http))
    };
    let every = service("every", 1)?;
    let mut zone = service("zone", 2)?;
    zone["spec"]["trafficDistribution"] = json!("PreferClose");
    let mut local = service("local", 3)?;
    local["spec"]["internalTrafficPolicy"] = json!("Local");
    let mut named = service("named", 4)?;
    named["spec"]["ports"][0]["targetPort"] = json!("web");
    with(mesh, &[every, zone, local, named], || {
        // (near is ready, service, who answers)
        let both: &[&str] = &["away", "near"];
        for (is_ready, expected) in [
            (true, [both, &["near"], &["near"], &["near"]]),
            (false, [&["away"], &["away"], &[], &[]]),
            (true, [both, &["near"], &["near"], &["near"]]),
        ] {
            set_ready(mesh, "near", is_ready)?;
            for (number, expected) in (1..).zip(expected) {
                for host in [format!("10.96.1.{number}"), format!("[fd96::1:{number}]")] {
                    let what = format!("{expected:?} answering at {host}, near ready: {is_ready}");
                    // News takes its time.
                    until(&what, PATIENCE, || {
                        let told = who_answers(mesh, &host, 32)?;
                        Ok(told
                            .keys()
                            .map(String::as_str)
                            .eq(expected.iter().copied())
                            .then_some(()))
                    })?;
                    // After it not one of many goes elsewhere.
                    let told = who_answers(mesh, &host, 32)?;
                    let names: Vec<&str> = told.keys().map(String::as_str).collect();
                    ensure!(names == expected, "{what}: {told:?}");
                    let answers: usize = told.values().sum();
                    let wanted = if expected.is_empty() { 0 } else { 32 };
                    ensure!(answers == wanted, "{what}: {answers} answers to 32 connections");
                }
            }
        }
        Ok(())
    })
}

/// IPv6 link-local addresses mean something on one interface only: what a captured pod dials there is refused, and the log says so.
pub(crate) fn link_local(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh = &*mesh;
    for address in ["fe80::1", "fe80::abcd"] {
        let log = LogFromNow::of(mesh, "a")?;
        let answer = fetch(mesh, "client", "-6", &format!("[{address}%25eth0]:{}", ports::HTTP))?;
        ensure!(answer.is_none(), "{address} answers {answer:?}");
        let target = format!("dst.addr=[{address}]:{}", ports::HTTP);
        let source = format!("src.addr=[{}]:", mesh.lab.pod("client").ipv6);
        let line = log.line(&["direction=\"outbound\"", &source, &target])?;
        ensure!(field(&line, "reason") == Some("connect_failed"), "{line}");
        let error = field(&line, "error").unwrap_or_default();
        ensure!(error.contains("is link-local, which is not carried"), "{line}");
    }
    Ok(())
}

/// Which pods answer, how often, when the client connects `times` times.
fn who_answers(mesh: &Mesh, host: &str, times: u32) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut curl = mesh.lab.pod("client").command("curl");
    curl.args(["-s", "-m", "20", "-H", "Connection: close"])
        .arg(format!("http://{host}/[1-{times}]"));
    let mut told = BTreeMap::new();
    for line in run(&mut curl, PATIENCE)?.stdout.lines() {
        let name = line.strip_prefix("hello from ").and_then(|rest| rest.split(' ').next());
        *told.entry(name.with_context(|| line.to_owned())?.to_owned()).or_default() += 1;
    }
    Ok(told)
}

/// Says of a pod whether it is ready, as a kubelet does.
fn set_ready(mesh: &Mesh, pod: &str, is_ready: bool) -> anyhow::Result<()> {
    let file = mesh.lab.manifests().join(format!("Pod.mesh.{pod}.json"));
    let mut object: Value = serde_json::from_slice(&std::fs::read(file)?)?;
    let status = if is_ready { "True" } else { "False" };
    object["status"]["conditions"] = json!([{ "type": "Ready", "status": status }]);
    mesh.lab.apply(&object)
}

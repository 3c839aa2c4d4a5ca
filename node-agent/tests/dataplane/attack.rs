//! What is refused, and in whose favour: floods, silence, ended certificates, policies that have not come.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use culvert_agent::dataplane::{Changed, DataPlaneConfig, Limits, TunnelRole};
use mesh_model::CloseReason;
use mesh_resolve::IndexDelta;

use crate::node::{Mesh, Node, identity, issue, issue_until, workload};
use crate::{echo, exchange, read_error};

fn with_limits(limits: Limits) -> DataPlaneConfig {
    DataPlaneConfig { workers: 1, limits, ..DataPlaneConfig::default() }
}

/// How often a handshake ended for `reason`.
fn handshakes_failed(node: &Node, reason: CloseReason) -> u64 {
    node.plane.stats().handshakes_failed.get(&reason).copied().unwrap_or(0)
}

/// Waits until exactly so many have; a peer sees its reset before the worker has counted it.
fn wait_for_failed(node: &Node, reason: CloseReason, count: u64) {
    let begun = Instant::now();
    while handshakes_failed(node, reason) < count && begun.elapsed() < Duration::from_secs(5) {
        thread::yield_now();
    }
    assert_eq!(handshakes_failed(node, reason), count, "{reason}");
}

/// New certificates for both ends, so that the next flow needs a new tunnel.
fn renew(mesh: &Mesh) {
    for (node, name) in [(&mesh.client, "client"), (&mesh.server, "server")] {
        let id = identity(name);
        let svid = issue(&mesh.ca, &id);
        node.change(Changed::IDENTITIES, |snapshot| {
            snapshot.svids.insert(id.clone(), Arc::clone(&svid));
        });
    }
}

/// Opens connections that never say a word, as fast as it can, and holds the latest thousand of them.
fn flood(mesh: &Arc<Mesh>, target: SocketAddr, stop: &Arc<AtomicBool>) -> thread::JoinHandle<u64> {
    let (mesh, stop) = (Arc::clone(mesh), Arc::clone(stop));
    thread::spawn(move || {
        let mut held = std::collections::VecDeque::new();
        let mut opened = 0;
        while !stop.load(Ordering::Relaxed) {
            held.extend(mesh.client.pod.connect_plain(target));
            opened += 1;
            if held.len() > 1_000 {
                held.pop_front();
            }
        }
        opened
    })
}

#[test]
fn a_flood_of_silent_peers_stops_neither_the_pod_nor_its_dials() {
    let limits = Limits { handshakes: 16, ..Limits::default() };
    let mesh = Arc::new(Mesh::with(with_limits(limits)));
    let stop = Arc::new(AtomicBool::new(false));
    let floods = [&mesh.server, &mesh.client].map(|node| flood(&mesh, node.pod.v4(15008), &stop));
    while handshakes_failed(&mesh.server, CloseReason::Overloaded) < 100
        || handshakes_failed(&mesh.client, CloseReason::Overloaded) < 100
    {
        thread::yield_now();
    }
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    for _ in 0..10 {
        exchange(&mesh, target, 10_000);
        renew(&mesh);
    }
    stop.store(true, Ordering::Relaxed);
    for flood in floods {
        assert!(flood.join().unwrap() > 100);
    }
}

#[test]
fn a_silent_peer_is_given_up_long_before_a_slow_one() {
    let limits = Limits {
        first_word_timeout: Duration::from_millis(300),
        handshake_timeout: Duration::from_millis(1_500),
        ..Limits::default()
    };
    let mesh = Mesh::with(with_limits(limits));
    let ended_after = |said: &[u8]| {
        let mut peer = mesh.client.pod.connect_plain(mesh.server.pod.v4(15008)).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        peer.write_all(said).unwrap();
        let begun = Instant::now();
        let mut answer = Vec::new();
        let error = peer.read_to_end(&mut answer).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        begun.elapsed()
    };
    // Half a record is no word.
    for said in [&[][..], &[22, 3, 1, 2, 0, 1]] {
        let elapsed = ended_after(said);
        assert!(elapsed < Duration::from_millis(1_200), "{elapsed:?}");
    }
    wait_for_failed(&mesh.server, CloseReason::TimedOut, 2);
    let elapsed = ended_after(&client_hello());
    assert!(elapsed > Duration::from_millis(1_200), "{elapsed:?}");
    wait_for_failed(&mesh.server, CloseReason::TlsFailure, 1);
}

/// The first flight of a real client, which then falls silent.
fn client_hello() -> Vec<u8> {
    let mesh = Mesh::new();
    let trust = mesh.client.shared.snapshot.load().trust.clone();
    let svid = issue(&mesh.ca, &identity("client"));
    let config = mesh_identity::tls::client(&svid, trust, vec![identity("server")]);
    let name = rustls_pki_types::ServerName::try_from("any.invalid").unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}

/// A certificate is revoked while its handshake is under way, which judges by the lists of its beginning.
#[test]
fn a_peer_that_is_revoked_during_its_handshake_is_not_let_in() {
    let mut mesh = Mesh::with(with_limits(Limits::default()));
    let svid = issue(&mesh.ca, &identity("client"));
    let trust = mesh.client.shared.snapshot.load().trust.clone();
    let shake_hands = |mesh: &Mesh, meanwhile: &mut dyn FnMut()| {
        let config = mesh_identity::tls::client(&svid, trust.clone(), vec![identity("server")]);
        let name = rustls_pki_types::ServerName::try_from("any.invalid").unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut wire = mesh.client.pod.connect_plain(mesh.server.pod.v4(15008)).unwrap();
        wire.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.write_tls(&mut wire).unwrap();
        // The server has chosen what it judges by once it has answered.
        wire.peek(&mut [0]).unwrap();
        meanwhile();
        while client.is_handshaking() {
            client.complete_io(&mut wire).unwrap();
        }
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        (client, wire)
    };
    let (held, _wire) = shake_hands(&mesh, &mut || {});
    assert!(!held.is_handshaking());
    mesh.ca.revoke_leaf(svid.serial(), SystemTime::now());
    let list = mesh.ca.crl_pem(SystemTime::now()).unwrap();
    let roots = mesh.ca.root_bundle_pem();
    let revoking = mesh_identity::TrustBundle::from_pem("cluster.local", &roots, &list).unwrap();
    let revoking = Arc::new(revoking);
    // The first is cut by the round that the change begins; the second has to be met when it is up.
    let server = &mesh.server;
    let (_client, mut wire) = shake_hands(&mesh, &mut || {
        server.change(Changed::TRUST, |snapshot| snapshot.trust = Arc::clone(&revoking));
        thread::sleep(Duration::from_millis(300));
    });
    wait_for_failed(&mesh.server, CloseReason::CertRevoked, 1);
    let mut rest = Vec::new();
    let ended = wire.read_to_end(&mut rest);
    let timed_out = [ErrorKind::WouldBlock, ErrorKind::TimedOut];
    assert!(!ended.is_err_and(|error| timed_out.contains(&error.kind())), "it stays open");
}

/// A request that waits for the pod's workload is refused with its tunnel, and not delivered when the workload has come.
#[test]
fn a_request_that_waits_is_refused_when_its_peer_is_revoked() {
    let config = DataPlaneConfig { workers: 1, ..DataPlaneConfig::default() };
    let mut mesh = Mesh::with(config);
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    exchange(&mesh, target, 100);
    let before = mesh.server.ledger.ended(1).len();
    mesh.server.change(Changed::INDEX, |snapshot| {
        let removed_workloads = vec![workload("server", &[]).uid];
        snapshot.index.apply(IndexDelta { removed_workloads, ..IndexDelta::default() });
    });
    let mut waits: TcpStream = mesh.client.dial(target).unwrap();
    thread::sleep(Duration::from_millis(300));
    let serial = mesh.client.shared.snapshot.load().svids[&identity("client")].serial().to_vec();
    mesh.ca.revoke_leaf(&serial, SystemTime::now());
    let list = mesh.ca.crl_pem(SystemTime::now()).unwrap();
    let roots = mesh.ca.root_bundle_pem();
    let trust = mesh_identity::TrustBundle::from_pem("cluster.local", &roots, &list).unwrap();
    let trust = Arc::new(trust);
    let begun = Instant::now();
    mesh.server.change(Changed::TRUST, |snapshot| snapshot.trust = Arc::clone(&trust));
    assert_eq!(read_error(&mut waits), ErrorKind::ConnectionReset);
    assert!(begun.elapsed() < Duration::from_secs(3), "only its patience has ended it");
    let refused = &mesh.server.ledger.ended(before + 1)[before];
    assert_eq!(refused.reason, CloseReason::CertRevoked);
}

/// While memory is short what is new is refused by that name, and what is open goes on.
#[test]
fn nothing_is_admitted_while_memory_is_short() {
    let mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut open = mesh.client.dial(target).unwrap();
    say_hello(&mut open);
    mesh.client.plane.set_memory_short(true);
    let mut refused: TcpStream = mesh.client.dial(target).unwrap();
    assert_eq!(read_error(&mut refused), ErrorKind::ConnectionReset);
    say_hello(&mut open);
    let record = &mesh.client.ledger.ended(1)[0];
    assert_eq!(record.reason, CloseReason::Overloaded);
    assert!(record.detail.as_deref().is_some_and(|detail| detail.contains("memory")), "{record:?}");
    mesh.client.plane.set_memory_short(false);
    // The other end is short: the peer's request is refused.
    mesh.server.plane.set_memory_short(true);
    let mut refused: TcpStream = mesh.client.dial(target).unwrap();
    assert_eq!(read_error(&mut refused), ErrorKind::ConnectionReset);
    say_hello(&mut open);
    mesh.server.plane.set_memory_short(false);
    exchange(&mesh, target, 10_000);
}

#[test]
fn a_target_that_never_shakes_hands_is_given_up_in_time() {
    let limits = Limits { handshake_timeout: Duration::from_millis(500), ..Limits::default() };
    let mesh = Mesh::with(with_limits(limits));
    let uid = mesh.server.uid.clone();
    mesh.runtime.block_on(mesh.server.plane.remove_pod(&uid, culvert_agent::dataplane::Drain::Now));
    let deaf = mesh.server.pod.listen(mesh.server.pod.v4(15008));
    let mut refused: TcpStream = mesh.client.dial(mesh.server.pod.v4(8080)).unwrap();
    assert_eq!(read_error(&mut refused), ErrorKind::ConnectionReset);
    drop(deaf);
    let record = &mesh.client.ledger.ended(1)[0];
    assert_eq!(record.reason, CloseReason::TlsFailure, "{record:?}");
    assert!(record.duration < Duration::from_secs(5), "{:?}", record.duration);
}

/// Tunnels that were set up to `node`.
fn tunnels_to(node: &Node) -> u64 {
    node.plane.stats().tunnels.get(&TunnelRole::Server).map_or(0, |tunnels| tunnels.handshakes_ok)
}

fn say_hello(stream: &mut TcpStream) {
    stream.write_all(b"hello").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn a_new_certificate_retires_tunnels_of_both_ends_and_loses_no_stream() {
    let mesh = Mesh::with(with_limits(Limits::default()));
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut live = Vec::new();
    for (node, name) in [(&mesh.server, "server"), (&mesh.client, "client")] {
        let mut stream = mesh.client.dial(target).unwrap();
        say_hello(&mut stream);
        live.push(stream);
        let before = tunnels_to(&mesh.server);
        let id = identity(name);
        let svid = issue(&mesh.ca, &id);
        node.change(Changed::IDENTITIES, |snapshot| {
            snapshot.svids.insert(id.clone(), Arc::clone(&svid));
        });
        let begun = Instant::now();
        while tunnels_to(&mesh.server) == before {
            exchange(&mesh, target, 1_000);
            assert!(begun.elapsed() < Duration::from_secs(5), "{name}'s old certificate serves on");
        }
        live.iter_mut().for_each(say_hello);
    }
}

#[test]
fn a_tunnel_takes_no_new_stream_when_a_certificate_has_ended() {
    let patience = Duration::from_millis(300);
    let limits = Limits { certificate_patience: patience, ..Limits::default() };
    let mesh = Mesh::with(with_limits(limits));
    let id = identity("server");
    let svid = issue_until(&mesh.ca, &id, SystemTime::now() + Duration::from_secs(3));
    mesh.server.change(Changed::IDENTITIES, |snapshot| {
        snapshot.svids.insert(id.clone(), Arc::clone(&svid));
    });
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut live = mesh.client.dial(target).unwrap();
    say_hello(&mut live);
    let begun = Instant::now();
    loop {
        let mut stream = mesh.client.dial(target).unwrap();
        if stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])).is_err() {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "an ended certificate serves on");
        thread::sleep(Duration::from_millis(50));
    }
    assert!(SystemTime::now() >= svid.not_after(), "refused too early");
    say_hello(&mut live);
}

#[test]
fn nothing_is_judged_before_the_policies_have_come() {
    let patience = Duration::from_millis(300);
    let limits =
        Limits { policy_patience: patience, workload_patience: patience, ..Limits::default() };
    let mesh = Mesh::with(with_limits(limits));
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let synced = |node: &Node, synced: bool| {
        node.change(Changed::POLICIES, |snapshot| snapshot.synced = synced);
    };
    let reset = || {
        let mut stream = mesh.client.dial(target).unwrap();
        assert_eq!(read_error(&mut stream), ErrorKind::ConnectionReset);
    };
    synced(&mesh.client, false);
    reset();
    assert_eq!(mesh.client.ledger.ended(1)[0].reason, CloseReason::NotSynced);
    let mut waits = mesh.client.dial(target).unwrap();
    waits.write_all(b"hello").unwrap();
    synced(&mesh.client, true);
    waits.read_exact(&mut [0; 5]).unwrap();
    drop(waits);
    mesh.client.ledger.ended(2);
    let before = mesh.server.ledger.ended(1).len();

    synced(&mesh.server, false);
    reset();
    assert_eq!(mesh.server.ledger.ended(before + 1)[before].reason, CloseReason::NotSynced);
}

#[test]
fn an_address_of_the_clusters_pods_waits_for_its_pod_and_never_leaks() {
    let patience = Duration::from_millis(500);
    let mesh =
        Mesh::with(with_limits(Limits { destination_patience: patience, ..Limits::default() }));
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    mesh.client.change(Changed::INDEX.and(Changed::POLICIES), |snapshot| {
        snapshot.policies.set_pod_networks(&["10.77.0.0/24".parse().unwrap()]);
        let removed_workloads = vec![workload("server", &[]).uid];
        snapshot.index.apply(IndexDelta { removed_workloads, ..IndexDelta::default() });
    });
    let mut in_vain = mesh.client.dial(target).unwrap();
    assert_eq!(read_error(&mut in_vain), ErrorKind::ConnectionReset);
    assert_eq!(mesh.client.ledger.ended(1)[0].reason, CloseReason::UnknownDestination);
    // One of this node that the index does not have is no stranger either, whatever the networks are.
    let own = workload("client", &[]).uid;
    mesh.client.change(Changed::INDEX, |snapshot| {
        let mut moved = workload("client", &[mesh.client.pod.addresses[0]]);
        moved.uid = own.clone();
        let workloads = vec![moved];
        snapshot.index.apply(IndexDelta { workloads, ..IndexDelta::default() });
    });
    let mut in_vain = mesh.client.dial(mesh.client.pod.v6(8080)).unwrap();
    assert_eq!(read_error(&mut in_vain), ErrorKind::ConnectionReset);
    assert_eq!(mesh.client.ledger.ended(2)[1].reason, CloseReason::UnknownDestination);

    let mut waits = mesh.client.dial(target).unwrap();
    waits.write_all(b"hello").unwrap();
    mesh.client.change(Changed::INDEX, |snapshot| {
        let workloads = vec![workload("server", &mesh.server.pod.addresses)];
        snapshot.index.apply(IndexDelta { workloads, ..IndexDelta::default() });
    });
    waits.read_exact(&mut [0; 5]).unwrap();
    drop(waits);
    let record = &mesh.client.ledger.ended(3)[2];
    assert!(record.facts.mutual_tls, "{record:?}");
    // Outside of those networks is outside of the mesh.
    let mut outside = mesh.client.dial("192.0.2.1:80".parse().unwrap()).unwrap();
    assert_ne!(read_error(&mut outside), ErrorKind::WouldBlock);
    let record = &mesh.client.ledger.ended(4)[3];
    assert_eq!(record.reason, CloseReason::ConnectFailed);
    assert_eq!(record.detail.as_deref(), Some("Network is unreachable (os error 101)"));
}

#[test]
fn an_engine_that_hangs_is_noticed() {
    let watchdog = culvert_agent::dataplane::WatchdogConfig {
        interval: Duration::from_millis(50),
        stuck_after: 2,
        abort_after: 0,
    };
    let config = DataPlaneConfig { watchdog, ..with_limits(Limits::default()) };
    let mesh = Mesh::with(config);
    let stuck = || mesh.client.plane.stats().stuck_workers;
    let until = |expected: usize| {
        let begun = Instant::now();
        while stuck() != expected {
            assert!(begun.elapsed() < Duration::from_secs(10), "{} engines stuck", stuck());
            thread::sleep(Duration::from_millis(5));
        }
    };
    // Idle engines turn when they are asked to.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(stuck(), 0);
    let held = mesh.client.hold_capture();
    let waiting = mesh.client.dial_unnoted(mesh.server.pod.v4(8080));
    until(1);
    assert_eq!(mesh.server.plane.stats().stuck_workers, 0);
    drop(held);
    until(0);
    drop(waiting);
}

//! Two data planes on two "nodes", with real sockets, namespaces and certificates. Root is needed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod attack;
mod last_words;
mod netlab;
mod node;
mod plaintext;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use culvert_agent::dataplane::{Changed, DataPlaneConfig, Drain, Limits};
use mesh_authorize::{
    Action, Clause, Match, Policy, PolicyKind, PolicyName, PolicyOrigin, PolicyScope, Rule,
};
use mesh_identity::TrustBundle;
use mesh_model::CloseReason;
use mesh_resolve::IndexDelta;
use mesh_telemetry::FlowPath;
use node::{Mesh, Node, identity, issue, workload};
use socket2::SockRef;

/// Bytes of which each says where it is.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at * 31 + at / 251) % 256).unwrap()).collect()
}

/// Answers every connection with its own bytes, and ends when the client has.
fn echo(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { break };
            thread::spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                if std::io::copy(&mut reader, &mut stream).is_ok() {
                    stream.shutdown(Shutdown::Write).ok();
                }
            });
        }
    });
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// The kind of error a read ends with; panics when it does not end, or ends well.
fn read_error(stream: &mut TcpStream) -> ErrorKind {
    let mut sink = [0; 1024];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => panic!("an orderly end instead of a reset"),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return error.kind(),
        }
    }
}

fn exchange(mesh: &Mesh, target: SocketAddr, length: usize) {
    let mut stream = mesh.client.dial(target).unwrap();
    let sent = pattern(length);
    let mut writer = stream.try_clone().unwrap();
    let to_send = sent.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&to_send).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    writing.join().unwrap();
    assert!(
        received == sent,
        "{} of {} bytes came back, or wrong ones",
        received.len(),
        sent.len()
    );
}

#[test]
fn bytes_ends_addresses_and_identities_are_right_in_both_families() {
    let mesh = Mesh::new();
    for target in [mesh.server.pod.v4(8080), mesh.server.pod.v6(8080)] {
        let listener = mesh.server.pod.listen(target);
        let server = thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            let local = stream.local_addr().unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap();
            // The client has ended its half; ours goes on.
            stream.write_all(&request).unwrap();
            (peer, local)
        });
        exchange(&mesh, target, 3_000_000);
        let (peer, local) = server.join().unwrap();
        assert!(mesh.client.pod.addresses.contains(&peer.ip()), "application saw {peer}");
        assert_eq!(local, target);
    }
    for (node, records) in
        [(&mesh.client, mesh.client.ledger.ended(2)), (&mesh.server, mesh.server.ledger.ended(2))]
    {
        assert_eq!(records.len(), 2);
        for record in records {
            assert_eq!(record.reason, CloseReason::Complete, "{record:?}");
            assert_eq!(record.path, FlowPath::Tunnel);
            assert_eq!(record.pod, node.uid);
            assert_eq!(record.bytes.client_to_server, 3_000_000);
            assert_eq!(record.bytes.server_to_client, 3_000_000);
            assert_eq!(record.facts.source_principal, Some(identity("client")));
            assert_eq!(record.facts.destination_principal, Some(identity("server")));
            assert!(record.facts.mutual_tls);
        }
    }
}

#[test]
fn a_closed_port_resets_the_client_at_once() {
    let mesh = Mesh::new();
    // The first flow pays for the handshake, the second one must not wait.
    for _ in 0..2 {
        let begun = Instant::now();
        let mut stream = mesh.client.dial(mesh.server.pod.v4(9)).unwrap();
        assert_eq!(read_error(&mut stream), ErrorKind::ConnectionReset);
        assert!(begun.elapsed() < Duration::from_secs(2));
    }
    assert_eq!(mesh.server.ledger.ended(2)[0].reason, CloseReason::ConnectRefused);
    assert_eq!(mesh.client.ledger.ended(2)[0].reason, CloseReason::PeerRefused);
}

#[test]
fn a_reset_of_either_end_is_a_reset_at_the_other() {
    let mesh = Mesh::new();
    let listener = mesh.server.pod.listen(mesh.server.pod.v4(8080));

    let mut client = mesh.client.dial(mesh.server.pod.v4(8080)).unwrap();
    client.write_all(b"hello").unwrap();
    let (mut app, _) = listener.accept().unwrap();
    app.read_exact(&mut [0; 5]).unwrap();
    reset(app);
    assert_eq!(read_error(&mut client), ErrorKind::ConnectionReset);

    let mut client = mesh.client.dial(mesh.server.pod.v4(8080)).unwrap();
    client.write_all(b"hello").unwrap();
    let (mut app, _) = listener.accept().unwrap();
    app.read_exact(&mut [0; 5]).unwrap();
    app.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    reset(client);
    assert_eq!(read_error(&mut app), ErrorKind::ConnectionReset);

    let reasons: Vec<_> = mesh.client.ledger.ended(2).iter().map(|record| record.reason).collect();
    assert_eq!(reasons, [CloseReason::ServerReset, CloseReason::ClientReset]);
}

/// Whoever has `CAP_NET_ADMIN` in a pod may end the agent's sockets there.
#[test]
fn listeners_ended_from_inside_their_pods_are_opened_again() {
    let mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut live = mesh.client.dial(target).unwrap();
    // Served, that is, not in the queue of a listener that is ended.
    live.write_all(b"x").unwrap();
    live.read_exact(&mut [0]).unwrap();
    for (node, port) in [(&mesh.client, 15001), (&mesh.server, 15008), (&mesh.server, 15006)] {
        let before = node.plane.stats().listeners_ended;
        let ended = node.pod.enter(|| {
            let filter = format!("sport = :{port}");
            std::process::Command::new("ss").args(["-K", "-l", "-t", "-n", &filter]).output()
        });
        let ended = ended.unwrap();
        assert!(ended.status.success(), "{ended:?}");
        let deadline = Instant::now() + Duration::from_secs(10);
        while node.plane.stats().listeners_ended == before {
            assert!(Instant::now() < deadline, "nobody noticed the end of {port}: {ended:?}");
            thread::sleep(Duration::from_millis(10));
        }
        loop {
            let listening = node.pod.enter(|| {
                let filter = format!("sport = :{port}");
                std::process::Command::new("ss").args(["-H", "-l", "-t", "-n", &filter]).output()
            });
            if !listening.unwrap().stdout.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "{port} was not opened again");
            thread::sleep(Duration::from_millis(10));
        }
        exchange(&mesh, target, 10_000);
    }
    live.write_all(b"still").unwrap();
    live.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn a_thousand_connections_at_once_keep_their_bytes() {
    let mesh = Arc::new(Mesh::new());
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut streams: Vec<TcpStream> =
        (0..1_000).map(|_| mesh.client.dial(target).unwrap()).collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&u32::try_from(number).unwrap().to_be_bytes()).unwrap();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(u32::from_be_bytes(answer), u32::try_from(number).unwrap());
    }
    assert_eq!(mesh.client.plane.stats().open_flows, 1_000);
    assert_eq!(mesh.runtime.block_on(mesh.server.plane.connections()).len(), 1_000);
    drop(streams);
    assert_eq!(mesh.client.ledger.ended(1_000).len(), 1_000);
    assert_eq!(mesh.server.ledger.ended(1_000).len(), 1_000);
    assert_eq!(mesh.client.plane.stats().open_flows, 0);
}

fn deny_client() -> Policy {
    let name = PolicyName::new("shop", "deny-client");
    let clients = Match {
        source_ips: vec!["10.77.0.1".parse().unwrap(), "fd77::1".parse().unwrap()],
        ..Match::default()
    };
    Policy {
        origin: PolicyOrigin {
            kind: PolicyKind::AuthorizationPolicy,
            namespace: "shop".into(),
            name: "deny-client".into(),
            unreadable: None,
        },
        name,
        scope: PolicyScope::Namespace,
        action: Action::Deny,
        dry_run: false,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![clients] }] }],
    }
}

#[test]
fn a_new_denial_cuts_live_flows_within_a_second_and_refuses_new_ones() {
    let mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut live = mesh.client.dial(target).unwrap();
    live.write_all(b"x").unwrap();
    live.read_exact(&mut [0]).unwrap();

    let begun = Instant::now();
    mesh.server.change(Changed::POLICIES, |snapshot| {
        snapshot.policies.upsert(deny_client());
    });
    assert_eq!(read_error(&mut live), ErrorKind::ConnectionReset);
    assert!(begun.elapsed() < Duration::from_secs(1));
    let cut = &mesh.server.ledger.ended(1)[0];
    assert_eq!(cut.reason, CloseReason::PolicyChanged);
    let rule = "AuthorizationPolicy shop/deny-client rule 0";
    assert_eq!(cut.policy.as_ref().unwrap().to_string(), rule);

    let mut refused = mesh.client.dial(target).unwrap();
    assert_eq!(read_error(&mut refused), ErrorKind::ConnectionReset);
    let refused = &mesh.server.ledger.ended(2)[1];
    assert_eq!(refused.reason, CloseReason::PolicyDenied);
    assert_eq!(refused.policy.as_ref().unwrap().to_string(), rule);
    assert_eq!(mesh.client.ledger.ended(2)[1].reason, CloseReason::PeerDenied);
}

#[test]
fn a_revoked_peer_is_cut_and_not_let_in_again() {
    let mut mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut live = mesh.client.dial(target).unwrap();
    live.write_all(b"x").unwrap();
    live.read_exact(&mut [0]).unwrap();

    let serial = mesh.client.shared.snapshot.load().svids[&identity("client")].serial().to_vec();
    mesh.ca.revoke_leaf(&serial, SystemTime::now());
    let list = mesh.ca.crl_pem(SystemTime::now()).unwrap();
    let roots = mesh.ca.root_bundle_pem();
    let trust = Arc::new(TrustBundle::from_pem("cluster.local", &roots, &list).unwrap());
    mesh.server.change(Changed::TRUST, |snapshot| snapshot.trust = Arc::clone(&trust));
    assert_eq!(read_error(&mut live), ErrorKind::ConnectionReset);
    assert_eq!(mesh.server.ledger.ended(1)[0].reason, CloseReason::CertRevoked);

    let mut refused = mesh.client.dial(target).unwrap();
    assert_eq!(read_error(&mut refused), ErrorKind::ConnectionReset);
}

#[test]
fn rotating_certificates_and_roots_under_traffic_fails_no_connection() {
    let mut mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut long = mesh.client.dial(target).unwrap();
    for round in 0..3 {
        if round == 1 {
            mesh.ca.begin_root_rotation(SystemTime::now()).unwrap();
            mesh.ca.activate_root(SystemTime::now()).unwrap();
        }
        let roots = mesh.ca.root_bundle_pem();
        let trust = Arc::new(TrustBundle::from_pem("cluster.local", &roots, "").unwrap());
        for (node, name) in [(&mesh.client, "client"), (&mesh.server, "server")] {
            node.change(Changed::TRUST, |snapshot| snapshot.trust = Arc::clone(&trust));
            let svid = issue(&mesh.ca, &identity(name));
            node.change(Changed::IDENTITIES, |snapshot| {
                snapshot.svids.insert(identity(name), Arc::clone(&svid));
            });
        }
        for _ in 0..20 {
            exchange(&mesh, target, 10_000);
        }
        long.write_all(b"still here").unwrap();
        let mut answer = [0; 10];
        long.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"still here");
    }
    for record in mesh.client.ledger.ended(60) {
        assert_eq!(record.reason, CloseReason::Complete, "{record:?}");
    }
}

#[test]
fn a_server_with_another_identity_gets_no_byte() {
    let mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    let listener = mesh.server.pod.listen(target);
    mesh.client.change(Changed::INDEX, |snapshot| {
        let mut server = workload("server", &mesh.server.pod.addresses);
        server.service_account = "somebody-else".into();
        snapshot.index.apply(IndexDelta { workloads: vec![server], ..IndexDelta::default() });
    });
    let mut stream = mesh.client.dial(target).unwrap();
    stream.write_all(b"secret").ok();
    assert_eq!(read_error(&mut stream), ErrorKind::ConnectionReset);
    let record = &mesh.client.ledger.ended(1)[0];
    assert_eq!(record.reason, CloseReason::WrongIdentity);
    let detail = format!(
        "peer's certificate refused: peer is {}, which was not expected",
        identity("server")
    );
    assert_eq!(record.detail.as_deref(), Some(&*detail), "{record:?}");
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn an_unknown_destination_passes_in_plaintext_and_a_closed_one_resets() {
    let mesh = Mesh::new();
    mesh.client.change(Changed::INDEX, |snapshot| {
        let removed_workloads = vec![workload("server", &[]).uid];
        snapshot.index.apply(IndexDelta { removed_workloads, ..IndexDelta::default() });
    });
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    exchange(&mesh, target, 500_000);
    let mut closed = mesh.client.dial(mesh.server.pod.v4(9)).unwrap();
    assert_eq!(read_error(&mut closed), ErrorKind::ConnectionReset);
    let records = mesh.client.ledger.ended(2);
    assert_eq!(records[0].path, FlowPath::Plaintext);
    assert_eq!(records[0].reason, CloseReason::Complete);
    assert!(!records[0].facts.mutual_tls);
    assert_eq!(records[1].reason, CloseReason::ConnectRefused);
}

fn impatient() -> DataPlaneConfig {
    let patience = Duration::from_millis(300);
    DataPlaneConfig {
        workers: 1,
        limits: Limits {
            workload_patience: patience,
            certificate_patience: patience,
            ..Limits::default()
        },
        ..DataPlaneConfig::default()
    }
}

#[test]
fn flows_wait_for_workload_and_certificate_and_are_refused_after_a_while() {
    let mesh = Mesh::with(impatient());
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let uid = workload("client", &[]).uid;
    mesh.client.change(Changed::INDEX, |snapshot| {
        let removed_workloads = vec![uid.clone()];
        snapshot.index.apply(IndexDelta { removed_workloads, ..IndexDelta::default() });
    });
    let mut in_vain = mesh.client.dial(target).unwrap();
    assert_eq!(read_error(&mut in_vain), ErrorKind::ConnectionReset);
    assert_eq!(mesh.client.ledger.ended(1)[0].reason, CloseReason::UnknownWorkload);

    let kept = mesh.client.shared.snapshot.load().svids.clone();
    mesh.client.change(Changed::IDENTITIES, |snapshot| snapshot.svids.clear());
    let mut waits = mesh.client.dial(target).unwrap();
    waits.write_all(b"x").unwrap();
    mesh.client.change(Changed::INDEX, |snapshot| {
        let workloads = vec![workload("client", &mesh.client.pod.addresses)];
        snapshot.index.apply(IndexDelta { workloads, ..IndexDelta::default() });
    });
    mesh.client.change(Changed::IDENTITIES, |snapshot| snapshot.svids = kept.clone());
    waits.read_exact(&mut [0]).unwrap();

    mesh.client.change(Changed::IDENTITIES, |snapshot| snapshot.svids.clear());
    let mut in_vain = mesh.client.dial(target).unwrap();
    assert_eq!(read_error(&mut in_vain), ErrorKind::ConnectionReset);
    let reasons: Vec<_> = mesh.client.ledger.ended(2).iter().map(|record| record.reason).collect();
    assert_eq!(reasons, [CloseReason::UnknownWorkload, CloseReason::NoCertificate]);
}

#[test]
fn what_came_past_capture_and_what_is_no_tls_is_refused() {
    let mesh = Mesh::new();
    // The reset may come before connect has returned.
    let refusal = |connected: std::io::Result<TcpStream>| match connected {
        Ok(mut stream) => read_error(&mut stream),
        Err(error) => error.kind(),
    };
    let direct = mesh.client.pod.connect_plain(mesh.client.pod.v4(15001));
    assert_eq!(refusal(direct), ErrorKind::ConnectionReset);
    assert_eq!(mesh.client.ledger.ended(1)[0].reason, CloseReason::LoopRefused);

    let plain = mesh.client.pod.connect_plain(mesh.server.pod.v4(15006));
    assert_eq!(refusal(plain), ErrorKind::ConnectionReset);
    assert_eq!(mesh.server.ledger.ended(1)[0].reason, CloseReason::LoopRefused);

    let mut garbage = mesh.client.pod.connect_plain(mesh.server.pod.v4(15008)).unwrap();
    garbage.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut rest = Vec::new();
    // Closed at once, not after the handshake's deadline.
    garbage.read_to_end(&mut rest).ok();
    let begun = Instant::now();
    let failed = || mesh.server.plane.stats().handshakes_failed;
    while failed().get(&CloseReason::TlsFailure) != Some(&1) {
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", failed());
        thread::yield_now();
    }
}

#[test]
fn a_leaving_pod_lets_its_flows_end_or_cuts_them_at_the_deadline() {
    let mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut ends = mesh.client.dial(target).unwrap();
    ends.write_all(b"x").unwrap();
    ends.read_exact(&mut [0]).unwrap();
    let stays = ends.try_clone().unwrap();
    let ending = thread::spawn(move || {
        ends.write_all(b"y").unwrap();
        ends.read_exact(&mut [0]).unwrap();
        ends.shutdown(Shutdown::Both).unwrap();
    });
    let begun = Instant::now();
    mesh.runtime.block_on(
        mesh.client.plane.remove_pod(&mesh.client.uid, Drain::Graceful(Duration::from_secs(30))),
    );
    ending.join().unwrap();
    drop(stays);
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(mesh.client.plane.stats().pods, 0);
    // A program that another test starts at this moment may hold a copy of the listener until it runs.
    let begun = Instant::now();
    while mesh.client.dial(target).map_err(|error| error.kind()).err()
        != Some(ErrorKind::ConnectionRefused)
    {
        assert!(begun.elapsed() < Duration::from_secs(5), "the pod's port is still open");
    }
}

/// A pod that leaves the mesh and lives on: no deadline ends its flows, and a later one may.
#[test]
fn flows_of_a_pod_that_lives_on_end_by_themselves() {
    let mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut held = mesh.client.dial(target).unwrap();
    let hello = |stream: &mut TcpStream| {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    };
    hello(&mut held);
    let leaving = mesh.client.plane.remove_pod(&mesh.client.uid, Drain::WhenOver);
    let waited = mesh
        .runtime
        .block_on(async { tokio::time::timeout(Duration::from_millis(500), leaving).await });
    assert!(waited.is_err(), "the pod was gone before its flow");
    hello(&mut held);
    assert_eq!(mesh.client.plane.open_flows(&mesh.client.uid), 1);
    held.shutdown(Shutdown::Both).unwrap();
    drop(held);
    mesh.runtime.block_on(mesh.client.plane.remove_pod(&mesh.client.uid, Drain::WhenOver));
    assert_eq!(mesh.client.plane.open_flows(&mesh.client.uid), 0);
    assert_ne!(mesh.client.ledger.ended(1)[0].reason, CloseReason::Drained);
}

/// What lies in the queue of a listener when its pod leaves was captured, and for its client it is open.
#[test]
fn what_waits_to_be_accepted_when_a_pod_leaves_is_served() {
    let mesh = Mesh::with(DataPlaneConfig { workers: 1, ..DataPlaneConfig::default() });
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let sockets: Vec<_> = (0..100)
        .map(|_| {
            let socket = mesh.client.pod.client_socket(target);
            mesh.client.note(&socket, target);
            socket
        })
        .collect();
    // The worker stands at the first one; of the others it accepts some before it hears that the pod leaves.
    let held = mesh.client.hold_capture();
    let streams: Vec<_> = sockets.into_iter().map(|one| Node::dial_noted(one).unwrap()).collect();
    let leaving = mesh.client.plane.remove_pod(&mesh.client.uid, Drain::WhenOver);
    let asked =
        mesh.runtime.block_on(async { tokio::time::timeout(Duration::ZERO, leaving).await });
    assert!(asked.is_err(), "the pod was gone before its flows");
    drop(held);
    for mut stream in streams {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    assert_eq!(mesh.client.ledger.ended(100).len(), 100);
}

#[test]
fn a_pod_that_is_gone_takes_its_flows_with_it() {
    let mesh = Mesh::new();
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let mut live = mesh.client.dial(target).unwrap();
    live.write_all(b"x").unwrap();
    live.read_exact(&mut [0]).unwrap();
    mesh.runtime.block_on(mesh.server.plane.remove_pod(&mesh.server.uid, Drain::Now));
    assert_eq!(read_error(&mut live), ErrorKind::ConnectionReset);
    assert_eq!(mesh.server.ledger.ended(1)[0].reason, CloseReason::Drained);
}

#[test]
fn policy_changes_under_load_do_not_disturb_what_is_allowed() {
    let mesh = Arc::new(Mesh::new());
    let target = mesh.server.pod.v4(8080);
    echo(mesh.server.pod.listen(target));
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (mesh, stop, done) = (Arc::clone(&mesh), Arc::clone(&stop), Arc::clone(&done));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    exchange(&mesh, target, 20_000);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for _ in 0..100 {
        mesh.server.change(Changed::POLICIES.and(Changed::INDEX).and(Changed::TRUST), |_| {});
        mesh.client.change(Changed::POLICIES.and(Changed::INDEX).and(Changed::TRUST), |_| {});
        thread::yield_now();
    }
    while done.load(Ordering::Relaxed) < 40 {
        thread::yield_now();
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
}

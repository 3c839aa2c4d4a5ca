//! Captured plaintext: port 15006, steered to by nftables here, where the kernel's sk_lookup would do it.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use culvert_agent::dataplane::{Changed, DataPlaneConfig, Limits};
use mesh_model::{CloseReason, Direction};
use mesh_telemetry::FlowPath;

use crate::node::Mesh;
use crate::{deny_client, read_error};

#[test]
fn plaintext_keeps_its_addresses_is_judged_without_identity_and_waits_for_policies() {
    let patience = Duration::from_millis(300);
    let limits = Limits { policy_patience: patience, ..Limits::default() };
    let mesh = Mesh::with(DataPlaneConfig { workers: 1, limits, ..DataPlaneConfig::default() });
    mesh.server.pod.steer_plaintext(8080);
    for (turn, target) in
        [mesh.server.pod.v4(8080), mesh.server.pod.v6(8080)].into_iter().enumerate()
    {
        let listener = mesh.server.pod.listen(target);
        let server = thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap();
            stream.write_all(&request).unwrap();
            peer
        });
        let mut client = mesh.client.pod.connect_plain(target).unwrap();
        let own = client.local_addr().unwrap();
        let sent = crate::pattern(500_000);
        let mut writer = client.try_clone().unwrap();
        let to_send = sent.clone();
        let writing = thread::spawn(move || {
            writer.write_all(&to_send).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        writing.join().unwrap();
        assert!(received == sent, "{} bytes came back", received.len());
        let seen = server.join().unwrap();
        assert_eq!(seen.ip(), own.ip());
        // The client's own port is in use here by the captured connection.
        assert_ne!(seen.port(), own.port());
        let record = &mesh.server.ledger.ended(turn + 1)[turn];
        assert_eq!(
            (record.reason, record.direction),
            (CloseReason::Complete, Direction::InboundPlaintext)
        );
        assert_eq!(record.path, FlowPath::Plaintext);
        assert_eq!(record.facts.source_principal, None);
        assert!(!record.facts.mutual_tls);
    }
    let target = mesh.server.pod.v4(8080);
    let refused = |reason: CloseReason, count: usize| {
        let error = match mesh.client.pod.connect_plain(target) {
            Ok(mut stream) => read_error(&mut stream),
            Err(error) => error.kind(),
        };
        assert_eq!(error, ErrorKind::ConnectionReset);
        assert_eq!(mesh.server.ledger.ended(count)[count - 1].reason, reason);
    };
    mesh.server.change(Changed::POLICIES, |snapshot| snapshot.synced = false);
    refused(CloseReason::NotSynced, 3);
    mesh.server.change(Changed::POLICIES, |snapshot| {
        snapshot.synced = true;
        snapshot.policies.upsert(deny_client());
    });
    refused(CloseReason::PolicyDenied, 4);
}

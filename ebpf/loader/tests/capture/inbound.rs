//! Inbound: new connections reach the agent with the address they were made to, except tunnels,
//! the node's probes and what is excluded.

use std::net::Shutdown;
use std::time::Instant;

use mesh_ebpf::{PodSettings, Selection};

use crate::lab::{
    Lab, NODE_V4, OUTSIDE_V4, PATIENCE, POD_V4, POD_V6, at, dial, expect_refusals_at_once, greet,
    ip, listener, refused,
};

/// Applications in the pod on these ports, which greet with "application".
fn applications(lab: &Lab, ports: &[u16]) -> Vec<socket2::Socket> {
    let listeners: Vec<_> = lab.pod.inside(|| ports.iter().map(|port| listener(*port)).collect());
    for listener in &listeners {
        greet(listener, |_, _| "application".to_owned());
    }
    listeners
}

#[test]
fn every_port_is_steered_to_the_agent_with_its_address() {
    let lab = Lab::new();
    let capture = lab.capture();
    let agent = lab.enroll(&capture, PodSettings::default());
    let _applications = applications(&lab, &[8080]);
    let tunnels = lab.agent_listener(&capture, 15008);
    greet(&tunnels, |_, _| "application".to_owned());
    lab.outside.inside(|| {
        for port in [1, 443, 8080, 15001, 15006, 15053, 65_000] {
            for address in [POD_V4, POD_V6] {
                let target = at(address, port);
                assert_eq!(dial(target).unwrap(), format!("inbound {target}"));
            }
        }
        // The tunnel port is the agent's own.
        assert_eq!(dial(at(POD_V4, 15008)).unwrap(), "application");
        assert_eq!(dial(at(POD_V6, 15008)).unwrap(), "application");
    });
    lab.pod.inside(|| {
        for address in [POD_V4, POD_V6, "127.0.0.1", "::1"] {
            assert_eq!(dial(at(address, 8080)).unwrap(), "application", "{address}");
        }
    });
    // A second listener takes over before the first one closes.
    let successor = lab.agent_listener(&capture, 15006);
    greet(&successor, |_, _| "successor".to_owned());
    lab.outside.inside(|| {
        for _ in 0..20 {
            assert_eq!(dial(at(POD_V4, 8080)).unwrap(), "successor");
        }
    });
    drop(agent);
    lab.outside.inside(|| assert_eq!(dial(at(POD_V4, 8080)).unwrap(), "successor"));
    successor.shutdown(Shutdown::Both).unwrap();
    drop(successor);
    lab.outside.inside(|| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let result = dial(at(POD_V4, 8080));
            if refused(&result) {
                break;
            }
            assert!(Instant::now() < deadline, "{result:?}");
        }
        expect_refusals_at_once(at(POD_V4, 8080));
        expect_refusals_at_once(at(POD_V6, 443));
    });
    assert_eq!(capture.counters().unwrap()["guard_dropped_no_flow"], 0);
}

#[test]
fn probes_come_from_the_node_to_declared_ports_only() {
    let lab = Lab::new();
    let capture = lab.capture();
    let settings = PodSettings { probe_ports: [8080].into(), ..PodSettings::default() };
    let _agent = lab.enroll(&capture, settings);
    let _applications = applications(&lab, &[8080, 8081]);
    let captured = |port| format!("inbound {POD_V4}:{port}");
    // Not a node address yet.
    assert_eq!(dial(at(POD_V4, 8080)).unwrap(), captured(8080));
    capture.set_node_addresses(&[ip(NODE_V4), ip("fd91:1::1")]).unwrap();
    assert_eq!(dial(at(POD_V4, 8080)).unwrap(), "application");
    assert_eq!(dial(at(POD_V6, 8080)).unwrap(), "application");
    assert_eq!(dial(at(POD_V4, 8081)).unwrap(), captured(8081));
    lab.outside.inside(|| assert_eq!(dial(at(POD_V4, 8080)).unwrap(), captured(8080)));
    capture.set_node_addresses(&[]).unwrap();
    assert_eq!(dial(at(POD_V4, 8080)).unwrap(), captured(8080));
    assert_eq!(capture.counters().unwrap()["inbound_probe"], 2);
}

#[test]
fn excluded_inbound_connections_reach_the_application() {
    let lab = Lab::new();
    let capture = lab.capture();
    let _applications = applications(&lab, &[80, 81]);
    let expect = |settings: PodSettings, expected: [bool; 3]| {
        let shown = format!("{settings:?}");
        let _agent = lab.enroll(&capture, settings);
        lab.outside.inside(|| {
            let targets = [at(POD_V4, 80), at(POD_V4, 81), at(POD_V6, 81)];
            for (target, passes) in targets.into_iter().zip(expected) {
                let wanted =
                    if passes { "application".to_owned() } else { format!("inbound {target}") };
                assert_eq!(dial(target).unwrap(), wanted, "{shown}");
            }
        });
    };
    let inbound = |selection| PodSettings { inbound: selection, ..PodSettings::default() };
    let client = vec![format!("{OUTSIDE_V4}/32").parse().unwrap()];
    expect(
        inbound(Selection { exclude_ports: [81].into(), ..Selection::default() }),
        [false, true, true],
    );
    expect(
        inbound(Selection { include_ports: [81].into(), ..Selection::default() }),
        [true, false, false],
    );
    expect(
        inbound(Selection { exclude_networks: client.clone(), ..Selection::default() }),
        [true, true, false],
    );
    expect(
        inbound(Selection { include_networks: client, ..Selection::default() }),
        [false, false, true],
    );
    expect(PodSettings { capture_inbound: false, ..PodSettings::default() }, [true; 3]);
    assert_eq!(capture.counters().unwrap()["guard_dropped_no_flow"], 0);
}

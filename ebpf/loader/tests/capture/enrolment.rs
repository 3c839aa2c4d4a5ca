//! Enrolment: existing connections keep working, an error leaves nothing behind, un-enrolment
//! takes all of it away.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use mesh_ebpf::{Capture, CaptureError, Interfaces, PodSettings, monotonic_now};

use crate::lab::{
    Lab, OUTSIDE_V4, OUTSIDE_V6, PATIENCE, POD_V4, POD_V6, at, dial, greet, ip, listener,
    read_line, run,
};

fn connect(target: std::net::SocketAddr, greeting: &str) -> TcpStream {
    let stream = TcpStream::connect_timeout(&target, PATIENCE).unwrap();
    assert_eq!(read_line(&stream).unwrap(), greeting);
    stream
}

fn check_echo(mut stream: &TcpStream) {
    stream.write_all(b"still there?").unwrap();
    let mut echo = [0; 12];
    stream.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"still there?");
}

#[test]
fn connections_that_exist_at_enrolment_keep_working_until_they_close() {
    let lab = Lab::new();
    let capture = lab.capture();
    let outside = lab.outside.inside(|| listener(80));
    greet(&outside, |_, _| "outside".to_owned());
    let application = lab.pod.inside(|| listener(8080));
    greet(&application, |_, _| "application".to_owned());
    let outbound = lab
        .pod
        .inside(|| [OUTSIDE_V4, OUTSIDE_V6].map(|address| connect(at(address, 80), "outside")));
    let inbound = lab
        .outside
        .inside(|| [POD_V4, POD_V6].map(|address| connect(at(address, 8080), "application")));

    let _agent = lab.enroll(&capture, PodSettings::default());
    for stream in outbound.iter().chain(&inbound) {
        check_echo(stream);
    }
    lab.pod.inside(|| {
        assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), format!("outbound {OUTSIDE_V4}:80"));
    });
    let settled = monotonic_now() + Duration::from_secs(60);
    let swept = capture.sweep_flows(settled).unwrap();
    assert_eq!((swept.live, swept.removed), (4, 0));
    for stream in outbound.iter().chain(&inbound) {
        check_echo(stream);
    }
    drop((outbound, inbound));
    let deadline = std::time::Instant::now() + PATIENCE;
    while capture.sweep_flows(settled).unwrap().live > 0 {
        assert!(std::time::Instant::now() < deadline);
    }
    assert_eq!(capture.counters().unwrap()["guard_dropped_no_flow"], 0);
}

#[test]
fn enrolling_again_changes_settings_and_addresses() {
    let lab = Lab::new();
    let capture = lab.capture();
    let mut pod = lab.pod_capture(PodSettings::default());
    pod.addresses = vec![ip(POD_V4)];
    let cookie = capture.enroll(&pod, 1).unwrap();
    assert_eq!(cookie, Capture::netns_cookie(&lab.pod.path).unwrap());
    assert_eq!(capture.enrolled().unwrap()[0].addresses, [ip(POD_V4)]);
    pod.addresses = vec![ip(POD_V6)];
    assert_eq!(capture.enroll(&pod, 1).unwrap(), cookie);
    let enrolled = capture.enrolled().unwrap();
    assert_eq!((enrolled.len(), &enrolled[0].addresses[..]), (1, &[ip(POD_V6)][..]));
}

#[test]
fn a_failed_enrolment_leaves_nothing_behind() {
    let lab = Lab::new();
    let capture = lab.capture();
    let server = lab.outside.inside(|| listener(80));
    greet(&server, |_, _| "outside".to_owned());
    let refuse = |pod: &mesh_ebpf::PodCapture| {
        let error = capture.enroll(pod, 1).unwrap_err();
        assert!(capture.enrolled().unwrap().is_empty());
        let pods = lab.bpffs.join("culvert/v3/pods");
        assert_eq!(std::fs::read_dir(pods).unwrap().count(), 0);
        lab.pod.inside(|| assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), "outside"));
        error
    };
    let pod = lab.pod_capture(PodSettings::default());
    // Not a listener: the kernel refuses it as an entry.
    let file = std::fs::File::open("/dev/null").unwrap();
    let cookie = Capture::netns_cookie(&lab.pod.path).unwrap();
    let error = capture.set_listener(cookie, 15006, 0, file.as_fd()).unwrap_err();
    assert!(matches!(error, CaptureError::Kernel { .. }));
    let missing = mesh_ebpf::PodCapture { netns: "/run/netns/mebpf-none".into(), ..pod.clone() };
    assert!(matches!(refuse(&missing), CaptureError::Netns { .. }));
    let node = Path::new("/proc/thread-self/ns/net").to_owned();
    let node = mesh_ebpf::PodCapture { netns: node, ..pod.clone() };
    assert!(matches!(refuse(&node), CaptureError::HostNetwork { .. }));
    let loopback = mesh_ebpf::PodCapture { addresses: vec![ip("127.0.0.1")], ..pod.clone() };
    assert!(matches!(refuse(&loopback), CaptureError::Addresses(_)));
    // A way out that no guard can watch, found after everything else was right.
    let outside = lab.outside.path.file_name().unwrap().display();
    lab.pod.inside(|| run(&format!("ip link add leak type veth peer name leak netns {outside}")));
    assert!(matches!(refuse(&pod), CaptureError::Unguardable { .. }));
    lab.pod.inside(|| run("ip link delete leak"));
    capture.enroll(&pod, 1).unwrap();
}

#[test]
fn unenrolling_lets_traffic_go_direct_and_removes_everything() {
    let lab = Lab::new();
    let capture = lab.capture();
    let outside = lab.outside.inside(|| listener(80));
    greet(&outside, |_, _| "outside".to_owned());
    let agent = lab.enroll(&capture, PodSettings::default());
    let captured =
        lab.pod.inside(|| connect(at(OUTSIDE_V4, 80), &format!("outbound {OUTSIDE_V4}:80")));
    capture.unenroll(agent.cookie).unwrap();
    capture.unenroll(agent.cookie).unwrap();
    assert!(capture.enrolled().unwrap().is_empty());
    check_echo(&captured);
    assert_eq!(captured.peer_addr().unwrap(), at(OUTSIDE_V4, 80));
    let application = lab.pod.inside(|| listener(8080));
    greet(&application, |_, _| "application".to_owned());
    lab.pod.inside(|| assert_eq!(dial(at(OUTSIDE_V4, 80)).unwrap(), "outside"));
    lab.outside.inside(|| assert_eq!(dial(at(POD_V4, 8080)).unwrap(), "application"));
}

/// What another CNI plugin adds to a running pod (Multus) is guarded at the next look, or named.
#[test]
fn interfaces_added_after_enrolment_are_guarded_or_named() {
    let lab = Lab::new();
    let capture = lab.capture();
    let agent = lab.enroll(&capture, PodSettings::default());
    assert_eq!(capture.guard_new_interfaces().unwrap(), Interfaces::default());
    let pod = lab.pod.path.file_name().unwrap().to_str().unwrap();
    run(&format!(
        "ip link add vmore type veth peer name eth1 netns {pod}
        ip link set vmore up
        ip -n {pod} link set eth1 up"
    ));
    assert_eq!(capture.find(agent.cookie).unwrap().unwrap().guarded.len(), 1);
    assert_eq!(capture.guard_new_interfaces().unwrap().guarded, 1);
    let found = capture.find(agent.cookie).unwrap().unwrap();
    assert!(found.guarded.len() == 2 && found.is_whole(), "{found:?}");
    assert_eq!(capture.guard_new_interfaces().unwrap().guarded, 0);
    // A way out whose other end is not on this node.
    let elsewhere = lab.outside.path.file_name().unwrap().to_str().unwrap();
    run(&format!("ip -n {pod} link add far0 type veth peer name far1 netns {elsewhere}"));
    let found = capture.guard_new_interfaces().unwrap();
    assert_eq!(found.unguardable, [(agent.cookie, "far0".to_owned())]);
    capture.detach_all().unwrap();
}

/// A link that somebody takes away is missed.
#[test]
fn a_pod_whose_steering_was_detached_is_not_whole() {
    let lab = Lab::new();
    let capture = lab.capture();
    let agent = lab.enroll(&capture, PodSettings::default());
    assert!(capture.find(agent.cookie).unwrap().unwrap().is_whole());
    run(&format!(
        "rm {}",
        lab.bpffs.join(format!("culvert/v3/pods/{}/steer_inbound", agent.cookie)).display()
    ));
    assert!(!capture.find(agent.cookie).unwrap().unwrap().is_whole());
    assert!(!capture.enrolled().unwrap()[0].is_whole());
    capture.unenroll(agent.cookie).unwrap();
    assert_eq!(capture.find(agent.cookie).unwrap(), None);
    capture.detach_all().unwrap();
}

//! What is found by trying is what capture then uses.

use crate::lab::Lab;

#[test]
fn probes_say_what_capture_uses_and_leave_nothing() {
    let lab = Lab::new();
    let probes = mesh_ebpf::probe(None);
    let capture = lab.capture();
    let features = capture.features();
    probes.netns_cookie.unwrap();
    probes.sock_destroy.unwrap();
    let attachments = probes.programs.unwrap();
    assert_eq!(attachments.guard.unwrap(), features.guard);
    assert_eq!(attachments.cgroup_order.unwrap(), features.cgroup_order);
    attachments.sk_lookup.unwrap();
    let group = format!("culvert-probe-{}", std::process::id());
    assert!(!features.cgroup_root.join(group).exists());
}

#[test]
fn a_probe_names_what_is_missing() {
    let probes = mesh_ebpf::probe(Some(std::path::Path::new("/proc")));
    let attachments = probes.programs.unwrap();
    assert!(attachments.cgroup_order.unwrap_err().to_string().contains("cgroup"));
}

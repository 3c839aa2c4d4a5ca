use super::super::Level::{self, Fail, Ok, Warn};
use super::*;

fn level(finding: &Finding, expected: Level) {
    assert_eq!(finding.level, expected, "{finding:?}");
    assert_eq!(finding.remedy.is_empty(), expected == Ok, "{finding:?}");
}

#[test]
fn kernels_are_judged_by_their_number() {
    for (release, expected) in [
        (Some("6.1.0-18-amd64"), Ok),
        (Some("6.12.9+deb13-amd64"), Ok),
        (Some("10.0"), Ok),
        (Some("6.0.19"), Fail),
        (Some("5.15.0-91-generic"), Fail),
        (Some("linux"), Warn),
        (None, Fail),
    ] {
        level(&kernel(release), expected);
    }
}

#[test]
fn the_guard_needs_tcx_or_clsact() {
    for (tcx, clsact, expected) in [
        (Some(true), None, Ok),
        (Some(true), Some(false), Ok),
        (Some(false), Some(true), Warn),
        (Some(false), Some(false), Fail),
        (None, Some(true), Warn),
        (None, None, Warn),
    ] {
        level(&guard(tcx, clsact), expected);
    }
}

#[test]
fn only_the_machines_own_cgroup_root_will_do() {
    let root = |is_cgroup2, inode| CgroupRoot { path: "/sys/fs/cgroup".into(), is_cgroup2, inode };
    level(&cgroup(&[root(false, Some(1)), root(true, Some(1))]), Ok);
    level(&cgroup(&[root(true, Some(4711))]), Fail);
    level(&cgroup(&[root(true, None)]), Fail);
    level(&cgroup(&[root(false, Some(1))]), Fail);
    level(&cgroup(&[]), Fail);
}

#[test]
fn missing_capabilities_are_named() {
    level(&capabilities(Some(u64::MAX)), Ok);
    let finding = capabilities(Some(!(1 << 39) & !(1 << 12)));
    level(&finding, Fail);
    assert_eq!(finding.found, "this process lacks CAP_NET_ADMIN, CAP_BPF");
    level(&capabilities(None), Fail);
}

#[test]
fn clocks_that_cannot_be_right_are_told() {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let (now, day) = (at(1_800_000_000), 86_400);
    level(&clock(now, Some(at(1_700_000_000)), None), Ok);
    level(&clock(now, None, Some(at(1_800_000_010))), Ok);
    level(&clock(now, None, Some(at(1_800_000_000 - day))), Warn);
    level(&clock(now, None, Some(at(1_800_000_000 + day))), Warn);
    level(&clock(at(1_000), Some(at(1_700_000_000)), Some(at(1_000))), Fail);
}

#[test]
fn the_smallest_mtu_counts() {
    let uplink = |mtu| Uplink { name: "eth0".to_owned(), mtu };
    level(&mtu(&[uplink(Some(1500)), uplink(Some(9000))]), Ok);
    level(&mtu(&[uplink(Some(1450)), uplink(Some(9000))]), Warn);
    level(&mtu(&[uplink(Some(1279))]), Fail);
    level(&mtu(&[uplink(None)]), Warn);
    level(&mtu(&[]), Warn);
}

#[test]
fn limits_and_switches() {
    level(&descriptors(Some(1024)), Warn);
    level(&descriptors(Some(1_048_576)), Ok);
    level(&descriptors(None), Warn);
    level(&jit(Some("0")), Warn);
    level(&jit(Some("1")), Ok);
    level(&jit(None), Ok);
    level(&lockdown(Some("none [integrity] confidentiality")), Ok);
    level(&lockdown(Some("none integrity [confidentiality]")), Fail);
    level(&lockdown(None), Ok);
    level(&btf(Some(1)), Ok);
    level(&btf(None), Fail);
    level(&bpffs(Path::new("/sys/fs/bpf/culvert"), true), Ok);
    level(&bpffs(Path::new("/sys/fs/bpf/culvert"), false), Fail);
    level(&memlock(Some(8 * 1024 * 1024), Some(0)), Ok);
}

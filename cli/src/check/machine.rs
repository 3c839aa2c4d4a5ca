//! What can be seen of the machine. Facts only; [`verdict`](super::verdict) judges them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

/// A candidate for the root of the cgroup2 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CgroupRoot {
    pub(super) path: PathBuf,
    pub(super) is_cgroup2: bool,
    /// None when it cannot be looked at.
    pub(super) inode: Option<u64>,
}

/// An interface that a default route goes through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Uplink {
    pub(super) name: String,
    pub(super) mtu: Option<u32>,
}

/// A small file's text, without blanks around it; none when it is not there.
pub(super) fn text(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The kernel's type information.
pub(super) fn btf() -> Option<Vec<u8>> {
    fs::read("/sys/kernel/btf/vmlinux").ok()
}

/// True when the kernel's types know of tcx links.
pub(super) fn has_tcx(btf: &[u8]) -> bool {
    let name = b"\0BPF_TCX_INGRESS\0";
    btf.windows(name.len()).any(|window| window == name)
}

/// True when the clsact queueing discipline is there or can be loaded; none when that cannot be told.
pub(super) fn has_clsact() -> Option<bool> {
    if Path::new("/sys/module/sch_ingress").exists() {
        return Some(true);
    }
    let folder = PathBuf::from("/lib/modules").join(text("/proc/sys/kernel/osrelease")?);
    let lists = ["modules.builtin", "modules.dep"];
    let mut texts = lists.iter().map(|list| fs::read_to_string(folder.join(list)));
    if texts.by_ref().any(|text| text.is_ok_and(|text| text.contains("/sch_ingress.ko"))) {
        return Some(true);
    }
    folder.join("modules.dep").exists().then_some(false)
}

/// True when the kernel can end sockets for the direct path; none when its configuration cannot be read.
pub(super) fn can_end_sockets() -> Option<bool> {
    let release = text("/proc/sys/kernel/osrelease")?;
    let config = text(&format!("/boot/config-{release}")).or_else(kernel_config)?;
    Some(config.lines().any(|line| line == "CONFIG_INET_DIAG_DESTROY=y"))
}

/// The running kernel's configuration, where it tells it.
fn kernel_config() -> Option<String> {
    let unpacked =
        std::process::Command::new("gzip").args(["-dc", "/proc/config.gz"]).output().ok()?;
    unpacked.status.success().then(|| String::from_utf8_lossy(&unpacked.stdout).into_owned())
}

/// Where the hierarchy may be: `named`, or the usual places for `auto`.
pub(super) fn cgroup_roots(named: &str) -> Vec<CgroupRoot> {
    let paths = match named {
        "auto" => vec!["/sys/fs/cgroup", "/sys/fs/cgroup/unified"],
        path => vec![path],
    };
    paths
        .into_iter()
        .map(|path| CgroupRoot {
            path: path.into(),
            is_cgroup2: statfs(path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC),
            inode: fs::metadata(path).ok().map(|metadata| metadata.ino()),
        })
        .collect()
}

/// True when `path`, or the nearest folder above it that exists, is on a bpffs.
pub(super) fn is_on_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find_map(|folder| statfs(folder).ok())
        .is_some_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// This process's effective capabilities, a bit for each.
pub(super) fn effective_capabilities() -> Option<u64> {
    let status = text("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// The hard limit of locked memory, bytes.
pub(super) fn memlock() -> Option<u64> {
    getrlimit(Resource::RLIMIT_MEMLOCK).ok().map(|(_soft, hard)| hard)
}

/// The hard limit of open descriptors.
pub(super) fn descriptors() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(_soft, hard)| hard)
}

/// When this program's file was made: no clock may show less.
pub(super) fn program_made() -> Option<SystemTime> {
    std::env::current_exe().and_then(fs::metadata).and_then(|file| file.modified()).ok()
}

/// What the machine's hardware clock shows.
pub(super) fn hardware_clock() -> Option<SystemTime> {
    let seconds = text("/sys/class/rtc/rtc0/since_epoch")?.parse().ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// The interfaces of the default routes of both families.
pub(super) fn uplinks() -> Vec<Uplink> {
    let ipv4 = text("/proc/net/route").unwrap_or_default();
    let ipv6 = text("/proc/net/ipv6_route").unwrap_or_default();
    let mut names: Vec<&str> = default_routes(&ipv4, &ipv6);
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .map(|name| Uplink {
            name: name.to_owned(),
            mtu: text(&format!("/sys/class/net/{name}/mtu")).and_then(|mtu| mtu.parse().ok()),
        })
        .collect()
}

/// Source: proc_net(5): interface, destination, …, mask; for IPv6 destination, prefix length, …, interface.
fn default_routes<'a>(ipv4: &'a str, ipv6: &'a str) -> Vec<&'a str> {
    let of_ipv4 = ipv4.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000");
        fields.first().copied().filter(|_| is_default)
    });
    let of_ipv6 = ipv6.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00")
            && fields.first().is_some_and(|address| address.bytes().all(|byte| byte == b'0'));
        // The kernel's own "unreachable" route stands at lo.
        fields.last().copied().filter(|name| is_default && OsStr::new(name) != "lo")
    });
    of_ipv4.chain(of_ipv6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_found() {
        let ipv4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
                    eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                    eth1\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                    tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n";
        let zero = "0".repeat(32);
        let ipv6 = format!(
            "{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 1 0 00000003 wlan0\n\
             {zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200 lo\n\
             fe80{} 40 {zero} 00 {zero} 00000100 1 0 00000001 eth9\n",
            "0".repeat(28)
        );
        assert_eq!(default_routes(ipv4, &ipv6), ["eth0", "wlan0"]);
        assert!(default_routes("", "").is_empty());
    }

    #[test]
    fn tcx_is_known_by_its_name() {
        assert!(has_tcx(b"abc\0BPF_TCX_INGRESS\0def"));
        assert!(!has_tcx(b"abc\0BPF_TCX_INGRES\0def"));
    }
}

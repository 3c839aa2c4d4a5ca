//! What the facts mean for the agent, and what to do about them.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::Finding;
use super::machine::{CgroupRoot, Uplink};

/// The oldest kernel with everything that has no fallback.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// Capabilities the agent needs, by bit. Source: capability.h of Linux.
const NEEDED: [(u32, &str); 4] =
    [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
const CAP_SYS_RESOURCE: u32 = 24;
/// Descriptors below which a node of a hundred pods runs out: two for each connection.
const ENOUGH_DESCRIPTORS: u64 = 65_536;
/// Inode of the root of the machine's cgroup2 hierarchy.
const ROOT_INODE: u64 = 1;
/// Smallest MTU of IPv6 (RFC 8200) and the usual one.
const MTUS: (u32, u32) = (1280, 1500);
/// How far two clocks of one machine may be apart.
const CLOCK_SLACK: Duration = Duration::from_mins(5);

pub(super) fn kernel(release: Option<&str>) -> Finding {
    let Some(release) = release else {
        return Finding::fail("kernel", "its release cannot be read", "mount /proc");
    };
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= OLDEST_KERNEL => Finding::ok(
            "kernel",
            format!("Linux {release}, by its version; as root everything is tried"),
        ),
        (Some(Ok(_)), Some(Ok(_))) => {
            let remedy = "use Linux 6.1 or later, such as that of Debian 12";
            Finding::fail("kernel", format!("Linux {release} is too old"), remedy)
        }
        _ => Finding::warn(
            "kernel",
            format!("release {release:?} has no version"),
            "see that it is 6.1 or later",
        ),
    }
}

/// Its version decides nothing where everything is tried.
pub(super) fn kernel_tried(release: Option<&str>) -> Finding {
    let release =
        release.map_or_else(|| "of unknown release".to_owned(), |text| format!("Linux {text}"));
    Finding::ok("kernel", format!("{release}; what it has was tried, see below"))
}

/// Whether this process has the capabilities that trying takes.
pub(super) fn may_try(capabilities: Option<u64>) -> bool {
    capabilities.is_some_and(|effective| NEEDED.iter().all(|(bit, _)| has(effective, *bit)))
}

pub(super) fn btf(size: Option<usize>) -> Finding {
    match size {
        Some(bytes) => {
            let found = format!("types of the kernel, {} KiB", bytes / 1024);
            Finding::ok("BTF", found)
        }
        None => Finding::fail(
            "BTF",
            "/sys/kernel/btf/vmlinux cannot be read",
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y, and mount /sys",
        ),
    }
}

pub(super) fn guard(tcx: Option<bool>, clsact: Option<bool>) -> Finding {
    match (tcx, clsact) {
        (Some(true), _) => Finding::ok("guard", "by tcx"),
        (Some(false) | None, Some(true)) => Finding::warn(
            "guard",
            "no tcx: it falls back to clsact, which any tool with CAP_NET_ADMIN can remove",
            "use Linux 6.6 or later; until then the agent looks after it and puts it back",
        ),
        (Some(false) | None, Some(false)) => Finding::fail(
            "guard",
            "neither tcx nor clsact",
            "use Linux 6.6 or later, or install the kernel module sch_ingress",
        ),
        (Some(false) | None, None) => Finding::warn(
            "guard",
            "no tcx, and whether there is clsact cannot be told",
            "see that modprobe sch_ingress works, or use Linux 6.6 or later",
        ),
    }
}

/// Whether connections between pods of one node may go without the agent.
pub(super) fn same_node(can_end_sockets: Option<bool>) -> Finding {
    match can_end_sockets {
        Some(true) => Finding::ok("same node", "direct: sockets can be ended (SOCK_DESTROY)"),
        Some(false) => Finding::warn(
            "same node",
            "sockets cannot be ended: it falls back to tunnels through the agent",
            "use a kernel with CONFIG_INET_DIAG_DESTROY=y and the module tcp_diag",
        ),
        None => Finding::warn(
            "same node",
            "whether sockets can be ended cannot be told; if not, it falls back to tunnels",
            "see that modprobe tcp_diag works; the agent's log says what it found",
        ),
    }
}

pub(super) fn lockdown(modes: Option<&str>) -> Finding {
    let remedy = "boot without lockdown=confidentiality: it forbids BPF to read";
    match modes {
        Some(modes) if modes.contains("[confidentiality]") => {
            Finding::fail("lockdown", "confidentiality", remedy)
        }
        Some(modes) if modes.contains("[integrity]") => Finding::ok("lockdown", "integrity"),
        Some(_) | None => Finding::ok("lockdown", "none"),
    }
}

pub(super) fn cgroup(roots: &[CgroupRoot]) -> Finding {
    let Some(root) = roots.iter().find(|root| root.is_cgroup2) else {
        let tried: Vec<String> = roots.iter().map(|root| root.path.display().to_string()).collect();
        return Finding::fail(
            "cgroup2",
            format!("not found at {}", tried.join(" or ")),
            "mount -t cgroup2 none /sys/fs/cgroup/unified, or name its root with --cgroup-root",
        );
    };
    let path = root.path.display();
    match root.inode {
        Some(ROOT_INODE) => Finding::ok("cgroup2", format!("root at {path}")),
        Some(inode) => Finding::fail(
            "cgroup2",
            format!("{path} is not the machine's root (inode {inode}, not 1)"),
            "run outside a cgroup namespace: mount the host's /sys/fs/cgroup into the container",
        ),
        None => Finding::fail("cgroup2", format!("{path} cannot be looked at"), "run as root"),
    }
}

pub(super) fn bpffs(path: &Path, is_bpffs: bool) -> Finding {
    if is_bpffs {
        return Finding::ok("bpffs", format!("holds {}", path.display()));
    }
    Finding::fail(
        "bpffs",
        format!("{} is not on one: capture would not outlive the agent", path.display()),
        "mount -t bpf bpf /sys/fs/bpf; in a container, mount the host's",
    )
}

pub(super) fn capabilities(effective: Option<u64>) -> Finding {
    let Some(effective) = effective else {
        return Finding::fail("capabilities", "cannot be read", "mount /proc");
    };
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(bit, _)| !has(effective, *bit)).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        return Finding::ok("capabilities", "all that are needed");
    }
    Finding::fail(
        "capabilities",
        format!("this process lacks {}", missing.join(", ")),
        "run as root, in a container with these capabilities",
    )
}

pub(super) fn memlock(hard: Option<u64>, capabilities: Option<u64>) -> Finding {
    let raisable = capabilities.is_some_and(|effective| has(effective, CAP_SYS_RESOURCE));
    let limit = match hard {
        Some(u64::MAX) | None => "not limited".to_owned(),
        Some(_) if raisable => "can be raised".to_owned(),
        Some(bytes) => crate::show::bytes(bytes),
    };
    // Source: Linux 5.11 charges the memory of BPF to its cgroup instead; every kernel we take does.
    Finding::ok("memlock", format!("{limit}; BPF's memory is charged to the cgroup, not to it"))
}

pub(super) fn descriptors(hard: Option<u64>) -> Finding {
    match hard {
        Some(limit) if limit < ENOUGH_DESCRIPTORS => Finding::warn(
            "descriptors",
            format!("at most {limit}; a connection takes two"),
            "LimitNOFILE=1048576 in the unit, or ulimit -Hn 1048576",
        ),
        Some(limit) => Finding::ok("descriptors", format!("at most {limit}")),
        None => Finding::warn("descriptors", "the limit cannot be read", "run as root"),
    }
}

pub(super) fn jit(setting: Option<&str>) -> Finding {
    match setting {
        Some("0") => Finding::warn(
            "BPF JIT",
            "off: every packet and connect is slow",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Some(_) | None => Finding::ok("BPF JIT", "on"),
    }
}

pub(super) fn clock(
    now: SystemTime,
    program_made: Option<SystemTime>,
    hardware: Option<SystemTime>,
) -> Finding {
    let remedy = "start chrony or systemd-timesyncd: certificates live for a day";
    if program_made.is_some_and(|made| made > now + CLOCK_SLACK) {
        return Finding::fail("clock", "shows a time before this program was made", remedy);
    }
    let apart = hardware
        .map(|other| now.duration_since(other).unwrap_or_else(|earlier| earlier.duration()));
    match apart {
        Some(apart) if apart > CLOCK_SLACK => Finding::warn(
            "clock",
            format!("{} from the hardware clock", crate::show::span(apart.as_secs())),
            format!("{remedy} (a hardware clock in local time is no fault)"),
        ),
        Some(_) | None => Finding::ok("clock", "plausible"),
    }
}

pub(super) fn mtu(uplinks: &[Uplink]) -> Finding {
    let described = |uplink: &Uplink| match uplink.mtu {
        Some(mtu) => format!("{} {mtu}", uplink.name),
        None => format!("{} unknown", uplink.name),
    };
    let found = uplinks.iter().map(described).collect::<Vec<_>>().join(", ");
    let smallest = uplinks.iter().filter_map(|uplink| uplink.mtu).min();
    match smallest {
        None => Finding::warn(
            "MTU",
            "no default route",
            "see that the interface between the nodes has at least 1280",
        ),
        Some(mtu) if mtu < MTUS.0 => {
            let remedy = "raise it to 1280 or more: IPv6 needs that";
            Finding::fail("MTU", found, remedy)
        }
        Some(mtu) if mtu < MTUS.1 => Finding::warn(
            "MTU",
            found,
            "give the pods' interfaces the same or less, or large packets get lost",
        ),
        Some(_) => Finding::ok("MTU", found),
    }
}

const fn has(capabilities: u64, bit: u32) -> bool {
    capabilities & (1 << bit) != 0
}

#[cfg(test)]
mod tests;

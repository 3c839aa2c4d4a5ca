//! How many cores this process may use.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// Cores this process may keep busy, at least 1: what its affinity (which a cpuset limits as well) and the processor
/// quotas of its cgroup and of every cgroup above allow, rounded up.
///
/// Rounded up, because a quota of 1.5 cores kept busy by one thread wastes a third of it.
/// Source: kernel `Documentation/admin-guide/cgroup-v2.rst` (cpu.max); cgroup v1 `cpu.cfs_quota_us`.
#[must_use]
pub fn usable_cores() -> usize {
    let quota = fs::read_to_string("/proc/self/cgroup")
        .ok()
        .and_then(|cgroups| quota_cores(&cgroups, Path::new("/sys/fs/cgroup")));
    affinity_cores().min(quota.unwrap_or(usize::MAX)).max(1)
}

fn affinity_cores() -> usize {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return 1 };
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).count()
}

/// The tightest quota on the way from the process's cgroup up to `root`; `None` without any.
fn quota_cores(cgroups: &str, root: &Path) -> Option<usize> {
    cgroups
        .lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            match controllers {
                "" => tightest(root, path, quota_v2),
                _ if controllers.split(',').any(|controller| controller == "cpu") => {
                    let mounted = root.join(controllers);
                    let base = if mounted.exists() { mounted } else { root.join("cpu") };
                    tightest(&base, path, quota_v1)
                }
                _ => None,
            }
        })
        .min()
}

fn tightest(base: &Path, path: &str, quota: impl Fn(&Path) -> Option<usize>) -> Option<usize> {
    let mut folder: PathBuf = base.join(path.trim_start_matches('/'));
    let mut least = None;
    // In a cgroup namespace the path may lead outside; then only the root is seen.
    while folder.starts_with(base) {
        if let Some(cores) = quota(&folder) {
            least = Some(least.map_or(cores, |least: usize| least.min(cores)));
        }
        if !folder.pop() {
            break;
        }
    }
    least
}

fn quota_v2(folder: &Path) -> Option<usize> {
    parse_cpu_max(&fs::read_to_string(folder.join("cpu.max")).ok()?)
}

fn quota_v1(folder: &Path) -> Option<usize> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let quota: i64 = read("cpu.cfs_quota_us")?.trim().parse().ok()?;
    let period: u64 = read("cpu.cfs_period_us")?.trim().parse().ok()?;
    cores(u64::try_from(quota).ok()?, period)
}

/// `max 100000` or `150000 100000`.
fn parse_cpu_max(text: &str) -> Option<usize> {
    let mut words = text.split_whitespace();
    let quota = words.next()?.parse().ok()?;
    cores(quota, words.next()?.parse().ok()?)
}

fn cores(quota: u64, period: u64) -> Option<usize> {
    if period == 0 {
        return None;
    }
    usize::try_from(quota.div_ceil(period)).ok().map(|cores| cores.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_rounded_up() {
        for (text, expected) in [
            ("max 100000\n", None),
            ("150000 100000\n", Some(2)),
            ("200000 100000", Some(2)),
            ("10000 100000", Some(1)),
            ("0 100000", Some(1)),
            ("100 0", None),
            ("", None),
            ("nonsense here", None),
        ] {
            assert_eq!(parse_cpu_max(text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_tightest_quota_above_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("kubepods/pod1/container");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("cpu.max"), "max 100000").unwrap();
        fs::write(root.path().join("kubepods/pod1/cpu.max"), "300000 100000").unwrap();
        fs::write(root.path().join("kubepods/cpu.max"), "700000 100000").unwrap();
        assert_eq!(quota_cores("0::/kubepods/pod1/container\n", root.path()), Some(3));
        assert_eq!(quota_cores("0::/kubepods\n", root.path()), Some(7));
        assert_eq!(quota_cores("0::/elsewhere\n", root.path()), None);
        assert_eq!(quota_cores("0::/../..\n", root.path()), None);
        assert_eq!(quota_cores("rubbish", root.path()), None);
    }

    #[test]
    fn version_one_quotas_count_as_well() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("cpu,cpuacct/docker/abc");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("cpu.cfs_quota_us"), "250000").unwrap();
        fs::write(inner.join("cpu.cfs_period_us"), "100000").unwrap();
        let cgroups = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n";
        assert_eq!(quota_cores(cgroups, root.path()), Some(3));
        fs::write(inner.join("cpu.cfs_quota_us"), "-1").unwrap();
        assert_eq!(quota_cores(cgroups, root.path()), None);
    }

    #[test]
    fn at_least_one_core_is_usable() {
        assert!(usable_cores() >= 1);
    }
}

//! How much of its memory the agent may still use, as its cgroup says.

use std::path::{Path, PathBuf};

/// Above this share of the limit nothing is admitted.
const SHORT_PERCENT: u64 = 90;
/// Below this share admission begins again.
const ENOUGH_PERCENT: u64 = 85;

/// Looks at a cgroup. Without a limit memory is never short.
#[derive(Debug)]
pub(crate) struct MemoryMeter {
    group: Option<PathBuf>,
    short: bool,
}

impl MemoryMeter {
    /// Over this process's own cgroup (cgroup2).
    pub(crate) fn of_this_process() -> Self {
        let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = groups.lines().find_map(|line| line.strip_prefix("0::"));
        let folders = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let candidates = own.into_iter().flat_map(|own| {
            folders.map(|folder| Path::new(folder).join(own.trim_start_matches('/')))
        });
        let mut limited = candidates.filter(|group| group.join("memory.max").exists());
        Self { group: limited.next(), short: false }
    }

    /// Over a cgroup's folder.
    #[cfg(test)]
    fn over(group: &Path) -> Self {
        Self { group: Some(group.to_owned()), short: false }
    }

    /// Whether memory is short now.
    pub(crate) fn look(&mut self) -> bool {
        let Some(group) = &self.group else { return false };
        // A cgroup that cannot be read has gone, or says `max`.
        let Some((used, limit)) = used(group) else {
            self.short = false;
            return false;
        };
        let percent = if self.short { ENOUGH_PERCENT } else { SHORT_PERCENT };
        self.short = used.saturating_mul(100) > limit.saturating_mul(percent);
        self.short
    }
}

/// Bytes in use that the kernel cannot take back at once, and the limit. Source: Linux cgroup-v2.rst, "Memory Interface
/// Files"; the kubelet's working set is the same.
fn used(group: &Path) -> Option<(u64, u64)> {
    let number = |file: &str| std::fs::read_to_string(group.join(file)).ok()?.trim().parse().ok();
    let (current, limit): (u64, u64) = (number("memory.current")?, number("memory.max")?);
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
    let cache = cache.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0);
    Some((current.saturating_sub(cache), limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_short_above_nine_tenths_and_enough_again_a_little_below() {
        let group = tempfile::tempdir().unwrap();
        let mut meter = MemoryMeter::over(group.path());
        assert!(!meter.look(), "no files, no limit");
        let mut look = |current: u64, cache: u64, limit: &str| {
            let write = |file: &str, text: String| {
                std::fs::write(group.path().join(file), text).unwrap();
            };
            write("memory.current", format!("{current}\n"));
            write("memory.max", format!("{limit}\n"));
            write("memory.stat", format!("anon 1\ninactive_file {cache}\nactive_file 7\n"));
            meter.look()
        };
        assert!(!look(900, 0, "1000") && look(901, 0, "1000"));
        assert!(look(860, 0, "1000") && !look(850, 0, "1000") && !look(860, 0, "1000"));
        assert!(!look(1000, 200, "1000"), "cache is taken back when it is needed");
        assert!(!look(1 << 60, 0, "max"));
    }
}

//! Control groups: every machine of a cluster lives in one group per hierarchy, below one group of
//! the cluster. They are how a machine is limited, found again and ended, whatever it has started.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// Where hierarchies are mounted, by convention of systemd and of every container runtime.
const MOUNT: &str = "/sys/fs/cgroup";

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// Where it is mounted.
    pub(super) mount: PathBuf,
    /// The options it has to be mounted with again; `None` for version 2.
    pub(super) v1: Option<String>,
}

/// All hierarchies of this machine, in the order they are mounted in.
pub(super) fn hierarchies() -> anyhow::Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    let found = parse(&mounts);
    if found.is_empty() {
        bail!("no control groups below {MOUNT}: mount cgroup2 there, then try again");
    }
    Ok(found)
}

/// Fields of mountinfo, see proc(5): the mount point is the fifth; type and options follow " - ".
fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let line = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mount = before.split(' ').nth(4)?;
        let mut after = after.split(' ');
        let kind = after.next()?;
        let options = after.nth(1)?;
        if !mount.starts_with(MOUNT) {
            return None;
        }
        let v1 = match kind {
            "cgroup2" => None,
            "cgroup" => Some(controllers(options)),
            _ => return None,
        };
        Some(Hierarchy { mount: mount.into(), v1 })
    };
    mountinfo.lines().filter_map(line).collect()
}

/// What names a hierarchy of version 1, without what only describes this mount of it.
fn controllers(options: &str) -> String {
    let descriptive = ["rw", "ro", "xattr", "relatime", "clone_children", "cpuset_v2_mode"];
    let named: Vec<&str> = options
        .split(',')
        .filter(|option| !descriptive.contains(option) && !option.starts_with("release_agent="))
        .collect();
    match named.as_slice() {
        [name] if name.starts_with("name=") => format!("none,{name}"),
        all => all.join(","),
    }
}

/// The groups of a cluster.
#[derive(Debug, Clone)]
pub(super) struct Groups {
    hierarchies: Vec<Hierarchy>,
    name: String,
}

impl Groups {
    /// The groups of the cluster `cluster`; nothing is made yet.
    pub(super) fn of(cluster: &str) -> anyhow::Result<Self> {
        Ok(Self { hierarchies: hierarchies()?, name: format!("culvert-cluster-{cluster}") })
    }

    /// True when some group of the cluster is there.
    pub(super) fn exist(&self) -> bool {
        self.tops().any(|top| top.exists())
    }

    /// Makes the groups of a machine, ready to be entered.
    pub(super) fn create(&self, machine: &str) -> anyhow::Result<()> {
        for hierarchy in &self.hierarchies {
            let top = hierarchy.mount.join(&self.name);
            let group = top.join(machine);
            for (above, folder) in [(&hierarchy.mount, &top), (&top, &group)] {
                make(folder)?;
                if hierarchy.v1.is_none() {
                    delegate(above)?;
                } else {
                    inherit_cpus(above, folder)?;
                }
            }
        }
        Ok(())
    }

    /// Moves a process into the groups of a machine.
    pub(super) fn enter(&self, machine: &str, process: u32) -> anyhow::Result<()> {
        for hierarchy in &self.hierarchies {
            let file = hierarchy.mount.join(&self.name).join(machine).join("cgroup.procs");
            fs::write(&file, process.to_string())
                .with_context(|| format!("cannot move process {process} to {}", file.display()))?;
        }
        Ok(())
    }

    /// Where there is version 2 alone: moves `process` beside the machines, because a group that holds
    /// processes cannot hand controllers down.
    pub(super) fn stand_aside(&self, process: u32) -> anyhow::Result<()> {
        if let [Hierarchy { mount, v1: None }] = self.hierarchies.as_slice() {
            let aside = mount.join(&self.name).join("parents");
            make(&aside)?;
            fs::write(aside.join("cgroup.procs"), process.to_string())?;
        }
        Ok(())
    }

    /// Ends every process of a machine, or of the whole cluster, and removes the groups.
    pub(super) fn end(&self, machine: Option<&str>) -> anyhow::Result<()> {
        let tops: Vec<PathBuf> = self
            .tops()
            .map(|top| machine.map_or_else(|| top.clone(), |machine| top.join(machine)))
            .collect();
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut ended = BTreeSet::new();
        loop {
            let mut processes = BTreeSet::new();
            for top in &tops {
                members(top, &mut processes)?;
            }
            for process in &processes {
                kill(*process)?;
            }
            ended.extend(processes.iter().copied());
            let mut left = Vec::new();
            for top in &tops {
                if !remove(top)? {
                    left.push(top.display().to_string());
                }
            }
            // A group counts as empty while its last processes still let go of what they held.
            let lingers = ended.iter().any(|process| self.holds(*process));
            if left.is_empty() && processes.is_empty() && !lingers {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("processes {processes:?} do not end; left behind: {}", left.join(", "));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// True while a process is in a group of the cluster, also when the group itself is gone.
    fn holds(&self, process: i32) -> bool {
        let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
        let name = format!("/{}", self.name);
        groups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(|path| {
            path.strip_prefix(&name)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', ' ']))
        })
    }

    fn tops(&self) -> impl Iterator<Item = PathBuf> {
        self.hierarchies.iter().map(|hierarchy| hierarchy.mount.join(&self.name))
    }
}

fn make(group: &Path) -> anyhow::Result<()> {
    match fs::create_dir(group) {
        Err(fault) if fault.kind() != ErrorKind::AlreadyExists => {
            Err(fault).with_context(|| format!("cannot make the control group {}", group.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// A new cpuset has no processors, and nobody can enter it before it has some.
fn inherit_cpus(above: &Path, group: &Path) -> anyhow::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let source = above.join(name);
        if source.exists() {
            fs::write(group.join(name), fs::read_to_string(source)?.trim())?;
        }
    }
    Ok(())
}

/// Hands the controllers of a version 2 group down to its children.
pub(super) fn delegate(group: &Path) -> anyhow::Result<()> {
    let available = fs::read_to_string(group.join("cgroup.controllers"))?;
    let all: Vec<String> = available.split_whitespace().map(|name| format!("+{name}")).collect();
    if all.is_empty() {
        return Ok(());
    }
    fs::write(group.join("cgroup.subtree_control"), all.join(" "))
        .with_context(|| format!("cannot hand controllers down from {}", group.display()))
}

/// Collects the processes in `group` and below. A group that is gone has none.
fn members(group: &Path, into: &mut BTreeSet<i32>) -> anyhow::Result<()> {
    let Some(listing) = if_present(fs::read_to_string(group.join("cgroup.procs")))? else {
        return Ok(());
    };
    into.extend(listing.lines().filter_map(|line| line.parse::<i32>().ok()));
    for below in children(group)? {
        members(&below, into)?;
    }
    Ok(())
}

fn children(group: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let Some(entries) = if_present(fs::read_dir(group))? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    Ok(found)
}

/// Removes a group depth first; false while it is still in use.
fn remove(group: &Path) -> anyhow::Result<bool> {
    for below in children(group)? {
        if !remove(&below)? {
            return Ok(false);
        }
    }
    match fs::remove_dir(group) {
        Ok(()) => Ok(true),
        Err(fault) if fault.kind() == ErrorKind::NotFound => Ok(true),
        Err(fault) if fault.kind() == ErrorKind::ResourceBusy => Ok(false),
        Err(fault) => Err(fault).with_context(|| format!("cannot remove {}", group.display())),
    }
}

/// Groups vanish while they are looked at, and reading one that is being removed gives ENODEV.
fn if_present<T>(result: std::io::Result<T>) -> anyhow::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(fault)
            if fault.kind() == ErrorKind::NotFound
                || fault.raw_os_error() == Some(nix::libc::ENODEV) =>
        {
            Ok(None)
        }
        Err(fault) => Err(fault.into()),
    }
}

/// SIGKILL; a process that is gone already is as good as killed.
fn kill(process: i32) -> anyhow::Result<()> {
    use nix::errno::Errno;
    use nix::sys::signal::{Signal, kill};
    // Processes of an outer process namespace are listed as 0: never signal a whole group.
    if process <= 1 {
        return Ok(());
    }
    match kill(nix::unistd::Pid::from_raw(process), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(fault) => Err(fault).with_context(|| format!("cannot end process {process}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(mountinfo: &str) -> Vec<String> {
        let text = |found: Hierarchy| {
            format!("{} {}", found.mount.display(), found.v1.unwrap_or_else(|| "v2".to_owned()))
        };
        parse(mountinfo).into_iter().map(text).collect()
    }

    #[test]
    fn a_hybrid_layout_is_found_with_the_options_that_name_each_hierarchy() {
        let mounts = "\
25 1 0:22 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
28 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
29 1 0:26 / /elsewhere rw - cgroup2 cgroup2 rw";
        assert_eq!(
            shown(mounts),
            [
                "/sys/fs/cgroup/cpu,cpuacct cpu,cpuacct",
                "/sys/fs/cgroup/systemd none,name=systemd",
                "/sys/fs/cgroup/unified v2",
            ]
        );
    }

    #[test]
    fn a_machine_with_version_2_alone_has_one_hierarchy() {
        let mounts = "30 1 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(shown(mounts), ["/sys/fs/cgroup v2"]);
    }
}

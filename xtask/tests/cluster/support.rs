//! A cluster for the length of a test, and questions to it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

/// Longest wait for something that a cluster does by itself.
const PATIENCE: Duration = Duration::from_secs(90);

/// A running cluster; it ends with the value, unless the test failed and `CULVERT_LAB_KEEP` is set.
pub(crate) struct Cluster {
    /// Its name, unique on this machine.
    pub(crate) name: String,
}

/// A program that runs beside the test, until the value ends.
pub(crate) struct Running(Child);

impl Running {
    /// Sends it a signal. What it runs inside a cluster has the same process id: nothing forks.
    pub(crate) fn signal(&self, name: &str) {
        kill(self.0.id(), name);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().expect("a child of ours can be ended");
        self.0.wait().expect("a child of ours can be waited for");
    }
}

impl Cluster {
    /// Starts a cluster. `CULVERT_LAB_PREFIX` keeps checkouts apart that run tests at once.
    pub(crate) fn up(name: &str, options: &[&str]) -> Self {
        let prefix = std::env::var("CULVERT_LAB_PREFIX").unwrap_or_else(|_| "t".to_owned());
        let cluster = Self { name: format!("{prefix}{name}") };
        if !traces(&cluster.name).is_empty() {
            // A test that was killed.
            cluster.xtask(&["down"], &[]);
        }
        println!("{}", cluster.xtask(&["up"], options));
        cluster
    }

    /// Runs `cargo xtask cluster VERB --name NAME ARGUMENTS`; it must succeed.
    pub(crate) fn xtask(&self, verb: &[&str], arguments: &[&str]) -> String {
        answer(self.command(verb).args(arguments)).expect("cargo xtask cluster succeeds")
    }

    fn command(&self, verb: &[&str]) -> Command {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root");
        let mut command = Command::new(XTASK);
        command.arg("cluster").args(verb).args(["--name", &self.name]).current_dir(root);
        command
    }

    /// What kubectl prints; it must succeed.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).expect("kubectl succeeds")
    }

    /// What kubectl prints, or what it complains about.
    pub(crate) fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        answer(self.command(&["kubectl"]).args(arguments))
    }

    /// What a program prints that runs beside the control plane.
    pub(crate) fn try_exec(&self, arguments: &[&str]) -> Result<String, String> {
        answer(self.command(&["exec"]).args(arguments))
    }

    /// Starts a program beside the control plane; its output is the test's.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(&["exec"]);
        Running(command.args(arguments).stdin(Stdio::null()).spawn().expect("it starts"))
    }

    /// Starts kubectl; what it prints is read at its end.
    pub(crate) fn start_kubectl(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(&["kubectl"]);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("kubectl starts")
    }

    /// Kills a program of the control plane, which is started again.
    pub(crate) fn restart(&self, program: &str) {
        self.signal(program, "KILL");
    }

    /// Sends a signal to a program of the control plane.
    pub(crate) fn signal(&self, program: &str, signal: &str) {
        let group = format!("/culvert-cluster-{}/control-plane", self.name);
        let named = |process: &u32| {
            let read = |file: &str| fs::read(format!("/proc/{process}/{file}")).unwrap_or_default();
            let groups = String::from_utf8_lossy(&read("cgroup")).into_owned();
            groups.lines().any(|line| line.ends_with(&group))
                && read("cmdline").starts_with(program.as_bytes())
        };
        let processes = fs::read_dir("/proc").expect("/proc can be read").flatten();
        let mut processes =
            processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        kill(processes.find(named).expect("the program runs"), signal);
    }

    /// Forwards a port to a pod, beside the control plane.
    pub(crate) fn forward(&self, pod: &str, ports: &str) -> Running {
        self.forward_in("default", pod, ports)
    }

    /// The same for a pod of another namespace.
    pub(crate) fn forward_in(&self, namespace: &str, pod: &str, ports: &str) -> Running {
        let mut forward = self.command(&["kubectl"]);
        forward
            .args(["-n", namespace, "port-forward", pod, ports])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Running(forward.spawn().expect("kubectl starts"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() && std::env::var_os("CULVERT_LAB_KEEP").is_some() {
            return;
        }
        let down = answer(&mut self.command(&["down"]));
        // A second panic would hide the first.
        if !thread::panicking() {
            println!("{}", down.expect("a cluster can be ended"));
        }
    }
}

fn answer(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!("{command:?}: {} {}", text(&output.stdout), text(&output.stderr)))
    }
}

fn kill(process: u32, signal: &str) {
    let process = process.to_string();
    let status = Command::new("kill").args(["-s", signal, &process]).status();
    assert!(status.expect("kill can be run").success(), "cannot signal process {process}");
}

/// Asks until it is so.
pub(crate) fn eventually(what: &str, mut question: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match question() {
            Ok(()) => return,
            Err(last) if Instant::now() > deadline => panic!("waited in vain for {what}: {last}"),
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Whatever of a cluster is on this machine: processes, control groups, mounts, links, files.
pub(crate) fn traces(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    let group = format!("/culvert-cluster-{name}");
    for entry in fs::read_dir("/proc").expect("/proc can be read").flatten() {
        let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        if groups.lines().any(|line| line.ends_with(&group) || line.contains(&format!("{group}/")))
        {
            found.push(format!("process {}", entry.path().display()));
        }
    }
    for entry in fs::read_dir("/sys/fs/cgroup").expect("control groups can be read").flatten() {
        let path = format!("{}{group}", entry.path().display());
        for path in [path, format!("/sys/fs/cgroup{group}")] {
            if Path::new(&path).exists() {
                found.push(path);
            }
        }
    }
    let folder = format!("/running/{name}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts can be read");
    found.extend(mounts.lines().filter(|line| line.contains(&folder)).map(str::to_owned));
    for link in ["br0", "node1", "node2"] {
        if Path::new("/sys/class/net").join(link).exists() {
            found.push(format!("link {link}"));
        }
    }
    let home = std::env::var("HOME").expect("HOME is set");
    let folder = format!("{home}/.cache/culvert/cluster{folder}");
    if Path::new(&folder).exists() {
        found.push(folder);
    }
    found
}

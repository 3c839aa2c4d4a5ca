//! The README's "Running it on machines", run as it is written: in a network, mount and process namespace of its own that
//! looks like a machine. Only cargo's lines are left out; this program was built already.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::{Arguments, Trial};
use mesh_netns::process::run;

const README: &str = include_str!("../../../README.md");
const LIMIT: Duration = Duration::from_secs(180);

/// What a machine has: folders that nothing else writes to, an address, a route.
const MACHINE: &str = "
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /usr/local/bin
mkdir -p /run/etc/upper /run/etc/work /run/here/target
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work /etc
ip link set lo up
ip link add uplink type veth peer name wire
ip link set wire up
ip address add 192.0.2.10/24 dev uplink
ip link set uplink up
ip route add default via 192.0.2.1
cd /run/here
ln -s \"$PROGRAMS\" target/release
umask 022
";
/// What a reader does who looks before going on.
const CONTROLLER_IS_THERE: &str = "until culvert status controller > /dev/null; do sleep 0.1; done";
const AGENT_IS_THERE: &str = "until culvert status agent > /dev/null; do sleep 0.1; done";
/// Looked at afterwards.
const AFTERWARDS: &str = "
echo \"folder of the socket: $(stat -c %a /run/culvert-controller)\"
for who in agent controller; do
    echo \"$who logs $(culvert log-level --of $who)\"
    echo \"$who logs now $(culvert log-level --of $who debug)\"
    echo \"$who logs again $(culvert log-level --of $who --reset)\"
done
culvert pod list
";

fn main() {
    let arguments = Arguments::from_args();
    let trial = Trial::test("the_readme_runs_as_written", || {
        readme_runs().map_err(|error| format!("{error:#}").into())
    });
    libtest_mimic::run(&arguments, vec![trial]).exit();
}

fn readme_runs() -> anyhow::Result<()> {
    let programs = std::env::current_exe()?;
    let programs = programs.ancestors().nth(2).context("no folder of programs")?;
    let programs =
        std::env::var_os("CULVERT_BIN_DIR").map_or_else(|| programs.to_owned(), Into::into);
    let script = script()?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["sh", "-euc", &script]).env("PROGRAMS", &programs).env_remove("CULVERT_RUN_DIR");
    let finished = run(&mut command, LIMIT)?;
    let said = format!("{}\n--- standard error\n{}", finished.stdout, finished.stderr);
    ensure!(finished.success(), "{}: {said}", finished.status);
    for expected in [
        "shop/db is in the mesh\n",
        "no open connections\n",
        "ALLOWED: ",
        "folder of the socket: 700\n",
        "agent logs info\n",
        "agent logs now debug\n",
        "agent logs again info\n",
        "controller logs now debug\n",
        "controller logs again info\n",
    ] {
        ensure!(finished.stdout.contains(expected), "{expected:?} is missing: {said}");
    }
    let pods = finished.stdout.rsplit("POD ").next().unwrap_or_default();
    ensure!(pods.contains("shop/db") && pods.contains("enrolled"), "not enrolled: {said}");
    ensure!(!Path::new("/run/netns/db").exists(), "the machine was not a namespace of its own");
    Ok(())
}

/// The README's commands between what makes a machine and what is looked at afterwards.
fn script() -> anyhow::Result<String> {
    let section =
        README.split("\n## Running it on machines\n").nth(1).context("no such section")?;
    let block = section.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next());
    let block = block.context("the section has no commands")?;
    let builds =
        "cargo build --release --bin culvert-controller --bin culvert-agent --bin culvert\n";
    ensure!(block.contains(builds), "nothing says how the programs are built");
    let mut script = MACHINE.to_owned();
    let mut command = String::new();
    for line in block.lines() {
        if line.starts_with("cargo ") {
            continue;
        }
        script.push_str(line);
        script.push('\n');
        command.push_str(line);
        if line.ends_with('\\') {
            continue;
        }
        if command.ends_with(" &") {
            let is_agent = command.starts_with("culvert-agent ");
            script.push_str(if is_agent { AGENT_IS_THERE } else { CONTROLLER_IS_THERE });
            script.push('\n');
        }
        command.clear();
    }
    Ok(script + AFTERWARDS)
}

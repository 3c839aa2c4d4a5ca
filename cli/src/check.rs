//! `culvert check`: has this machine what the agent needs? Changes nothing that stays, needs no agent.
//!
//! Who may, tries what the kernel has, where nobody uses it; everybody else is told what its version and types promise.

mod machine;
mod tried;
mod verdict;

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;

use crate::arguments::{CheckArgs, Daemon, Output, Reach};
use crate::failure::{Ending, Failure};
use crate::show;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    /// As it should be.
    Ok,
    /// The agent runs, with less than it could have.
    Warn,
    /// The agent cannot run.
    Fail,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    name: &'static str,
    level: Level,
    found: String,
    /// What to do; empty when all is well.
    remedy: String,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), remedy: String::new() }
    }

    fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, level: Level::Warn, found: found.into(), remedy: remedy.into() }
    }

    fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, level: Level::Fail, found: found.into(), remedy: remedy.into() }
    }
}

/// Looks at everything and prints. Ends with no when something is missing.
///
/// # Errors
/// When the answer cannot be written.
pub(crate) fn run(args: &CheckArgs, reach: &Reach, output: Output) -> Result<Ending, Failure> {
    let mut findings = findings(args);
    findings.push(agent(reach));
    match output {
        Output::Json => show::json(&findings)?,
        Output::Table => show::text(&render(&findings))?,
    }
    let worst = findings.iter().map(|finding| finding.level).max();
    Ok(if worst == Some(Level::Fail) { Ending::No } else { Ending::Yes })
}

fn findings(args: &CheckArgs) -> Vec<Finding> {
    let capabilities = machine::effective_capabilities();
    let btf = machine::btf();
    let release = machine::text("/proc/sys/kernel/osrelease");
    let mut findings = if verdict::may_try(capabilities) {
        let root = (args.cgroup_root != "auto").then(|| Path::new(&args.cgroup_root));
        let mut findings = vec![verdict::kernel_tried(release.as_deref())];
        findings.extend(tried::findings(&mesh_ebpf::probe(root)));
        findings
    } else {
        vec![
            verdict::kernel(release.as_deref()),
            verdict::guard(btf.as_deref().map(machine::has_tcx), machine::has_clsact()),
        ]
    };
    findings.extend([
        verdict::btf(btf.as_deref().map(<[u8]>::len)),
        verdict::same_node(machine::can_end_sockets()),
        verdict::lockdown(machine::text("/sys/kernel/security/lockdown").as_deref()),
        verdict::cgroup(&machine::cgroup_roots(&args.cgroup_root)),
        verdict::bpffs(&args.bpffs, machine::is_on_bpffs(&args.bpffs)),
        verdict::capabilities(capabilities),
        verdict::memlock(machine::memlock(), capabilities),
        verdict::descriptors(machine::descriptors()),
        verdict::jit(machine::text("/proc/sys/net/core/bpf_jit_enable").as_deref()),
        verdict::clock(SystemTime::now(), machine::program_made(), machine::hardware_clock()),
        verdict::mtu(&machine::uplinks()),
    ]);
    findings
}

fn agent(reach: &Reach) -> Finding {
    let socket = reach.run_dir.join("agent.sock");
    match std::os::unix::net::UnixStream::connect(&socket) {
        Ok(_listening) => Finding::ok("agent", format!("listens at {}", socket.display())),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Finding::warn(
            "agent",
            format!("{} may only be asked by root", socket.display()),
            "run this as root",
        ),
        Err(_away) => Finding::warn(
            "agent",
            format!("nobody listens at {}", socket.display()),
            format!("start the {}; pods of the mesh do not start without it", Daemon::Agent.name()),
        ),
    }
}

fn render(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let one_line = finding.found.replace('\n', " ");
        add(&mut text, format_args!("{level:<6}{:<14}{one_line}", finding.name));
        if !finding.remedy.is_empty() {
            add(&mut text, format_args!("{:20}remedy: {}", "", finding.remedy));
        }
    }
    let of = |level| findings.iter().filter(|finding| finding.level == level).count();
    let summary = match (of(Level::Fail), of(Level::Warn)) {
        (0, 0) => "This machine has all that the agent needs.".to_owned(),
        (0, warnings) => format!("The agent can run here; {}.", show::count(warnings, "warning")),
        (missing, _) => {
            format!("The agent cannot run here: {} missing.", show::count(missing, "thing"))
        }
    };
    add(&mut text, format_args!("\n{summary}"));
    text
}

fn add(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a String takes everything");
}

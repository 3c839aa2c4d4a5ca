//! A mesh on Kubernetes, asked from anywhere: through kubectl, with whatever access the caller has. What concerns one node
//! or the controller is asked there, by the same program in the daemon's own container.

mod kubectl;
mod membership;
mod network_policy;
mod overview;

use std::process::Command as Program;

use crate::arguments::{
    Arguments, ChartCommand, CheckArgs, Command, Daemon, LogsArgs, NamespaceCommand, Output,
};
use crate::failure::{Ending, Failure};
use crate::show;
use kubectl::Kubectl;

/// Where the CLI is in the daemons' images.
const IN_IMAGE: &str = "/usr/local/bin/culvert";
/// The chart in a checkout.
const CHART: &str = "charts/culvert";

/// Does what was typed with the cluster.
///
/// # Errors
/// When kubectl, or what it reaches, fails.
pub(crate) fn run(arguments: &Arguments) -> Result<Ending, Failure> {
    let Arguments { command, cluster, output, .. } = arguments;
    let kubectl = Kubectl::new(cluster);
    match command {
        Command::Check(CheckArgs { .. }) => network_policy::run(&kubectl, *output),
        Command::Status(what) => match (what.daemon, &cluster.node) {
            (Some(Daemon::Controller), _) => delegate(&kubectl, &kubectl.controller()),
            (_, Some(node)) => delegate(&kubectl, &kubectl.agent_on(node)?),
            (None | Some(Daemon::Agent), None) => overview::run(&kubectl, *output),
        },
        Command::Explain(_) => delegate(&kubectl, &kubectl.controller()),
        Command::Config(what) if what.daemon == Some(Daemon::Controller) => {
            delegate(&kubectl, &kubectl.controller())
        }
        Command::LogLevel(what) if what.daemon == Some(Daemon::Controller) => {
            delegate(&kubectl, &kubectl.controller())
        }
        Command::Logs(lines) => logs(&kubectl, lines),
        Command::Connections(filter) => {
            let agent = match (&filter.pod, &cluster.node) {
                (Some(pod), None) => kubectl.agent_of(pod)?,
                (_, node) => kubectl.agent_on(named(node.as_ref())?)?,
            };
            delegate(&kubectl, &agent)
        }
        Command::Config(_)
        | Command::Certs
        | Command::LogLevel(_)
        | Command::Pod(_)
        | Command::Agent(_) => {
            let agent = kubectl.agent_on(named(cluster.node.as_ref())?)?;
            delegate(&kubectl, &agent)
        }
        Command::Install(chart) => install(&kubectl, chart),
        Command::Uninstall => uninstall(&kubectl),
        Command::Ns(action) => match action {
            NamespaceCommand::Add { namespace } => membership::add(&kubectl, namespace),
            NamespaceCommand::Remove { namespace } => membership::remove(&kubectl, namespace),
        },
        Command::Completions { .. } => Err(Failure::Usage {
            problem: "a script has nothing to do with a cluster".to_owned(),
            remedy: "leave --cluster out".to_owned(),
        }),
    }
}

fn named(node: Option<&String>) -> Result<&str, Failure> {
    node.map(String::as_str).ok_or_else(|| Failure::Usage {
        problem: "every node has an agent of its own".to_owned(),
        remedy: "say which is meant: --node NAME".to_owned(),
    })
}

/// Has the same words answered in a daemon's container.
fn delegate(kubectl: &Kubectl, container: &[String]) -> Result<Ending, Failure> {
    let words = std::env::args().skip(1);
    let mut command = kubectl.command(&["exec", "-i"]);
    command.args(container).args(["--", IN_IMAGE]).args(own_words(words));
    let code = kubectl::pass_on(&mut command)?;
    Ok(if code == 0 { Ending::Yes } else { Ending::Code(code) })
}

/// What was typed, without what says how the cluster is reached.
fn own_words(words: impl Iterator<Item = String>) -> Vec<String> {
    let mut kept = Vec::new();
    let mut words = words;
    while let Some(word) = words.next() {
        let valued = ["--node", "--context", "--system-namespace"];
        if valued.contains(&word.as_str()) {
            words.next();
        } else if word != "--cluster"
            && !valued.iter().any(|flag| word.starts_with(&format!("{flag}=")))
        {
            kept.push(word);
        }
    }
    kept
}

/// The log of the agent on the pod's node, filtered here.
fn logs(kubectl: &Kubectl, lines: &LogsArgs) -> Result<Ending, Failure> {
    let agent = kubectl.agent_of(&lines.pod)?;
    let mut source = kubectl.command(&["logs", "--tail=-1"]);
    source.args(&agent);
    if lines.follow {
        source.arg("--follow");
    }
    if let Some(since) = &lines.since {
        source.arg(format!("--since={since}"));
    }
    let (mut child, stdout) = kubectl::read_from(source)?;
    let printed = crate::logs::print_from(lines, stdout);
    // It goes on for ever when it follows; nobody reads it any more.
    kubectl::end(&mut child);
    printed
}

fn install(kubectl: &Kubectl, chart: &ChartCommand) -> Result<Ending, Failure> {
    let mut helm = kubectl.helm(&["upgrade", "--install", "culvert"]);
    helm.arg(chart.chart.as_deref().unwrap_or(CHART));
    helm.args(["--create-namespace", "--wait"]);
    for value in &chart.set {
        helm.args(["--set", value]);
    }
    show::text(
        "installing; this waits until the controller and an agent on every node are ready\n",
    )?;
    finished(&mut helm, "Culvert is installed. Next: culvert ns add NAMESPACE\n")
}

fn uninstall(kubectl: &Kubectl) -> Result<Ending, Failure> {
    let mut helm = kubectl.helm(&["uninstall", "culvert", "--wait"]);
    show::text("every agent undoes what it did to its node; this waits for all of them\n")?;
    finished(&mut helm, "Culvert is gone from every node.\n")
}

fn finished(helm: &mut Program, done: &str) -> Result<Ending, Failure> {
    match kubectl::pass_on(helm)? {
        0 => show::text(done).map(|()| Ending::Yes),
        code => Ok(Ending::Code(code)),
    }
}

/// Prints for people or for programs.
fn print<T: serde::Serialize>(value: &T, table: &str, output: Output) -> Result<(), Failure> {
    match output {
        Output::Json => show::json(value),
        Output::Table => show::text(table),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_words_are_said_in_the_container() {
        let check = |typed: &str, said: &str| {
            let words = typed.split(' ').map(str::to_owned);
            assert_eq!(own_words(words).join(" "), said, "{typed}");
        };
        check("certs --node node1 -o json", "certs -o json");
        check("--cluster --context=x explain a/b -> c.d:80", "explain a/b -> c.d:80");
        check("connections --pod shop/web --system-namespace mesh", "connections --pod shop/web");
    }
}

//! `culvert`: what a person types. Parse, ask, show, exit.

#![forbid(unsafe_code)]

mod admin;
mod agent;
mod arguments;
mod certs;
mod check;
mod cluster;
mod config;
mod connections;
mod explain;
mod failure;
mod log_level;
mod logs;
mod pod;
mod show;
mod status;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::arguments::{Arguments, Command};
use crate::failure::{Ending, Failure};

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    // As a plugin of kubectl it is always about a cluster.
    let name = std::env::args_os().next().unwrap_or_default();
    arguments.cluster.cluster |=
        Path::new(&name).file_name().is_some_and(|name| name == "kubectl-culvert");
    match run(&arguments) {
        Ok(ending) => ending.exit_code(),
        Err(failure) => failure.report(),
    }
}

fn run(arguments: &Arguments) -> Result<Ending, Failure> {
    let Arguments { command, reach, cluster, output } = arguments;
    let only_in_cluster =
        matches!(command, Command::Install(_) | Command::Uninstall | Command::Ns(_));
    let is_script = matches!(command, Command::Completions { .. });
    if (cluster.cluster || cluster.node.is_some() || only_in_cluster) && !is_script {
        return cluster::run(arguments);
    }
    match command {
        Command::Check(what) => check::run(what, reach, *output),
        Command::Status(what) => status::run(what, reach, *output),
        Command::Explain(question) => explain::run(question, reach, *output),
        Command::Config(what) => config::run(what, reach, *output),
        Command::Connections(filter) => connections::run(filter, reach, *output),
        Command::Certs => certs::run(reach, *output),
        Command::LogLevel(what) => log_level::run(what, reach, *output),
        Command::Logs(lines) => logs::run(lines, reach),
        Command::Agent(action) => agent::run(action, reach, *output),
        Command::Pod(action) => pod::run(action, reach, *output),
        Command::Install(_) | Command::Uninstall | Command::Ns(_) => cluster::run(arguments),
        Command::Completions { shell } => completions(*shell),
    }
}

fn completions(shell: clap_complete::Shell) -> Result<Ending, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "culvert", &mut script);
    show::raw(&script)?;
    Ok(Ending::Yes)
}

//! `culvert`: what a person types. Parse, ask, show, exit.

#![forbid(unsafe_code)]

mod admin;
mod agent;
mod arguments;
mod certs;
mod check;
mod config;
mod connections;
mod explain;
mod failure;
mod log_level;
mod logs;
mod pod;
mod show;
mod status;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::arguments::{Arguments, Command};
use crate::failure::{Ending, Failure};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(ending) => ending.exit_code(),
        Err(failure) => failure.report(),
    }
}

fn run(arguments: &Arguments) -> Result<Ending, Failure> {
    let Arguments { command, reach, output } = arguments;
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
        Command::Completions { shell } => completions(*shell),
    }
}

fn completions(shell: clap_complete::Shell) -> Result<Ending, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "culvert", &mut script);
    show::raw(&script)?;
    Ok(Ending::Yes)
}

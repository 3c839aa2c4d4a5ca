//! `culvert`: what a person types. Parse, ask, show, exit.

#![forbid(unsafe_code)]

mod admin;
mod arguments;
mod certs;
mod connections;
mod explain;
mod failure;
mod pod;
mod show;
mod status;

use std::process::ExitCode;

use clap::Parser as _;

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
        Command::Status(what) => status::run(what, reach, *output),
        Command::Explain(question) => explain::run(question, reach, *output),
        Command::Connections(filter) => connections::run(filter, reach, *output),
        Command::Certs => certs::run(reach, *output),
        Command::Pod(action) => pod::run(action, reach, *output),
    }
}

//! How a run ends, and the exit codes that scripts rely on.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use mesh_model::error_chain;

/// The exit codes, as `--help` tells them.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done; explain: the connection would be made; status: ready, and of the controller: all
     it should read is in force; check: nothing is missing
  1  a plain no: explain: it would be refused; status: not ready, or the controller has
     refused, denied or kept something; check: something is missing; pod: the agent refused,
     or the pod stays outside the mesh
  2  the command line, or a name in it, cannot be understood
  3  the agent or the controller cannot be reached, or does not answer in time
  4  it answered with an error, or with what cannot be read; a local file or program failed";

/// A run that came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Done, or yes.
    Yes,
    /// No.
    No,
    /// What another program ended with, whose answer it is.
    Code(u8),
}

impl Ending {
    /// What the shell is told.
    pub(crate) fn exit_code(self) -> ExitCode {
        match self {
            Self::Yes => ExitCode::SUCCESS,
            Self::No => ExitCode::from(1),
            Self::Code(code) => ExitCode::from(code),
        }
    }
}

/// A run that could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The agent said no.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
        /// What to do; may be empty.
        remedy: String,
        /// True when the same may succeed later.
        retryable: bool,
    },
    /// What was typed makes no sense.
    #[error("{problem}")]
    Usage {
        /// What is wrong.
        problem: String,
        /// What to type.
        remedy: String,
    },
    /// Nobody listens, or we may not ask.
    #[error("cannot reach the {who} at {}", socket.display())]
    Unreachable {
        /// Agent or controller.
        who: &'static str,
        /// Its socket.
        socket: PathBuf,
        /// What to do.
        remedy: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or no answer came in time.
    #[error("no answer from the {who} at {}: {problem}", socket.display())]
    NoAnswer {
        /// Agent or controller.
        who: &'static str,
        /// Its socket.
        socket: PathBuf,
        /// What happened.
        problem: String,
    },
    /// An answer that says it cannot.
    #[error("the {who} answered: {problem}")]
    Answered {
        /// Agent or controller.
        who: &'static str,
        /// Its words.
        problem: String,
        /// What to do; may be empty.
        remedy: String,
    },
    /// An answer of another shape than ours.
    #[error("the {who}'s answer cannot be read")]
    Unreadable {
        /// Agent or controller.
        who: &'static str,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A file or program of this machine.
    #[error("{what}")]
    Local {
        /// What was tried.
        what: String,
        /// What to do.
        remedy: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// Standard output cannot be written.
    #[error("cannot write the answer")]
    Output(#[source] io::Error),
}

impl Failure {
    /// Tells what went wrong on standard error, and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if self.is_closed_pipe() {
            return ExitCode::SUCCESS;
        }
        let mut text = format!("culvert: {}\n", error_chain(self));
        let remedy = self.remedy();
        if !remedy.is_empty() {
            write_to(&mut text, &format!("  remedy: {remedy}\n"));
        }
        match io::stderr().write_all(crate::show::plain(&text).as_bytes()) {
            // Nobody reads it; the exit code says it too.
            Ok(()) | Err(_) => ExitCode::from(self.code()),
        }
    }

    const fn code(&self) -> u8 {
        match self {
            Self::Refused { .. } => 1,
            Self::Usage { .. } => 2,
            Self::Unreachable { .. } | Self::NoAnswer { .. } => 3,
            Self::Answered { .. }
            | Self::Unreadable { .. }
            | Self::Local { .. }
            | Self::Output(_) => 4,
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Refused { remedy, retryable: true, .. } if remedy.is_empty() => {
                "ask again in a moment".to_owned()
            }
            Self::Refused { remedy, .. }
            | Self::Usage { remedy, .. }
            | Self::Unreachable { remedy, .. }
            | Self::Answered { remedy, .. }
            | Self::Local { remedy, .. } => remedy.clone(),
            Self::NoAnswer { .. } => "look at its log; it may be overloaded or ending".to_owned(),
            Self::Unreadable { .. } => {
                "use culvert and the daemons of one version, or read it raw: -o json".to_owned()
            }
            Self::Output(_) => String::new(),
        }
    }

    /// `culvert … | head` is no failure.
    fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

fn write_to(text: &mut String, more: &str) {
    text.write_str(more).expect("a String takes everything");
}

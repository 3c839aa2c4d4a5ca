//! `culvert agent`: what is done to the node's agent itself.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::admin::AdminClient;
use crate::arguments::{AgentCommand, Daemon, Output, Reach};
use crate::failure::{Ending, Failure};
use crate::show;

/// Does it, and prints what came of it.
///
/// # Errors
/// When the agent cannot be asked, or refuses.
pub(crate) fn run(
    command: &AgentCommand,
    reach: &Reach,
    output: Output,
) -> Result<Ending, Failure> {
    match command {
        AgentCommand::Upgrade { binary } => upgrade(binary.as_deref(), reach, output),
    }
}

/// A successor that was started.
#[derive(Debug, Deserialize, Serialize)]
struct Started {
    pid: u32,
    program: String,
    ended: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Standing {
    pid: u32,
    version: String,
    ready: bool,
}

#[derive(Debug, Serialize)]
struct Outcome<'a> {
    pid: u32,
    program: &'a str,
    version: &'a str,
    ready: bool,
}

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// How long a successor may take: it loads programs, hears the controller, and takes over.
const PATIENCE: Duration = Duration::from_secs(120);

fn upgrade(binary: Option<&Path>, reach: &Reach, output: Output) -> Result<Ending, Failure> {
    let agent = AdminClient::new(Daemon::Agent, reach);
    let path = match binary {
        None => String::new(),
        Some(path) => {
            let absolute = std::path::absolute(path).map_err(|source| Failure::Local {
                what: format!("{} is no path", path.display()),
                remedy: String::new(),
                source,
            })?;
            absolute.to_string_lossy().into_owned()
        }
    };
    let started: Started = agent.read(&agent.post("/upgrade", path)?)?;
    let until = Instant::now() + PATIENCE;
    let standing = loop {
        // For a moment nobody may answer: the old one has ended its requests, the new one has not begun.
        match ask(&agent, started.pid) {
            Ok(Some(standing)) => break standing,
            Err(failure) if Instant::now() >= until => return Err(failure),
            Ok(None) if Instant::now() >= until => {
                return Err(Failure::Refused {
                    reason: format!("process {} has not taken over in {PATIENCE:?}", started.pid),
                    remedy: "see the agent's log; the old agent goes on meanwhile".to_owned(),
                    retryable: false,
                });
            }
            Err(refused @ Failure::Refused { .. }) => return Err(refused),
            Ok(None) | Err(_) => std::thread::sleep(LOOK),
        }
    };
    let Started { pid, program, .. } = &started;
    let Standing { version, ready, .. } = &standing;
    match output {
        Output::Json => show::json(&Outcome { pid: *pid, program, version, ready: *ready })?,
        Output::Table => show::text(&format!(
            "version {version} (process {pid}, {program}) has taken over, no connection was lost\n"
        ))?,
    }
    Ok(Ending::Yes)
}

/// How the successor stands, once it answers in the old agent's place.
fn ask(agent: &AdminClient, successor: u32) -> Result<Option<Standing>, Failure> {
    let standing: Standing = agent.read(&agent.get("/status")?)?;
    if standing.pid == successor {
        return Ok(standing.ready.then_some(standing));
    }
    let last: Option<Started> = agent.read(&agent.get("/upgrade")?)?;
    match last {
        Some(Started { pid, ended: Some(ended), program }) if pid == successor => {
            Err(Failure::Refused {
                reason: format!("{program} ended ({ended}) before it took over"),
                remedy: "see the agent's log; the old agent goes on".to_owned(),
                retryable: false,
            })
        }
        _ => Ok(None),
    }
}

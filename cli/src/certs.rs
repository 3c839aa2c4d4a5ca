//! `culvert certs`: the identities this node holds, and for how long.

use jiff::Timestamp;
use serde::Deserialize;

use crate::admin::AdminClient;
use crate::arguments::{Daemon, Output, Reach};
use crate::failure::{Ending, Failure};
use crate::show::{self, Columns};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Held {
    identity: String,
    state: String,
    cert_chain: Vec<Certificate>,
    root_certs: Vec<serde::de::IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Certificate {
    serial_number: Option<String>,
    /// RFC 3339, or `unknown`.
    valid_from: Option<String>,
    /// RFC 3339, or `unknown`.
    expiration_time: Option<String>,
}

/// Asks the agent and prints.
///
/// # Errors
/// When it cannot be asked.
pub(crate) fn run(reach: &Reach, output: Output) -> Result<Ending, Failure> {
    let agent = AdminClient::new(Daemon::Agent, reach);
    let body = agent.get("/certs")?;
    match output {
        Output::Json => show::raw(&body)?,
        Output::Table => {
            let held: Vec<Held> = agent.read(&body)?;
            show::text(&render(&held, Timestamp::now()))?;
        }
    }
    Ok(Ending::Yes)
}

fn render(held: &[Held], now: Timestamp) -> String {
    if held.is_empty() {
        return "no certificates: no pod of this node is in the mesh, or the controller is away\n"
            .to_owned();
    }
    let mut columns = Columns::new(&[
        "IDENTITY",
        "STATE",
        "VALID FROM",
        "EXPIRES",
        "IN",
        ">CHAIN",
        ">ROOTS",
        "SERIAL",
    ]);
    for one in held {
        let none = Certificate::default();
        let leaf = one.cert_chain.first().unwrap_or(&none);
        columns.row([
            one.identity.clone(),
            one.state.to_lowercase(),
            leaf.valid_from.clone().unwrap_or_default(),
            leaf.expiration_time.clone().unwrap_or_default(),
            leaf.expiration_time.as_deref().map(|end| left(now, end)).unwrap_or_default(),
            one.cert_chain.len().to_string(),
            one.root_certs.len().to_string(),
            leaf.serial_number.clone().unwrap_or_default(),
        ]);
    }
    columns.render()
}

/// Time from `now` until `end`; empty when that is no time.
fn left(now: Timestamp, end: &str) -> String {
    let Ok(end) = end.parse::<Timestamp>() else { return String::new() };
    let seconds = end.duration_since(now).as_secs();
    match u64::try_from(seconds) {
        Ok(seconds) => show::span(seconds),
        Err(_past) => format!("{} ago", show::span(seconds.unsigned_abs())),
    }
}

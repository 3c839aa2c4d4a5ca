//! `culvert log-level`: what a daemon logs. Changed over its Unix socket only.

use serde::Deserialize;

use crate::admin::{AdminClient, query};
use crate::arguments::{LogLevelArgs, Output, Reach};
use crate::failure::{Ending, Failure};
use crate::show;
use crate::status::nearest;

#[derive(Debug, Deserialize)]
struct Logging {
    level: String,
}

/// Changes it where that is asked for, and prints what is in force.
///
/// # Errors
/// When the daemon cannot be asked, or the filter is none.
pub(crate) fn run(args: &LogLevelArgs, reach: &Reach, output: Output) -> Result<Ending, Failure> {
    let client = AdminClient::new(args.daemon.unwrap_or_else(|| nearest(reach)), reach);
    let body = match (&args.level, args.reset) {
        (Some(level), _) => client.post(&format!("/logging{}", query(&[("level", level)])), "")?,
        (None, true) => client.post("/logging?reset", "")?,
        (None, false) => client.get("/logging")?,
    };
    let logging: Logging = client.read(&body)?;
    match output {
        Output::Json => show::raw(&body)?,
        Output::Table => show::text(&format!("{}\n", logging.level))?,
    }
    Ok(Ending::Yes)
}

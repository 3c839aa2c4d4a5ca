//! `culvert logs`: the lines of the agent's log that are about one pod.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use mesh_enroll::EnrolledPod;
use serde_json::Value;

use crate::admin::AdminClient;
use crate::arguments::{Daemon, LogsArgs, Reach};
use crate::failure::{Ending, Failure};
use crate::pod::pod_name;
use crate::show;

/// Prints the lines about the pod, as they are.
///
/// # Errors
/// When the log cannot be read; when the agent knows no such pod and the log has nothing about it.
pub(crate) fn run(args: &LogsArgs, reach: &Reach) -> Result<Ending, Failure> {
    let name = pod_name(&args.pod)?;
    let mut lines = PodLines::new(name.namespace(), name.name());
    let is_unknown = lines.learn(reach) == Some(false);
    let unknown = || Failure::Usage {
        problem: format!(
            "the agent of this machine knows no pod {name}, and its log has no line about it"
        ),
        remedy: "see what it knows: culvert pod list; the pod may run on another node".to_owned(),
    };
    if is_unknown && args.follow {
        // It may come yet, and ends with the reader.
        show::remark(&format!("the agent of this machine knows no pod {name} yet\n"));
    }
    let about = Cell::new(false);
    let print = |line: &str| -> Result<(), Failure> {
        if lines.has(line) {
            about.set(true);
            if !args.refused || is_refusal(line) {
                show::text(&format!("{line}\n"))?;
            }
        }
        Ok(())
    };
    match &args.file {
        Some(path) if path == Path::new("-") => each_line(io::stdin().lock(), path, print)?,
        Some(path) => {
            let file = File::open(path).map_err(|source| unreadable(path, source))?;
            each_line(BufReader::new(file), path, print)?;
        }
        None => journal(args, print)?,
    }
    // The log may tell of a pod that is gone.
    if is_unknown && !about.get() { Err(unknown()) } else { Ok(Ending::Yes) }
}

/// Prints the lines about the pod that a program writes.
///
/// # Errors
/// When they cannot be read or written.
pub(crate) fn print_from(args: &LogsArgs, lines: impl BufRead) -> Result<Ending, Failure> {
    let name = pod_name(&args.pod)?;
    let known = PodLines::new(name.namespace(), name.name());
    each_line(lines, Path::new("the agent's log"), |line| {
        if known.has(line) && (!args.refused || is_refusal(line)) {
            show::text(&format!("{line}\n"))?;
        }
        Ok(())
    })?;
    Ok(Ending::Yes)
}

fn journal(args: &LogsArgs, print: impl Fn(&str) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut command = Command::new("journalctl");
    command.args(["--quiet", "--no-pager", "--output=cat"]).arg(format!("--unit={}", args.unit));
    if args.follow {
        command.arg("--follow");
    }
    if let Some(since) = &args.since {
        command.arg(format!("--since={since}"));
    }
    let failed = |source| Failure::Local {
        what: "cannot read the journal with journalctl".to_owned(),
        remedy: "name the file the agent logs to with --file, or pipe its log into --file -"
            .to_owned(),
        source,
    };
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(failed)?;
    let printed = match child.stdout.take() {
        Some(stdout) => each_line(BufReader::new(stdout), Path::new("the journal"), print),
        None => Ok(()),
    };
    if printed.is_err() {
        // It waits for a reader that is gone.
        child.kill().map_err(failed)?;
    }
    let ended = child.wait().map_err(failed)?;
    printed?;
    if ended.success() { Ok(()) } else { Err(failed(io::Error::other(ended.to_string()))) }
}

fn each_line(
    mut from: impl BufRead,
    path: &Path,
    print: impl Fn(&str) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut line = Vec::new();
    loop {
        line.clear();
        match from.read_until(b'\n', &mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => print(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']))?,
            Err(error) => return Err(unreadable(path, error)),
        }
    }
}

fn unreadable(path: &Path, source: io::Error) -> Failure {
    let remedy = "name the file the agent logs to".to_owned();
    Failure::Local { what: format!("cannot read {}", path.display()), remedy, source }
}

/// What a line about the pod holds.
#[derive(Debug)]
struct PodLines {
    namespace: String,
    name: String,
    /// Words that stand for the pod: its full name, uid and addresses.
    words: BTreeSet<String>,
}

impl PodLines {
    fn new(namespace: &str, name: &str) -> Self {
        let words = [format!("{namespace}/{name}")].into();
        Self { namespace: namespace.to_owned(), name: name.to_owned(), words }
    }

    /// Asks the agent for the pod's uid and addresses, which is all that some lines have. Without an agent, or of a
    /// pod that is gone, the names have to do. Whether the agent knows the pod; none when it does not answer.
    fn learn(&mut self, reach: &Reach) -> Option<bool> {
        let agent = AdminClient::new(Daemon::Agent, reach);
        let answer = agent.get("/pods").and_then(|body| agent.read::<Vec<EnrolledPod>>(&body));
        let pods = answer.ok()?;
        let same = |one: &&EnrolledPod| {
            one.pod.name.namespace() == self.namespace && one.pod.name.name() == self.name
        };
        for one in pods.iter().filter(same) {
            self.words.insert(one.pod.uid.as_str().to_owned());
            self.words.extend(one.ips.iter().map(ToString::to_string));
        }
        Some(pods.iter().any(|one| same(&one)))
    }

    fn has(&self, line: &str) -> bool {
        self.is_end(line, "src") || self.is_end(line, "dst") || self.words(line)
    }

    /// True when the pod is this end of a connection.
    fn is_end(&self, line: &str, end: &str) -> bool {
        let field = |name: &str, value: &str| {
            let text = format!("{end}.{name}={}", Value::from(value));
            let json = format!("\"{end}.{name}\":{}", Value::from(value));
            line.contains(&text) || line.contains(&json)
        };
        field("workload", &self.name) && field("namespace", &self.namespace)
    }

    /// True when one of the pod's words stands in the line by itself.
    fn words(&self, line: &str) -> bool {
        let part_of_name = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        self.words.iter().any(|word| {
            line.match_indices(word.as_str()).any(|(at, _)| {
                let before = line.get(..at).and_then(|text| text.chars().next_back());
                let after = line.get(at + word.len()..).and_then(|text| text.chars().next());
                !before.is_some_and(part_of_name) && !after.is_some_and(part_of_name)
            })
        })
    }
}

/// True for the access-log line of a connection that did not end well.
fn is_refusal(line: &str) -> bool {
    line.contains(" error=\"") || line.contains("\"error\":\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_about_the_pod_are_found() {
        let mut lines = PodLines::new("shop", "cart-1");
        lines.words.extend(["10.0.0.1".to_owned(), "0b1c-uid".to_owned()]);
        for line in [
            r#"access src.workload="cart-1" src.namespace="shop" dst.workload="db""#,
            r#"{"src.workload":"web","dst.workload":"cart-1","dst.namespace":"shop"}"#,
            "enrolled pod=shop/cart-1",
            "src.addr=10.0.0.1:4711 dst.addr=10.0.0.7:80",
            "pod 0b1c-uid is late",
        ] {
            assert!(lines.has(line), "{line}");
        }
        for line in [
            r#"access src.workload="cart-1" src.namespace="other""#,
            r#"access src.workload="cart-10" src.namespace="shop""#,
            "enrolled pod=shop/cart-10",
            "enrolled pod=work-shop/cart-1",
            "src.addr=10.0.0.10:4711",
            "src.addr=110.0.0.1:4711",
            "",
        ] {
            assert!(!lines.has(line), "{line}");
        }
    }

    #[test]
    fn a_refusal_has_an_error() {
        assert!(is_refusal(r#"duration="1ms" error="policy rejection" reason=policy_denied"#));
        assert!(is_refusal(r#"{"level":"error","error":"policy rejection"}"#));
        assert!(!is_refusal(r#"duration="1ms" reason=complete"#));
    }
}

//! `culvert explain`: would a connection be made, and what decides.

mod question;
mod source;

use std::fmt::{Display, Write as _};
use std::net::IpAddr;

use mesh_authorize::{Explanation, Outcome};
use mesh_resolve::Step;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::admin::{AdminClient, query};
use crate::arguments::{Daemon, ExplainArgs, Output, Reach};
use crate::failure::{Ending, Failure};
use crate::show;
use question::Question;

/// The controller's answer. Steps are kept as they came, so that one that a newer controller has invented is shown
/// raw instead of spoiling the whole answer.
#[derive(Debug, Deserialize)]
struct Answer {
    allowed: bool,
    reason: Option<String>,
    summary: String,
    stages: Vec<Stage>,
    #[serde(default)]
    warnings: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Stage {
    side: String,
    workload: String,
    resolve: Vec<Value>,
    authorize: Option<Value>,
    outcome: String,
}

/// Asks, prints, and ends with whether the connection would be made.
///
/// # Errors
/// When the question cannot be read, or the controller cannot answer it.
pub(crate) fn run(args: &ExplainArgs, reach: &Reach, output: Output) -> Result<Ending, Failure> {
    let mut question = Question::read(args)?;
    let controller = AdminClient::new(Daemon::Controller, reach);
    let asked = question.to_string();
    let note = source::replace_service(&mut question, &controller)?;
    let port = question.port.to_string();
    let mut asked_for = vec![("from", &*question.from), ("to", &*question.to), ("port", &*port)];
    if let Some((method, path)) = &question.request {
        asked_for.extend([
            ("method", &**method),
            ("path", &**path),
            ("headers", &*question.headers),
        ]);
    }
    let target = format!("/explain{}", query(&asked_for));
    let body = controller.get(&target)?;
    let answer: Answer = controller.read(&body)?;
    let same_node = if answer.allowed { same_node(&question, &answer, reach) } else { None };
    match output {
        Output::Json => show::raw(&body)?,
        Output::Table => {
            let mut text = render(&asked, note.as_deref(), &answer);
            if let Some(same_node) = same_node {
                line(&mut text, 0, &same_node);
            }
            show::text(&text)?;
        }
    }
    Ok(if answer.allowed { Ending::Yes } else { Ending::No })
}

/// What this node's agent says of the path between two of its pods.
#[derive(Debug, Deserialize)]
struct SameNode {
    direct: bool,
    in_force: bool,
    because: String,
}

/// Asks the agent of this machine; none when there is none, or when the connection is neither between two of its pods nor
/// from one of them to a service.
fn same_node(question: &Question, answer: &Answer, reach: &Reach) -> Option<String> {
    let agent = AdminClient::new(Daemon::Agent, reach);
    if !agent.is_there() {
        return None;
    }
    let port = question.port.to_string();
    let from = question.from.rsplit_once("//Pod/").map_or(&*question.from, |(_, name)| name);
    let to = dialled(answer).map_or_else(|| question.to.clone(), |ip| ip.to_string());
    let asked = query(&[("from", from), ("to", &to), ("port", &port)]);
    let answer: SameNode = agent.read(&agent.get(&format!("/same-node{asked}")).ok()?).ok()?;
    let SameNode { direct, in_force, because } = answer;
    Some(match (direct, in_force) {
        (true, true) => format!("on this node: direct, without the agent ({because})"),
        (true, false) => {
            format!("on this node: direct from the second connection on ({because})")
        }
        (false, _) => format!("on this node: through the agent, encrypted ({because})"),
    })
}

/// The address that a name stands for: an agent knows names of pods only.
fn dialled(answer: &Answer) -> Option<IpAddr> {
    answer.stages.iter().flat_map(|stage| &stage.resolve).find_map(|step| {
        match serde_json::from_value(step.clone()) {
            Ok(Step::Dialled { destination, .. }) => Some(destination.ip()),
            Ok(_other) => None,
            // A step that a newer controller has invented.
            Err(_unknown) => None,
        }
    })
}

fn render(asked: &str, note: Option<&str>, answer: &Answer) -> String {
    let mut text = String::new();
    line(&mut text, 0, &asked);
    if let Some(note) = note {
        line(&mut text, 0, &note);
    }
    for stage in &answer.stages {
        render_stage(&mut text, stage);
    }
    let verdict = match (&answer.reason, answer.allowed) {
        (_, true) => format!("ALLOWED: {}", answer.summary),
        (Some(reason), false) => format!("DENIED ({reason}): {}", answer.summary),
        (None, false) => format!("DENIED: {}", answer.summary),
    };
    text.push('\n');
    line(&mut text, 0, &verdict);
    if let Some(rule) = deciding_rule(answer) {
        line(&mut text, 0, &format!("decided by {rule}"));
    }
    for warning in &answer.warnings {
        line(&mut text, 0, &format!("warning: {warning}"));
    }
    text
}

fn render_stage(text: &mut String, stage: &Stage) {
    let title = match stage.side.as_str() {
        "source" => "At the source",
        "waypoint" => "At the waypoint",
        "destination" => "At the destination",
        other => other,
    };
    text.push('\n');
    line(text, 0, &format!("{title}, {}", stage.workload));
    for step in &stage.resolve {
        line(text, 1, &sentence::<Step>(step));
    }
    if let Some(authorize) = &stage.authorize {
        match Explanation::deserialize(authorize) {
            Ok(explanation) => render_policies(text, &explanation),
            Err(_newer) => line(text, 1, authorize),
        }
    }
    line(text, 1, &format!("=> {}", stage.outcome));
}

fn render_policies(text: &mut String, explanation: &Explanation) {
    for policy in &explanation.policies {
        line(text, 1, policy);
        for rule in &policy.rules {
            line(text, 2, rule);
        }
    }
    for note in &explanation.notes {
        line(text, 1, &format!("note: {} by {} (not enforced)", note.kind.as_str(), note.rule));
    }
    if explanation.policies.is_empty() && matches!(explanation.outcome, Outcome::Allowed { .. }) {
        line(text, 1, &"no policy applies");
    }
}

/// The rule that decides, by name: that of the last end that judged.
fn deciding_rule(answer: &Answer) -> Option<String> {
    let last = answer.stages.iter().rev().find_map(|stage| stage.authorize.as_ref())?;
    let explanation = Explanation::deserialize(last).ok()?;
    match explanation.outcome {
        Outcome::Allowed { rule } => rule,
        Outcome::Denied(denial) => denial.rule,
    }
    .map(|rule| rule.to_string())
}

/// A step in words, or raw when this program does not know it.
fn sentence<T: DeserializeOwned + Display>(step: &Value) -> String {
    T::deserialize(step).map_or_else(|_newer| step.to_string(), |step| step.to_string())
}

fn line(text: &mut String, depth: usize, what: &dyn Display) {
    writeln!(text, "{:width$}{what}", "", width = depth * 2).expect("a String takes everything");
}

//! `culvert status`: is the node, or the controller, well?

use std::collections::BTreeMap;
use std::fmt::Write as _;

use mesh_enroll::EnrolledPod;
use serde::Deserialize;

use crate::admin::AdminClient;
use crate::arguments::{Daemon, Output, Reach, StatusArgs};
use crate::failure::{Ending, Failure};
use crate::pod::pods_table;
use crate::show::{self, Columns, count};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct AgentStatus {
    version: String,
    node: String,
    ready: bool,
    waiting_for: Vec<String>,
    controller: Standing,
    capture: CaptureStatus,
    #[serde(default)]
    same_node: Option<SameNodeStatus>,
    pods: Vec<EnrolledPod>,
    workloads: usize,
    services: usize,
    policies: usize,
    #[serde(default)]
    denying: Vec<String>,
    certificates: usize,
    index_revision: u64,
    policy_revision: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Standing {
    connected: bool,
    synced: bool,
    last_error: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CaptureStatus {
    cgroup_order: String,
    guard: String,
    cgroup_root: String,
    adopted: bool,
}

#[derive(Debug, Deserialize)]
struct SameNodeStatus {
    setting: String,
    lacking: Option<String>,
    verdicts: usize,
    open: usize,
}

impl SameNodeStatus {
    fn sentence(&self) -> String {
        let Self { setting, lacking, verdicts, open } = self;
        match lacking {
            Some(lacking) => format!("by tunnel, since the kernel lacks: {lacking}"),
            None if setting == "direct" => format!(
                "direct, {}, {} open",
                count(*verdicts, "verdict"),
                count(*open, "connection")
            ),
            None => format!("by {setting}"),
        }
    }
}

#[derive(Debug, Deserialize)]
struct ControllerStatus {
    synced: bool,
    source: SourceStatus,
    #[serde(default)]
    revocations: Option<RevocationStatus>,
    policies: BTreeMap<String, PolicyStatus>,
    #[serde(default)]
    routes: BTreeMap<String, RouteStatus>,
    notes: Vec<(String, String)>,
}

#[derive(Debug, Deserialize)]
struct RouteStatus {
    accepted: bool,
    resolved_refs: bool,
    parents: Vec<String>,
    notes: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct RevocationStatus {
    file: String,
    problem: Option<String>,
}

#[derive(Debug, Deserialize)]
struct SourceStatus {
    objects: usize,
    refused: Vec<RefusedObject>,
    #[serde(default)]
    more_refused: usize,
    #[serde(default)]
    kept: usize,
    #[serde(default)]
    kept_objects: Vec<String>,
    #[serde(default)]
    missing: Option<String>,
    #[serde(default)]
    not_remembered: Option<String>,
    ignored: Vec<(String, usize)>,
}

#[derive(Debug, Deserialize)]
struct RefusedObject {
    file: String,
    line: usize,
    object: Option<String>,
    field: String,
    problem: String,
    remedy: String,
    last_good_in_use: bool,
    #[serde(default)]
    denied: bool,
}

#[derive(Debug, Deserialize)]
struct PolicyStatus {
    enforced_as_written: bool,
    #[serde(default)]
    denying: bool,
    place: String,
    notes: Vec<String>,
}

impl ControllerStatus {
    /// True when everything is read and in force as it is written down now.
    fn is_clean(&self) -> bool {
        let source = &self.source;
        let revocations = self.revocations.as_ref().and_then(|lists| lists.problem.as_ref());
        self.synced
            && source.refused.is_empty()
            && source.kept == 0
            && source.missing.is_none()
            && source.not_remembered.is_none()
            && revocations.is_none()
    }
}

/// Asks the agent, or the controller, and prints. Ends with whether it is ready, and of the controller, whether all it
/// should read is in force.
///
/// # Errors
/// When it cannot be asked.
pub(crate) fn run(args: &StatusArgs, reach: &Reach, output: Output) -> Result<Ending, Failure> {
    let daemon = args.daemon.unwrap_or_else(|| nearest(reach));
    let client = AdminClient::new(daemon, reach);
    let body = client.get("/status")?;
    let (text, well) = match daemon {
        Daemon::Agent => {
            let status: AgentStatus = client.read(&body)?;
            (render_agent(&status), status.ready)
        }
        Daemon::Controller => {
            let status: ControllerStatus = client.read(&body)?;
            let mut text = String::new();
            if args.daemon.is_none() {
                // Nobody named the controller: it stands in for an agent.
                let agent = reach.run_dir.join("admin.sock");
                let unreached = format!("cannot be reached: nothing at {}", agent.display());
                text.push_str(&list(&[("agent", unreached)]));
            }
            text.push_str(&render_controller(&status));
            (text, status.is_clean())
        }
    };
    match output {
        Output::Json => show::raw(&body)?,
        Output::Table => show::text(&text)?,
    }
    Ok(if well { Ending::Yes } else { Ending::No })
}

/// The agent, except on a machine that only has a controller.
pub(crate) fn nearest(reach: &Reach) -> Daemon {
    let has = |daemon| AdminClient::new(daemon, reach).is_there();
    if !has(Daemon::Agent) && has(Daemon::Controller) { Daemon::Controller } else { Daemon::Agent }
}

fn render_agent(status: &AgentStatus) -> String {
    let ready = if status.ready {
        "ready".to_owned()
    } else {
        format!("not ready, waiting for {}", status.waiting_for.join(", "))
    };
    let standing = &status.controller;
    let has_some = status.workloads > 0;
    let controller = match (standing.connected, standing.synced) {
        (true, true) => "connected, in sync",
        (true, false) if has_some => "connected, not yet in sync; going on with what is kept",
        (true, false) => "connected, not yet in sync",
        (false, true) => "away; going on with what it said last",
        (false, false) if has_some => "away; going on with what is kept of what it said",
        (false, false) => "away",
    };
    let because = match &standing.last_error {
        Some(error) if !standing.connected => format!(" ({error})"),
        Some(_) | None => String::new(),
    };
    let capture = &status.capture;
    let adopted = if capture.adopted { ", adopted from a predecessor" } else { "" };
    let facts = [
        ("node", status.node.clone()),
        ("agent", format!("{ready} (version {})", status.version)),
        ("controller", format!("{controller}{because}")),
        (
            "capture",
            format!(
                "guard by {}, hooks {}, at {}{adopted}",
                capture.guard, capture.cgroup_order, capture.cgroup_root
            ),
        ),
        (
            "knows",
            [
                count(status.workloads, "workload"),
                count(status.services, "service"),
                format!("{} (revision {})", policies(status.policies), status.policy_revision),
                count(status.certificates, "certificate"),
                format!("index revision {}", status.index_revision),
            ]
            .join(", "),
        ),
    ];
    let mut text = list(&facts);
    if let Some(same_node) = &status.same_node {
        text.push_str(&list(&[("same node", same_node.sentence())]));
    }
    for denying in &status.denying {
        text.push_str(&list(&[("DENYING", denying.clone())]));
    }
    text.push('\n');
    text.push_str(&pods_table(&status.pods));
    text
}

fn render_controller(status: &ControllerStatus) -> String {
    let source = &status.source;
    let synced = if status.synced { "in sync" } else { "still reading its source" };
    let mut text = list(&[
        ("controller", synced.to_owned()),
        (
            "objects",
            format!(
                "{} in use, {} refused",
                source.objects,
                source.refused.len() + source.more_refused
            ),
        ),
    ]);
    text.push_str(&render_kept(status));
    if !source.ignored.is_empty() {
        let kinds: Vec<String> =
            source.ignored.iter().map(|(kind, number)| format!("{kind} ({number})")).collect();
        text.push_str(&list(&[("not read", kinds.join(", "))]));
    }
    for refused in &source.refused {
        text.push_str(&render_refused(refused));
    }
    if !status.policies.is_empty() {
        let mut columns = Columns::new(&["POLICY", "ENFORCED", "WHERE", "NOTES"]);
        for (name, policy) in &status.policies {
            let enforced = match (policy.denying, policy.enforced_as_written) {
                (true, _) => "DENYING",
                (false, true) => "as written",
                (false, false) => "not as written",
            };
            columns.row([
                name.clone(),
                enforced.to_owned(),
                policy.place.clone(),
                policy.notes.join("; "),
            ]);
        }
        text.push('\n');
        text.push_str(&columns.render());
    }
    text.push_str(&render_routes(&status.routes));
    for (object, note) in &status.notes {
        add(&mut text, format_args!("\nnote: {object}: {note}"));
    }
    text
}

/// Routes: accepted by whom, and what of them answers 500.
fn render_routes(routes: &BTreeMap<String, RouteStatus>) -> String {
    if routes.is_empty() {
        return String::new();
    }
    let mut columns = Columns::new(&["ROUTE", "ACCEPTED", "REFERENCES", "PARENTS", "NOTES"]);
    for (name, route) in routes {
        columns.row([
            name.clone(),
            if route.accepted { "yes" } else { "NO" }.to_owned(),
            if route.resolved_refs { "resolved" } else { "NOT RESOLVED" }.to_owned(),
            route.parents.join("; "),
            route.notes.join("; "),
        ]);
    }
    format!("\n{}", columns.render())
}

/// What runs on an earlier version of what it should read.
fn render_kept(status: &ControllerStatus) -> String {
    let source = &status.source;
    let mut text = String::new();
    if let Some(problem) = &source.missing {
        add(&mut text, format_args!("MISSING:    {problem}; everything stays as it was"));
        add(
            &mut text,
            format_args!(
                "  remedy: mount or fill the folder again; if it is meant to be empty: culvert-controller source accept-empty"
            ),
        );
    }
    if source.kept > 0 {
        let more = source.kept.saturating_sub(source.kept_objects.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let names = source.kept_objects.join(", ");
        text.push_str(&list(&[(
            "KEPT",
            format!("{} in an earlier version: {names}{more}", count(source.kept, "object")),
        )]));
    }
    if let Some(problem) = &source.not_remembered {
        text.push_str(&list(&[(
            "AT RISK",
            format!("last good versions cannot be kept for a restart: {problem}"),
        )]));
    }
    if let Some(RevocationStatus { file, problem: Some(problem) }) = &status.revocations {
        text.push_str(&list(&[(
            "KEPT",
            format!("the last good revocation lists, instead of {file}: {problem}"),
        )]));
    }
    text
}

fn render_refused(refused: &RefusedObject) -> String {
    let mut text = String::new();
    let place = match refused.line {
        0 => refused.file.clone(),
        line => format!("{}:{line}", refused.file),
    };
    let object = refused.object.as_deref().unwrap_or("the document");
    let field =
        if refused.field.is_empty() { String::new() } else { format!(", {}", refused.field) };
    add(&mut text, format_args!("\nrefused: {object} at {place}{field}: {}", refused.problem));
    add(&mut text, format_args!("  remedy: {}", refused.remedy));
    let effect = if refused.last_good_in_use {
        "its last good version is still in use"
    } else if refused.denied {
        "DENYING: whatever it may refuse is refused until it can be read"
    } else {
        "NOT ENFORCED: nothing stands in for it"
    };
    add(&mut text, format_args!("  {effect}"));
    text
}

/// Facts, one a line, their names in a column.
fn list(facts: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (name, fact) in facts {
        let one_line = fact.replace('\n', " ");
        add(&mut text, format_args!("{:<12}{one_line}", format!("{name}:")));
    }
    text
}

fn policies(number: usize) -> String {
    if number == 1 { "1 policy".to_owned() } else { format!("{number} policies") }
}

fn add(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a String takes everything");
}

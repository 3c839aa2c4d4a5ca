//! What is written to a policy's status: whether it is accepted, and where and how it is enforced.
//!
//! The types carry our domain: in a cluster that also runs Istio, its conditions stand beside ours and are left alone.

use jiff::{Timestamp, Unit};
use serde_json::{Value, json};

use crate::index::PolicyStatus;
use crate::source::Refusal;

/// Whether the object can be read.
const ACCEPTED: &str = "culvert.dev/Accepted";
/// Whether it is enforced as written, and where.
const ENFORCED: &str = "culvert.dev/Enforced";
/// Longest message. Source: `metav1.Condition`.
const MAX_MESSAGE: usize = 32_768;

/// One condition, but for the time of its last change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) kind: &'static str,
    pub(super) is_true: bool,
    /// One word.
    pub(super) reason: &'static str,
    pub(super) message: String,
    pub(super) generation: i64,
}

/// How one policy object stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PolicyReport {
    /// The generation that is in force; none while nothing is.
    pub(crate) generation: Option<i64>,
    /// How what is in force is enforced.
    pub(crate) enforcement: Option<PolicyStatus>,
    /// Why its present version is refused, when it is.
    pub(crate) refusal: Option<Refusal>,
}

/// The conditions of an object whose present generation is `present`; none while that is not judged yet.
pub(super) fn conditions(report: &PolicyReport, present: i64) -> Option<[Condition; 2]> {
    let condition = |kind, is_true, reason, message: String, generation| {
        let message = message.chars().take(MAX_MESSAGE).collect();
        Condition { kind, is_true, reason, message, generation }
    };
    let in_force = report.generation.unwrap_or(present);
    let accepted = match &report.refusal {
        None if in_force != present => return None,
        None => condition(ACCEPTED, true, "Accepted", String::new(), present),
        Some(refusal) => {
            let field =
                if refusal.field.is_empty() { "the object" } else { refusal.field.as_str() };
            let message = format!("{field}: {}; {}", refusal.problem, refusal.remedy);
            condition(ACCEPTED, false, "Invalid", message, present)
        }
    };
    let enforced = match (&report.enforcement, &report.refusal) {
        (None, _) => {
            condition(ENFORCED, false, "NotEnforced", "it is not in force".into(), present)
        }
        (Some(status), refusal) => {
            let reason = match refusal {
                _ if status.denying => "Denying",
                Some(_) => "LastGoodVersion",
                None if status.enforced_as_written => "AsWritten",
                None => "NotAsWritten",
            };
            let is_true = refusal.is_none() && status.enforced_as_written;
            let generation = if status.denying { present } else { in_force };
            condition(ENFORCED, is_true, reason, place(status), generation)
        }
    };
    Some([accepted, enforced])
}

fn place(status: &PolicyStatus) -> String {
    let place = if status.place.is_empty() { "nowhere" } else { status.place.as_str() };
    if status.notes.is_empty() {
        return format!("at {place}");
    }
    format!("at {place}; {}", status.notes.join("; "))
}

/// The conditions of an object with ours in their place; none when they are there. `now` as RFC 3339.
pub(super) fn merged(present: &Value, ours: &[Condition], now: &str) -> Option<Vec<Value>> {
    let present = present.as_array().map(Vec::as_slice).unwrap_or_default();
    let mut merged = present.to_vec();
    for condition in ours {
        let found = merged.iter().position(|one| one["type"] == condition.kind);
        let status = if condition.is_true { "True" } else { "False" };
        let since = found
            .map(|at| &merged[at])
            .filter(|one| one["status"] == status)
            .and_then(|one| one["lastTransitionTime"].as_str())
            .unwrap_or(now)
            .to_owned();
        let next = json!({
            "type": condition.kind,
            "status": status,
            "reason": condition.reason,
            "message": condition.message,
            "observedGeneration": condition.generation,
            "lastTransitionTime": since,
        });
        match found {
            Some(at) => merged[at] = next,
            None => merged.push(next),
        }
    }
    (merged != present).then_some(merged)
}

/// The moment as conditions write it, to the second.
pub(super) fn now() -> String {
    let now = Timestamp::now();
    now.round(Unit::Second).unwrap_or(now).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(notes: &[&str], denying: bool) -> PolicyStatus {
        PolicyStatus {
            enforced_as_written: notes.is_empty(),
            denying,
            place: "every workload of namespace shop".into(),
            notes: notes.iter().map(|note| (*note).to_owned()).collect(),
        }
    }

    fn refused() -> Refusal {
        Refusal {
            file: "kubernetes".into(),
            line: 0,
            kind: Some("AuthorizationPolicy"),
            object: None,
            field: "spec.action".into(),
            problem: "\"MAYBE\" is not known".into(),
            remedy: "use ALLOW or DENY".into(),
            last_good_in_use: false,
            denied: true,
        }
    }

    #[test]
    fn each_standing_has_its_reason_and_generation() {
        let check = |report: PolicyReport, expected: Option<[(bool, &str, i64); 2]>| {
            let found = conditions(&report, 3);
            let found = found.map(|both| both.map(|one| (one.is_true, one.reason, one.generation)));
            assert_eq!(found, expected, "{report:?}");
        };
        let report = |generation, enforcement, refusal| PolicyReport {
            generation: Some(generation),
            enforcement: Some(enforcement),
            refusal,
        };
        let accepted = (true, "Accepted", 3);
        let invalid = (false, "Invalid", 3);
        check(report(3, status(&[], false), None), Some([accepted, (true, "AsWritten", 3)]));
        check(report(3, status(&["x"], false), None), Some([accepted, (false, "NotAsWritten", 3)]));
        check(report(2, status(&[], false), None), None);
        let last_good = report(2, status(&[], false), Some(refused()));
        check(last_good, Some([invalid, (false, "LastGoodVersion", 2)]));
        let denying = report(2, status(&["x"], true), Some(refused()));
        check(denying, Some([invalid, (false, "Denying", 3)]));
        let nothing = PolicyReport { refusal: Some(refused()), ..PolicyReport::default() };
        check(nothing, Some([invalid, (false, "NotEnforced", 3)]));
    }

    #[test]
    fn others_conditions_stay_and_times_change_with_the_status_only() {
        let report = PolicyReport {
            generation: Some(1),
            enforcement: Some(status(&[], false)),
            refusal: None,
        };
        let theirs = json!([{"type": "ZtunnelAccepted", "status": "True"}]);
        let ours = conditions(&report, 1).unwrap();
        let first = merged(&theirs, &ours, "t1").unwrap();
        assert_eq!(first.len(), 3);
        assert_eq!(first[0], theirs[0]);
        assert_eq!(first[2]["message"], "at every workload of namespace shop");
        assert_eq!(merged(&json!(first), &ours, "t2"), None);
        let noted = PolicyReport { enforcement: Some(status(&["x"], false)), ..report };
        let next = merged(&json!(first), &conditions(&noted, 1).unwrap(), "t2").unwrap();
        assert_eq!(next[1]["lastTransitionTime"], "t1");
        assert_eq!(next[2]["lastTransitionTime"], "t2");
        assert_eq!(merged(&Value::Null, &ours, "t1").unwrap().len(), 2);
    }
}

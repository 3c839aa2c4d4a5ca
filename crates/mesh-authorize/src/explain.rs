//! Every step of a decision, as data, for `culvert explain`.

use std::fmt;

use mesh_model::{Revision, SpiffeId};
use mesh_resolve::ResolvedFlow;
use serde::{Deserialize, Serialize};

pub use crate::compile::{Attribute, FailedCondition};
use crate::compile::{CompiledPolicy, Subject};
use crate::evaluate::{Observe, authorize_egress, judge};
use crate::policy::{Action, PolicyName, PolicyOrigin, PolicyScope};
use crate::set::PolicySet;
use crate::verdict::{Decision, Denial, Note, RuleRef, Verdict};

/// A decision and how it came about. It holds no permit: nothing can be opened with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// What was decided.
    pub outcome: Outcome,
    /// The policies matched against the flow, in order. Those that could no longer change the decision were not.
    pub policies: Vec<PolicyStep>,
    /// What AUDIT and dry-run policies say.
    pub notes: Vec<Note>,
    /// The revision of the policies.
    pub revision: Revision,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The flow may happen.
    Allowed {
        /// The ALLOW rule that matched; none when nothing applied.
        rule: Option<RuleRef>,
    },
    /// It may not.
    Denied(Denial),
}

/// One policy, matched against the flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyStep {
    /// Its key.
    pub name: PolicyName,
    /// The object it was made of.
    pub origin: PolicyOrigin,
    /// Why it applies.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: Action,
    /// Whether it is only noted.
    pub dry_run: bool,
    /// The first rule that matched.
    pub matched: Option<usize>,
    /// The rules up to that one.
    pub rules: Vec<RuleStep>,
}

/// One rule, matched against the flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleStep {
    /// Which of the policy's, from 0.
    pub rule_index: usize,
    /// The first clause that did not match, from 0; none when the rule matched.
    pub failed_clause: Option<usize>,
    /// Of each match in that clause, a condition that did not hold.
    pub failed: Vec<FailedCondition>,
}

/// As [`authorize`](crate::authorize), with every step.
#[must_use]
pub fn explain(
    policies: &PolicySet,
    resolved: &ResolvedFlow,
    peer: Option<&SpiffeId>,
) -> Explanation {
    let mut steps = Steps::default();
    let verdict = judge(policies, resolved, peer, &mut steps);
    explanation(policies, verdict, steps)
}

/// As [`authorize_egress`], as data.
#[must_use]
pub fn explain_egress(policies: &PolicySet, resolved: &ResolvedFlow) -> Explanation {
    explanation(policies, authorize_egress(policies, resolved), Steps::default())
}

pub(crate) fn explanation(policies: &PolicySet, verdict: Verdict, steps: Steps) -> Explanation {
    let outcome = match verdict.decision {
        Decision::Allow(permit) => Outcome::Allowed { rule: permit.rule().cloned() },
        Decision::Deny(denial) => Outcome::Denied(denial),
    };
    let revision = policies.revision();
    Explanation { outcome, policies: steps.0, notes: verdict.notes, revision }
}

#[derive(Default)]
pub(crate) struct Steps(Vec<PolicyStep>);

impl Observe for Steps {
    fn considered(
        &mut self,
        policy: &CompiledPolicy,
        subject: &Subject<'_>,
        matched: Option<usize>,
    ) {
        let looked_at = matched.map_or_else(|| policy.rules().len(), |index| index + 1);
        let rules = policy.rules().iter().take(looked_at).enumerate();
        let source = policy.source();
        self.0.push(PolicyStep {
            name: source.name.clone(),
            origin: source.origin.clone(),
            scope: source.scope,
            action: source.action,
            dry_run: source.dry_run,
            matched,
            rules: rules
                .map(|(rule_index, rule)| {
                    let failed_clause = rule.failed_clause(subject);
                    let failed = failed_clause
                        .map(|clause| rule.failed_conditions(clause, subject))
                        .unwrap_or_default();
                    RuleStep { rule_index, failed_clause, failed }
                })
                .collect(),
        });
    }
}

impl fmt::Display for PolicyStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dry_run = if self.dry_run { " (dry run)" } else { "" };
        write!(f, "{} {}{dry_run}: ", self.action.as_str(), self.origin)?;
        match self.matched {
            Some(index) => write!(f, "rule {index} matches"),
            None if self.rules.is_empty() => f.write_str("has no rules, so it never matches"),
            None => f.write_str("no rule matches"),
        }
    }
}

impl fmt::Display for RuleStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}: ", self.rule_index)?;
        let Some(clause) = self.failed_clause else { return f.write_str("matches") };
        write!(f, "clause {clause} does not hold for its ")?;
        let mut words: Vec<_> = self.failed.iter().map(ToString::to_string).collect();
        words.sort();
        words.dedup();
        f.write_str(&words.join(", "))
    }
}

impl fmt::Display for FailedCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.negated {
            f.write_str("excluded ")?;
        }
        f.write_str(self.attribute.as_str())
    }
}

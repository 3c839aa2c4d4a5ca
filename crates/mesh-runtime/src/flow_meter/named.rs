//! Counters with a policy's name in a label: how often each refused a connection, or would have.
//!
//! Such names come and go, so that these counters are kept beside the traffic's, under the same bounds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use mesh_telemetry::metric::{self, Metric};
use mesh_telemetry::{LabelSet, LabelValue, PolicyRef};
use serde::{Deserialize, Serialize};

use super::FlowMeterConfig;

/// One series. The text of a policy's problem is no part of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum NamedSeries {
    /// A policy refused a flow, or cut one.
    Denial { reporter: Arc<str>, reason: Arc<str>, policy: Arc<str>, rule: Option<usize> },
    /// A policy matched and is not enforced.
    Note { note: Arc<str>, policy: Arc<str>, rule: Option<usize> },
}

#[derive(Debug)]
struct Kept {
    count: u64,
    used: Instant,
}

/// A series on its way to a successor process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WrittenNamed {
    series: NamedSeries,
    count: u64,
}

/// All series.
#[derive(Debug, Default)]
pub(super) struct NamedCounts {
    kept: HashMap<NamedSeries, Kept>,
}

impl NamedSeries {
    pub(super) fn denial(reporter: &str, reason: &str, policy: Option<&PolicyRef>) -> Self {
        let (policy, rule) = named(policy);
        Self::Denial { reporter: reporter.into(), reason: reason.into(), policy, rule }
    }

    pub(super) fn note(note: &str, policy: &PolicyRef) -> Self {
        let (policy, rule) = named(Some(policy));
        Self::Note { note: note.into(), policy, rule }
    }

    /// The same without names. There are as many of these as there are reporters, reasons and notes.
    fn folded(self) -> Self {
        let policy = Arc::default();
        match self {
            Self::Denial { reporter, reason, .. } => {
                Self::Denial { reporter, reason, policy, rule: None }
            }
            Self::Note { note, .. } => Self::Note { note, policy, rule: None },
        }
    }

    const fn metric(&self) -> &'static Metric {
        match self {
            Self::Denial { .. } => &metric::DENIALS,
            Self::Note { .. } => &metric::POLICY_NOTES,
        }
    }

    fn labels(&self) -> LabelSet {
        let shared = |text: &Arc<str>| LabelValue::Shared(Arc::clone(text));
        let number = |rule: &Option<usize>| {
            rule.map_or(LabelValue::Static(""), |rule| LabelValue::Shared(rule.to_string().into()))
        };
        match self {
            Self::Denial { reporter, reason, policy, rule } => LabelSet::new([
                ("reporter", shared(reporter)),
                ("reason", shared(reason)),
                ("policy", shared(policy)),
                ("rule", number(rule)),
            ]),
            Self::Note { note, policy, rule } => LabelSet::new([
                ("note", shared(note)),
                ("policy", shared(policy)),
                ("rule", number(rule)),
            ]),
        }
    }
}

fn named(policy: Option<&PolicyRef>) -> (Arc<str>, Option<usize>) {
    policy.map_or_else(Default::default, |policy| (Arc::clone(&policy.policy), policy.rule))
}

impl NamedCounts {
    /// Adds `added` to a series. Beyond the bound it is counted without its names.
    pub(super) fn add(&mut self, config: &FlowMeterConfig, series: NamedSeries, added: u64) {
        let now = Instant::now();
        let mut series = series;
        if !self.kept.contains_key(&series) && self.kept.len() >= config.max_series {
            self.expire(config, now);
            if self.kept.len() >= config.max_series {
                metrics::counter!(metric::SERIES_FOLDED.name).increment(1);
                series = series.folded();
            }
        }
        let kept = self.kept.entry(series).or_insert(Kept { count: 0, used: now });
        kept.count += added;
        kept.used = now;
    }

    /// Forgets what has not changed for so long.
    pub(super) fn expire(&mut self, config: &FlowMeterConfig, now: Instant) {
        self.kept.retain(|_, kept| now.saturating_duration_since(kept.used) < config.idle);
    }

    /// The series of `metric`.
    pub(super) fn series_of(&self, metric: &Metric) -> impl Iterator<Item = (LabelSet, u64)> {
        let of_metric = self.kept.iter().filter(move |(series, _)| series.metric() == metric);
        of_metric.map(|(series, kept)| (series.labels(), kept.count))
    }

    /// All series, for a successor.
    pub(super) fn written(&self) -> Vec<WrittenNamed> {
        let write = |(series, kept): (&NamedSeries, &Kept)| WrittenNamed {
            series: series.clone(),
            count: kept.count,
        };
        self.kept.iter().map(write).collect()
    }

    /// Goes on counting where a predecessor stopped.
    pub(super) fn take_over(&mut self, config: &FlowMeterConfig, written: Vec<WrittenNamed>) {
        for WrittenNamed { series, count } in written {
            self.add(config, series, count);
        }
    }
}

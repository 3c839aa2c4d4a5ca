//! Counters of a predecessor process, added to this one's in every rendering so that they never go back.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What a predecessor had counted: by metric, then by series. Only counters and histograms.
#[derive(Debug, Default)]
pub(super) struct Carried {
    metrics: BTreeMap<String, Metric>,
}

#[derive(Debug, Default)]
struct Metric {
    /// `# HELP` and `# TYPE`.
    head: String,
    kind: String,
    series: Vec<(String, f64)>,
}

impl Carried {
    /// Reads a rendering. Gauges are this process's own; so are metrics for which `elsewhere` is true.
    pub(super) fn parse(text: &str, elsewhere: impl Fn(&str) -> bool) -> Self {
        let mut metrics = read(text);
        metrics.retain(|name, metric| metric.is_counted() && !elsewhere(name));
        Self { metrics }
    }

    /// The rendering `own` with what was counted before.
    pub(super) fn add_to(&self, own: &str) -> String {
        if self.metrics.is_empty() {
            return own.to_owned();
        }
        let mut metrics = read(own);
        for (name, carried) in &self.metrics {
            let metric = metrics.entry(name.clone()).or_insert_with(|| Metric {
                head: carried.head.clone(),
                kind: carried.kind.clone(),
                series: Vec::new(),
            });
            for (series, count) in &carried.series {
                match metric.series.iter_mut().find(|(known, _)| known == series) {
                    Some((_, own)) => *own += count,
                    None => metric.series.push((series.clone(), *count)),
                }
            }
        }
        let mut text = String::with_capacity(own.len() + 1024);
        for metric in metrics.values() {
            text.push_str(&metric.head);
            for (series, value) in &metric.series {
                writeln!(text, "{series} {value}").expect("a String takes everything");
            }
            text.push('\n');
        }
        text
    }
}

impl Metric {
    fn is_counted(&self) -> bool {
        self.kind == "counter" || self.kind == "histogram"
    }
}

/// Metrics by name. Source: Prometheus text exposition format 0.0.4; a metric's lines stand together behind its `# TYPE`.
fn read(text: &str) -> BTreeMap<String, Metric> {
    let mut metrics: BTreeMap<String, Metric> = BTreeMap::new();
    let mut name = "";
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let (what, named) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
            name = named;
            let metric = metrics.entry(name.to_owned()).or_default();
            metric.head.push_str(line);
            metric.head.push('\n');
            if what == "TYPE" {
                words.next().unwrap_or("").clone_into(&mut metric.kind);
            }
        } else if let Some((series, value)) = line.rsplit_once(' ')
            && let (Ok(value), Some(metric)) = (value.parse(), metrics.get_mut(name))
        {
            metric.series.push((series.to_owned(), value));
        }
    }
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# HELP a_total things\n# TYPE a_total counter\na_total{x=\"1 2\"} 3\na_total{x=\"z\"} 1\n\n\
        # TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 2\nh_sum 0.5\nh_count 2\n\n\
        # TYPE g gauge\ng 9\n\n# TYPE k_total counter\nk_total 7\n\n# TYPE gone_total counter\ngone_total 4\n";
    const OWN: &str = "# HELP a_total things\n# TYPE a_total counter\na_total{x=\"1 2\"} 10\n\n\
        # TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 3\nh_sum 4\nh_count 3\n\n\
        # TYPE g gauge\ng 1\n\n# TYPE k_total counter\nk_total 8\n";

    #[test]
    fn counters_and_histograms_go_on_and_gauges_do_not() {
        let carried = Carried::parse(BEFORE, |name| name == "k_total");
        let text = carried.add_to(OWN);
        for line in [
            "a_total{x=\"1 2\"} 13",
            "a_total{x=\"z\"} 1",
            "h_bucket{le=\"1\"} 3",
            "h_bucket{le=\"+Inf\"} 5",
            "h_sum 4.5",
            "h_count 5",
            "g 1",
            "k_total 8",
            "gone_total 4",
            "# TYPE gone_total counter",
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
        // A third process carries both.
        assert!(Carried::parse(&text, |_| false).add_to("").contains("a_total{x=\"1 2\"} 13\n"));
    }

    #[test]
    fn nothing_carried_changes_nothing() {
        assert_eq!(Carried::default().add_to(OWN), OWN);
    }
}

//! The rows, the table and the JSON.

use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::topology::{CULVERT, PLAIN, RELAY, STOCK, ZTUNNEL};

/// The columns, in order. That of ztunnel is empty unless one was given.
pub(crate) const COLUMNS: &[&str] = &[PLAIN, RELAY, STOCK, ZTUNNEL, CULVERT];

/// One row: what was measured, in which unit, whether more is better, and every way's rounds.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) group: &'static str,
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) more_is_better: bool,
    samples: Vec<(&'static str, Vec<f64>)>,
}

/// A ratio between two ways: the median of the rounds' ratios, and the smallest and largest of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ratio {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Row {
    pub(crate) fn new(
        group: &'static str,
        name: &str,
        unit: &'static str,
        more_is_better: bool,
    ) -> Self {
        Self { group, name: name.to_owned(), unit, more_is_better, samples: Vec::new() }
    }

    /// Adds one round's value of a way; a way that has no such value has none.
    pub(crate) fn push(&mut self, way: &'static str, value: Option<f64>) {
        let Some(value) = value.filter(|value| value.is_finite()) else { return };
        match self.samples.iter_mut().find(|(name, _)| *name == way) {
            Some((_, values)) => values.push(value),
            None => self.samples.push((way, vec![value])),
        }
    }

    fn values(&self, way: &str) -> &[f64] {
        self.samples.iter().find(|(name, _)| *name == way).map_or(&[], |(_, values)| values)
    }

    /// The median of a way's rounds.
    pub(crate) fn median(&self, way: &str) -> Option<f64> {
        median(self.values(way))
    }

    /// How far the rounds of a way lie apart: (max − min) / median.
    fn spread(&self, way: &str) -> Option<f64> {
        let values = self.values(way);
        let middle = median(values).filter(|middle| *middle > 0.0)?;
        let (least, most) = range(values.iter().copied());
        Some((most - least) / middle)
    }

    /// `way` against `other`, round by round: a busy moment of the machine hits both.
    pub(crate) fn ratio(&self, way: &str, other: &str) -> Option<Ratio> {
        let ratios: Vec<f64> = self
            .values(way)
            .iter()
            .zip(self.values(other))
            .filter(|(_, other)| **other > 0.0)
            .map(|(way, other)| way / other)
            .collect();
        let (least, most) = range(ratios.iter().copied());
        Some(Ratio { median: median(&ratios)?, least, most })
    }

    /// True when a ratio is on the good side of 1.
    pub(crate) fn is_better(&self, ratio: f64) -> bool {
        if self.more_is_better { ratio > 1.0 } else { ratio < 1.0 }
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        Some(f64::midpoint(*sorted.get(middle.checked_sub(1)?)?, *sorted.get(middle)?))
    } else {
        sorted.get(middle).copied()
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| {
        (least.min(value), most.max(value))
    })
}

/// Few enough digits to read.
pub(crate) fn short(value: f64) -> String {
    if value >= 1000.0 {
        format!("{value:.0}")
    } else if value >= 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// Prints the table to standard output.
pub(crate) fn print(rows: &[Row]) {
    let mut group = "";
    for row in rows {
        if row.group != group {
            group = row.group;
            let names: Vec<String> = COLUMNS.iter().map(|name| format!("{name:>14}")).collect();
            println!("\n{group:50} {}   {:26} of relay", names.join(" "), "culvert/stock");
        }
        let cells: Vec<String> = COLUMNS
            .iter()
            .map(|column| {
                let cell = row.median(column).map_or_else(
                    || "-".to_owned(),
                    |value| match row.spread(column).filter(|_| row.values(column).len() > 1) {
                        Some(spread) => format!("{} ±{:.0}%", short(value), spread * 50.0),
                        None => short(value),
                    },
                );
                format!("{cell:>14}")
            })
            .collect();
        let against_stock = row.ratio(CULVERT, STOCK).map_or_else(
            || "-".to_owned(),
            |Ratio { median, least, most }| {
                let word = if row.is_better(median) { "better" } else { "WORSE" };
                format!("{median:.2} ({least:.2}–{most:.2}) {word}")
            },
        );
        let against_relay = row
            .ratio(CULVERT, RELAY)
            .map_or_else(|| "-".to_owned(), |ratio| format!("{:.2}", ratio.median));
        println!(
            "{:50} {}   {against_stock:26} {against_relay}",
            format!("  {}, {}", row.name, row.unit),
            cells.join(" "),
        );
    }
    println!(
        "\nMedians over rounds; ± is half the distance between the best and the worst round. Ratios are taken within a\n\
         round, median (least–most). relay: two plain relays in place of the agents; to their CPU per GB one seal and one\n\
         open (AES-128-GCM) are added, which makes it the floor of a mesh in user space."
    );
}

/// Writes `results.json` into `folder`.
pub(crate) fn write(folder: &Path, rows: &[Row], notes: &Value) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let table: Vec<Value> = rows.iter().map(json_of).collect();
    let results = json!({ "rows": table, "notes": notes });
    Ok(std::fs::write(folder.join("results.json"), serde_json::to_vec_pretty(&results)?)?)
}

fn json_of(row: &Row) -> Value {
    let ways: serde_json::Map<String, Value> = row
        .samples
        .iter()
        .map(|(name, values)| {
            ((*name).to_owned(), json!({ "median": row.median(name), "rounds": values }))
        })
        .collect();
    json!({
        "group": row.group, "row": row.name, "unit": row.unit,
        "more_is_better": row.more_is_better, "ways": ways,
        "culvert_to_stock": row.ratio(CULVERT, STOCK).map(|ratio| ratio.median),
        "culvert_to_ztunnel": row.ratio(CULVERT, ZTUNNEL).map(|ratio| ratio.median),
        "culvert_to_relay": row.ratio(CULVERT, RELAY).map(|ratio| ratio.median),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_ratios() {
        let mut row = Row::new("group", "row", "s", false);
        for (culvert, stock) in [(1.0, 2.0), (4.0, 5.0), (9.0, 10.0)] {
            row.push(CULVERT, Some(culvert));
            row.push(STOCK, Some(stock));
        }
        let ratio = row.ratio(CULVERT, STOCK).unwrap();
        assert_eq!(ratio, Ratio { median: 0.8, least: 0.5, most: 0.9 });
        assert!(row.is_better(ratio.median));
        assert_eq!(row.median(CULVERT), Some(4.0));
        assert_eq!(row.ratio(CULVERT, PLAIN), None);
    }

    #[test]
    fn a_median_of_two_lies_between_them() {
        assert_eq!(median(&[1.0, 3.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn values_that_are_none_are_left_out() {
        let mut row = Row::new("group", "row", "s", true);
        row.push(PLAIN, None);
        row.push(PLAIN, Some(f64::NAN));
        assert_eq!(row.median(PLAIN), None);
    }
}

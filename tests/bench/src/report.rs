//! The table, the JSON and the chart.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

/// One row: what was measured, in which unit, and whether more is better.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) more_is_better: bool,
    /// Variant name and its values, one per round.
    pub(crate) variants: Vec<(&'static str, Vec<f64>)>,
}

impl Row {
    /// The median of a variant's rounds.
    pub(crate) fn median(&self, variant: &str) -> Option<f64> {
        let (_name, values) = self.variants.iter().find(|(name, _)| *name == variant)?;
        let mut sorted: Vec<f64> =
            values.iter().copied().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }

    /// How far the rounds of a variant lie apart: (max − min) / median.
    fn spread(&self, variant: &str) -> Option<f64> {
        let (_name, values) = self.variants.iter().find(|(name, _)| *name == variant)?;
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some((high - low) / self.median(variant)?)
    }
}

/// Prints the table to standard output.
pub(crate) fn print(rows: &[Row]) {
    println!(
        "{:44} {:10} {:>12} {:>12} {:>12} {:>16}",
        "", "unit", "plain", "stock", "culvert", "culvert/stock"
    );
    for row in rows {
        let cell = |variant: &str| {
            row.median(variant).map_or_else(
                || "-".to_owned(),
                |value| {
                    let spread = row.spread(variant).unwrap_or_default() * 100.0;
                    format!("{value:.2} ±{spread:.0}%")
                },
            )
        };
        let ratio = match (row.median("culvert"), row.median("stock")) {
            (Some(culvert), Some(stock)) if stock > 0.0 => {
                let better = (culvert > stock) == row.more_is_better;
                format!("{:.2} {}", culvert / stock, if better { "better" } else { "worse" })
            }
            (Some(_) | None, Some(_) | None) => "-".to_owned(),
        };
        println!(
            "{:44} {:10} {:>12} {:>12} {:>12} {:>16}",
            row.name,
            row.unit,
            cell("plain"),
            cell("stock"),
            cell("culvert"),
            ratio
        );
    }
}

/// Writes `results.json` and `results.svg` into `folder`.
pub(crate) fn write(folder: &Path, rows: &[Row], notes: &Value) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let table: Vec<Value> = rows
        .iter()
        .map(|row| {
            let variants: serde_json::Map<String, Value> = row
                .variants
                .iter()
                .map(|(name, values)| {
                    ((*name).to_owned(), json!({ "median": row.median(name), "rounds": values }))
                })
                .collect();
            json!({ "row": row.name, "unit": row.unit, "more_is_better": row.more_is_better, "variants": variants })
        })
        .collect();
    let results = json!({ "rows": table, "notes": notes });
    std::fs::write(folder.join("results.json"), serde_json::to_vec_pretty(&results)?)?;
    std::fs::write(folder.join("results.svg"), chart(rows))?;
    println!("written: {0}/results.json, {0}/results.svg", folder.display());
    Ok(())
}

/// Bars of every row relative to the stock relay, whose bar is 1.
fn chart(rows: &[Row]) -> String {
    const LINE: usize = 54;
    const LEFT: f64 = 330.0;
    const UNIT: f64 = 180.0;
    let height = rows.len() * LINE + 30;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"900\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n"
    );
    for (index, row) in rows.iter().enumerate() {
        let top = index * LINE + 20;
        let direction = if row.more_is_better { "more is better" } else { "less is better" };
        append(
            &mut svg,
            format_args!("<text x=\"8\" y=\"{}\">{} ({direction})</text>\n", top + 16, row.name),
        );
        let Some(stock) = row.median("stock").filter(|stock| *stock > 0.0) else { continue };
        for (line, (variant, colour)) in
            [("plain", "#bbb"), ("stock", "#c77"), ("culvert", "#386")].into_iter().enumerate()
        {
            let Some(value) = row.median(variant) else { continue };
            let width = (value / stock * UNIT).min(480.0);
            let y = top + line * 15;
            append(
                &mut svg,
                format_args!(
                    "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"12\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\">{variant} {value:.2} {}</text>\n",
                    LEFT + width + 6.0,
                    y + 11,
                    row.unit
                ),
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn append(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a String cannot fail");
}

//! The chart: every row relative to the stock relay, whose bar has the length 1.

use std::fmt::Write as _;

use crate::report::{Row, short};
use crate::topology::{CULVERT, PLAIN, RELAY, STOCK};

const BARS: &[(&str, &str)] =
    &[(PLAIN, "#c8ccd0"), (RELAY, "#9aa4ae"), (STOCK, "#c98a5b"), (CULVERT, "#1f7a5a")];
const WIDTH: f64 = 960.0;
const LEFT: f64 = 330.0;
/// Length of the stock relay's bar.
const UNIT: f64 = 150.0;
/// No bar is longer; the number behind it says the value.
const LONGEST: f64 = 480.0;
const BAR: usize = 13;
const HEADING: usize = 34;

/// Draws the rows that have a stock relay to be compared with.
pub(crate) fn draw(rows: &[Row]) -> String {
    let rows: Vec<&Row> =
        rows.iter().filter(|row| row.median(STOCK).is_some_and(|stock| stock > 0.0)).collect();
    let mut body = String::new();
    let (mut top, mut group) = (HEADING, "");
    for row in &rows {
        if row.group != group {
            group = row.group;
            append(
                &mut body,
                format_args!(
                    "<text x=\"8\" y=\"{}\" font-weight=\"bold\" font-size=\"14\">{group}</text>\n",
                    top + 18
                ),
            );
            top += HEADING;
        }
        top = draw_row(&mut body, row, top);
    }
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        top + 8
    );
    let mut x = LEFT;
    for (way, colour) in BARS {
        append(
            &mut svg,
            format_args!(
                "<rect x=\"{x}\" y=\"12\" width=\"11\" height=\"11\" fill=\"{colour}\"/><text x=\"{}\" y=\"22\">{way}</text>\n",
                x + 16.0
            ),
        );
        x += 90.0;
    }
    svg.push_str(&body);
    svg.push_str("</svg>\n");
    svg
}

fn draw_row(svg: &mut String, row: &Row, top: usize) -> usize {
    let direction = if row.more_is_better { "more is better" } else { "less is better" };
    append(
        svg,
        format_args!(
            "<text x=\"8\" y=\"{}\">{}</text><text x=\"8\" y=\"{}\" fill=\"#667\">{}, {direction}</text>\n",
            top + 12,
            row.name,
            top + 26,
            row.unit
        ),
    );
    let stock = row.median(STOCK).unwrap_or(1.0);
    let mut y = top;
    for (way, colour) in BARS {
        let Some(value) = row.median(way) else { continue };
        let width = (value / stock * UNIT).clamp(1.0, LONGEST);
        append(
            svg,
            format_args!(
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"11\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\">{}</text>\n",
                LEFT + width + 6.0,
                y + 10,
                short(value)
            ),
        );
        y += BAR;
    }
    y.max(top + 2 * BAR) + 10
}

fn append(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a String cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rows_with_a_stock_relay_are_drawn_and_bars_are_relative_to_it() {
        let mut compared = Row::new("across nodes", "compared", "s", false);
        compared.push(STOCK, Some(2.0));
        compared.push(CULVERT, Some(1.0));
        let mut alone = Row::new("at rest", "alone", "s", false);
        alone.push(CULVERT, Some(1.0));
        let svg = draw(&[compared, alone]);
        assert!(svg.contains("compared") && !svg.contains("alone"));
        assert!(svg.contains("width=\"150.0\"") && svg.contains("width=\"75.0\""));
    }
}

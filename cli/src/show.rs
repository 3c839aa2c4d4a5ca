//! Output: tables and sentences for people, the server's own bytes for programs.

use std::io::{self, Write as _};

use comfy_table::{CellAlignment, Table, presets};

use crate::failure::Failure;

/// Writes text to standard output, each control character made visible: names come from other machines, and a
/// terminal obeys them.
///
/// # Errors
/// [`Failure::Output`].
pub(crate) fn text(text: &str) -> Result<(), Failure> {
    raw(plain(text).as_bytes())
}

/// Says something beside the answer, on standard error.
pub(crate) fn remark(text: &str) {
    match io::stderr().write_all(plain(text).as_bytes()) {
        // Nobody reads it; the answer does not depend on it.
        Ok(()) | Err(_) => {}
    }
}

/// Writes bytes as they are.
///
/// # Errors
/// [`Failure::Output`].
pub(crate) fn raw(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Writes a value as indented JSON.
///
/// # Errors
/// [`Failure::Output`].
pub(crate) fn json<T: serde::Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    let mut json = serde_json::to_vec_pretty(value)
        .map_err(|error| Failure::Output(io::Error::other(error)))?;
    json.push(b'\n');
    raw(&json)
}

/// Text without control characters other than tabs and line ends.
pub(crate) fn plain(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && !matches!(c, '\n' | '\t') {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// A table without lines: columns two spaces apart, as kubectl has them.
pub(crate) struct Columns {
    table: Table,
}

impl Columns {
    /// A table with these headings; those that begin with `>` stand over numbers.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(headings.iter().map(|heading| heading.trim_start_matches('>')));
        for (index, heading) in headings.iter().enumerate() {
            if let Some(column) = table.column_mut(index) {
                column.set_padding((0, 2));
                if heading.starts_with('>') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        Self { table }
    }

    /// One more row; empty cells show as `-`.
    pub(crate) fn row<I>(&mut self, cells: I)
    where
        I: IntoIterator<Item = String>,
    {
        let cells = cells.into_iter().map(|cell| {
            let one_line: String = plain(&cell)
                .chars()
                .map(|c| if matches!(c, '\n' | '\t') { ' ' } else { c })
                .collect();
            if one_line.is_empty() { "-".to_owned() } else { one_line }
        });
        self.table.add_row(cells);
    }

    /// The table's text, without blanks at line ends.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        for line in self.table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `n thing` or `n things`.
pub(crate) fn count(number: usize, thing: &str) -> String {
    if number == 1 { format!("1 {thing}") } else { format!("{number} {thing}s") }
}

/// A span of time in its two largest units, such as `2h 5m`.
pub(crate) fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        (_, _, _) => format!("{days}d {hours}h"),
    }
}

/// A number of bytes in the largest binary unit in which it is at least 1, with one decimal.
pub(crate) fn bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut whole, mut tenth, mut unit) = (bytes, 0, "B");
    for larger in units {
        if whole < 1024 {
            break;
        }
        (tenth, whole, unit) = (whole % 1024 * 10 / 1024, whole / 1024, larger);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{whole}.{tenth} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_in_their_unit() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1024 * 1024 - 1, "1023.9 KiB"),
            (5 * 1024 * 1024, "5.0 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn spans_are_told_in_two_units() {
        for (seconds, text) in
            [(0, "0s"), (59, "59s"), (61, "1m 1s"), (7_500, "2h 5m"), (90_000, "1d 1h")]
        {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn a_terminal_is_never_told_what_to_do() {
        assert_eq!(plain("a\x1b[2J\tb\r\n"), "a\u{fffd}[2J\tb\u{fffd}\n");
        let mut columns = Columns::new(&["NAME", ">SIZE"]);
        columns.row(["a\x1b\nb".to_owned(), String::new()]);
        assert_eq!(columns.render(), "NAME  SIZE\na\u{fffd} b     -\n");
    }
}

//! Tables for people, JSON and YAML for programs.

use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;

use super::Failure;
use super::yaml;
use crate::cluster::fault::Fault;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    Table,
    /// Stable: fields are added, never renamed
    Json,
    /// The same fields as JSON
    Yaml,
}

/// Prints `value` as the format says; `text` makes the form for people.
pub(super) fn print<T: Serialize>(
    format: Format,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    let text = match format {
        Format::Table => text(value),
        Format::Json => serde_json::to_string_pretty(value).map_err(unprintable)? + "\n",
        Format::Yaml => yaml::emit(&serde_json::to_value(value).map_err(unprintable)?),
    };
    Ok(write(&text)?)
}

fn unprintable(error: serde_json::Error) -> Failure {
    Failure::Fault(Fault::internal(format!("cannot print the answer: {error}")))
}

/// Writes to standard output, now.
pub(super) fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Two spaces between columns: no cell of ours has that many in a row, unless it is the last.
const GAP: &str = "  ";

/// A table with aligned columns.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(super) fn new(headings: &[&str]) -> Self {
        Self {
            rows: vec![headings.iter().map(ToString::to_string).collect()],
        }
    }

    /// Adds a row, one cell a heading.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The text, each line without trailing spaces.
    pub(super) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |i: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(i));
            cells.map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            out += cells.join(GAP).trim_end();
            out.push('\n');
        }
        out
    }
}

/// `name: value` lines with aligned values.
pub(super) fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(k, _)| k.len()).max().unwrap_or(0) + 1;
    pairs
        .iter()
        .map(|(key, value)| {
            let key = format!("{key}:");
            format!("{key:<width$} {value}").trim_end().to_string() + "\n"
        })
        .collect()
}

/// `-` for nothing.
pub(super) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.into()
}

/// `k=v,k=v`.
pub(super) fn show_labels(labels: &crate::cluster::model::Labels) -> String {
    let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    or_dash(&pairs.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["NAME", "SIZE", "WHY"]);
        table.row(vec!["a-long-name".into(), "1 GiB".into(), String::new()]);
        table.row(vec!["b".into(), "10 GiB".into(), "x".into()]);
        assert_eq!(
            table.text(),
            "NAME         SIZE    WHY\na-long-name  1 GiB\nb            10 GiB  x\n"
        );
        assert_eq!(
            fields(&[("A", "1".into()), ("Long", String::new())]),
            "A:    1\nLong:\n"
        );
    }
}

//! Output: tables for people, JSON for programs.

use std::io::{self, Write};
use std::time::SystemTime;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::failure::Failure;

/// A table without lines: a heading, and a row for each thing.
pub(crate) fn table<const N: usize>(heading: [&str; N], rows: Vec<[String; N]>) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(heading);
    table.add_rows(rows.into_iter().map(|row| row.map(|cell| printable(&cell))));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().into()).collect();
    lines.join("\n") + "\n"
}

/// A text of others, without what a terminal could take for a command.
pub(crate) fn printable(text: &str) -> String {
    let visible = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(visible).collect()
}

/// What is absent is shown as a dash.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// The name that a value has in the interface's JSON.
pub(crate) fn name<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => "?".into(),
    }
}

/// How long ago something was, for people, from its RFC 3339.
pub(crate) fn age(since: &str) -> String {
    let then = humantime::parse_rfc3339_weak(since);
    let ago = then
        .ok()
        .and_then(|t| SystemTime::now().duration_since(t).ok());
    let Some(seconds) = ago.map(|ago| ago.as_secs()) else {
        return "-".into();
    };
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Prints a text.
pub(crate) fn text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints a JSON document.
pub(crate) fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    text(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Prints one JSON document on one line.
pub(crate) fn json_line<T: Serialize>(value: &T) -> Result<(), Failure> {
    text(&(serde_json::to_string(value)? + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_aligned_columns_and_no_trailing_blanks() {
        let rows = vec![["disk0".into(), "free".into()], ["x".into(), "-".into()]];

        let shown = table(["ID", "STATE"], rows);

        assert_eq!(shown, "ID     STATE\ndisk0  free\nx      -\n");
    }

    #[test]
    fn control_characters_of_others_reach_no_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }

    #[test]
    fn age_of_what_is_no_time_is_a_dash() {
        assert_eq!(age("yesterday"), "-");
    }
}

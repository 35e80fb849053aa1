//! What commands print: JSON for programs, aligned text for people.

use std::io::Write;

use serde_json::Value;

/// Form of what a command prints on standard output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON document.
    Json,
}

/// Writes to standard output. Whoever closed the other end of a pipe has seen enough.
pub(super) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    if !text.ends_with('\n') {
        let _ = out.write_all(b"\n");
    }
    let _ = out.flush();
}

/// Prints a JSON document.
pub(super) fn print_json(value: &Value) {
    print(&serde_json::to_string_pretty(value).unwrap_or_default());
}

/// Prints an object: as JSON, or a line for each field.
pub(super) fn print_object(format: Format, value: &Value) {
    match (format, value) {
        (Format::Text, Value::Object(fields)) => {
            let rows = fields.iter().map(|(name, value)| vec![name.clone(), cell(value)]).collect();
            print(&aligned(&[], rows));
        }
        _ => print_json(value),
    }
}

/// A value in a line of text.
pub(super) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Rows as aligned columns. Numbers stand to the right where a whole column is numbers.
pub(super) fn aligned(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut lines: Vec<Vec<String>> = Vec::with_capacity(rows.len() + 1);
    if !header.is_empty() {
        lines.push(header.iter().map(|name| (*name).to_owned()).collect());
    }
    lines.extend(rows);
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let body = &lines[usize::from(!header.is_empty())..];
    let shape: Vec<(usize, bool)> = (0..columns)
        .map(|column| {
            let width =
                lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max();
            let numbers = !header.is_empty()
                && body
                    .iter()
                    .filter_map(|line| line.get(column))
                    .all(|cell| cell.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-'));
            (width.unwrap_or(0), numbers)
        })
        .collect();
    let mut text = String::new();
    for line in &lines {
        let mut padded = String::new();
        for (cell, (width, number)) in line.iter().zip(&shape) {
            if !padded.is_empty() {
                padded.push_str("  ");
            }
            if *number {
                padded.push_str(&format!("{cell:>width$}"));
            } else {
                padded.push_str(&format!("{cell:<width$}"));
            }
        }
        text.push_str(padded.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_stand_to_the_right() {
        let rows = vec![vec!["a".into(), "5".into()], vec!["long".into(), "1000".into()]];
        assert_eq!(aligned(&["id", "left"], rows), "id    left\na        5\nlong  1000\n");
    }
}

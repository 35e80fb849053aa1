//! Two results beside each other.

use std::fmt::Write as _;

use crate::report::{Latency, Report};

/// What changed from one result to another, as an aligned table.
pub fn compare(before: &Report, after: &Report) -> String {
    let mut rows: Vec<[String; 4]> = vec![["".into(), "before".into(), "after".into(), "change".into()]];
    let mut row = |name: &str, before: f64, after: f64, digits: usize| {
        let change = if before == after {
            "=".to_owned()
        } else if before == 0.0 {
            "new".to_owned()
        } else {
            format!("{:+.1} %", (after / before - 1.0) * 100.0)
        };
        rows.push([name.to_owned(), format!("{before:.digits$}"), format!("{after:.digits$}"), change]);
    };
    row("arrivals per second", before.offered.rate_achieved, after.offered.rate_achieved, 0);
    row("requests", before.offered.requests as f64, after.offered.requests as f64, 0);
    row("failed", before.failed() as f64, after.failed() as f64, 0);
    let mut latency = |name: &str, before: &Latency, after: &Latency| {
        for (figure, pick) in [
            ("p50", (|l: &Latency| l.p50) as fn(&Latency) -> u64),
            ("p99", |l| l.p99),
            ("p99.9", |l| l.p99_9),
            ("max", |l| l.max),
        ] {
            row(
                &format!("{name} {figure}, ms"),
                pick(before) as f64 / 1000.0,
                pick(after) as f64 / 1000.0,
                2,
            );
        }
    };
    latency("all", &before.latency_us, &after.latency_us);
    latency("first click to accepted", &before.accepted_after_us, &after.accepted_after_us);
    let mut names: Vec<(String, String)> = Vec::new();
    for outcome in before.outcomes.iter().chain(&after.outcomes) {
        let name = (outcome.operation.clone(), outcome.code.clone());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for (operation, code) in names {
        let count = |report: &Report| {
            let same = report.outcomes.iter().find(|o| o.operation == operation && o.code == code);
            same.map_or(0.0, |outcome| outcome.requests as f64)
        };
        row(&format!("{operation} {code}"), count(before), count(after), 0);
    }
    row(
        "generator µs per request",
        before.generator.cpu_us_per_request,
        after.generator.cpu_us_per_request,
        1,
    );
    let worst = |report: &Report, pick: fn(&crate::impact::Impact) -> u64| {
        report.events.iter().filter_map(|event| event.impact.as_ref()).map(pick).max().unwrap_or(0) as f64
    };
    if !before.events.is_empty() || !after.events.is_empty() {
        row("held, ms", worst(before, |i| i.held_ms), worst(after, |i| i.held_ms), 0);
        row("error window, ms", worst(before, |i| i.error_window_ms), worst(after, |i| i.error_window_ms), 0);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    let mut out = String::new();
    for row in &rows {
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{:<w0$}  {:>w1$}  {:>w2$}  {:>w3$}",
            row[0],
            row[1],
            row[2],
            row[3],
            w0 = widths[0],
            w1 = widths[1],
            w2 = widths[2],
            w3 = widths[3]
        );
    }
    let name = |result: crate::report::Result| {
        serde_json::to_value(result)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default()
    };
    let _ = writeln!(out, "result: {} → {}", name(before.result), name(after.result));
    if before.environment.cpu != after.environment.cpu || before.environment.cores != after.environment.cores
    {
        out.push_str("note: not the same machine\n");
    }
    if !before.generator.valid || !after.generator.valid {
        out.push_str("note: a run is invalid, its figures say nothing about the target\n");
    }
    out
}

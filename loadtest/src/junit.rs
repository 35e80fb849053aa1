//! Checks and thresholds as JUnit XML, the form that CI systems show.

use std::fmt::Write as _;

use crate::report::Report;

/// Text that may stand in XML, in content and in attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(c),
            // XML 1.0 has no place for control characters, not even escaped.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// The report as a test suite: one case for the generator, one for each check and each threshold.
pub fn xml(report: &Report) -> String {
    let mut cases: Vec<(&str, String, Option<String>)> = Vec::new();
    let invalid = (!report.generator.valid).then(|| report.generator.reasons.join("; "));
    cases.push(("generator", "kept up".to_owned(), invalid));
    if let Some(books) = &report.books {
        for check in &books.checks {
            let failed = (!check.ok).then(|| {
                let named = books.violations.iter().take(20).map(|violation| violation.detail.as_str());
                let mut text = check.detail.clone();
                for detail in named {
                    let _ = write!(text, "\n{detail}");
                }
                text
            });
            cases.push(("books", check.name.clone().into_owned(), failed));
        }
        if let Some(why) = &books.unreachable {
            cases.push(("books", "reachable".to_owned(), Some(why.clone())));
        }
    }
    for judged in &report.thresholds {
        let failed = (!judged.ok).then(|| match judged.measured {
            Some(measured) => format!("measured {measured:.3}"),
            None => "the run has no such figure".to_owned(),
        });
        cases.push(("thresholds", judged.threshold.clone(), failed));
    }
    let failures = cases.iter().filter(|(.., failed)| failed.is_some()).count();
    let seconds: u64 = report.intervals.iter().map(|interval| interval.seconds).sum();
    let name = if report.scenario.name.is_empty() { "loadtest" } else { &report.scenario.name };
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<testsuites>\n  <testsuite name=\"{}\" tests=\"{}\" failures=\"{failures}\" errors=\"0\" time=\"{seconds}\" timestamp=\"{}\">",
        escape(name),
        cases.len(),
        escape(&report.started_at),
    );
    for (class, name, failed) in cases {
        let _ = write!(out, "    <testcase classname=\"{class}\" name=\"{}\"", escape(&name));
        let _ = match failed {
            None => writeln!(out, "/>"),
            Some(text) => {
                let first = text.lines().next().unwrap_or_default().to_owned();
                writeln!(
                    out,
                    ">\n      <failure message=\"{}\">{}</failure>\n    </testcase>",
                    escape(&first),
                    escape(&text)
                )
            }
        };
    }
    out.push_str("  </testsuite>\n</testsuites>\n");
    out
}

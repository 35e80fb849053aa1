//! The result as one HTML page: plots as inline SVG, no scripts, nothing from elsewhere. Colours follow the
//! reader's light or dark scheme.

mod plot;

use std::fmt::Write as _;

use crate::junit::escape;
use crate::report::{IntervalReport, Latency, Report, Result};
use plot::{Area, Axis, Line, Plot};

/// The page.
pub fn page(report: &Report) -> String {
    let name = if report.scenario.name.is_empty() { "loadtest" } else { &report.scenario.name };
    let mut out = String::with_capacity(256 * 1024);
    // Writing to a string cannot fail, here and below.
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{} · {}</title>\n<style>{}</style>\n</head>\n<body>\n<main>\n",
        escape(name),
        escape(report.scenario.sale.as_str()),
        include_str!("html/style.css"),
    );
    head(&mut out, report, name);
    tiles(&mut out, report);
    plots(&mut out, report);
    events(&mut out, report);
    thresholds(&mut out, report);
    outcomes(&mut out, report);
    books(&mut out, report);
    about(&mut out, report);
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn head(out: &mut String, report: &Report, name: &str) {
    let (class, verdict) = match report.result {
        Result::Pass if report.books.is_some() => ("good", "Pass: the books balance"),
        Result::Pass => ("good", "Pass: the generator kept up (books not checked)"),
        Result::ThresholdMissed => ("bad", "Fail: a threshold does not hold"),
        Result::BooksUnbalanced => ("bad", "Fail: the books do not balance"),
        Result::Invalid => ("warn", "Invalid: the generator could not keep the rate"),
        Result::Unreachable => ("warn", "Unreachable: the books could not be checked"),
    };
    let _ = write!(
        out,
        "<header><h1>{}</h1><p class=\"sub\">sale {} · {} · seed {}</p><p class=\"verdict {class}\">{verdict}</p>",
        escape(name),
        escape(report.scenario.sale.as_str()),
        escape(report.started_at.split('.').next().unwrap_or_default()).replace('T', " "),
        report.scenario.seed
    );
    if !report.notes.is_empty() {
        out.push_str("<ul class=\"notes\">");
        for note in &report.notes {
            let _ = write!(out, "<li>{}</li>", escape(note));
        }
        out.push_str("</ul>");
    }
    out.push_str("</header>\n");
}

fn tiles(out: &mut String, report: &Report) {
    let effect =
        |effect: &str| report.outcomes.iter().filter(|o| o.effect == effect).map(|o| o.requests).sum::<u64>();
    let orders = report.books.as_ref().map_or(report.purchases.accepted, |books| books.orders);
    let tiles = [
        (
            "arrivals per second",
            count(report.offered.rate_achieved.round() as u64),
            format!("asked {:.0}", report.offered.rate_asked),
        ),
        ("requests", count(report.offered.requests), format!("{} unsent", count(report.offered.unsent))),
        ("orders", count(orders), format!("{} refused", count(effect("refused")))),
        ("failed", count(report.failed()), format!("{} of unknown fate", count(effect("unknown")))),
        ("p50", ms(report.latency_us.p50), format!("p90 {}", ms(report.latency_us.p90))),
        ("p99", ms(report.latency_us.p99), format!("p99.9 {}", ms(report.latency_us.p99_9))),
    ];
    out.push_str("<section class=\"tiles\">");
    for (name, value, under) in tiles {
        let _ =
            write!(out, "<div class=\"tile\"><span>{name}</span><b>{value}</b><small>{under}</small></div>");
    }
    out.push_str("</section>\n");
}

/// Points of a line: the middle of each stretch.
fn over_time(report: &Report, value: impl Fn(&IntervalReport) -> Option<f64>) -> Vec<(f64, f64)> {
    let middle = |interval: &IntervalReport| interval.second as f64 + interval.seconds as f64 / 2.0;
    report.intervals.iter().filter_map(|interval| Some((middle(interval), value(interval)?))).collect()
}

fn plots(out: &mut String, report: &Report) {
    let end = report.intervals.last().map_or(1.0, |last| (last.second + last.seconds) as f64).max(1.0);
    let marks: Vec<(f64, String)> =
        report.events.iter().map(|event| (event.at_ms as f64 / 1000.0, event.name.clone())).collect();
    let warmup = report.scenario.warmup.as_secs_f64();
    let time = || Axis::linear("seconds", 0.0, end);
    let per_second = |pick: fn(&IntervalReport) -> u64| -> Vec<f64> {
        report.intervals.iter().map(|interval| pick(interval) as f64 / interval.seconds as f64).collect()
    };
    let mut stacked = Vec::new();
    let mut below = vec![0.0; report.intervals.len()];
    for (name, class, pick) in [
        ("accepted", "c-accepted", (|i| i.accepted) as fn(&IntervalReport) -> u64),
        ("replayed", "c-replayed", |i| i.replayed),
        ("read, paid", "c-done", |i| i.done),
        ("refused", "c-refused", |i| i.refused),
        ("failed", "c-failed", |i| i.failed),
        ("unknown", "c-unknown", |i| i.unknown),
    ] {
        let values = per_second(pick);
        if values.iter().all(|value| *value == 0.0) {
            continue;
        }
        // Each stretch is a step as wide as it lasted.
        let points: Vec<(f64, f64, f64)> = values
            .iter()
            .zip(&mut below)
            .zip(&report.intervals)
            .flat_map(|((value, below), interval)| {
                let from = *below;
                *below += value;
                let start = interval.second as f64;
                [(start, from, *below), (start + interval.seconds as f64, from, *below)]
            })
            .collect();
        stacked.push(Area { name, class, points });
    }
    let top = below.iter().copied().fold(1.0, f64::max);
    let plot = Plot {
        title: "Throughput by outcome",
        x: time(),
        y: Axis::linear("answers per second", 0.0, top),
        areas: stacked,
        lines: Vec::new(),
        marks: &marks,
        shade: warmup,
    };
    out.push_str("<section class=\"plots\">\n");
    out.push_str(&plot.svg());

    let latency = |pick: fn(&IntervalReport) -> u64| {
        over_time(report, |interval| (!interval.hdr.is_empty()).then(|| pick(interval) as f64 / 1000.0))
    };
    let lines = vec![
        Line { name: "p50", class: "l1", points: latency(|i| i.p50_us) },
        Line { name: "p90", class: "l2", points: latency(|i| i.p90_us) },
        Line { name: "p99", class: "l3", points: latency(|i| i.p99_us) },
        Line { name: "p99.9", class: "l4", points: latency(|i| i.p99_9_us) },
    ];
    let plot = Plot {
        title: "Latency over time",
        x: time(),
        y: Axis::log("ms", &lines),
        areas: Vec::new(),
        lines,
        marks: &marks,
        shade: warmup,
    };
    out.push_str(&plot.svg());

    out.push_str(&percentiles(report));

    let stock = over_time(report, |interval| interval.stock.map(|stock| stock as f64));
    if stock.len() > 1 {
        let top = stock.iter().map(|(_, left)| *left).fold(1.0, f64::max);
        let lines = vec![Line { name: "units left", class: "l1", points: stock }];
        let plot = Plot {
            title: "Stock",
            x: time(),
            y: Axis::linear("units", 0.0, top),
            areas: Vec::new(),
            lines,
            marks: &marks,
            shade: warmup,
        };
        out.push_str(&plot.svg());
    }
    out.push_str("</section>\n");
}

/// Latency by percentile, the tail stretched: each step to the right is one nine more.
fn percentiles(report: &Report) -> String {
    let curve = |latency: &Latency| -> Vec<(f64, f64)> {
        let histogram = latency.histogram();
        let last = if latency.count > 1 { (latency.count as f64).log10() } else { 1.0 };
        let steps = 120;
        (0..=steps)
            .map(|step| {
                let nines = last * f64::from(step) / f64::from(steps);
                let quantile = 1.0 - 10f64.powf(-nines);
                (nines, histogram.value_at_quantile(quantile) as f64 / 1000.0)
            })
            .collect()
    };
    let mut lines = vec![Line { name: "all requests", class: "l3", points: curve(&report.latency_us) }];
    let accepted = report.outcomes.iter().find(|o| o.operation == "purchase" && o.code == "accepted");
    if let Some(accepted) = accepted.filter(|accepted| accepted.requests > 1) {
        lines.push(Line { name: "accepted", class: "l1", points: curve(&accepted.latency_us) });
    }
    if report.accepted_after_us.count > 1 && report.offered.retries > 0 {
        lines.push(Line {
            name: "first click to accepted",
            class: "l2",
            points: curve(&report.accepted_after_us),
        });
    }
    let end = lines.iter().flat_map(|line| &line.points).map(|(x, _)| *x).fold(1.0, f64::max);
    let y = Axis::log("ms", &lines);
    Plot {
        title: "Latency by percentile",
        x: Axis::nines(end),
        y,
        areas: Vec::new(),
        lines,
        marks: &[],
        shade: 0.0,
    }
    .svg()
}

fn events(out: &mut String, report: &Report) {
    if report.events.is_empty() {
        return;
    }
    out.push_str(
        "<section><h2>Events</h2><table><thead><tr><th class=\"n\">at</th><th>what</th><th class=\"n\">took</th><th class=\"n\">held</th>\
         <th class=\"n\">recovered after</th><th class=\"n\">errors</th><th class=\"n\">error window</th></tr></thead><tbody>",
    );
    for event in &report.events {
        let impact = event.impact.unwrap_or_default();
        let recovered = impact.recovery_ms.map_or_else(|| "not".to_owned(), |ms| format!("{ms} ms"));
        let ok = if event.ok { "" } else { " <b class=\"bad\">failed</b>" };
        let _ = write!(
            out,
            "<tr><td class=\"n\">{:.1} s</td><td><code>{}</code>{ok}</td><td class=\"n\">{} ms</td><td class=\"n\">{} ms</td>\
             <td class=\"n\">{recovered}</td><td class=\"n\">{}</td><td class=\"n\">{} ms</td></tr>",
            event.at_ms as f64 / 1000.0,
            escape(&event.name),
            event.took_ms,
            impact.held_ms,
            count(impact.errors),
            impact.error_window_ms
        );
    }
    out.push_str("</tbody></table></section>\n");
}

fn verdict(ok: bool) -> &'static str {
    if ok { "<b class=\"good\">✓</b>" } else { "<b class=\"bad\">✗</b>" }
}

fn thresholds(out: &mut String, report: &Report) {
    if report.thresholds.is_empty() {
        return;
    }
    out.push_str("<section><h2>Thresholds</h2><table><thead><tr><th></th><th>what has to hold</th><th class=\"n\">measured</th></tr></thead><tbody>");
    for judged in &report.thresholds {
        let measured = judged.measured.map_or_else(|| "nothing".to_owned(), |value| format!("{value:.3}"));
        let _ = write!(
            out,
            "<tr><td>{}</td><td><code>{}</code></td><td class=\"n\">{measured}</td></tr>",
            verdict(judged.ok),
            escape(&judged.threshold)
        );
    }
    out.push_str("</tbody></table></section>\n");
}

fn outcomes(out: &mut String, report: &Report) {
    out.push_str(
        "<section><h2>Outcomes</h2><div class=\"wide\"><table><thead><tr><th>operation</th><th>outcome</th><th>effect</th><th class=\"n\">requests</th>\
         <th class=\"n\">p50</th><th class=\"n\">p90</th><th class=\"n\">p99</th><th class=\"n\">p99.9</th><th class=\"n\">max</th></tr></thead><tbody>",
    );
    for outcome in &report.outcomes {
        let failed = if outcome.failed { " class=\"bad\"" } else { "" };
        let _ = write!(
            out,
            "<tr><td>{}</td><td{failed}>{}</td><td>{}</td><td class=\"n\">{}</td>",
            escape(&outcome.operation),
            escape(&outcome.code),
            outcome.effect,
            count(outcome.requests)
        );
        latency_cells(out, &outcome.latency_us);
    }
    let _ = write!(
        out,
        "<tr class=\"sum\"><td>all</td><td></td><td></td><td class=\"n\">{}</td>",
        count(report.latency_us.count)
    );
    latency_cells(out, &report.latency_us);
    let first = &report.accepted_after_us;
    let _ = write!(
        out,
        "<tr><td>first click to accepted</td><td></td><td></td><td class=\"n\">{}</td>",
        count(first.count)
    );
    latency_cells(out, first);
    out.push_str("</tbody></table></div></section>\n");
}

fn latency_cells(out: &mut String, latency: &Latency) {
    for us in [latency.p50, latency.p90, latency.p99, latency.p99_9, latency.max] {
        let text = if latency.count == 0 { String::new() } else { ms(us) };
        let _ = write!(out, "<td class=\"n\">{text}</td>");
    }
    out.push_str("</tr>");
}

fn books(out: &mut String, report: &Report) {
    let Some(books) = &report.books else { return };
    out.push_str("<section><h2>The books</h2>");
    for sale in &books.sales {
        let Some(after) = &sale.after else { continue };
        let _ = write!(
            out,
            "<p><code>{}</code>: {} on offer = {} remaining + {} held by buyers; {} given back; {} orders</p>",
            escape(&sale.sale_id),
            after.total,
            after.remaining,
            after.claimed,
            after.released,
            count(sale.orders)
        );
    }
    out.push_str("<table><tbody>");
    for check in &books.checks {
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td></tr>",
            verdict(check.ok),
            escape(&check.name.replace('_', " ")),
            escape(&check.detail)
        );
    }
    out.push_str("</tbody></table>");
    if !books.violations.is_empty() {
        let _ = write!(out, "<h3>{} violations</h3><ol class=\"violations\">", count(books.violation_count));
        for violation in &books.violations {
            let _ = write!(
                out,
                "<li><code>{}</code> {}</li>",
                escape(&violation.code),
                escape(&violation.detail)
            );
        }
        out.push_str("</ol>");
    }
    out.push_str("</section>\n");
}

fn about(out: &mut String, report: &Report) {
    let (environment, generator) = (&report.environment, &report.generator);
    let busy: Vec<String> =
        generator.workers.iter().map(|worker| format!("{:.0} %", worker.busy * 100.0)).collect();
    let skew = &report.offered.skew_us;
    let rows = [
        (
            "machine",
            format!(
                "{} · {} cores · {} · {} GB · load average {}",
                environment.cpu,
                environment.cores,
                environment.kernel,
                environment.memory_bytes >> 30,
                environment.load_average
            ),
        ),
        (
            "version",
            format!(
                "{} · commit {}",
                environment.loadtest_version,
                environment.commit.as_deref().unwrap_or("unknown")
            ),
        ),
        ("targets", report.scenario.targets.join(", ")),
        (
            "generator",
            format!(
                "{} processes, {} workers, busy {}; {:.1} µs of CPU per request; {} connections at most, {} failed to connect; {} MB of memory at most",
                generator.processes,
                generator.workers.len(),
                busy.join(" "),
                generator.cpu_us_per_request,
                count(generator.connections_peak),
                generator.connect_errors,
                generator.peak_rss_bytes >> 20
            ),
        ),
        (
            "punctuality",
            format!(
                "arrivals noticed late by p99 {}; sent late by p50 {}, p99 {}, max {}; {:.2} % sent in time",
                ms(generator.lag_us.p99),
                ms(skew.p50),
                ms(skew.p99),
                ms(skew.max),
                generator.sent_in_time * 100.0
            ),
        ),
        (
            "beside it",
            format!(
                "{} duplicates, {} second purchases, {} retries, {} later steps",
                count(report.offered.duplicates),
                count(report.offered.second_purchases),
                count(report.offered.retries),
                count(report.offered.journey)
            ),
        ),
    ];
    out.push_str("<section><h2>How it was measured</h2><p>Latency counts from the time a request was meant to be sent, whatever it waited for.</p><table><tbody>");
    for (name, text) in rows {
        let _ = write!(out, "<tr><td>{name}</td><td>{}</td></tr>", escape(&text));
    }
    out.push_str("</tbody></table></section>\n");
}

/// A count with its thousands apart.
fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// Microseconds as a time that is short to read.
fn ms(us: u64) -> String {
    match us {
        0..1000 => format!("{us} µs"),
        1000..10_000 => format!("{:.2} ms", us as f64 / 1e3),
        10_000..100_000 => format!("{:.1} ms", us as f64 / 1e3),
        100_000..10_000_000 => format!("{:.0} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!(count(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(count(999), "999");
        assert_eq!((ms(999), ms(1500), ms(2_000_000)), ("999 µs".into(), "1.50 ms".into(), "2000 ms".into()));
    }
}

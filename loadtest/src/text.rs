//! The report for a person: an aligned table.

use std::fmt::{self, Display, Formatter};

use crate::report::{Latency, Report, Result};

/// Violations that are printed; the JSON form has more.
const VIOLATIONS_SHOWN: usize = 20;

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (offered, generator) = (&self.offered, &self.generator);
        writeln!(
            f,
            "sale {}  seed {}  buyers {}…  {} · {} cores · {}",
            self.scenario.sale,
            self.scenario.seed,
            self.scenario.uid_prefix.as_deref().unwrap_or_default(),
            self.environment.cpu,
            self.environment.cores,
            self.environment.kernel,
        )?;
        writeln!(
            f,
            "offered   {} arrivals at {:.0}/s (asked {:.0}/s), {} unsent; {} requests: {} duplicates, {} second purchases, {} retries, {} later steps; send skew p50 {} ms, p99 {} ms",
            offered.arrivals,
            offered.rate_achieved,
            offered.rate_asked,
            offered.unsent,
            offered.requests,
            offered.duplicates,
            offered.second_purchases,
            offered.retries,
            offered.journey,
            ms(offered.skew_us.p50),
            ms(offered.skew_us.p99),
        )?;
        writeln!(
            f,
            "generator {:.1} µs CPU per request, lag p99 {} ms, busy {}, {} connections (peak), {} MB of memory (peak)",
            generator.cpu_us_per_request,
            ms(generator.lag_us.p99),
            generator
                .workers
                .iter()
                .map(|w| format!("{:.0} %", w.busy * 100.0))
                .collect::<Vec<_>>()
                .join(" "),
            generator.connections_peak,
            generator.peak_rss_bytes >> 20,
        )?;
        let warm: u64 = self.warmup.iter().map(|outcome| outcome.requests).sum();
        if warm > 0 {
            writeln!(f, "warm-up   {warm} requests, not in the figures below")?;
        }
        writeln!(f, "\n{:<24} {:<9} {:>10}{}", "outcome", "effect", "requests", LATENCY_HEAD)?;
        for outcome in &self.outcomes {
            let name = if outcome.operation == "purchase" {
                outcome.code.clone()
            } else {
                format!("{} {}", outcome.operation, outcome.code)
            };
            writeln!(
                f,
                "{name:<24} {:<9} {:>10}{}",
                outcome.effect,
                outcome.requests,
                columns(&outcome.latency_us)
            )?;
        }
        writeln!(f, "{:<24} {:<9} {:>10}{}", "all", "", self.latency_us.count, columns(&self.latency_us))?;
        writeln!(
            f,
            "{:<24} {:<9} {:>10}{}",
            "first click to accepted",
            "",
            self.accepted_after_us.count,
            columns(&self.accepted_after_us)
        )?;
        self.events(f)?;
        self.books(f)?;
        if !self.thresholds.is_empty() {
            writeln!(f)?;
        }
        for judged in &self.thresholds {
            let measured =
                judged.measured.map_or_else(|| "nothing".to_owned(), |value| format!("{value:.3}"));
            let ok = if judged.ok { "ok" } else { "FAIL" };
            writeln!(f, "  {ok:<4} {:<34} measured {measured}", judged.threshold)?;
        }
        writeln!(f)?;
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        let text = match self.result {
            Result::Pass if self.books.is_some() => "PASS: the books balance",
            Result::Pass => "PASS: the generator kept up (books not checked)",
            Result::ThresholdMissed => "FAIL: a threshold does not hold",
            Result::BooksUnbalanced => "FAIL: the books do not balance",
            Result::Invalid => {
                "INVALID: the generator could not keep the rate, the figures say nothing about the target"
            }
            Result::Unreachable => "UNREACHABLE: the books could not be checked",
        };
        writeln!(f, "{text}")
    }
}

impl Report {
    fn events(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for event in &self.events {
            let at = event.at_ms as f64 / 1000.0;
            let ok = if event.ok { "" } else { " FAILED" };
            write!(f, "\nevent     {at:.1} s: {}{ok} ({} ms)", event.name, event.took_ms)?;
            if let Some(impact) = &event.impact {
                let recovery = impact
                    .recovery_ms
                    .map_or_else(|| "not recovered".to_owned(), |ms| format!("recovered after {ms} ms"));
                write!(
                    f,
                    ": held {} ms, {recovery}, {} errors within {} ms",
                    impact.held_ms, impact.errors, impact.error_window_ms
                )?;
            }
        }
        if self.events.is_empty() { Ok(()) } else { writeln!(f) }
    }

    fn books(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Some(books) = &self.books else { return Ok(()) };
        writeln!(
            f,
            "\nbooks     {} orders in {} purchases; {} unknown: {} accepted, {} refused, {} unresolved; stored after {:.1} s",
            books.orders,
            self.purchases.total,
            books.unknown,
            books.unknown_accepted,
            books.unknown_refused,
            books.unknown_unresolved,
            books.drain_ms as f64 / 1000.0,
        )?;
        for sale in &books.sales {
            let Some(after) = &sale.after else { continue };
            writeln!(
                f,
                "ledger    {}: total {} = remaining {} + claimed {}; {} released, {} in flight",
                sale.sale_id, after.total, after.remaining, after.claimed, after.released, after.in_flight
            )?;
        }
        if books.payments + books.cancellations > 0 {
            writeln!(
                f,
                "orders    {} paid, {} cancelled by their buyers",
                books.payments, books.cancellations
            )?;
        }
        for check in &books.checks {
            writeln!(f, "  {:<4} {:<34} {}", if check.ok { "ok" } else { "FAIL" }, check.name, check.detail)?;
        }
        if books.violation_count > 0 {
            writeln!(f, "violations: {}", books.violation_count)?;
        }
        for violation in books.violations.iter().take(VIOLATIONS_SHOWN) {
            writeln!(f, "  {}: {}", violation.code, violation.detail)?;
        }
        if books.violation_count > VIOLATIONS_SHOWN as u64 {
            writeln!(f, "  … {} more", books.violation_count - VIOLATIONS_SHOWN as u64)?;
        }
        Ok(())
    }
}

const LATENCY_HEAD: &str = "   p50 ms     p90 ms     p99 ms   p99.9 ms     max ms";

fn columns(latency: &Latency) -> String {
    [latency.p50, latency.p90, latency.p99, latency.p99_9, latency.max]
        .map(|us| format!("{:>9}", ms(us)))
        .join("  ")
}

fn ms(us: u64) -> String {
    format!("{:.2}", us as f64 / 1000.0)
}

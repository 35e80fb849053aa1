//! What has to hold for a run to pass: `p99 < 50ms`, `failed == 0`, `held < 1s`.

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::report::{Latency, Report};
use crate::stats::{add, histogram};

/// A bound on one figure of the report.
#[derive(Debug, Clone, PartialEq)]
pub struct Threshold {
    text: String,
    metric: Metric,
    compare: Compare,
    /// Milliseconds for times.
    value: f64,
}

#[derive(Debug, Clone, PartialEq)]
enum Metric {
    /// A percentile (0 to 100) of the latency of a scope.
    Percentile(Scope, f64),
    Max(Scope),
    Mean(Scope),
    Count(Scope),
    Failed,
    FailedShare,
    Effect(&'static str),
    Requests,
    Rate,
    Skew,
    Held,
    Recovery,
    ErrorWindow,
    Errors,
}

/// Which requests.
#[derive(Debug, Clone, PartialEq)]
enum Scope {
    All,
    /// One operation or one code.
    Named(String),
    /// From the first click to the acceptance.
    FirstClick,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Compare {
    Less,
    AtMost,
    More,
    AtLeast,
    Equal,
    NotEqual,
}

/// A threshold held against a report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// As it was written.
    pub threshold: String,
    /// It holds.
    pub ok: bool,
    /// What was measured, in milliseconds where it is a time; `null`: the run has no such figure.
    pub measured: Option<f64>,
}

const USAGE: &str = "a threshold is FIGURE < VALUE (or <=, >, >=, ==, !=); figures: p50, p99, p99.9 … max, mean \
     (with a time), also of one operation or outcome (accepted.p99, read_sale.max) or first_click.p99; \
     failed, failed_share, accepted, refused, unknown, unsent, requests, rate, errors, OUTCOME.count; \
     held, recovery, error_window, skew (with a time)";

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Threshold, String> {
        let at = text.find(['<', '>', '=', '!']).ok_or(USAGE)?;
        let (name, rest) = (text[..at].trim(), &text[at..]);
        let (compare, value) = [
            ("<=", Compare::AtMost),
            (">=", Compare::AtLeast),
            ("==", Compare::Equal),
            ("!=", Compare::NotEqual),
            ("<", Compare::Less),
            (">", Compare::More),
        ]
        .into_iter()
        .find_map(|(sign, compare)| Some((compare, rest.strip_prefix(sign)?.trim())))
        .ok_or(USAGE)?;
        let metric = Metric::read(name).ok_or_else(|| format!("{name:?} is no figure: {USAGE}"))?;
        let value = if metric.is_time() { milliseconds(value) } else { value.parse().ok() };
        let value = value.filter(|value: &f64| value.is_finite()).ok_or_else(|| {
            let kind = if metric.is_time() { "a time with a unit (us, ms, s, m)" } else { "a number" };
            format!("{text:?}: {name} is compared with {kind}")
        })?;
        Ok(Threshold { text: text.trim().to_owned(), metric, compare, value })
    }
}

fn milliseconds(text: &str) -> Option<f64> {
    let digits = text.trim_end_matches(|c: char| c.is_alphabetic());
    let scale = match text[digits.len()..].trim() {
        "us" | "µs" => 0.001,
        "ms" => 1.0,
        "s" => 1000.0,
        "m" => 60_000.0,
        _ => return None,
    };
    digits.trim().parse::<f64>().ok().map(|number| number * scale)
}

impl Metric {
    fn read(name: &str) -> Option<Metric> {
        let plain = match name {
            "failed" => Some(Metric::Failed),
            "failed_share" => Some(Metric::FailedShare),
            "accepted" | "refused" | "unknown" | "unsent" => ["accepted", "refused", "unknown", "unsent"]
                .into_iter()
                .find(|effect| *effect == name)
                .map(Metric::Effect),
            "requests" => Some(Metric::Requests),
            "rate" => Some(Metric::Rate),
            "skew" => Some(Metric::Skew),
            "held" => Some(Metric::Held),
            "recovery" => Some(Metric::Recovery),
            "error_window" => Some(Metric::ErrorWindow),
            "errors" => Some(Metric::Errors),
            _ => None,
        };
        if plain.is_some() {
            return plain;
        }
        // The scope is what stands before the first dot, unless that is the point of a percentile.
        let (scope, figure) = match name.split_once('.') {
            Some((scope, figure)) if percentile(scope).is_none() => {
                let named = scope.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
                if !named || scope.is_empty() {
                    return None;
                }
                let scope =
                    if scope == "first_click" { Scope::FirstClick } else { Scope::Named(scope.to_owned()) };
                (scope, figure)
            }
            _ => (Scope::All, name),
        };
        match figure {
            "max" => Some(Metric::Max(scope)),
            "mean" => Some(Metric::Mean(scope)),
            "count" if scope != Scope::All => Some(Metric::Count(scope)),
            _ => percentile(figure).map(|percent| Metric::Percentile(scope, percent)),
        }
    }

    fn is_time(&self) -> bool {
        match self {
            Metric::Percentile(..)
            | Metric::Max(_)
            | Metric::Mean(_)
            | Metric::Skew
            | Metric::Held
            | Metric::Recovery
            | Metric::ErrorWindow => true,
            Metric::Count(_)
            | Metric::Failed
            | Metric::FailedShare
            | Metric::Effect(_)
            | Metric::Requests
            | Metric::Rate
            | Metric::Errors => false,
        }
    }
}

/// `p99.9` and `p99_9`: 99.9.
fn percentile(text: &str) -> Option<f64> {
    let digits = text.strip_prefix('p')?.replace('_', ".");
    if !digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return None;
    }
    digits.parse().ok().filter(|percent| (0.0..=100.0).contains(percent))
}

impl Threshold {
    /// Holds it against a report. What the report does not have does not hold.
    pub fn judge(&self, report: &Report) -> Judged {
        let measured = self.measure(report);
        let ok = measured.is_some_and(|measured| match self.compare {
            Compare::Less => measured < self.value,
            Compare::AtMost => measured <= self.value,
            Compare::More => measured > self.value,
            Compare::AtLeast => measured >= self.value,
            Compare::Equal => measured == self.value,
            Compare::NotEqual => measured != self.value,
        });
        Judged { threshold: self.text.clone(), ok, measured }
    }

    fn measure(&self, report: &Report) -> Option<f64> {
        let events = || report.events.iter().filter_map(|event| event.impact);
        let worst = |values: Vec<u64>| values.into_iter().max().map(|ms| ms as f64);
        match &self.metric {
            Metric::Percentile(scope, percent) => {
                let latency = of(report, scope)?;
                (latency.count > 0)
                    .then(|| latency.histogram().value_at_quantile(percent / 100.0) as f64 / 1000.0)
            }
            Metric::Max(scope) => of(report, scope).filter(|l| l.count > 0).map(|l| l.max as f64 / 1000.0),
            Metric::Mean(scope) => of(report, scope).filter(|l| l.count > 0).map(|l| l.mean / 1000.0),
            Metric::Count(scope) => Some(of(report, scope).map_or(0.0, |latency| latency.count as f64)),
            Metric::Failed => Some(report.failed() as f64),
            Metric::FailedShare => {
                let all = report.offered.requests + report.offered.unsent;
                Some(if all == 0 { 0.0 } else { report.failed() as f64 / all as f64 })
            }
            Metric::Effect(effect) => {
                let of_it = report.outcomes.iter().filter(|outcome| outcome.effect == *effect);
                Some(of_it.map(|outcome| outcome.requests).sum::<u64>() as f64)
            }
            Metric::Requests => Some(report.offered.requests as f64),
            Metric::Rate => Some(report.offered.rate_achieved),
            Metric::Skew => Some(report.offered.skew_us.p99 as f64 / 1000.0),
            Metric::Held => worst(events().map(|impact| impact.held_ms).collect()),
            // An event without recovery is worse than any bound.
            Metric::Recovery => events()
                .map(|impact| impact.recovery_ms.map_or(f64::INFINITY, |ms| ms as f64))
                .max_by(f64::total_cmp)
                .filter(|ms| ms.is_finite()),
            Metric::ErrorWindow => worst(events().map(|impact| impact.error_window_ms).collect()),
            Metric::Errors => Some(events().map(|impact| impact.errors).sum::<u64>() as f64),
        }
    }
}

fn of(report: &Report, scope: &Scope) -> Option<Latency> {
    match scope {
        Scope::All => Some(report.latency_us.clone()),
        Scope::FirstClick => Some(report.accepted_after_us.clone()),
        Scope::Named(name) => {
            let mut all = histogram(3);
            let of_it = |outcome: &&crate::report::CodeReport| {
                outcome.code == *name || (outcome.operation == *name && outcome.effect != "unsent")
            };
            for outcome in report.outcomes.iter().filter(of_it) {
                add(&mut all, &outcome.latency_us.histogram());
            }
            Some(Latency::of(&all))
        }
    }
}

impl Display for Threshold {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Threshold {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Threshold {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Threshold, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_read_or_refused() {
        for text in [
            "p99 < 50ms",
            "p99.9<=1s",
            "p99_9 < 1s",
            "accepted.p50 < 900us",
            "first_click.p99 < 2s",
            "failed == 0",
            "failed_share < 0.01",
            "sold_out.count > 10",
            "held < 1s",
            "read_sale.max < 1s",
            "rate >= 900",
        ] {
            assert_eq!(text.parse::<Threshold>().unwrap().to_string(), text);
        }
        for text in
            ["", "p99", "p99 < 50", "failed == 0ms", "p101 < 1s", "pace < 3", "p99 ~ 1s", "a b.p99 < 1s"]
        {
            assert!(text.parse::<Threshold>().is_err(), "{text}");
        }
    }
}

//! The result of a run. The JSON form is `loadtest/schema.json`; fields are only ever added within one
//! `schema_version`.

use std::borrow::Cow;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::books::Books;
use crate::environment::Environment;
use crate::hdr;
pub use crate::part::Purchases;
use crate::scenario::Scenario;
use crate::selfcheck::Usage;
use crate::stats::{Interval, histogram};
use crate::threshold::Judged;
use crate::timeline::Event;

/// The name of the JSON schema.
pub const SCHEMA: &str = "seckill-loadtest/run";
/// Its version.
pub const SCHEMA_VERSION: u32 = 2;

/// Codes that no flash sale answers to a buyer who does everything right.
const MISFITS: [&str; 7] = [
    "unauthenticated",
    "forbidden",
    "bad_request",
    "sale_not_found",
    "idempotency_key_missing",
    "idempotency_key_reused",
    "http_404",
];

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Result {
    /// The books balance, the generator kept up and every threshold holds.
    Pass,
    /// A threshold does not hold.
    ThresholdMissed,
    /// The books do not balance.
    BooksUnbalanced,
    /// The generator could not keep the rate: the figures say nothing about the target.
    Invalid,
    /// The target could not be reached, so the books could not be checked.
    Unreachable,
}

impl Result {
    /// The process's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Result::Pass => 0,
            Result::ThresholdMissed => 1,
            Result::BooksUnbalanced => 2,
            Result::Invalid => 3,
            Result::Unreachable => 4,
        }
    }
}

/// Everything a run found out.
#[derive(Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: Cow<'static, str>,
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// How it ended.
    pub result: Result,
    /// The exit code that belongs to it.
    pub exit_code: u8,
    /// Why it did not pass, and what a reader should know when it did.
    pub notes: Vec<String>,
    /// When the load began, RFC 3339.
    pub started_at: String,
    /// The arrivals were ended early from outside.
    pub interrupted: bool,
    /// What was run.
    pub scenario: Scenario,
    /// Where it ran.
    pub environment: Environment,
    /// What was sent, the warm-up aside.
    pub offered: Offered,
    /// What came back, by operation and code.
    pub outcomes: Vec<CodeReport>,
    /// The same for the warm-up.
    pub warmup: Vec<CodeReport>,
    /// All requests that were sent, from their intended send time.
    pub latency_us: Latency,
    /// From a buyer's intended first click to the acceptance, retries included.
    pub accepted_after_us: Latency,
    /// What became of the purchases, those of the warm-up included.
    pub purchases: Purchases,
    /// Whether the generator kept up.
    pub generator: Generator,
    /// The books; `null` if they were not checked.
    pub books: Option<Books>,
    /// What was done to the target meanwhile.
    pub events: Vec<Event>,
    /// The thresholds.
    pub thresholds: Vec<Judged>,
    /// Over time.
    pub intervals: Vec<IntervalReport>,
}

impl Report {
    /// Requests that failed: unknown fates, answers of a server that could not, arrivals that were never sent.
    pub fn failed(&self) -> u64 {
        self.outcomes.iter().filter(|outcome| outcome.failed).map(|outcome| outcome.requests).sum()
    }

    /// Decides how the run ended, and says why.
    pub(crate) fn conclude(&mut self) {
        let thresholds = self.scenario.thresholds.clone();
        self.thresholds = thresholds.iter().map(|threshold| threshold.judge(self)).collect();
        let unreachable = self.books.as_ref().and_then(|books| books.unreachable.clone());
        let unbalanced = self.books.as_ref().is_some_and(|books| !books.balanced);
        // Contradictions found while a target was up stand, even if it is gone now.
        let contradicted = self.books.as_ref().is_some_and(|books| books.contradicted());
        self.result = match unreachable {
            Some(_) if !contradicted => Result::Unreachable,
            _ if unbalanced => Result::BooksUnbalanced,
            _ if !self.generator.valid => Result::Invalid,
            _ if self.thresholds.iter().any(|judged| !judged.ok) => Result::ThresholdMissed,
            _ => Result::Pass,
        };
        self.exit_code = self.result.exit_code();
        self.note();
    }

    fn note(&mut self) {
        if let Some(books) = &self.books {
            let failed = books.checks.iter().filter(|check| !check.ok);
            self.notes.extend(failed.map(|check| format!("{}: {}", check.name, check.detail)));
            if books.orders_from_before > 0 {
                let text = "orders are from an earlier run with the same seed or uid prefix";
                self.notes.push(format!("{} {text}", books.orders_from_before));
            }
            for sale in books.sales.iter().filter(|sale| sale.per_user_limit.is_none()) {
                self.notes
                    .push(format!("sale {} does not tell its per_user_limit: not checked", sale.sale_id));
            }
        } else {
            self.notes.push("the books were not checked".to_owned());
        }
        for judged in self.thresholds.iter().filter(|judged| !judged.ok) {
            let measured =
                judged.measured.map_or_else(|| "nothing".to_owned(), |value| format!("{value:.3}"));
            self.notes.push(format!("threshold missed: {} (measured {measured})", judged.threshold));
        }
        for event in self.events.iter().filter(|event| !event.ok) {
            self.notes.push(format!("{} did not succeed: {}", event.name, event.output));
        }
        self.notes.extend(self.generator.reasons.iter().map(|reason| format!("invalid: {reason}")));
        if self.generator.valid && self.generator.sent_in_time < crate::selfcheck::SENT_IN_TIME_MIN {
            self.notes.push(format!(
                "the target (or {} connections) did not take the rate: {:.1} % of the arrivals were sent in time",
                self.scenario.connections,
                self.generator.sent_in_time * 100.0
            ));
        }
        for outcome in self.outcomes.iter().filter(|outcome| outcome.operation != "forged_purchase") {
            if MISFITS.contains(&outcome.code.as_str()) {
                self.notes.push(format!(
                    "{} requests ended with {}: does the scenario fit the target?",
                    outcome.requests, outcome.code
                ));
            }
        }
        if self.offered.arrivals < u64::from(self.scenario.buyers) && !self.interrupted {
            self.notes.push(format!(
                "rate × duration lets {} of the {} buyers arrive",
                self.offered.arrivals, self.scenario.buyers
            ));
        }
        if self.offered.unsent > 0 {
            self.notes.push(format!("{} arrivals were never sent", self.offered.unsent));
        }
    }
}

/// What was sent.
#[derive(Serialize, Deserialize, Default)]
pub struct Offered {
    /// Arrivals per second that were asked for, on average.
    pub rate_asked: f64,
    /// Arrivals per second that were sent.
    pub rate_achieved: f64,
    /// Arrivals that came due, those of the warm-up included.
    pub arrivals: u64,
    /// Of those, sent.
    pub arrivals_sent: u64,
    /// Of those, still waiting for a connection when the run gave up on them.
    pub unsent: u64,
    /// Requests of all kinds.
    pub requests: u64,
    /// Second clicks among them.
    pub duplicates: u64,
    /// Second purchases among them.
    pub second_purchases: u64,
    /// Retries among them.
    pub retries: u64,
    /// Later steps of journeys among them: looks, clicks after thinking, payments.
    pub journey: u64,
    /// Retries and steps left out because they would have come after the end.
    pub retries_skipped: u64,
    /// How long after its intended time an arrival's first request went out, whatever it waited for.
    pub skew_us: Latency,
}

/// Requests of one operation that ended with one code.
#[derive(Clone, Serialize, Deserialize)]
pub struct CodeReport {
    /// `purchase`, `forged_purchase`, `read_sale`, `read_order`, `pay` or `cancel`.
    pub operation: String,
    /// The code.
    pub code: String,
    /// `accepted`, `done`, `refused`, `unknown` or `unsent`.
    pub effect: String,
    /// The server failed: no answer, or a 5xx, whether or not anything happened.
    pub failed: bool,
    /// How many.
    pub requests: u64,
    /// Their latency from the intended send time.
    pub latency_us: Latency,
}

/// Percentiles in microseconds, and the histogram they are from.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it all")]
pub struct Latency {
    pub count: u64,
    pub mean: f64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
    pub p99_99: u64,
    pub max: u64,
    /// HdrHistogram V2, compressed, base64; empty without values.
    pub hdr: String,
}

impl Latency {
    /// Of a histogram in microseconds.
    pub fn of(histogram: &Histogram<u64>) -> Latency {
        if histogram.is_empty() {
            return Latency::default();
        }
        let at = |quantile| histogram.value_at_quantile(quantile);
        Latency {
            count: histogram.len(),
            mean: (histogram.mean() * 10.0).round() / 10.0,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            p99_99: at(0.9999),
            max: histogram.max(),
            hdr: hdr::to_text(histogram),
        }
    }

    /// The histogram; empty if there is none.
    pub fn histogram(&self) -> Histogram<u64> {
        hdr::from_text(&self.hdr).unwrap_or_else(|| histogram(3))
    }
}

/// The self-check.
#[derive(Serialize, Deserialize)]
pub struct Generator {
    /// It kept up.
    pub valid: bool,
    /// Why not.
    pub reasons: Vec<String>,
    /// How late it noticed arrivals.
    pub lag_us: Latency,
    /// The share of the arrivals that was sent within the duration.
    pub sent_in_time: f64,
    /// CPU time per request sent, in microseconds.
    pub cpu_us_per_request: f64,
    /// Each worker while sending.
    pub workers: Vec<WorkerReport>,
    /// Processes that sent.
    pub processes: u32,
    /// Connections opened.
    pub connections_opened: u64,
    /// The most open at once (sum of the workers' peaks).
    pub connections_peak: u64,
    /// Connection attempts that failed.
    pub connect_errors: u64,
    /// The most memory that this process had resident, in bytes.
    pub peak_rss_bytes: u64,
    /// Reads of the sale that the live view made beside the load.
    pub stock_reads: u64,
}

/// One worker.
#[derive(Serialize, Deserialize)]
pub struct WorkerReport {
    /// What its thread used.
    #[serde(flatten)]
    pub usage: Usage,
    /// The share of the time in which it ran or wanted to.
    pub busy: f64,
}

/// A stretch of time, a second at first; see [`crate::series`].
#[derive(Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "as in `Interval`")]
pub struct IntervalReport {
    pub second: u64,
    /// How many seconds it covers.
    pub seconds: u64,
    pub arrivals: u64,
    pub requests: u64,
    pub accepted: u64,
    pub replayed: u64,
    pub done: u64,
    pub refused: u64,
    pub failed: u64,
    pub unknown: u64,
    pub backlog: u64,
    /// Units left, as the public listener told; `null`: it was not asked or did not answer.
    pub stock: Option<i64>,
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
    pub p99_9_us: u64,
    pub max_us: u64,
    /// The histogram (two digits), as in [`Latency::hdr`].
    pub hdr: String,
}

impl IntervalReport {
    /// Of an interval.
    pub fn of(interval: &Interval, seconds: u64, stock: Option<i64>) -> IntervalReport {
        let latency = Latency::of(&interval.latency_us);
        IntervalReport {
            second: interval.second,
            seconds,
            arrivals: interval.arrivals,
            requests: interval.requests,
            accepted: interval.accepted,
            replayed: interval.replayed,
            done: interval.done,
            refused: interval.refused,
            failed: interval.failed,
            unknown: interval.unknown,
            backlog: interval.backlog,
            stock,
            p50_us: latency.p50,
            p90_us: latency.p90,
            p99_us: latency.p99,
            p99_9_us: latency.p99_9,
            max_us: latency.max,
            hdr: latency.hdr,
        }
    }

    /// Adds another run's same time, or the time that follows.
    pub fn merge(&mut self, other: &IntervalReport) {
        let mut latency = hdr::from_text(&self.hdr).unwrap_or_else(|| histogram(2));
        if let Some(theirs) = hdr::from_text(&other.hdr) {
            crate::stats::add(&mut latency, &theirs);
        }
        let sum = Interval {
            second: self.second,
            arrivals: self.arrivals + other.arrivals,
            requests: self.requests + other.requests,
            accepted: self.accepted + other.accepted,
            replayed: self.replayed + other.replayed,
            done: self.done + other.done,
            refused: self.refused + other.refused,
            failed: self.failed + other.failed,
            unknown: self.unknown + other.unknown,
            backlog: self.backlog.max(other.backlog),
            latency_us: latency,
            pulses: Vec::new(),
        };
        *self = IntervalReport::of(&sum, self.seconds, other.stock.or(self.stock));
    }
}

//! The result of a run. The JSON form is described in `loadtest/README.md`; fields are only ever added
//! within one `schema_version`.

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::books::Books;
use crate::scenario::Scenario;
use crate::selfcheck::Usage;
use crate::stats::Interval;

/// The name of the JSON schema.
pub const SCHEMA: &str = "seckill-loadtest/run";
/// Its version.
pub const SCHEMA_VERSION: u32 = 1;
/// Seconds kept one by one; a longer run keeps its first two hours.
pub const INTERVALS_KEPT: usize = 7200;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Result {
    /// The books balance and the generator kept up.
    Pass,
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
            Result::BooksUnbalanced => 2,
            Result::Invalid => 3,
            Result::Unreachable => 4,
        }
    }
}

/// Everything a run found out.
#[derive(Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
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
    /// What was sent.
    pub offered: Offered,
    /// What came back, by code.
    pub outcomes: Vec<CodeReport>,
    /// All requests that were sent, from their intended send time.
    pub latency_us: Latency,
    /// From a buyer's intended first click to the acceptance, retries included.
    pub accepted_after_us: Latency,
    /// What became of the purchases.
    pub purchases: Purchases,
    /// Whether the generator kept up.
    pub generator: Generator,
    /// The books; `null` if they were not checked.
    pub books: Option<Books>,
    /// Second by second.
    pub intervals: Vec<IntervalReport>,
}

impl Report {
    /// Decides how the run ended, and says why.
    pub(crate) fn conclude(&mut self) {
        let unreachable = self.books.as_ref().and_then(|books| books.unreachable.clone());
        let unbalanced = self.books.as_ref().is_some_and(|books| !books.balanced);
        // Contradictions found while a target was up stand, even if it is gone now.
        let contradicted = self.books.as_ref().is_some_and(|books| books.contradicted());
        self.result = match unreachable {
            Some(_) if !contradicted => Result::Unreachable,
            _ if unbalanced => Result::BooksUnbalanced,
            _ if !self.generator.valid => Result::Invalid,
            _ => Result::Pass,
        };
        self.exit_code = self.result.exit_code();
        if let Some(books) = &self.books {
            let failed = books.checks.iter().filter(|check| !check.ok);
            self.notes.extend(failed.map(|check| format!("{}: {}", check.name, check.detail)));
            if books.orders_from_before > 0 {
                let text = "orders are from an earlier run with the same seed or uid prefix";
                self.notes.push(format!("{} {text}", books.orders_from_before));
            }
            if books.per_user_limit.is_none() {
                self.notes.push("the sale does not tell its per_user_limit: not checked".to_owned());
            }
        } else {
            self.notes.push("the books were not checked".to_owned());
        }
        self.notes.extend(self.generator.reasons.iter().map(|reason| format!("invalid: {reason}")));
        if self.generator.valid && self.generator.sent_in_time < crate::selfcheck::SENT_IN_TIME_MIN {
            self.notes.push(format!(
                "the target (or {} connections) did not take the rate: {:.1} % of the arrivals were sent in time",
                self.scenario.connections,
                self.generator.sent_in_time * 100.0
            ));
        }
        for outcome in &self.outcomes {
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

/// The machine and the versions.
#[derive(Serialize)]
pub struct Environment {
    /// Cores this process may use.
    pub cores: usize,
    /// The processor's name.
    pub cpu: String,
    /// The kernel.
    pub kernel: String,
    /// Version of this program.
    pub loadtest_version: &'static str,
}

impl Environment {
    /// Looks around.
    pub fn here() -> Environment {
        let uname = rustix::system::uname();
        let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
        let cpu = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|info| {
            let line = info.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
        Environment {
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            cpu: cpu.unwrap_or_else(|| text(uname.machine())),
            kernel: format!("{} {}", text(uname.sysname()), text(uname.release())),
            loadtest_version: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// What was sent.
#[derive(Serialize, Default)]
pub struct Offered {
    /// Arrivals per second that were asked for.
    pub rate_asked: f64,
    /// Arrivals per second that were sent.
    pub rate_achieved: f64,
    /// Arrivals that came due.
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
    /// Retries left out because they would have come after the end.
    pub retries_skipped: u64,
}

/// Requests that ended with one code.
#[derive(Serialize)]
pub struct CodeReport {
    /// The code.
    pub code: String,
    /// `accepted`, `refused`, `unknown` or `unsent`.
    pub effect: &'static str,
    /// How many.
    pub requests: u64,
    /// Their latency from the intended send time.
    pub latency_us: Latency,
}

/// Percentiles in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
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
        }
    }
}

/// Purchases (all requests under one key are one).
#[derive(Serialize, Default)]
pub struct Purchases {
    /// How many were begun.
    pub total: u64,
    /// With an order when the load had ended.
    pub accepted: u64,
    /// Answered, without one.
    pub refused: u64,
    /// Nobody knew when the load had ended; the books resolve them.
    pub unknown: u64,
}

/// The self-check.
#[derive(Serialize)]
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
    /// Connections opened.
    pub connections_opened: u64,
    /// The most open at once (sum of the workers' peaks).
    pub connections_peak: u64,
    /// Connection attempts that failed.
    pub connect_errors: u64,
}

/// One worker.
#[derive(Serialize)]
pub struct WorkerReport {
    /// What its thread used.
    #[serde(flatten)]
    pub usage: Usage,
    /// The share of the time in which it ran or wanted to.
    pub busy: f64,
}

/// One second.
#[derive(Serialize)]
#[allow(missing_docs, reason = "as in `Interval`")]
pub struct IntervalReport {
    pub second: u64,
    pub arrivals: u64,
    pub requests: u64,
    pub accepted: u64,
    pub replayed: u64,
    pub refused: u64,
    pub unknown: u64,
    pub backlog: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

impl IntervalReport {
    /// Of an interval.
    pub fn of(interval: &Interval) -> IntervalReport {
        let latency = Latency::of(&interval.latency_us);
        IntervalReport {
            second: interval.second,
            arrivals: interval.arrivals,
            requests: interval.requests,
            accepted: interval.accepted,
            replayed: interval.replayed,
            refused: interval.refused,
            unknown: interval.unknown,
            backlog: interval.backlog,
            p50_us: latency.p50,
            p99_us: latency.p99,
            max_us: latency.max,
        }
    }
}

//! What is counted while the load runs: HDR histograms by code, merged when the workers have ended.

use hdrhistogram::Histogram;

use crate::outcome::{Code, Effect, Verdict};
use crate::schedule::Reason;

/// Latencies are kept from a microsecond to an hour.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// A histogram of microseconds with `digits` significant digits.
pub fn histogram(digits: u8) -> Histogram<u64> {
    match Histogram::new_with_bounds(1, LATENCY_MAX_US, digits) {
        Ok(histogram) => histogram,
        Err(_) => unreachable!("the bounds are constant and valid"),
    }
}

/// Adds `from` to `into`.
pub fn add(into: &mut Histogram<u64>, from: &Histogram<u64>) {
    if into.add(from).is_err() {
        unreachable!("all histograms have the same bounds");
    }
}

/// Counts by code and by reason.
pub struct Stats {
    by_code: Vec<Option<Box<CodeStats>>>,
    /// Requests by [`Reason`].
    pub by_reason: [u64; 4],
    /// From the intended first click to the acceptance, retries included, in microseconds.
    pub accepted_after_us: Histogram<u64>,
}

/// One code's.
pub struct CodeStats {
    /// What the code did to the purchase.
    pub effect: &'static str,
    /// Requests that ended with it; latency in microseconds from the intended send time.
    pub latency_us: Histogram<u64>,
}

impl Stats {
    /// Nothing counted yet.
    pub fn new() -> Stats {
        Stats {
            by_code: (0..Code::SPACE).map(|_| None).collect(),
            by_reason: [0; 4],
            accepted_after_us: histogram(3),
        }
    }

    /// A request was sent.
    pub fn sent(&mut self, reason: Reason) {
        self.by_reason[reason as usize] += 1;
    }

    /// A request ended.
    pub fn ended(&mut self, verdict: &Verdict, latency_us: u64) {
        let effect = match verdict.effect {
            Effect::Accepted { .. } => "accepted",
            Effect::Refused => "refused",
            Effect::Unknown => "unknown",
        };
        self.slot(verdict.code, effect).latency_us.saturating_record(latency_us.max(1));
    }

    /// An arrival was never sent; it had waited at least this long.
    pub fn unsent(&mut self, waited_us: u64) {
        self.slot(Code::UNSENT, "unsent").latency_us.saturating_record(waited_us.max(1));
    }

    fn slot(&mut self, code: Code, effect: &'static str) -> &mut CodeStats {
        self.by_code[usize::from(code.0)]
            .get_or_insert_with(|| Box::new(CodeStats { effect, latency_us: histogram(3) }))
    }

    /// Every code that was seen.
    pub fn codes(&self) -> impl Iterator<Item = (Code, &CodeStats)> {
        (0u8..).map(Code).zip(&self.by_code).filter_map(|(code, stats)| Some((code, stats.as_deref()?)))
    }

    /// Adds another worker's.
    pub fn merge(&mut self, other: &Stats) {
        for (code, stats) in other.codes() {
            add(&mut self.slot(code, stats.effect).latency_us, &stats.latency_us);
        }
        for (mine, theirs) in self.by_reason.iter_mut().zip(other.by_reason) {
            *mine += theirs;
        }
        add(&mut self.accepted_after_us, &other.accepted_after_us);
    }
}

impl Default for Stats {
    fn default() -> Stats {
        Stats::new()
    }
}

/// What one worker, or all of them, did in one second.
#[derive(Clone)]
pub struct Interval {
    /// Which second, from 0.
    pub second: u64,
    /// Arrivals sent.
    pub arrivals: u64,
    /// Requests sent.
    pub requests: u64,
    /// Answers that accepted for the first time.
    pub accepted: u64,
    /// Answers that accepted again.
    pub replayed: u64,
    /// Answers that refused.
    pub refused: u64,
    /// Requests whose fate is unknown.
    pub unknown: u64,
    /// Arrivals that are due and wait for a connection, at the end of the second.
    pub backlog: u64,
    /// Latencies of the requests that ended in it, in microseconds.
    pub latency_us: Histogram<u64>,
}

impl Interval {
    /// Nothing yet.
    pub fn new(second: u64) -> Interval {
        Interval {
            second,
            arrivals: 0,
            requests: 0,
            accepted: 0,
            replayed: 0,
            refused: 0,
            unknown: 0,
            backlog: 0,
            latency_us: histogram(2),
        }
    }

    /// A request ended.
    pub fn ended(&mut self, verdict: &Verdict, latency_us: u64) {
        match verdict.effect {
            Effect::Accepted { replayed: false, .. } => self.accepted += 1,
            Effect::Accepted { replayed: true, .. } => self.replayed += 1,
            Effect::Refused => self.refused += 1,
            Effect::Unknown => self.unknown += 1,
        }
        self.latency_us.saturating_record(latency_us.max(1));
    }

    /// Adds another worker's.
    pub fn merge(&mut self, other: &Interval) {
        self.arrivals += other.arrivals;
        self.requests += other.requests;
        self.accepted += other.accepted;
        self.replayed += other.replayed;
        self.refused += other.refused;
        self.unknown += other.unknown;
        self.backlog += other.backlog;
        add(&mut self.latency_us, &other.latency_us);
    }
}

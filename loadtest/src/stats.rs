//! What is counted while the load runs: HDR histograms by operation and code, merged when the workers have
//! ended.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::impact::{PULSES_PER_SECOND, Pulse};
use crate::outcome::{Code, Codes, Effect, Op, Verdict};
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

/// Adds `from` to `into`. Histograms of other bounds come only from files written by something else; what lies
/// outside of ours is clamped.
pub fn add(into: &mut Histogram<u64>, from: &Histogram<u64>) {
    if into.add(from).is_err() {
        for value in from.iter_recorded() {
            into.saturating_record_n(value.value_iterated_to(), value.count_since_last_iteration());
        }
    }
}

/// Counts by operation and code, and by reason.
pub struct Stats {
    by_code: Vec<Option<Box<CodeStats>>>,
    /// Requests by [`Reason`].
    pub by_reason: [u64; Reason::COUNT],
    /// From the intended first click to the acceptance, retries included, in microseconds.
    pub accepted_after_us: Histogram<u64>,
}

/// One operation's and code's.
pub struct CodeStats {
    /// What the code did.
    pub effect: &'static str,
    /// The server failed.
    pub failed: bool,
    /// Requests that ended with it; latency in microseconds from the intended send time.
    pub latency_us: Histogram<u64>,
}

/// [`CodeStats`] between processes.
#[derive(Serialize, Deserialize)]
struct CodeStatsText {
    operation: String,
    code: String,
    effect: String,
    failed: bool,
    #[serde(with = "crate::hdr")]
    latency_us: Histogram<u64>,
}

/// [`Stats`] between processes.
#[derive(Serialize, Deserialize)]
pub struct StatsText {
    by_code: Vec<CodeStatsText>,
    by_reason: [u64; Reason::COUNT],
    #[serde(with = "crate::hdr")]
    accepted_after_us: Histogram<u64>,
}

/// Effects as they are written in reports.
pub const EFFECTS: [&str; 5] = ["accepted", "done", "refused", "unknown", "unsent"];

impl Stats {
    /// Nothing counted yet.
    pub fn new() -> Stats {
        Stats {
            by_code: (0..Code::SPACE * Op::ALL.len()).map(|_| None).collect(),
            by_reason: [0; Reason::COUNT],
            accepted_after_us: histogram(3),
        }
    }

    /// A request was sent.
    pub fn sent(&mut self, reason: Reason) {
        self.by_reason[reason as usize] += 1;
    }

    /// A request ended.
    pub fn ended(&mut self, op: Op, verdict: &Verdict, latency_us: u64) {
        let effect = match verdict.effect {
            Effect::Accepted { .. } => "accepted",
            Effect::Done(_) => "done",
            Effect::Refused => "refused",
            Effect::Unknown => "unknown",
        };
        let slot = self.slot(op, verdict.code, effect, verdict.failed);
        slot.latency_us.saturating_record(latency_us.max(1));
    }

    /// An arrival was never sent; it had waited at least this long.
    pub fn unsent(&mut self, waited_us: u64) {
        let slot = self.slot(Op::Purchase, Code::UNSENT, "unsent", true);
        slot.latency_us.saturating_record(waited_us.max(1));
    }

    fn slot(&mut self, op: Op, code: Code, effect: &'static str, failed: bool) -> &mut CodeStats {
        self.by_code[op as usize * Code::SPACE + usize::from(code.0)]
            .get_or_insert_with(|| Box::new(CodeStats { effect, failed, latency_us: histogram(3) }))
    }

    /// Everything that was seen.
    pub fn codes(&self) -> impl Iterator<Item = (Op, Code, &CodeStats)> {
        self.by_code.iter().enumerate().filter_map(|(at, stats)| {
            Some((Op::ALL[at / Code::SPACE], Code((at % Code::SPACE) as u8), stats.as_deref()?))
        })
    }

    /// Requests that ended.
    pub fn requests(&self) -> u64 {
        self.by_reason.iter().sum()
    }

    /// Adds another worker's.
    pub fn merge(&mut self, other: &Stats) {
        for (op, code, stats) in other.codes() {
            add(&mut self.slot(op, code, stats.effect, stats.failed).latency_us, &stats.latency_us);
        }
        for (mine, theirs) in self.by_reason.iter_mut().zip(other.by_reason) {
            *mine += theirs;
        }
        add(&mut self.accepted_after_us, &other.accepted_after_us);
    }

    /// For another process: codes by name, because each process numbers what it learns.
    pub fn to_text(&self, codes: &Codes) -> StatsText {
        let by_code = self.codes().map(|(op, code, stats)| CodeStatsText {
            operation: op.name().to_owned(),
            code: codes.name(code),
            effect: stats.effect.to_owned(),
            failed: stats.failed,
            latency_us: stats.latency_us.clone(),
        });
        StatsText {
            by_code: by_code.collect(),
            by_reason: self.by_reason,
            accepted_after_us: self.accepted_after_us.clone(),
        }
    }

    /// From another process.
    pub fn from_text(text: &StatsText, codes: &mut Codes) -> Stats {
        let mut stats = Stats::new();
        for entry in &text.by_code {
            let Some(op) = Op::ALL.into_iter().find(|op| op.name() == entry.operation) else { continue };
            let effect = EFFECTS.into_iter().find(|effect| *effect == entry.effect).unwrap_or("unknown");
            let code = codes.number(&entry.code);
            add(&mut stats.slot(op, code, effect, entry.failed).latency_us, &entry.latency_us);
        }
        stats.by_reason = text.by_reason;
        add(&mut stats.accepted_after_us, &text.accepted_after_us);
        stats
    }
}

impl Default for Stats {
    fn default() -> Stats {
        Stats::new()
    }
}

/// What one worker, or all of them, did in one second.
#[derive(Clone, Serialize, Deserialize)]
pub struct Interval {
    /// Which second, from 0.
    pub second: u64,
    /// Arrivals sent.
    pub arrivals: u64,
    /// Requests sent.
    pub requests: u64,
    /// Purchases accepted for the first time.
    pub accepted: u64,
    /// Purchases accepted again.
    pub replayed: u64,
    /// Reads answered, payments and cancellations carried out.
    pub done: u64,
    /// Requests refused, though the server did not fail.
    pub refused: u64,
    /// Refused by a server that could not: 5xx with nothing executed.
    pub failed: u64,
    /// Requests whose fate is unknown.
    pub unknown: u64,
    /// Arrivals that are due and wait for a connection, at the end of the second.
    pub backlog: u64,
    /// Latencies of the requests that ended in it, in microseconds.
    #[serde(with = "crate::hdr")]
    pub latency_us: Histogram<u64>,
    /// Hundredths of the second.
    pub pulses: Vec<Pulse>,
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
            done: 0,
            refused: 0,
            failed: 0,
            unknown: 0,
            backlog: 0,
            latency_us: histogram(2),
            pulses: vec![Pulse::default(); PULSES_PER_SECOND],
        }
    }

    /// A request ended, `pulse` hundredths into the second.
    pub fn ended(&mut self, op: Op, verdict: &Verdict, latency_us: u64, pulse: usize) {
        match verdict.effect {
            Effect::Accepted { replayed: false, .. } => self.accepted += 1,
            Effect::Accepted { replayed: true, .. } => self.replayed += 1,
            Effect::Done(_) => self.done += 1,
            Effect::Refused if verdict.failed => self.failed += 1,
            Effect::Refused => self.refused += 1,
            Effect::Unknown => self.unknown += 1,
        }
        self.latency_us.saturating_record(latency_us.max(1));
        if let Some(pulse) = self.pulses.get_mut(pulse) {
            pulse.failed += u32::from(verdict.failed);
            pulse.served += u32::from(op == Op::Purchase && !verdict.failed && !verdict.retryable);
        }
    }

    /// Adds another worker's, or a later second's.
    pub fn merge(&mut self, other: &Interval) {
        self.arrivals += other.arrivals;
        self.requests += other.requests;
        self.accepted += other.accepted;
        self.replayed += other.replayed;
        self.done += other.done;
        self.refused += other.refused;
        self.failed += other.failed;
        self.unknown += other.unknown;
        self.backlog += other.backlog;
        add(&mut self.latency_us, &other.latency_us);
        for (mine, theirs) in self.pulses.iter_mut().zip(&other.pulses) {
            mine.add(*theirs);
        }
    }
}

//! What one worker, one process or a whole run counted: parts that add up.

use std::path::PathBuf;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::connections::Tally;
use crate::outcome::{Code, Codes};
use crate::record::{Purchase, Violations};
use crate::selfcheck::Usage;
use crate::stats::{Stats, StatsText, add, histogram};

/// What became of the purchases (all requests under one key are one) when the load had ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
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

impl Purchases {
    /// Counts one.
    pub fn count(&mut self, purchase: &Purchase) {
        self.total += 1;
        if purchase.order().is_some() {
            self.accepted += 1;
        } else if purchase.is_unknown() {
            self.unknown += 1;
        } else if purchase.code() != Code::UNSENT {
            self.refused += 1;
        }
    }

    fn add(&mut self, other: Purchases) {
        self.total += other.total;
        self.accepted += other.accepted;
        self.refused += other.refused;
        self.unknown += other.unknown;
    }
}

/// What was counted.
pub struct Part {
    /// Counts and latencies.
    pub stats: Stats,
    /// The same for the warm-up.
    pub warmup: Stats,
    /// Contradictions between answers.
    pub violations: Violations,
    /// How late arrivals were noticed, in microseconds.
    pub lag_us: Histogram<u64>,
    /// How long after its intended time an arrival's first request went out, in microseconds.
    pub skew_us: Histogram<u64>,
    /// What each worker's thread used while sending.
    pub usage: Vec<Usage>,
    /// Arrivals that came due.
    pub arrivals: u64,
    /// Of those, sent within the duration.
    pub sent_in_time: u64,
    /// Of those, sent at all.
    pub sent: u64,
    /// When the last of them was sent, nanoseconds after the start.
    pub last_sent_ns: u64,
    /// When the last answer came, nanoseconds after the start.
    pub finished_ns: u64,
    /// Follow-ups left out: too late, or too many waiting.
    pub retries_skipped: u64,
    /// What became of the purchases.
    pub purchases: Purchases,
    /// Connections opened, failed, and the most open at once.
    pub connections: Tally,
    /// The files with the record of every purchase.
    pub ledgers: Vec<PathBuf>,
}

/// [`Part`] between processes.
#[derive(Serialize, Deserialize)]
pub struct PartText {
    stats: StatsText,
    warmup: StatsText,
    violations: Violations,
    #[serde(with = "crate::hdr")]
    lag_us: Histogram<u64>,
    #[serde(with = "crate::hdr")]
    skew_us: Histogram<u64>,
    usage: Vec<Usage>,
    arrivals: u64,
    sent_in_time: u64,
    sent: u64,
    last_sent_ns: u64,
    finished_ns: u64,
    retries_skipped: u64,
    purchases: Purchases,
    connections: Tally,
    ledgers: Vec<PathBuf>,
}

impl Part {
    /// Nothing counted yet.
    pub fn new() -> Part {
        Part {
            stats: Stats::new(),
            warmup: Stats::new(),
            violations: Violations::default(),
            lag_us: histogram(3),
            skew_us: histogram(3),
            usage: Vec::new(),
            arrivals: 0,
            sent_in_time: 0,
            sent: 0,
            last_sent_ns: 0,
            finished_ns: 0,
            retries_skipped: 0,
            purchases: Purchases::default(),
            connections: Tally::default(),
            ledgers: Vec::new(),
        }
    }

    /// Adds another's.
    pub fn merge(&mut self, other: Part) {
        self.stats.merge(&other.stats);
        self.warmup.merge(&other.warmup);
        self.violations.merge(other.violations);
        add(&mut self.lag_us, &other.lag_us);
        add(&mut self.skew_us, &other.skew_us);
        self.usage.extend(other.usage);
        self.arrivals += other.arrivals;
        self.sent_in_time += other.sent_in_time;
        self.sent += other.sent;
        self.last_sent_ns = self.last_sent_ns.max(other.last_sent_ns);
        self.finished_ns = self.finished_ns.max(other.finished_ns);
        self.retries_skipped += other.retries_skipped;
        self.purchases.add(other.purchases);
        self.connections.opened += other.connections.opened;
        self.connections.errors += other.connections.errors;
        self.connections.peak += other.connections.peak;
        self.ledgers.extend(other.ledgers);
    }

    /// For another process.
    pub fn into_text(self, codes: &Codes) -> PartText {
        PartText {
            stats: self.stats.to_text(codes),
            warmup: self.warmup.to_text(codes),
            violations: self.violations,
            lag_us: self.lag_us,
            skew_us: self.skew_us,
            usage: self.usage,
            arrivals: self.arrivals,
            sent_in_time: self.sent_in_time,
            sent: self.sent,
            last_sent_ns: self.last_sent_ns,
            finished_ns: self.finished_ns,
            retries_skipped: self.retries_skipped,
            purchases: self.purchases,
            connections: self.connections,
            ledgers: self.ledgers,
        }
    }

    /// From another process.
    pub fn from_text(text: PartText, codes: &mut Codes) -> Part {
        Part {
            stats: Stats::from_text(&text.stats, codes),
            warmup: Stats::from_text(&text.warmup, codes),
            violations: text.violations,
            lag_us: text.lag_us,
            skew_us: text.skew_us,
            usage: text.usage,
            arrivals: text.arrivals,
            sent_in_time: text.sent_in_time,
            sent: text.sent,
            last_sent_ns: text.last_sent_ns,
            finished_ns: text.finished_ns,
            retries_skipped: text.retries_skipped,
            purchases: text.purchases,
            connections: text.connections,
            ledgers: text.ledgers,
        }
    }
}

impl Default for Part {
    fn default() -> Part {
        Part::new()
    }
}

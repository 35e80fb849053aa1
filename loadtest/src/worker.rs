//! A worker: one thread, its own share of the arrivals and of the connections, and nothing shared with the
//! others while it runs. A request costs it a write, a read and its share of an `epoll_wait`.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::sync::mpsc;

use crate::buyers::{Buyers, chance, mix};
use crate::connections::{Connections, Events, Flight, Tally};
use crate::outcome::{Asked, Codes, Effect, Verdict, judge};
use crate::record::{Contradiction, Purchase, Violation, Violations};
use crate::request::PurchaseRequest;
use crate::schedule::{Due, Next, PurchaseIndex, Reason, Schedule};
use crate::selfcheck::{Mark, Usage};
use crate::stats::{Interval, Stats, histogram};

/// How often timeouts are looked for.
const SWEEP_NS: u64 = 20_000_000;
/// Sleeps are not shorter than this: at high rates a wake-up then serves several arrivals.
const NAP_MIN_NS: u64 = 20_000;
const SECOND_NS: u64 = 1_000_000_000;
/// Half of the duplicates are sent at once, the others within this time.
const DUPLICATE_DELAY_NS: f64 = 100e6;
/// Second purchases follow within this time.
const SECOND_PURCHASE_DELAY_NS: f64 = 500e6;
/// The first retry waits up to this long, each later one twice as long.
const BACKOFF_NS: u64 = 50_000_000;
/// Marks a [`PurchaseIndex`] as one of the second purchases.
const SECOND_BIT: u32 = 1 << 31;

/// What all workers of a run have in common.
pub struct Plan {
    /// Addresses of the targets, each with its request.
    pub targets: Vec<(SocketAddr, PurchaseRequest)>,
    /// Who buys.
    pub buyers: Buyers,
    /// What they buy.
    pub asked: Asked,
    /// Arrivals per second, all workers together.
    pub rate: f64,
    /// Arrivals of the run.
    pub arrivals: u32,
    /// For how long arrivals come.
    pub duration: Duration,
    /// Workers.
    pub workers: u32,
    /// Connections of each worker.
    pub connections: usize,
    /// How long an answer may take after its request was sent.
    pub timeout: Duration,
    /// The share of arrivals that click twice.
    pub duplicates: f64,
    /// The share of arrivals that buy again under a new key.
    pub second_purchases: f64,
    /// Requests per purchase while the load runs, the first included.
    pub max_attempts: u16,
    /// `Retry-After` is honoured.
    pub honour_retry_after: bool,
    /// The seed of every choice.
    pub seed: u64,
    /// Set from outside to end the arrivals early.
    pub interrupted: AtomicBool,
}

/// What a worker hands back.
pub struct Outcome {
    /// Purchases, the second ones last.
    pub purchases: Vec<Purchase>,
    /// Counts and latencies.
    pub stats: Stats,
    /// Contradictions between answers.
    pub violations: Violations,
    /// How late arrivals were noticed, in microseconds.
    pub lag_us: Histogram<u64>,
    /// What the thread used while sending.
    pub usage: Usage,
    /// Arrivals that came due.
    pub arrivals: u64,
    /// Of those, sent within the duration.
    pub sent_in_time: u64,
    /// Of those, sent at all.
    pub sent: u64,
    /// When the last of them was sent, nanoseconds after the start.
    pub last_sent_ns: u64,
    /// Retries left out: too late, or too many waiting.
    pub retries_skipped: u64,
    /// Connections opened, failed, and the most open at once.
    pub connections: Tally,
}

/// One worker; [`Worker::run`] is its thread.
pub struct Worker {
    plan: Arc<Plan>,
    codes: Codes,
    schedule: Schedule,
    connections: Connections,
    start: Instant,
    now_ns: u64,
    stop_ns: u64,
    scratch: Vec<u8>,
    first_purchases: Vec<Purchase>,
    second_purchases: Vec<Purchase>,
    stats: Stats,
    violations: Violations,
    lag_us: Histogram<u64>,
    interval: Interval,
    intervals: mpsc::Sender<Interval>,
    sent: u64,
    abandoned: u64,
    last_sent_ns: u64,
    retries_skipped: u64,
}

impl Worker {
    /// Worker `number` of a plan, which starts at `start`; each second's counts go to `intervals`.
    pub fn new(
        plan: Arc<Plan>,
        number: u32,
        codes: Codes,
        start: Instant,
        intervals: mpsc::Sender<Interval>,
    ) -> io::Result<Worker> {
        let schedule = Schedule::new(plan.rate, plan.arrivals, number, plan.workers);
        let share = schedule.total() as usize;
        // A little more than expected: growing would copy, in the middle of the load.
        let seconds = (share as f64 * plan.second_purchases * 1.1) as usize + 64;
        let addrs = plan.targets.iter().map(|(addr, _)| *addr).collect();
        Ok(Worker {
            codes,
            connections: Connections::new(addrs, number as usize, plan.connections)?,
            start,
            now_ns: 0,
            stop_ns: nanos(plan.duration + plan.timeout),
            scratch: Vec::with_capacity(1024),
            first_purchases: Vec::with_capacity(share + seconds),
            second_purchases: Vec::with_capacity(seconds),
            stats: Stats::new(),
            violations: Violations::default(),
            lag_us: histogram(3),
            interval: Interval::new(0),
            intervals,
            sent: 0,
            abandoned: 0,
            last_sent_ns: 0,
            retries_skipped: 0,
            schedule,
            plan,
        })
    }

    /// Runs the worker's share to its end: every request sent has an outcome.
    pub fn run(mut self) -> io::Result<Outcome> {
        // The default slack of 50 µs would be added to every sleep. Without the right to change it the
        // sleeps are a little less exact, nothing else.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
        std::thread::sleep(self.start.saturating_duration_since(Instant::now()));
        let mark = Mark::now();
        let duration_ns = nanos(self.plan.duration);
        let mut sending: Option<(Usage, u64)> = None;
        let mut events = Events::new();
        let mut next_sweep_ns = SWEEP_NS;
        loop {
            self.tick();
            self.dispatch();
            if sending.is_none() && (self.now_ns >= duration_ns || self.schedule.is_empty()) {
                sending = Some((mark.elapsed(), self.sent));
            }
            if self.now_ns >= (self.interval.second + 1) * SECOND_NS {
                self.publish_interval();
            }
            if self.now_ns >= next_sweep_ns {
                next_sweep_ns = self.now_ns + SWEEP_NS;
                self.sweep();
            }
            if self.connections.in_flight() == 0 && self.schedule.is_empty() {
                break;
            }
            let nap_ns = self.wake_ns(next_sweep_ns).saturating_sub(self.now_ns);
            let nap_ns = if nap_ns == 0 { 0 } else { nap_ns.max(NAP_MIN_NS) };
            self.connections.wait(nap_ns, &mut events)?;
            for event in events.iter() {
                let (asked, codes) = (&self.plan.asked, &mut self.codes);
                let ended = self.connections.handle(event, self.now_ns, |answer| judge(answer, asked, codes));
                if let Some((flight, verdict)) = ended {
                    self.complete(&flight, &verdict);
                }
                self.dispatch();
            }
        }
        self.publish_interval();
        let (usage, sent_in_time) = sending.unwrap_or_else(|| (mark.elapsed(), self.sent));
        let mut purchases = self.first_purchases;
        purchases.append(&mut self.second_purchases);
        Ok(Outcome {
            purchases,
            stats: self.stats,
            violations: self.violations,
            lag_us: self.lag_us,
            usage,
            arrivals: self.sent + self.abandoned,
            sent_in_time,
            sent: self.sent,
            last_sent_ns: self.last_sent_ns,
            retries_skipped: self.retries_skipped,
            connections: self.connections.tally(),
        })
    }

    fn tick(&mut self) {
        self.now_ns = nanos(self.start.elapsed());
        if let Some((count, oldest_ns)) = self.schedule.notice(self.now_ns) {
            // All that came due since the last look counts as late as the oldest: the worse reading.
            self.lag_us.saturating_record_n(((self.now_ns - oldest_ns) / 1000).max(1), u64::from(count));
        }
    }

    fn wake_ns(&self, next_sweep_ns: u64) -> u64 {
        let next = match self.schedule.next_ns() {
            Some(next) if next > self.now_ns || self.connections.has_idle() => Some(next),
            Some(_) => self.connections.retry_ns(),
            None => None,
        };
        next.map_or(next_sweep_ns, |next| next.min(next_sweep_ns))
    }

    /// Sends what is due as long as there are connections.
    fn dispatch(&mut self) {
        while self.schedule.next_ns().is_some_and(|at| at <= self.now_ns) {
            let Some(target) = self.connections.next_idle_target() else {
                return self.connections.open_more(self.schedule.backlog() as usize, self.now_ns);
            };
            let due = match self.schedule.take(self.now_ns) {
                Some(Next::Arrival { n, at_ns }) => self.arrive(n, at_ns),
                Some(Next::FollowUp(due)) => due,
                None => return,
            };
            self.send(target, due);
        }
    }

    /// A buyer arrives: their purchase, and what will follow from it, is entered.
    fn arrive(&mut self, n: u32, at_ns: u64) -> Due {
        let global = self.schedule.global(n);
        let buyers = self.plan.buyers.count();
        let (user, round) = (global % buyers, (global / buyers) as u16);
        let (seed, number) = (self.plan.seed, u64::from(global));
        let purchase = PurchaseIndex(self.first_purchases.len() as u32);
        self.first_purchases.push(Purchase::new(user, 2 * round));
        if self.plan.duplicates > 0.0 && chance(seed, number, 1) < self.plan.duplicates {
            let delay = (chance(seed, number, 2) * 2.0 - 1.0).max(0.0) * DUPLICATE_DELAY_NS;
            let at_ns = at_ns + delay as u64;
            self.schedule.follow_up(Due {
                at_ns,
                first_ns: at_ns,
                purchase,
                attempt: 1,
                reason: Reason::Duplicate,
            });
        }
        if self.plan.second_purchases > 0.0 && chance(seed, number, 3) < self.plan.second_purchases {
            let at_ns = at_ns + (chance(seed, number, 4) * SECOND_PURCHASE_DELAY_NS) as u64;
            let second = PurchaseIndex(self.second_purchases.len() as u32 | SECOND_BIT);
            let due = Due { at_ns, first_ns: at_ns, purchase: second, attempt: 1, reason: Reason::Second };
            if self.schedule.follow_up(due) {
                self.second_purchases.push(Purchase::new(user, 2 * round + 1));
            }
        }
        self.sent += 1;
        self.last_sent_ns = self.now_ns;
        self.interval.arrivals += 1;
        Due { at_ns, first_ns: at_ns, purchase, attempt: 1, reason: Reason::Arrival }
    }

    fn purchase(&mut self, index: PurchaseIndex) -> &mut Purchase {
        let at = (index.0 & !SECOND_BIT) as usize;
        if index.0 & SECOND_BIT == 0 { &mut self.first_purchases[at] } else { &mut self.second_purchases[at] }
    }

    fn send(&mut self, target: usize, due: Due) {
        let purchase = *self.purchase(due.purchase);
        self.scratch.clear();
        let request = &self.plan.targets[target].1;
        request.write(&self.plan.buyers, purchase.user, purchase.key, &mut self.scratch);
        let knew_order = purchase.order().is_some();
        match self.connections.send(&self.scratch, Flight { due, sent_ns: self.now_ns, knew_order }) {
            Ok(()) => {
                self.interval.requests += 1;
                self.stats.sent(due.reason);
            }
            // Not a byte went out: it goes over another connection, as if this one had been found closed a
            // moment earlier.
            Err(flight) => {
                if !self.schedule.follow_up(flight.due) {
                    self.retries_skipped += 1;
                }
            }
        }
    }

    fn complete(&mut self, flight: &Flight, verdict: &Verdict) {
        self.tick();
        let due = flight.due;
        let latency_us = (self.now_ns - due.at_ns) / 1000;
        self.stats.ended(verdict, latency_us);
        self.interval.ended(verdict, latency_us);
        let knew_before = self.purchase(due.purchase).order().is_some();
        if let Some(contradiction) = self.purchase(due.purchase).enter(verdict, flight.knew_order) {
            let purchase = *self.purchase(due.purchase);
            let (buyers, codes) = (&self.plan.buyers, &self.codes);
            self.violations.add(describe(contradiction, &purchase, buyers, codes));
        }
        if matches!(verdict.effect, Effect::Accepted { .. }) {
            if !knew_before {
                let after_us = (self.now_ns - due.first_ns) / 1000;
                self.stats.accepted_after_us.saturating_record(after_us.max(1));
            }
        } else if verdict.retryable && !knew_before && due.reason != Reason::Duplicate {
            self.retry(due, verdict);
        }
    }

    fn retry(&mut self, due: Due, verdict: &Verdict) {
        if due.attempt >= self.plan.max_attempts {
            return;
        }
        let backoff = BACKOFF_NS << (due.attempt - 1).min(10);
        let spread =
            mix(self.plan.seed ^ u64::from(due.purchase.0) << 16 ^ u64::from(due.attempt)) % (backoff / 2);
        let wait = match verdict.retry_after_s.filter(|_| self.plan.honour_retry_after) {
            Some(seconds) => (u64::from(seconds) * SECOND_NS).max(1) + spread,
            None => backoff / 2 + spread,
        };
        let retry = Due { at_ns: self.now_ns + wait, attempt: due.attempt + 1, reason: Reason::Retry, ..due };
        if retry.at_ns > self.stop_ns || !self.schedule.follow_up(retry) {
            self.retries_skipped += 1;
        }
    }

    fn sweep(&mut self) {
        if self.plan.interrupted.load(Ordering::Relaxed) {
            self.schedule.stop_arrivals();
            self.stop_ns = self.stop_ns.min(self.now_ns + nanos(self.plan.timeout));
        }
        for (flight, verdict) in self.connections.expire(self.now_ns, nanos(self.plan.timeout)) {
            self.complete(&flight, &verdict);
        }
        if self.now_ns >= self.stop_ns && !self.schedule.is_empty() {
            let now_ns = self.now_ns;
            for at_ns in self.schedule.abandon() {
                self.abandoned += 1;
                self.stats.unsent((now_ns - at_ns) / 1000);
            }
        }
    }

    fn publish_interval(&mut self) {
        let second = self.now_ns / SECOND_NS;
        let mut interval = std::mem::replace(&mut self.interval, Interval::new(second));
        interval.backlog = u64::from(self.schedule.backlog());
        // A full channel costs the live view a second, never the worker its time.
        let _ = self.intervals.try_send(interval);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A contradiction in words.
pub fn describe(
    contradiction: Contradiction,
    purchase: &Purchase,
    buyers: &Buyers,
    codes: &Codes,
) -> Violation {
    let uid = buyers.uid(purchase.user);
    let key = buyers.key(purchase.user, purchase.key);
    let (code, order, detail) = match contradiction {
        Contradiction::AnotherOrder { first, second } => (
            "replay_with_another_order",
            second,
            format!("user {uid} got order {first} and then order {second} under the same key {key}"),
        ),
        Contradiction::ReplayNotMarked(order) => (
            "replay_not_marked",
            order,
            format!(
                "order {order} was given to user {uid} twice under key {key} without Idempotent-Replayed"
            ),
        ),
        Contradiction::NotAsAsked(order) => (
            "wrong_acceptance",
            order,
            format!(
                "order {order} of user {uid} (key {key}) names another sale or quantity than was asked for"
            ),
        ),
        Contradiction::WinnerRefused(order, code) => (
            "winner_refused",
            order,
            format!(
                "user {uid} has order {order} and heard {} when asking again under key {key}",
                codes.name(code)
            ),
        ),
    };
    Violation { code: code.to_owned(), detail, order_id: Some(order.to_string()), uid: Some(uid) }
}

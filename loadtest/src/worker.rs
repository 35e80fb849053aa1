//! A worker: one thread, its own share of the arrivals and of the connections, and nothing shared with the
//! others while it runs. A request costs it a write, a read and its share of an `epoll_wait`.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::sync::mpsc;

use crate::connections::{Connections, Events, Flight};
use crate::impact::PULSES_PER_SECOND;
use crate::journey::Lives;
use crate::ledger_file::LedgerWriter;
use crate::outcome::{Codes, Op, Verdict, judge};
use crate::part::Part;
use crate::plan::{Gate, Plan};
use crate::record::Violations;
use crate::schedule::{Due, Next, Reason, Schedule};
use crate::selfcheck::{Mark, Usage};
use crate::stats::{Interval, Stats, histogram};

/// How often timeouts are looked for.
const SWEEP_NS: u64 = 20_000_000;
/// Sleeps are not shorter than this: at high rates a wake-up then serves several arrivals.
const NAP_MIN_NS: u64 = 20_000;
/// Connections that are to be warm are open after this long, or the load begins with those that are.
const WARM_WITHIN: Duration = Duration::from_secs(10);
pub(crate) const SECOND_NS: u64 = 1_000_000_000;
const PULSE_NS: u64 = SECOND_NS / PULSES_PER_SECOND as u64;

/// One worker; [`Worker::run`] is its thread.
pub struct Worker {
    pub(crate) plan: Arc<Plan>,
    pub(crate) codes: Codes,
    pub(crate) schedule: Schedule,
    pub(crate) connections: Connections,
    pub(crate) lives: Lives,
    ledger: LedgerWriter,
    /// The first error of the ledger file: without it there are no books.
    ledger_failed: Option<io::Error>,
    start: Instant,
    pub(crate) now_ns: u64,
    pub(crate) stop_ns: u64,
    scratch: Vec<u8>,
    pub(crate) stats: Stats,
    pub(crate) warmup: Stats,
    pub(crate) violations: Violations,
    lag_us: Histogram<u64>,
    skew_us: Histogram<u64>,
    pub(crate) interval: Interval,
    intervals: mpsc::Sender<Interval>,
    pub(crate) part: Part,
    pub(crate) retries_skipped: u64,
}

impl Worker {
    /// Worker `number` of a plan, whose record goes to `folder`; each second's counts go to `intervals`.
    pub fn new(
        plan: Arc<Plan>,
        number: u32,
        codes: Codes,
        folder: &Path,
        intervals: mpsc::Sender<Interval>,
    ) -> io::Result<Worker> {
        let schedule = Schedule::new(plan.arrivals.clone(), number, plan.workers);
        let addrs = plan.targets.iter().map(|(addr, _)| *addr).collect();
        let (ledger, path) = LedgerWriter::create(folder, number)?;
        let mut part = Part::new();
        part.ledgers.push(path);
        Ok(Worker {
            codes,
            connections: Connections::new(addrs, number as usize, plan.connections)?,
            lives: Lives::default(),
            ledger,
            ledger_failed: None,
            start: Instant::now(),
            now_ns: 0,
            stop_ns: plan.arrivals.end_ns().saturating_add(nanos(plan.timeout)),
            scratch: Vec::with_capacity(1024),
            stats: Stats::new(),
            warmup: Stats::new(),
            violations: Violations::default(),
            lag_us: histogram(3),
            skew_us: histogram(3),
            interval: Interval::new(0),
            intervals,
            part,
            retries_skipped: 0,
            schedule,
            plan,
        })
    }

    /// Runs the worker's share to its end: every request sent has an outcome.
    pub fn run(mut self, gate: &Gate) -> io::Result<Part> {
        // The default slack of 50 µs would be added to every sleep. Without the right to change it the
        // sleeps are a little less exact, nothing else.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
        let mut events = Events::new();
        if self.plan.warm_connections {
            self.warm(&mut events)?;
        }
        self.start = gate.wait();
        std::thread::sleep(self.start.saturating_duration_since(Instant::now()));
        let mark = Mark::now();
        let end_ns = self.plan.arrivals.end_ns();
        let mut sending: Option<(Usage, u64)> = None;
        let mut next_sweep_ns = SWEEP_NS;
        loop {
            self.tick();
            self.dispatch();
            if sending.is_none() && self.now_ns >= end_ns && (end_ns > 0 || self.schedule.arrivals_over()) {
                sending = Some((mark.elapsed(), self.part.sent));
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
                let (plan, codes) = (&self.plan, &mut self.codes);
                let ended = self.connections.handle(event, self.now_ns, |flight, answer| {
                    judge(flight.due.op, answer, plan.asked(flight.item), codes)
                });
                if let Some((flight, verdict)) = ended {
                    self.complete(&flight, &verdict);
                }
                self.dispatch();
            }
        }
        self.publish_interval();
        let (usage, sent_in_time) = sending.unwrap_or_else(|| (mark.elapsed(), self.part.sent));
        let leftover: Vec<_> = self.lives.drain().collect();
        for purchase in leftover {
            self.retire(&purchase);
        }
        self.ledger.finish()?;
        if let Some(err) = self.ledger_failed {
            return Err(err);
        }
        let mut part = self.part;
        part.stats = self.stats;
        part.warmup = self.warmup;
        part.violations = self.violations;
        part.lag_us = self.lag_us;
        part.skew_us = self.skew_us;
        part.usage.push(usage);
        part.sent_in_time = sent_in_time;
        part.arrivals += part.sent;
        part.retries_skipped = self.retries_skipped;
        part.connections = self.connections.tally();
        part.finished_ns = self.now_ns;
        Ok(part)
    }

    /// Opens all connections before the first arrival.
    fn warm(&mut self, events: &mut Events) -> io::Result<()> {
        let began = Instant::now();
        loop {
            let now_ns = nanos(began.elapsed());
            self.connections.open_more(usize::MAX, now_ns);
            if self.connections.all_idle() || began.elapsed() > WARM_WITHIN {
                self.connections.forget_time();
                return Ok(());
            }
            self.connections.wait(1_000_000, events)?;
            for event in events.iter() {
                let (plan, codes) = (&self.plan, &mut self.codes);
                let _ = self.connections.handle(event, now_ns, |flight, answer| {
                    judge(flight.due.op, answer, plan.asked(flight.item), codes)
                });
            }
        }
    }

    pub(crate) fn tick(&mut self) {
        self.now_ns = nanos(self.start.elapsed());
        if let Some((count, oldest_ns)) = self.schedule.notice(self.now_ns) {
            // All that came due since the last look counts as late as the oldest: the worse reading.
            self.lag_us.saturating_record_n(((self.now_ns - oldest_ns) / 1000).max(1), count);
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
            match self.schedule.take(self.now_ns) {
                Some(Next::Arrival { n, at_ns }) => {
                    self.part.sent += 1;
                    self.interval.arrivals += 1;
                    self.part.last_sent_ns = self.now_ns;
                    if let Some(due) = self.arrive(n, at_ns) {
                        self.send(target, due);
                    }
                }
                Some(Next::FollowUp(due)) => self.send(target, due),
                None => return,
            }
        }
    }

    fn send(&mut self, target: usize, due: Due) {
        // A burst is sent by one turn of the loop: each of its requests has a time of its own.
        self.now_ns = nanos(self.start.elapsed());
        let Some(live) = self.lives.get_mut(due.live) else { return };
        match due.op {
            Op::Purchase | Op::ForgedPurchase => live.asked = true,
            Op::Pay => live.purchase.pays(),
            Op::Cancel => live.purchase.cancels(),
            Op::ReadSale | Op::ReadOrder => {}
        }
        let (purchase, amount) = (live.purchase, live.amount);
        let sender = self.plan.sender(purchase.user, purchase.persona);
        let (requests, buyers, out) = (&self.plan.targets[target].1, &self.plan.buyers, &mut self.scratch);
        out.clear();
        match (due.op, purchase.order()) {
            (Op::Purchase, _) => requests.purchase(purchase.item, buyers, sender, purchase.key, None, out),
            (Op::ForgedPurchase, _) => {
                requests.purchase(purchase.item, buyers, sender, purchase.key, Some(purchase.user), out);
            }
            (Op::ReadOrder, Some(order)) => requests.read_order(order, buyers, sender, out),
            (Op::Cancel, Some(order)) => requests.cancel(order, buyers, sender, out),
            (Op::Pay, Some(order)) => {
                let coupon = seckill_domain::OrderId::from_number(purchase.coupon);
                requests.pay(order, amount, coupon, out);
            }
            // Without an order there is nothing to follow: the journey never comes here.
            (Op::ReadSale, _) | (Op::ReadOrder | Op::Cancel | Op::Pay, None) => {
                requests.read_sale(purchase.item, sender, out);
            }
        }
        let knew_order = purchase.order().is_some();
        let flight = Flight { due, sent_ns: self.now_ns, knew_order, item: purchase.item };
        match self.connections.send(&self.scratch, flight) {
            Ok(()) => {
                self.interval.requests += 1;
                let stats = if due.at_ns < self.plan.warmup_ns { &mut self.warmup } else { &mut self.stats };
                stats.sent(due.reason);
                if due.reason == Reason::Arrival && due.at_ns >= self.plan.warmup_ns {
                    self.skew_us.saturating_record(((self.now_ns - due.at_ns) / 1000).max(1));
                }
            }
            // Not a byte went out: it goes over another connection, as if this one had been found closed a
            // moment earlier.
            Err(flight) => {
                if !self.schedule.follow_up(flight.due) {
                    self.retries_skipped += 1;
                    self.let_go(due.live);
                }
            }
        }
    }

    fn complete(&mut self, flight: &Flight, verdict: &Verdict) {
        self.tick();
        let due = flight.due;
        let latency_us = self.now_ns.saturating_sub(due.at_ns) / 1000;
        let stats = if due.at_ns < self.plan.warmup_ns { &mut self.warmup } else { &mut self.stats };
        stats.ended(due.op, verdict, latency_us);
        let pulse = (self.now_ns % SECOND_NS / PULSE_NS) as usize;
        // What ends just after its second counts in the second's last hundredth: the interval is published
        // before the next one begins.
        let pulse =
            if self.now_ns / SECOND_NS > self.interval.second { PULSES_PER_SECOND - 1 } else { pulse };
        self.interval.ended(due.op, verdict, latency_us, pulse);
        self.proceed(flight, verdict);
        self.let_go(due.live);
    }

    /// One thing less is under way for a purchase; with the last one it is written down.
    pub(crate) fn let_go(&mut self, live: crate::schedule::LiveIndex) {
        if let Some(purchase) = self.lives.let_go(live) {
            self.retire(&purchase);
        }
    }

    fn retire(&mut self, purchase: &crate::record::Purchase) {
        self.part.purchases.count(purchase);
        if let Err(err) = self.ledger.write(purchase) {
            self.ledger_failed.get_or_insert(err);
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
                self.part.arrivals += 1;
                self.stats.unsent(now_ns.saturating_sub(at_ns) / 1000);
            }
        }
    }

    fn publish_interval(&mut self) {
        let second = self.now_ns / SECOND_NS;
        let mut interval = std::mem::replace(&mut self.interval, Interval::new(second));
        interval.backlog = self.schedule.backlog();
        // A full channel costs the live view a second, never the worker its time.
        let _ = self.intervals.try_send(interval);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

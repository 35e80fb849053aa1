//! A worker: one thread, one epoll set, its own share of the arrivals and connections, and nothing shared
//! with the others while it runs. A request costs it a write, a read and its share of an `epoll_wait`.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::event::{Timespec, epoll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use tokio::sync::mpsc;

use crate::buyers::{Buyers, chance, mix};
use crate::outcome::{Asked, Code, Codes, Effect, Verdict, judge};
use crate::record::{Contradiction, Purchase, Violation, Violations};
use crate::request::PurchaseRequest;
use crate::schedule::{Due, Next, PurchaseIndex, Reason, Schedule};
use crate::selfcheck::{Mark, Usage};
use crate::stats::{Interval, Stats, histogram};
use crate::wire;

/// The largest answer to a purchase that is read.
const ANSWER_MAX_BYTES: usize = 64 * 1024;
const ANSWER_START_BYTES: usize = 2048;
/// Connections being opened at the same time.
const CONNECTING_MAX: usize = 64;
/// After a failed connection attempt the next one waits this long.
const RECONNECT_NS: u64 = 50_000_000;
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
const EVENTS_MAX: usize = 256;
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
    /// Connections opened.
    pub connected: u64,
    /// Connection attempts that failed.
    pub connect_errors: u64,
    /// The most connections open at once.
    pub connections_peak: u64,
}

enum State {
    Connecting { since_ns: u64 },
    Idle,
    Busy,
}

struct Flight {
    due: Due,
    sent_ns: u64,
    knew_order: bool,
}

struct Conn {
    stream: TcpStream,
    generation: u32,
    target: usize,
    state: State,
    buf: Vec<u8>,
    filled: usize,
    unsent: Vec<u8>,
    flight: Option<Flight>,
}

/// One worker; [`Worker::run`] is its thread.
pub struct Worker {
    plan: Arc<Plan>,
    codes: Codes,
    schedule: Schedule,
    epoll: OwnedFd,
    start: Instant,
    now_ns: u64,
    stop_ns: u64,
    conns: Vec<Option<Conn>>,
    free: Vec<usize>,
    idle: Vec<usize>,
    connecting: usize,
    in_flight: usize,
    connect_after_ns: u64,
    next_target: usize,
    generation: u32,
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
    connected: u64,
    connect_errors: u64,
    connections_peak: usize,
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
        Ok(Worker {
            codes,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            start,
            now_ns: 0,
            stop_ns: nanos(plan.duration + plan.timeout),
            conns: Vec::new(),
            free: Vec::new(),
            idle: Vec::new(),
            connecting: 0,
            in_flight: 0,
            connect_after_ns: 0,
            next_target: number as usize,
            generation: 0,
            scratch: Vec::with_capacity(1024),
            first_purchases: Vec::with_capacity(share),
            second_purchases: Vec::new(),
            stats: Stats::new(),
            violations: Violations::default(),
            lag_us: histogram(3),
            interval: Interval::new(0),
            intervals,
            sent: 0,
            abandoned: 0,
            last_sent_ns: 0,
            retries_skipped: 0,
            connected: 0,
            connect_errors: 0,
            connections_peak: 0,
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
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS_MAX);
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
            if self.in_flight == 0 && self.schedule.is_empty() {
                break;
            }
            let wake_ns = self.wake_ns(next_sweep_ns);
            let nap = wake_ns.saturating_sub(self.now_ns);
            let nap = if nap == 0 { 0 } else { nap.max(NAP_MIN_NS) };
            let timeout = Timespec { tv_sec: (nap / SECOND_NS) as i64, tv_nsec: (nap % SECOND_NS) as i64 };
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(err) => return Err(err.into()),
            }
            for event in &events {
                let data = event.data.u64();
                self.on_event((data & u64::from(u32::MAX)) as usize, (data >> 32) as u32, event.flags);
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
            connected: self.connected,
            connect_errors: self.connect_errors,
            connections_peak: self.connections_peak as u64,
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
        let mut wake = next_sweep_ns;
        if let Some(next) = self.schedule.next_ns() {
            if next > self.now_ns || !self.idle.is_empty() {
                wake = wake.min(next);
            } else if self.open() < self.plan.connections && self.connecting == 0 {
                wake = wake.min(self.connect_after_ns);
            }
        }
        wake
    }

    /// Sends what is due as long as there are connections.
    fn dispatch(&mut self) {
        while self.schedule.next_ns().is_some_and(|at| at <= self.now_ns) {
            let Some(&conn) = self.idle.last() else {
                self.connect_more();
                return;
            };
            let Some(next) = self.schedule.take(self.now_ns) else { return };
            self.idle.pop();
            let due = match next {
                Next::Arrival { n, at_ns } => self.arrive(n, at_ns),
                Next::FollowUp(due) => due,
            };
            self.send(conn, due);
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

    fn send(&mut self, at: usize, due: Due) {
        let purchase = *self.purchase(due.purchase);
        let Some(conn) = self.conns[at].as_mut() else { return };
        self.scratch.clear();
        self.plan.targets[conn.target].1.write(
            &self.plan.buyers,
            purchase.user,
            purchase.key,
            &mut self.scratch,
        );
        let written = loop {
            match conn.stream.write(&self.scratch) {
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => break 0,
                Ok(written) => break written,
                Err(_) => {
                    // Not a byte went out: the request goes over another connection, as if this one had
                    // been found closed a moment earlier.
                    self.close(at);
                    if !self.schedule.follow_up(due) {
                        self.retries_skipped += 1;
                    }
                    return;
                }
            }
        };
        conn.state = State::Busy;
        conn.flight = Some(Flight { due, sent_ns: self.now_ns, knew_order: purchase.order().is_some() });
        self.in_flight += 1;
        self.interval.requests += 1;
        self.stats.sent(due.reason);
        if written < self.scratch.len() {
            conn.unsent.clear();
            conn.unsent.extend_from_slice(&self.scratch[written..]);
            self.watch(at, epoll::EventFlags::IN | epoll::EventFlags::OUT);
        }
    }

    fn on_event(&mut self, at: usize, generation: u32, flags: epoll::EventFlags) {
        let Some(conn) = self.conns[at].as_ref().filter(|conn| conn.generation == generation) else { return };
        match conn.state {
            State::Connecting { .. } => self.finish_connecting(at),
            State::Idle | State::Busy => {
                if flags.contains(epoll::EventFlags::OUT) && !self.send_rest(at) {
                    return;
                }
                if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                    self.receive(at);
                }
            }
        }
        self.dispatch();
    }

    /// `false` if the connection broke.
    fn send_rest(&mut self, at: usize) -> bool {
        let Some(conn) = self.conns[at].as_mut() else { return false };
        match conn.stream.write(&conn.unsent) {
            Ok(written) => {
                conn.unsent.drain(..written);
                if conn.unsent.is_empty() {
                    self.watch(at, epoll::EventFlags::IN);
                }
                true
            }
            Err(err) if matches!(err.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => true,
            Err(_) => {
                self.fail(at, Code::CONNECTION_LOST);
                false
            }
        }
    }

    fn receive(&mut self, at: usize) {
        loop {
            let Some(conn) = self.conns[at].as_mut() else { return };
            if conn.filled == conn.buf.len() {
                if conn.buf.len() >= ANSWER_MAX_BYTES {
                    return self.fail(at, Code::INVALID_ANSWER);
                }
                conn.buf.resize(conn.buf.len() * 2, 0);
            }
            let mut eof = false;
            match conn.stream.read(&mut conn.buf[conn.filled..]) {
                Ok(0) => eof = true,
                Ok(read) => conn.filled += read,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return self.fail(at, Code::CONNECTION_LOST),
            }
            if conn.flight.is_none() {
                // Closed while idle, or bytes nobody asked for: in both cases nothing is lost.
                return self.close(at);
            }
            match wire::parse_answer(&conn.buf[..conn.filled], eof) {
                Ok(Some(answer)) => {
                    let verdict = judge(&answer, &self.plan.asked, &mut self.codes);
                    let reusable = !answer.close && !eof && answer.consumed == conn.filled;
                    let reusable = reusable && conn.unsent.is_empty();
                    conn.filled = 0;
                    let flight = conn.flight.take();
                    if reusable {
                        conn.state = State::Idle;
                        self.idle.push(at);
                    } else {
                        self.close(at);
                    }
                    if let Some(flight) = flight {
                        self.complete(&flight, &verdict);
                    }
                    return;
                }
                Ok(None) if eof => return self.fail(at, Code::CONNECTION_LOST),
                Ok(None) if conn.filled < conn.buf.len() => return,
                Ok(None) => {}
                Err(_) => return self.fail(at, Code::INVALID_ANSWER),
            }
        }
    }

    /// The connection is of no more use; a request on it has an unknown fate.
    fn fail(&mut self, at: usize, code: Code) {
        let flight = self.conns[at].as_mut().and_then(|conn| conn.flight.take());
        self.close(at);
        if let Some(flight) = flight {
            self.complete(&flight, &Verdict::unknown(code));
        }
    }

    fn complete(&mut self, flight: &Flight, verdict: &Verdict) {
        self.tick();
        self.in_flight -= 1;
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
        let timeout_ns = nanos(self.plan.timeout);
        for at in 0..self.conns.len() {
            let Some(conn) = &self.conns[at] else { continue };
            if let State::Connecting { since_ns } = conn.state {
                if self.now_ns >= since_ns + timeout_ns {
                    self.connect_failed(at);
                }
            } else if conn.flight.as_ref().is_some_and(|flight| self.now_ns >= flight.sent_ns + timeout_ns) {
                self.fail(at, Code::TIMEOUT);
            }
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

    fn open(&self) -> usize {
        self.conns.len() - self.free.len()
    }

    fn connect_more(&mut self) {
        if self.now_ns < self.connect_after_ns {
            return;
        }
        let wanted =
            (self.schedule.backlog() as usize).clamp(1, CONNECTING_MAX).saturating_sub(self.connecting);
        let room = self.plan.connections - self.open();
        for _ in 0..wanted.min(room) {
            if self.connect().is_err() {
                self.connect_errors += 1;
                self.connect_after_ns = self.now_ns + RECONNECT_NS;
                return;
            }
        }
    }

    fn connect(&mut self) -> io::Result<()> {
        let target = self.next_target % self.plan.targets.len();
        self.next_target = self.next_target.wrapping_add(1);
        let addr = self.plan.targets[target].0;
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        match rustix::net::connect(&socket, &addr) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(err) => return Err(err.into()),
        }
        self.generation = self.generation.wrapping_add(1);
        let at = self.free.pop().unwrap_or_else(|| {
            self.conns.push(None);
            self.conns.len() - 1
        });
        let conn = Conn {
            stream: TcpStream::from(socket),
            generation: self.generation,
            target,
            state: State::Connecting { since_ns: self.now_ns },
            buf: vec![0; ANSWER_START_BYTES],
            filled: 0,
            unsent: Vec::new(),
            flight: None,
        };
        let added =
            epoll::add(&self.epoll, &conn.stream, event_data(at, conn.generation), epoll::EventFlags::OUT);
        if let Err(err) = added {
            self.free.push(at);
            return Err(err.into());
        }
        self.conns[at] = Some(conn);
        self.connecting += 1;
        self.connections_peak = self.connections_peak.max(self.open());
        Ok(())
    }

    fn finish_connecting(&mut self, at: usize) {
        let Some(conn) = self.conns[at].as_mut() else { return };
        if !matches!(conn.stream.take_error(), Ok(None)) {
            return self.connect_failed(at);
        }
        conn.state = State::Idle;
        self.connecting -= 1;
        self.connected += 1;
        self.idle.push(at);
        self.watch(at, epoll::EventFlags::IN);
    }

    fn connect_failed(&mut self, at: usize) {
        self.connecting -= 1;
        self.connect_errors += 1;
        self.connect_after_ns = self.now_ns + RECONNECT_NS;
        self.conns[at] = None;
        self.free.push(at);
    }

    fn watch(&mut self, at: usize, flags: epoll::EventFlags) {
        let Some(conn) = &self.conns[at] else { return };
        if epoll::modify(&self.epoll, &conn.stream, event_data(at, conn.generation), flags).is_err() {
            self.fail(at, Code::CONNECTION_LOST);
        }
    }

    /// Dropping the socket takes it out of the epoll set.
    fn close(&mut self, at: usize) {
        let Some(conn) = self.conns[at].take() else { return };
        if matches!(conn.state, State::Idle) {
            self.idle.retain(|idle| *idle != at);
        }
        self.free.push(at);
    }
}

fn event_data(at: usize, generation: u32) -> epoll::EventData {
    epoll::EventData::new_u64(u64::from(generation) << 32 | at as u64)
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

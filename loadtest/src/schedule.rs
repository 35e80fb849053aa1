//! When what is sent: arrivals, computed and not stored ([`crate::arrivals`]), and a heap of what follows from
//! them (second clicks, second purchases, retries, and the steps of a buyer's journey).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::arrivals::Arrivals;
use crate::outcome::Op;

/// Follow-ups that may wait in one worker (32 bytes each); beyond it they are left out and counted.
pub const FOLLOW_UPS_MAX: usize = 1_000_000;

/// Why a request is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A buyer arrives.
    Arrival,
    /// The same click once more.
    Duplicate,
    /// Another purchase by the same buyer.
    Second,
    /// After a retryable answer or none.
    Retry,
    /// The next step of the buyer's journey: a look, the click after thinking, a look at the order, a payment.
    Journey,
}

impl Reason {
    /// How many there are.
    pub const COUNT: usize = 5;
}

/// Which live purchase of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LiveIndex(pub u32);

/// A request that is to be sent. Ordered by its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Due {
    /// The intended send time, nanoseconds after the start: latency counts from here.
    pub at_ns: u64,
    /// The intended time of the purchase's first request.
    pub first_ns: u64,
    /// The purchase.
    pub live: LiveIndex,
    /// The number of this attempt, from 1.
    pub attempt: u16,
    /// What.
    pub op: Op,
    /// Why.
    pub reason: Reason,
}

/// The next thing that is due.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// An arrival.
    Arrival {
        /// Its number among all of the run.
        n: u64,
        /// The intended send time.
        at_ns: u64,
    },
    /// A follow-up.
    FollowUp(Due),
}

/// The schedule of one worker: every `workers`-th arrival is its own.
pub struct Schedule {
    arrivals: Arrivals,
    worker: u64,
    workers: u64,
    total: u64,
    next: u64,
    /// When the next arrival is due, kept because it is asked for all the time.
    next_at_ns: Option<u64>,
    noticed: u64,
    follow_ups: BinaryHeap<Reverse<Due>>,
}

impl Schedule {
    /// The share of one worker.
    pub fn new(arrivals: Arrivals, worker: u32, workers: u32) -> Schedule {
        let (worker, workers) = (u64::from(worker), u64::from(workers));
        let total = (arrivals.total() + workers - 1 - worker) / workers;
        let mut schedule = Schedule {
            arrivals,
            worker,
            workers,
            total,
            next: 0,
            next_at_ns: None,
            noticed: 0,
            follow_ups: BinaryHeap::new(),
        };
        schedule.next_at_ns = schedule.upcoming();
        schedule
    }

    /// Arrivals of this worker.
    pub fn total(&self) -> u64 {
        self.total
    }

    fn global(&self, n: u64) -> u64 {
        n * self.workers + self.worker
    }

    fn arrival_ns(&self, n: u64) -> u64 {
        self.arrivals.at_ns(self.global(n))
    }

    fn upcoming(&self) -> Option<u64> {
        (self.next < self.total).then(|| self.arrival_ns(self.next))
    }

    /// Arrivals that came due since the last call: how many, and the time of the oldest.
    pub fn notice(&mut self, now_ns: u64) -> Option<(u64, u64)> {
        if self.noticed == self.total {
            return None;
        }
        // Where nothing waits the next arrival is the oldest, and its time is known.
        let oldest = match self.next_at_ns {
            Some(at) if self.noticed == self.next => at,
            _ => self.arrival_ns(self.noticed),
        };
        if oldest > now_ns {
            return None;
        }
        let passed = self.arrivals.due(now_ns);
        let due = if passed > self.worker { (passed - self.worker - 1) / self.workers + 1 } else { 0 };
        let due = due.clamp(self.noticed + 1, self.total);
        let count = due - self.noticed;
        self.noticed = due;
        Some((count, oldest))
    }

    /// Arrivals that are due and not taken.
    pub fn backlog(&self) -> u64 {
        self.noticed.saturating_sub(self.next)
    }

    /// When the next request is due.
    pub fn next_ns(&self) -> Option<u64> {
        let follow_up = self.follow_ups.peek().map(|Reverse(due)| due.at_ns);
        match (self.next_at_ns, follow_up) {
            (Some(arrival), Some(follow_up)) => Some(arrival.min(follow_up)),
            (arrival, follow_up) => arrival.or(follow_up),
        }
    }

    /// Takes what is due at `now_ns`, oldest first.
    pub fn take(&mut self, now_ns: u64) -> Option<Next> {
        let arrival = self.next_at_ns;
        let follow_up = self.follow_ups.peek().map(|Reverse(due)| due.at_ns);
        match (arrival, follow_up) {
            (_, Some(at)) if at <= now_ns && arrival.is_none_or(|arrival| at <= arrival) => {
                self.follow_ups.pop().map(|Reverse(due)| Next::FollowUp(due))
            }
            (Some(at_ns), _) if at_ns <= now_ns => {
                let n = self.global(self.next);
                self.next += 1;
                self.next_at_ns = self.upcoming();
                Some(Next::Arrival { n, at_ns })
            }
            _ => None,
        }
    }

    /// Adds a follow-up; `false` if too many wait already.
    pub fn follow_up(&mut self, due: Due) -> bool {
        let room = self.follow_ups.len() < FOLLOW_UPS_MAX;
        if room {
            self.follow_ups.push(Reverse(due));
        }
        room
    }

    /// No arrival and no follow-up is left.
    pub fn is_empty(&self) -> bool {
        self.next == self.total && self.follow_ups.is_empty()
    }

    /// Every arrival has been taken.
    pub fn arrivals_over(&self) -> bool {
        self.next == self.total
    }

    /// No more arrivals from now on.
    pub fn stop_arrivals(&mut self) {
        self.total = self.total.min(self.noticed.max(self.next));
        self.next_at_ns = self.upcoming();
    }

    /// Gives up on what has not been sent: the intended times of the arrivals among it.
    pub fn abandon(&mut self) -> impl Iterator<Item = u64> + '_ {
        self.follow_ups.clear();
        let left = self.next..self.total;
        self.total = self.next;
        self.noticed = self.next;
        self.next_at_ns = None;
        left.map(|n| self.arrival_ns(n))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::arrivals::Stage;

    fn constant(rate: f64, arrivals: u64) -> Arrivals {
        Arrivals::new(&[Stage::constant(rate, Duration::from_secs_f64(arrivals as f64 / rate))])
    }

    fn follow_up(at_ns: u64) -> Due {
        let (op, reason) = (Op::Purchase, Reason::Duplicate);
        Due { at_ns, first_ns: 0, live: LiveIndex(0), attempt: 1, op, reason }
    }

    #[test]
    fn workers_share_the_arrivals_without_gap_or_overlap() {
        let mut numbers = Vec::new();
        for worker in 0..3 {
            let mut schedule = Schedule::new(constant(1000.0, 10), worker, 3);
            while let Some(Next::Arrival { n, at_ns }) = schedule.take(u64::MAX) {
                assert_eq!(at_ns / 1_000_000, n);
                numbers.push(n);
            }
        }
        numbers.sort_unstable();
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn the_oldest_goes_first_and_nothing_before_its_time() {
        let mut schedule = Schedule::new(constant(1000.0, 3), 0, 1);
        schedule.follow_up(follow_up(1_500_000));
        assert_eq!(schedule.take(0), Some(Next::Arrival { n: 0, at_ns: 0 }));
        assert_eq!(schedule.take(999_999), None);
        assert_eq!(schedule.take(5_000_000), Some(Next::Arrival { n: 1, at_ns: 1_000_000 }));
        assert_eq!(schedule.take(5_000_000), Some(Next::FollowUp(follow_up(1_500_000))));
        assert_eq!(schedule.take(5_000_000), Some(Next::Arrival { n: 2, at_ns: 2_000_000 }));
        assert!(schedule.is_empty());
    }

    #[test]
    fn each_arrival_is_noticed_once() {
        for workers in 1..4 {
            for worker in 0..workers {
                let mut schedule = Schedule::new(constant(1000.0, 100), worker, workers);
                let mut noticed = 0;
                for step in 0..300u64 {
                    if let Some((count, oldest)) = schedule.notice(step * 700_000) {
                        assert!(oldest <= step * 700_000);
                        noticed += count;
                    }
                }
                assert_eq!(noticed, schedule.total());
            }
        }
    }

    #[test]
    fn waiting_follow_ups_are_bounded() {
        let mut schedule = Schedule::new(constant(1.0, 1), 0, 1);
        assert!((0..FOLLOW_UPS_MAX as u64).all(|at| schedule.follow_up(follow_up(at))));
        assert!(!schedule.follow_up(follow_up(0)));
    }
}

//! When what is sent: arrivals at a constant rate, computed and not stored, and a heap of what follows from
//! them (second clicks, second purchases, retries).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

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
}

/// Which purchase of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PurchaseIndex(pub u32);

/// A request that is to be sent. Ordered by its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Due {
    /// The intended send time, nanoseconds after the start: latency counts from here.
    pub at_ns: u64,
    /// The intended time of the purchase's first request.
    pub first_ns: u64,
    /// The purchase.
    pub purchase: PurchaseIndex,
    /// The number of this attempt, from 1.
    pub attempt: u16,
    /// Why.
    pub reason: Reason,
}

/// The next thing that is due.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The worker's `n`-th arrival.
    Arrival {
        /// Which, counted within the worker.
        n: u32,
        /// The intended send time.
        at_ns: u64,
    },
    /// A follow-up.
    FollowUp(Due),
}

/// The schedule of one worker: every `workers`-th arrival is its own.
pub struct Schedule {
    interval_ns: f64,
    worker: u32,
    workers: u32,
    total: u32,
    next: u32,
    noticed: u32,
    follow_ups: BinaryHeap<Reverse<Due>>,
}

impl Schedule {
    /// `arrivals` at `rate` per second, all workers together.
    pub fn new(rate: f64, arrivals: u32, worker: u32, workers: u32) -> Schedule {
        let total = (arrivals + workers - 1 - worker) / workers;
        Schedule {
            interval_ns: 1e9 / rate,
            worker,
            workers,
            total,
            next: 0,
            noticed: 0,
            follow_ups: BinaryHeap::new(),
        }
    }

    /// Arrivals of this worker.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Arrivals already taken.
    pub fn taken(&self) -> u32 {
        self.next
    }

    /// The number of the worker's `n`-th arrival among all of the run.
    pub fn global(&self, n: u32) -> u32 {
        n * self.workers + self.worker
    }

    /// The intended time of the worker's `n`-th arrival.
    pub fn arrival_ns(&self, n: u32) -> u64 {
        (f64::from(self.global(n)) * self.interval_ns) as u64
    }

    /// Arrivals that came due since the last call: how many, and the time of the oldest.
    pub fn notice(&mut self, now_ns: u64) -> Option<(u32, u64)> {
        if self.noticed == self.total {
            return None;
        }
        let oldest = self.arrival_ns(self.noticed);
        if oldest > now_ns {
            return None;
        }
        let passed = (now_ns as f64 / self.interval_ns) as u64;
        let due = passed.saturating_sub(u64::from(self.worker)) / u64::from(self.workers) + 1;
        let due = u32::try_from(due).unwrap_or(u32::MAX).clamp(self.noticed + 1, self.total);
        let count = due - self.noticed;
        self.noticed = due;
        Some((count, oldest))
    }

    /// Arrivals that are due and not taken.
    pub fn backlog(&self) -> u32 {
        self.noticed - self.next
    }

    /// When the next request is due.
    pub fn next_ns(&self) -> Option<u64> {
        let arrival = (self.next < self.total).then(|| self.arrival_ns(self.next));
        let follow_up = self.follow_ups.peek().map(|Reverse(due)| due.at_ns);
        match (arrival, follow_up) {
            (Some(arrival), Some(follow_up)) => Some(arrival.min(follow_up)),
            (arrival, follow_up) => arrival.or(follow_up),
        }
    }

    /// Takes what is due at `now_ns`, oldest first.
    pub fn take(&mut self, now_ns: u64) -> Option<Next> {
        let arrival = (self.next < self.total).then(|| self.arrival_ns(self.next));
        let follow_up = self.follow_ups.peek().map(|Reverse(due)| due.at_ns);
        match (arrival, follow_up) {
            (_, Some(at)) if at <= now_ns && arrival.is_none_or(|arrival| at <= arrival) => {
                self.follow_ups.pop().map(|Reverse(due)| Next::FollowUp(due))
            }
            (Some(at_ns), _) if at_ns <= now_ns => {
                let n = self.next;
                self.next += 1;
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

    /// No more arrivals from now on.
    pub fn stop_arrivals(&mut self) {
        self.total = self.total.min(self.noticed.max(self.next));
    }

    /// Gives up on what has not been sent: the intended times of the arrivals among it.
    pub fn abandon(&mut self) -> impl Iterator<Item = u64> + '_ {
        self.follow_ups.clear();
        let left = self.next..self.total;
        self.total = self.next;
        self.noticed = self.next;
        let (interval, workers, worker) = (self.interval_ns, self.workers, self.worker);
        left.map(move |n| (f64::from(n * workers + worker) * interval) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow_up(at_ns: u64) -> Due {
        Due { at_ns, first_ns: 0, purchase: PurchaseIndex(0), attempt: 1, reason: Reason::Duplicate }
    }

    #[test]
    fn workers_share_the_arrivals_without_gap_or_overlap() {
        let mut times = Vec::new();
        for worker in 0..3 {
            let mut schedule = Schedule::new(1000.0, 10, worker, 3);
            while let Some(Next::Arrival { at_ns, .. }) = schedule.take(u64::MAX) {
                times.push(at_ns / 1_000_000);
            }
        }
        times.sort_unstable();
        assert_eq!(times, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn the_oldest_goes_first_and_nothing_before_its_time() {
        let mut schedule = Schedule::new(1000.0, 3, 0, 1);
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
                let mut schedule = Schedule::new(1000.0, 100, worker, workers);
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
        let mut schedule = Schedule::new(1.0, 1, 0, 1);
        assert!((0..FOLLOW_UPS_MAX as u64).all(|at| schedule.follow_up(follow_up(at))));
        assert!(!schedule.follow_up(follow_up(0)));
    }
}

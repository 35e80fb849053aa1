//! Purchases that a lane keeps because nothing may be attempted now: while the master moves, and while the authority
//! is on its way. They stay in the order in which they came, and each leaves when its time is over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::error::PurchaseError;
use super::metrics::InventoryMetrics;
use super::waiting::Waiting;

/// What all lanes of a service hold together while the master moves.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    /// How long a shift may hold a purchase.
    hold: Duration,
    max: usize,
    held: Arc<AtomicUsize>,
    metrics: Arc<InventoryMetrics>,
}

impl Bound {
    pub(super) fn new(hold: Duration, max: usize, metrics: &Arc<InventoryMetrics>) -> Bound {
        Bound { hold, max, held: Arc::default(), metrics: Arc::clone(metrics) }
    }

    /// Whether another purchase may be held by a shift.
    fn has_room(&self) -> bool {
        self.held.load(Ordering::Relaxed) < self.max
    }

    fn entered(&self) {
        self.held.fetch_add(1, Ordering::Relaxed);
        self.metrics.held.inc();
        self.metrics.held_total.inc();
    }

    fn left(&self, since: Instant) {
        self.held.fetch_sub(1, Ordering::Relaxed);
        self.metrics.held.dec();
        self.metrics.held_seconds.observe(since.elapsed().as_secs_f64());
    }
}

/// Why a purchase is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keeper {
    /// The master moves: counted, bounded in number and time.
    Shift,
    /// The authority is on its way; until the deadline.
    Authority,
}

/// One lane's purchases that are kept.
pub(super) struct Held {
    bound: Bound,
    by_turn: BTreeMap<u64, Stay>,
    by_expiry: BTreeSet<(Instant, u64)>,
}

struct Stay {
    waiting: Waiting,
    expires: Instant,
    /// Since when it is here because of a shift.
    shift_since: Option<Instant>,
}

impl Held {
    pub(super) fn new(bound: Bound) -> Held {
        Held { bound, by_turn: BTreeMap::new(), by_expiry: BTreeSet::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.by_turn.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_turn.is_empty()
    }

    /// When the time of one is over.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.by_expiry.first().map(|(expires, _)| *expires)
    }

    /// Keeps a purchase that no attempt was made for yet. Beyond the bound of a shift it is turned away.
    pub(super) fn take_in(&mut self, waiting: Waiting, keeper: Keeper) {
        match keeper {
            Keeper::Shift if !self.bound.has_room() => {
                self.bound.metrics.shifting.inc();
                waiting.refuse(PurchaseError::Shifting);
            }
            Keeper::Shift | Keeper::Authority => self.keep(waiting, keeper),
        }
    }

    /// Keeps a purchase that has been attempted. Their number is bounded by that of the attempts.
    pub(super) fn keep(&mut self, mut waiting: Waiting, keeper: Keeper) {
        let (expires, shift_since) = match keeper {
            Keeper::Shift => {
                let now = Instant::now();
                let since = *waiting.held_since.get_or_insert(now);
                waiting.why = Some(PurchaseError::Shifting);
                self.bound.entered();
                (waiting.deadline.min(since + self.bound.hold), Some(now))
            }
            Keeper::Authority => (waiting.deadline, None),
        };
        self.by_expiry.insert((expires, waiting.turn));
        self.by_turn.insert(waiting.turn, Stay { waiting, expires, shift_since });
    }

    /// A shift begins: it holds those that were kept for another reason, too.
    pub(super) fn shift_begins(&mut self) {
        let others: Vec<u64> = self
            .by_turn
            .iter()
            .filter(|(_, stay)| stay.shift_since.is_none())
            .map(|(turn, _)| *turn)
            .collect();
        for turn in others {
            if let Some(stay) = self.by_turn.remove(&turn) {
                self.by_expiry.remove(&(stay.expires, turn));
                match stay.waiting.sent_on {
                    None => self.keep(stay.waiting, Keeper::Shift),
                    Some(_) => stay.waiting.refuse(PurchaseError::Shifting),
                }
            }
        }
    }

    /// Takes up to so many out, those first that came first.
    pub(super) fn take(&mut self, max: usize) -> Vec<Waiting> {
        let mut batch = Vec::with_capacity(max.min(self.len()));
        while batch.len() < max
            && let Some((turn, stay)) = self.by_turn.pop_first()
        {
            self.by_expiry.remove(&(stay.expires, turn));
            batch.push(self.leave(stay));
        }
        batch
    }

    /// Answers those whose time is over.
    pub(super) fn answer_late(&mut self, now: Instant) {
        while let Some((expires, turn)) = self.by_expiry.first().copied()
            && expires <= now
        {
            self.by_expiry.pop_first();
            if let Some(stay) = self.by_turn.remove(&turn) {
                if stay.shift_since.is_some() {
                    self.bound.metrics.shifting.inc();
                }
                self.leave(stay).give_up();
            }
        }
    }

    fn leave(&self, stay: Stay) -> Waiting {
        if let Some(since) = stay.shift_since {
            self.bound.left(since);
        }
        stay.waiting
    }
}

impl Drop for Held {
    /// A lane that panics: what it held is answered by its senders' end and counts no more.
    fn drop(&mut self) {
        for stay in self.by_turn.values() {
            if let Some(since) = stay.shift_since {
                self.bound.left(since);
            }
        }
    }
}

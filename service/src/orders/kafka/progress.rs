//! Which entries a destination has acknowledged: the cursor moves over a contiguous prefix only.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use seckill_domain::OutboxId;
use tokio::sync::Notify;

/// Records on their way to one destination. Told of acknowledgements by the client library's thread.
#[derive(Debug, Default)]
pub(super) struct Progress {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Entries behind the prefix, oldest first, the first of them with the number `first`.
    entries: VecDeque<Entry>,
    first: usize,
    /// Up to where every entry is acknowledged, without a gap.
    reached: Option<OutboxId>,
    /// Records that are not acknowledged.
    in_flight: usize,
    failed: Option<String>,
}

#[derive(Debug)]
struct Entry {
    id: OutboxId,
    records: usize,
    unacknowledged: usize,
}

impl Progress {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is whole before the next line that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An entry is about to be sent as so many records, none where the destination is not concerned. Returns the
    /// number that each of its acknowledgements names.
    pub(super) fn begin(&self, id: OutboxId, records: usize) -> usize {
        let mut state = self.state();
        // What concerns nobody is counted with its like: a destination that is down holds up no memory.
        if records == 0
            && let Some(last) = state.entries.back_mut()
            && last.records == 0
        {
            last.id = id;
            return state.first + state.entries.len() - 1;
        }
        let number = state.first + state.entries.len();
        state.entries.push_back(Entry { id, records, unacknowledged: records });
        state.in_flight += records;
        state.advance();
        number
    }

    /// One record of an entry is acknowledged.
    pub(super) fn acknowledged(&self, number: usize) {
        let mut state = self.state();
        let place = number.checked_sub(state.first);
        if let Some(entry) = place.and_then(|place| state.entries.get_mut(place))
            && entry.unacknowledged > 0
        {
            entry.unacknowledged -= 1;
            state.in_flight -= 1;
            state.advance();
        }
        drop(state);
        self.changed.notify_one();
    }

    /// A record was not written, or nobody knows: the destination starts again from its cursor.
    pub(super) fn fail(&self, reason: String) {
        self.state().failed.get_or_insert(reason);
        self.changed.notify_one();
    }

    /// Up to where every entry is acknowledged.
    pub(super) fn reached(&self) -> Option<OutboxId> {
        self.state().reached
    }

    /// Records that are not acknowledged.
    pub(super) fn in_flight(&self) -> usize {
        self.state().in_flight
    }

    /// What went wrong, if anything.
    pub(super) fn failure(&self) -> Option<String> {
        self.state().failed.clone()
    }

    /// Waits for an acknowledgement or a failure since the last wait.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl State {
    fn advance(&mut self) {
        while let Some(entry) = self.entries.front()
            && entry.unacknowledged == 0
        {
            self.reached = Some(entry.id);
            self.entries.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seq: u64) -> OutboxId {
        OutboxId { epoch: 1, seq }
    }

    #[test]
    fn the_cursor_waits_for_the_oldest_record() {
        let progress = Progress::default();
        let first = progress.begin(at(2), 2);
        let second = progress.begin(at(3), 1);
        assert_eq!(progress.begin(at(4), 0), 2);
        assert_eq!(progress.begin(at(5), 0), 2);
        let last = progress.begin(at(6), 1);
        assert_eq!((progress.reached(), progress.in_flight()), (None, 4));
        progress.acknowledged(second);
        progress.acknowledged(first);
        assert_eq!(progress.reached(), None);
        progress.acknowledged(first);
        // The entry without records for this destination is passed for nothing.
        assert_eq!((progress.reached(), progress.in_flight()), (Some(at(5)), 1));
        progress.acknowledged(last);
        assert_eq!((progress.reached(), progress.in_flight()), (Some(at(6)), 0));
        // Late or doubled news of what is passed changes nothing.
        progress.acknowledged(first);
        assert_eq!((progress.reached(), progress.in_flight()), (Some(at(6)), 0));
    }

    #[test]
    fn the_first_failure_is_the_one_that_is_told() {
        let progress = Progress::default();
        let number = progress.begin(at(2), 1);
        progress.fail("gone".to_owned());
        progress.fail("purged".to_owned());
        assert_eq!(progress.failure().as_deref(), Some("gone"));
        assert_eq!((progress.reached(), number), (None, 0));
    }
}

//! A purchase while a lane has it, and the batch that is attempted with it.

use seckill_domain::{CenterId, CenterNumber, Epoch, OrderId};
use seckill_ledger::ReserveEntry;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::error::PurchaseError;
use super::route::Verdict;
use super::{Accepted, Purchase};

/// Where the buyer is at home.
#[derive(Clone)]
pub(super) struct Home {
    pub(super) center: CenterId,
    pub(super) number: CenterNumber,
}

/// A purchase in a lane.
pub(super) struct Waiting {
    pub(super) purchase: Purchase,
    pub(super) home: Home,
    pub(super) deadline: Instant,
    /// For a purchase that another center sent on: the epoch at which it did. At any other epoch, and while the
    /// master moves, it goes back to that center, which holds it and knows the next master as well as this one.
    pub(super) sent_on: Option<Epoch>,
    /// Its place in the lane: whoever came earlier has a lower one.
    pub(super) turn: u64,
    /// When a shift first held it.
    pub(super) held_since: Option<Instant>,
    /// Why it has not been decided yet.
    pub(super) why: Option<PurchaseError>,
    /// Set once an attempt may have been accepted without our hearing of it.
    pub(super) doubt: Option<PurchaseError>,
    answer: oneshot::Sender<Result<Accepted, PurchaseError>>,
}

impl Waiting {
    /// A purchase that has just come, and where its answer will be.
    pub(super) fn new(
        purchase: Purchase,
        home: Home,
        deadline: Instant,
        sent_on: Option<Epoch>,
    ) -> (Waiting, oneshot::Receiver<Result<Accepted, PurchaseError>>) {
        let (answer, outcome) = oneshot::channel();
        let waiting = Waiting {
            purchase,
            home,
            deadline,
            sent_on,
            turn: 0,
            held_since: None,
            why: None,
            doubt: None,
            answer,
        };
        (waiting, outcome)
    }

    /// What a decider needs of it.
    pub(super) fn entry(&self) -> ReserveEntry {
        ReserveEntry {
            uid: self.purchase.uid.clone(),
            key: self.purchase.key,
            quantity: self.purchase.quantity,
            center: self.home.number,
            traceparent: self.purchase.traceparent.clone(),
        }
    }

    fn accept(self, order_id: OrderId, replayed: bool) {
        let home_center = self.home.center.clone();
        self.settle(Ok(Accepted { order_id, replayed, home_center }));
    }

    /// Answers that it was not accepted, or, where an attempt may have been, that nobody knows.
    pub(super) fn refuse(mut self, error: PurchaseError) {
        let error = self.doubt.take().unwrap_or(error);
        self.settle(Err(error));
    }

    /// Answers why it was not decided in time.
    pub(super) fn give_up(mut self) {
        let error = self.why.take().unwrap_or(PurchaseError::Overloaded);
        self.refuse(error);
    }

    /// The client may be gone; then the ledger is what remembers.
    fn settle(self, answer: Result<Accepted, PurchaseError>) {
        let _ = self.answer.send(answer);
    }
}

/// Purchases of one sale that are attempted together. Each is answered by its own deadline, however long the
/// attempt goes on for the others.
pub(super) struct Batch {
    /// `None`: answered meanwhile.
    places: Vec<Option<Waiting>>,
    /// `None`: nobody is left.
    earliest: Option<Instant>,
    latest: Instant,
}

impl Batch {
    /// `None` if there is nothing to attempt.
    pub(super) fn new(waiting: Vec<Waiting>) -> Option<Batch> {
        let earliest = waiting.iter().map(|waiting| waiting.deadline).min()?;
        let latest = waiting.iter().map(|waiting| waiting.deadline).max()?;
        Some(Batch { places: waiting.into_iter().map(Some).collect(), earliest: Some(earliest), latest })
    }

    /// How many purchases are attempted, answered meanwhile or not.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn entries(&self) -> Vec<ReserveEntry> {
        self.places.iter().flatten().map(Waiting::entry).collect()
    }

    /// When the first of those that are left has to be answered; `None` once all are.
    pub(super) fn earliest(&self) -> Option<Instant> {
        self.earliest
    }

    /// Nobody waits for an answer after this.
    pub(super) fn latest(&self) -> Instant {
        self.latest
    }

    /// Answers those whose deadline has passed: they were sent, so nobody knows.
    pub(super) fn answer_late(&mut self, now: Instant, late: &PurchaseError) {
        for place in &mut self.places {
            if let Some(waiting) = place.take_if(|waiting| waiting.deadline <= now) {
                waiting.refuse(late.clone());
            }
        }
        self.earliest = self.places.iter().flatten().map(|waiting| waiting.deadline).min();
    }

    /// Answers what was decided; gives back the others, with what they are answered should their time be over.
    pub(super) fn answer(self, verdicts: Vec<Verdict>) -> Vec<Waiting> {
        debug_assert_eq!(self.places.len(), verdicts.len(), "a verdict for each purchase");
        let mut undecided = Vec::new();
        for (place, verdict) in self.places.into_iter().zip(verdicts) {
            let Some(mut waiting) = place else { continue };
            match verdict {
                Verdict::Accepted(order_id) => waiting.accept(order_id, false),
                // An attempt of ours whose reply was lost is no replay to the client.
                Verdict::Replay(order_id) => {
                    let replayed = waiting.doubt.is_none();
                    waiting.accept(order_id, replayed);
                }
                Verdict::Refused(error) => waiting.settle(Err(error)),
                Verdict::GivenUp(error) => waiting.refuse(error),
                Verdict::NotExecuted(error) => {
                    waiting.why = Some(error);
                    undecided.push(waiting);
                }
                Verdict::Unknown(error) => {
                    waiting.doubt = Some(error);
                    undecided.push(waiting);
                }
            }
        }
        undecided
    }
}

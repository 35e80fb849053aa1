//! The decider of every other center: an instance of the master center, over the cross-center API.
//!
//! A batch goes out as one signed call; the master's instance puts its purchases into its own lanes, where they
//! share calls of the ledger with its own buyers. Several batches are on their way at a time, because the way is
//! long; so many only that a batch grows while it waits for its turn.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use seckill_domain::SaleId;
use seckill_ledger::{Executed, ReserveEntry, StockMark};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::error::PurchaseError;
use super::metrics::InventoryMetrics;
use super::route::{Attempt, Verdict};
use super::sold_out::SoldOut;
use crate::cross_center::calls::{
    RESERVE, ReserveAnswer, ReserveCall, ReserveLine, ReserveOutcome, SoldOutMark, WireKey,
};
use crate::cross_center::{CallError, CrossCenter};

/// Batches of one lane on their way at the same time. At 30 ms between centers a batch leaves every 2 ms, and 512
/// purchases in each are 270,000 a second; a signed call costs both sides some tens of microseconds, so smaller
/// and more of them would only cost.
const IN_FLIGHT: usize = 16;
/// What the way to the master's instance and back takes of an attempt's time: several round trips between centers.
/// The instance may use the rest, so that its answer is here before this side gives the attempt up as unknown.
const WAY: Duration = Duration::from_millis(200);
/// With short deadlines the way takes this part of an attempt's time.
const WAY_PART: u32 = 5;

/// One lane's way to the master center.
pub(super) struct Remote {
    cross: CrossCenter,
    attempt_timeout: Duration,
    way: Duration,
    sold_out: Arc<SoldOut>,
    metrics: Arc<InventoryMetrics>,
    places: Arc<Semaphore>,
}

impl Remote {
    /// An attempt without an answer after `attempt_timeout` is unknown.
    pub(super) fn new(
        cross: CrossCenter,
        attempt_timeout: Duration,
        sold_out: Arc<SoldOut>,
        metrics: Arc<InventoryMetrics>,
    ) -> Remote {
        let places = Arc::new(Semaphore::new(IN_FLIGHT));
        let way = WAY.min(attempt_timeout / WAY_PART);
        Remote { cross, attempt_timeout, way, sold_out, metrics, places }
    }

    /// An attempt with less time would hardly hear what it came to.
    pub(super) fn least(&self) -> Duration {
        self.way * 2
    }

    /// Whether another batch may be sent now.
    pub(super) fn has_place(&self) -> bool {
        self.places.available_permits() > 0
    }

    /// Sends the batch; the answer is waited for beside the lane. Where a batch falls apart into several sales there
    /// may be no place for the last of them yet.
    pub(super) async fn attempt(
        &self,
        sale: &SaleId,
        entries: Vec<ReserveEntry>,
        deadline: Instant,
    ) -> Attempt {
        let until = deadline.min(Instant::now() + self.attempt_timeout);
        let busy = Verdict::NotExecuted(PurchaseError::MasterUnreachable { executed: Executed::No });
        let place = tokio::time::timeout_at(until, Arc::clone(&self.places).acquire_owned()).await;
        let (Ok(Ok(place)), Some(master)) = (place, self.cross.other_master()) else {
            return Attempt::all(busy, entries.len());
        };
        let timeout = deadline.min(Instant::now() + self.attempt_timeout) - Instant::now();
        let count = entries.len();
        let call = ReserveCall {
            sale_id: sale.clone(),
            deadline_ms: u64::try_from(timeout.saturating_sub(self.way).as_millis()).unwrap_or(u64::MAX),
            entries: entries.into_iter().map(line).collect(),
        };
        self.metrics.batches.inc();
        self.metrics.batched.inc_by(count as u64);
        let (cross, sold_out, metrics) =
            (self.cross.clone(), Arc::clone(&self.sold_out), Arc::clone(&self.metrics));
        let answered = async move {
            let answer = cross.call::<_, ReserveAnswer>(&master, RESERVE, &call, timeout).await;
            drop(place);
            match answer {
                Ok(ReserveAnswer { outcomes, sold_out: mark }) if outcomes.len() == count => {
                    if let Some(SoldOutMark { outbox, revision }) = mark {
                        sold_out.observe(&call.sale_id, StockMark { outbox, revision });
                    }
                    outcomes.into_iter().map(verdict).collect()
                }
                other => {
                    let error = match other {
                        Ok(_) => CallError::Unknown("an answer for another number of purchases".to_owned()),
                        Err(error) => error,
                    };
                    tracing::debug!(%error, sale = %call.sale_id, entries = count, "a batch was not decided by the master center");
                    let executed = error.executed();
                    let late = PurchaseError::MasterUnreachable { executed };
                    let verdict = match executed {
                        Executed::No => Verdict::NotExecuted(late),
                        Executed::Unknown => {
                            metrics.unknown.inc();
                            Verdict::Unknown(late)
                        }
                    };
                    vec![verdict; count]
                }
            }
        };
        let late = PurchaseError::MasterUnreachable { executed: Executed::Unknown };
        Attempt::Pending { rest: answered.boxed(), late }
    }
}

fn line(entry: ReserveEntry) -> ReserveLine {
    ReserveLine(entry.uid, WireKey(entry.key), entry.quantity, entry.center, entry.traceparent)
}

fn verdict(outcome: ReserveOutcome) -> Verdict {
    match outcome {
        ReserveOutcome::Accepted(order_id) => Verdict::Accepted(order_id),
        ReserveOutcome::Replayed(order_id) => Verdict::Replay(order_id),
        ReserveOutcome::KeyReused => Verdict::Refused(PurchaseError::KeyReused),
        ReserveOutcome::SaleNotFound => Verdict::Refused(PurchaseError::SaleNotFound),
        ReserveOutcome::Paused => Verdict::Refused(PurchaseError::Paused),
        ReserveOutcome::NotStarted { starts_at, retry_after_s } => {
            Verdict::Refused(PurchaseError::NotStarted { starts_at, retry_after_s })
        }
        ReserveOutcome::Ended => Verdict::Refused(PurchaseError::Ended),
        ReserveOutcome::LimitExceeded => Verdict::Refused(PurchaseError::LimitExceeded),
        ReserveOutcome::SoldOut => Verdict::Refused(PurchaseError::SoldOut),
        ReserveOutcome::InsufficientStock { remaining } => {
            Verdict::Refused(PurchaseError::InsufficientStock { remaining })
        }
        // Whoever waits behind a full lane is told at once, here as there.
        ReserveOutcome::Overloaded => Verdict::GivenUp(PurchaseError::Overloaded),
        ReserveOutcome::NoAuthority(reason) => {
            Verdict::NotExecuted(PurchaseError::NoAuthority(reason.into()))
        }
        ReserveOutcome::Shifting => Verdict::NotExecuted(PurchaseError::Shifting),
        ReserveOutcome::LedgerFull => Verdict::GivenUp(PurchaseError::LedgerFull),
        ReserveOutcome::NotExecuted => {
            Verdict::NotExecuted(PurchaseError::MasterUnreachable { executed: Executed::No })
        }
        ReserveOutcome::NotReplicated => Verdict::Unknown(PurchaseError::NotReplicated),
        ReserveOutcome::Unknown => {
            Verdict::Unknown(PurchaseError::MasterUnreachable { executed: Executed::Unknown })
        }
    }
}

//! The decider of the master center: the script `reserve` in this center's Redis.
//!
//! What a call's failure means:
//!
//! | failure | what happened | verdict |
//! | --- | --- | --- |
//! | refused by the fence, replica, loading, connection refused | nothing | not executed |
//! | timeout, connection lost | unknown | unknown; a new connection is opened for the next attempt |
//! | memory bound | nothing | given up with `ledger_full` |

use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use seckill_domain::SaleId;
use seckill_ledger::{Error, Executed, Fence, ReserveEntry, ReserveOutcome, ReserveReply, reserve};

use super::PARTITION;
use super::connection::Target;
use super::error::PurchaseError;
use super::metrics::InventoryMetrics;
use super::route::{Attempt, Verdict};
use super::sold_out::SoldOut;
use crate::topology::{Authority, Grant};

/// One lane's way to this center's Redis: a connection of its own with one call at a time under way.
pub(super) struct Local {
    target: Target,
    conn: Option<MultiplexedConnection>,
    authority: Authority,
    sold_out: Arc<SoldOut>,
    metrics: Arc<InventoryMetrics>,
}

impl Local {
    pub(super) fn new(
        target: Target,
        authority: Authority,
        sold_out: Arc<SoldOut>,
        metrics: Arc<InventoryMetrics>,
    ) -> Local {
        Local { target, conn: None, authority, sold_out, metrics }
    }

    /// Makes one call for the batch, under the grant that the authority gave for it.
    pub(super) async fn attempt(
        &mut self,
        grant: &Grant,
        sale: &SaleId,
        entries: &[ReserveEntry],
    ) -> Attempt {
        match self.call(&grant.fence, sale, entries).await {
            Ok(reply) => Attempt::Done(self.verdicts(&grant.fence, sale, reply)),
            Err(Error::Full) => Attempt::all(Verdict::GivenUp(PurchaseError::LedgerFull), entries.len()),
            Err(error) => {
                self.conn = None;
                self.authority.suspect();
                tracing::debug!(%error, %sale, entries = entries.len(), "a batch was not decided");
                let executed = error.executed();
                let late = PurchaseError::MasterUnreachable { executed };
                let verdict = match executed {
                    Executed::No => Verdict::NotExecuted(late),
                    Executed::Unknown => {
                        self.metrics.unknown.inc();
                        Verdict::Unknown(late)
                    }
                };
                Attempt::all(verdict, entries.len())
            }
        }
    }

    async fn call(
        &mut self,
        fence: &Fence,
        sale: &SaleId,
        entries: &[ReserveEntry],
    ) -> Result<ReserveReply, Error> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.target.connect().await.map_err(not_sent)?,
        };
        self.metrics.batches.inc();
        self.metrics.batched.inc_by(entries.len() as u64);
        let reply = reserve(&mut conn, fence, PARTITION, sale, entries).await?;
        self.conn = Some(conn);
        Ok(reply)
    }

    /// What a reply means. The authority is asked again (A2): an acceptance under an authority that has ended
    /// meanwhile may not be the truth any more.
    fn verdicts(&self, fence: &Fence, sale: &SaleId, reply: ReserveReply) -> Vec<Verdict> {
        let still = self.authority.grant().is_ok_and(|now| now.fence.epoch == fence.epoch);
        if reply.outcomes.contains(&ReserveOutcome::SoldOut) {
            self.sold_out.observe(sale, reply.mark);
        }
        let now = reply.now;
        let verdict = |outcome| match outcome {
            ReserveOutcome::Accepted(_) | ReserveOutcome::Replay(_) if !still => {
                Verdict::Unknown(PurchaseError::MasterUnreachable { executed: Executed::Unknown })
            }
            ReserveOutcome::Accepted(order_id) => Verdict::Accepted(order_id),
            ReserveOutcome::Replay(order_id) => Verdict::Replay(order_id),
            ReserveOutcome::KeyReused => Verdict::Refused(PurchaseError::KeyReused),
            ReserveOutcome::NotFound => Verdict::Refused(PurchaseError::SaleNotFound),
            ReserveOutcome::Paused => Verdict::Refused(PurchaseError::Paused),
            ReserveOutcome::NotStarted { starts_at } => Verdict::Refused(PurchaseError::NotStarted {
                starts_at,
                retry_after_s: starts_at.since_ms(now).div_ceil(1000).max(1),
            }),
            ReserveOutcome::Ended => Verdict::Refused(PurchaseError::Ended),
            ReserveOutcome::Limit => Verdict::Refused(PurchaseError::LimitExceeded),
            ReserveOutcome::SoldOut => Verdict::Refused(PurchaseError::SoldOut),
            ReserveOutcome::Insufficient { remaining } => {
                Verdict::Refused(PurchaseError::InsufficientStock { remaining })
            }
        };
        reply.outcomes.into_iter().map(verdict).collect()
    }
}

/// A connection that could not be opened carried nothing, whatever went wrong.
fn not_sent(error: Error) -> Error {
    match error.executed() {
        Executed::No => error,
        Executed::Unknown => Error::Rejected(error.to_string()),
    }
}

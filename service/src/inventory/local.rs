//! The decider of the master center: the script `reserve` in this center's Redis.
//!
//! What a call's failure means:
//!
//! | failure | what happened | verdict |
//! | --- | --- | --- |
//! | refused by the fence, replica, loading, connection refused | nothing | not executed |
//! | timeout, connection lost | unknown | unknown; a new connection is opened for the next attempt |
//! | memory bound | nothing | given up with `ledger_full` |
//! | not confirmed by the replicas, or the epoch ended meanwhile | unknown | unknown |
//!
//! With durability `replicated` the lane goes on with its next batch while the ones before wait for their barrier
//! ([`super::barrier`]). Acceptances and replays stand behind it alike (K3): the call that a replay repeats may have
//! died before its own barrier. The other answers need none. They promise nothing: should the master be lost
//! with the acceptances that led to a `sold_out` or a `limit_exceeded`, then somebody was turned away who could
//! have bought, as it happens to those who come a moment too early.

use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use seckill_domain::SaleId;
use seckill_ledger::{Error, Executed, Refusal, ReserveEntry, ReserveOutcome, ReserveReply, reserve};

use super::PARTITION;
use super::barrier::{Barrier, Unconfirmed};
use super::connection::Target;
use super::error::PurchaseError;
use super::metrics::InventoryMetrics;
use super::route::{Attempt, Verdict};
use super::sold_out::SoldOut;
use crate::topology::{Acknowledge, Authority, Grant};

/// One lane's way to this center's Redis: a connection of its own with one call at a time under way.
pub(super) struct Local {
    target: Target,
    conn: Option<Connection>,
    barrier: Barrier,
    authority: Authority,
    sold_out: Arc<SoldOut>,
    metrics: Arc<InventoryMetrics>,
}

/// A connection, and the run of the server that it leads to.
type Connection = (MultiplexedConnection, Arc<str>);

impl Local {
    pub(super) fn new(
        target: Target,
        barrier: Barrier,
        authority: Authority,
        sold_out: Arc<SoldOut>,
        metrics: Arc<InventoryMetrics>,
    ) -> Local {
        Local { target, conn: None, barrier, authority, sold_out, metrics }
    }

    /// Makes one call for the batch, under the grant that the authority gave for it.
    pub(super) async fn attempt(
        &mut self,
        grant: &Arc<Grant>,
        sale: &SaleId,
        entries: &[ReserveEntry],
    ) -> Attempt {
        match self.call(grant, sale, entries).await {
            Ok((reply, run_id)) => self.decided(grant, run_id, sale, reply),
            Err(Error::Full) => Attempt::all(Verdict::GivenUp(PurchaseError::LedgerFull), entries.len()),
            Err(error) => {
                self.conn = None;
                self.authority.suspect();
                tracing::debug!(%error, %sale, entries = entries.len(), "a batch was not decided");
                let executed = error.executed();
                let late = match &error {
                    // Another epoch than the one that this service knows: it will hear of it.
                    Error::Refused(Refusal::StaleEpoch { .. } | Refusal::FutureEpoch { .. }) => {
                        PurchaseError::NoAuthority(error.to_string().into())
                    }
                    _ => PurchaseError::MasterUnreachable { executed },
                };
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
        grant: &Grant,
        sale: &SaleId,
        entries: &[ReserveEntry],
    ) -> Result<(ReserveReply, Arc<str>), Error> {
        let admitted = grant.run_id(PARTITION);
        let (mut conn, run_id) = match self.conn.take() {
            Some(conn) if admitted.is_none_or(|admitted| *admitted == *conn.1) => conn,
            Some(_) | None => self.target.connect_to(admitted).await.map_err(not_sent)?,
        };
        self.metrics.batches.inc();
        self.metrics.batched.inc_by(entries.len() as u64);
        let reply = reserve(&mut conn, &grant.fence, PARTITION, sale, entries).await?;
        self.conn = Some((conn, Arc::clone(&run_id)));
        Ok((reply, run_id))
    }

    /// What a reply means, at once or behind the barrier.
    fn decided(&self, grant: &Arc<Grant>, run_id: Arc<str>, sale: &SaleId, reply: ReserveReply) -> Attempt {
        if reply.outcomes.contains(&ReserveOutcome::SoldOut) {
            self.sold_out.observe(sale, reply.mark);
        }
        let verdicts = verdicts(reply);
        let promises =
            verdicts.iter().any(|verdict| matches!(verdict, Verdict::Accepted(_) | Verdict::Replay(_)));
        match grant.acknowledge {
            // The authority is asked again (A2): an acceptance under an authority that has ended meanwhile may not
            // be the truth any more.
            Acknowledge::Local => match self.authority.grant() {
                Ok(now) if now.fence.epoch == grant.fence.epoch => Attempt::Done(verdicts),
                Ok(_) | Err(_) => {
                    let error = PurchaseError::MasterUnreachable { executed: Executed::Unknown };
                    Attempt::Done(in_doubt(verdicts, &error))
                }
            },
            Acknowledge::Replicated { .. } if !promises => Attempt::Done(verdicts),
            Acknowledge::Replicated { .. } => {
                let (barrier, grant) = (self.barrier.clone(), Arc::clone(grant));
                let rest = async move {
                    match barrier.confirm(&grant, &run_id).await {
                        Ok(()) => verdicts,
                        Err(Unconfirmed) => in_doubt(verdicts, &PurchaseError::NotReplicated),
                    }
                };
                Attempt::Pending { rest: Box::pin(rest), late: PurchaseError::NotReplicated }
            }
        }
    }
}

/// An acceptance that may not be the truth any more, or not survive, is none yet.
fn in_doubt(mut verdicts: Vec<Verdict>, error: &PurchaseError) -> Vec<Verdict> {
    for verdict in &mut verdicts {
        if matches!(verdict, Verdict::Accepted(_) | Verdict::Replay(_)) {
            *verdict = Verdict::Unknown(error.clone());
        }
    }
    verdicts
}

fn verdicts(reply: ReserveReply) -> Vec<Verdict> {
    let now = reply.now;
    let verdict = |outcome| match outcome {
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

/// A connection that could not be opened carried nothing, whatever went wrong.
fn not_sent(error: Error) -> Error {
    match error.executed() {
        Executed::No => error,
        Executed::Unknown => Error::Rejected(error.to_string()),
    }
}

//! What other centers ask of this one's inventory.

use std::time::Duration;

use seckill_domain::{Epoch, SaleId};
use seckill_ledger::admin::{self, ReclaimEntry};
use seckill_ledger::{Executed, ReleaseEntry};
use tokio::time::Instant;

use super::error::{PurchaseError, Unavailable};
use super::waiting::Home;
use super::{Accepted, Inventory, Purchase};
use crate::cross_center::calls::{
    ReclaimAnswer, ReclaimOutcome, ReleaseAnswer, ReleaseOutcome, ReserveAnswer, ReserveCall, ReserveLine,
    ReserveOutcome, SoldOutMark, WireKey,
};

impl Inventory {
    /// Decides purchases that reached another center, in the lanes that this center's own go through. Whoever
    /// drops the future loses the answer and nothing else. They are decided at this epoch, the caller's, or not at
    /// all: what finds another one, or the master about to move, goes back undone.
    pub async fn decide_for_others(&self, epoch: Epoch, call: ReserveCall) -> ReserveAnswer {
        let ReserveCall { sale_id, deadline_ms, entries } = call;
        let lanes = &self.0.lanes;
        let deadline = Instant::now() + Duration::from_millis(deadline_ms).min(lanes.deadline());
        let topology = self.0.topology.current();
        let mut waiting = Vec::with_capacity(entries.len());
        for ReserveLine(uid, WireKey(key), quantity, number, traceparent) in entries {
            let purchase = Purchase { uid, sale_id: sale_id.clone(), key, quantity, traceparent };
            if self.0.sold_out.rejects(&purchase) {
                self.0.metrics.marker_hits.inc();
                waiting.push(Err(PurchaseError::SoldOut));
                continue;
            }
            // The number goes into the order id; the caller, whose buyers they are, knows it best.
            let home = topology.centers.iter().find(|(_, center)| center.number == number);
            let center = home.map_or_else(|| topology.master.clone(), |(id, _)| id.clone());
            waiting.push(lanes.put(purchase, Home { center, number }, deadline, Some(epoch)));
        }
        let mut outcomes = Vec::with_capacity(waiting.len());
        for answer in waiting {
            let decided = match answer {
                Ok(answer) => answer
                    .await
                    .unwrap_or(Err(PurchaseError::MasterUnreachable { executed: Executed::Unknown })),
                Err(error) => Err(error),
            };
            outcomes.push(outcome(decided));
        }
        let sold_out = outcomes.contains(&ReserveOutcome::SoldOut).then(|| self.0.sold_out.mark_of(&sale_id));
        let sold_out =
            sold_out.flatten().map(|mark| SoldOutMark { outbox: mark.outbox, revision: mark.revision });
        ReserveAnswer { outcomes, sold_out }
    }

    /// Gives back the units of orders that were closed in another center; idempotent by order id.
    pub async fn release_for_others(
        &self,
        sale_id: &SaleId,
        orders: &[ReleaseEntry],
    ) -> Result<ReleaseAnswer, Unavailable> {
        let mut write = self.begin().await?;
        let outcomes = seckill_ledger::release(&mut write.conn, &write.grant.fence, sale_id, orders).await?;
        write.counted().await?;
        let outcomes = outcomes
            .into_iter()
            .map(|outcome| match outcome {
                seckill_ledger::ReleaseOutcome::Released => ReleaseOutcome::Released,
                seckill_ledger::ReleaseOutcome::AlreadyReleased => ReleaseOutcome::AlreadyReleased,
                seckill_ledger::ReleaseOutcome::Unknown => ReleaseOutcome::Unknown,
            })
            .collect();
        Ok(ReleaseAnswer { outcomes, kept_at: write.grant.degraded.then_some(write.grant.fence.epoch.0) })
    }

    /// Claims orders again that a shift lost (H6), where stock and limit allow, as the master; idempotent by order id.
    pub async fn reclaim(
        &self,
        sale_id: &SaleId,
        orders: &[ReclaimEntry],
    ) -> Result<ReclaimAnswer, Unavailable> {
        let mut write = self.begin().await?;
        let outcomes = admin::reclaim(&mut write.conn, &write.grant.fence, sale_id, orders).await?;
        write.counted().await?;
        let outcomes = outcomes
            .into_iter()
            .map(|outcome| match outcome {
                admin::ReclaimOutcome::Claimed => ReclaimOutcome::Claimed,
                admin::ReclaimOutcome::Held => ReclaimOutcome::Held,
                admin::ReclaimOutcome::OtherOrder => ReclaimOutcome::OtherOrder,
                admin::ReclaimOutcome::Limit => ReclaimOutcome::Limit,
                admin::ReclaimOutcome::NotEnough => ReclaimOutcome::NotEnough,
                admin::ReclaimOutcome::NoSale => ReclaimOutcome::NoSale,
                admin::ReclaimOutcome::Archived => ReclaimOutcome::Archived,
            })
            .collect();
        Ok(ReclaimAnswer { outcomes, kept_at: write.grant.degraded.then_some(write.grant.fence.epoch.0) })
    }
}

fn outcome(decided: Result<Accepted, PurchaseError>) -> ReserveOutcome {
    match decided {
        Ok(Accepted { order_id, replayed: false, .. }) => ReserveOutcome::Accepted(order_id),
        Ok(Accepted { order_id, replayed: true, .. }) => ReserveOutcome::Replayed(order_id),
        Err(error) => match error {
            PurchaseError::SaleNotFound => ReserveOutcome::SaleNotFound,
            PurchaseError::Paused => ReserveOutcome::Paused,
            PurchaseError::NotStarted { starts_at, retry_after_s } => {
                ReserveOutcome::NotStarted { starts_at, retry_after_s }
            }
            PurchaseError::Ended => ReserveOutcome::Ended,
            PurchaseError::LimitExceeded => ReserveOutcome::LimitExceeded,
            PurchaseError::SoldOut => ReserveOutcome::SoldOut,
            PurchaseError::InsufficientStock { remaining } => ReserveOutcome::InsufficientStock { remaining },
            PurchaseError::KeyReused => ReserveOutcome::KeyReused,
            PurchaseError::Overloaded => ReserveOutcome::Overloaded,
            PurchaseError::NoAuthority(reason) => ReserveOutcome::NoAuthority(reason.to_string()),
            PurchaseError::Shifting => ReserveOutcome::Shifting,
            PurchaseError::LedgerFull => ReserveOutcome::LedgerFull,
            PurchaseError::NotReplicated => ReserveOutcome::NotReplicated,
            PurchaseError::MasterUnreachable { executed: Executed::No } => ReserveOutcome::NotExecuted,
            PurchaseError::MasterUnreachable { executed: Executed::Unknown } => ReserveOutcome::Unknown,
        },
    }
}

//! Adopting a ledger: what is there is the truth from here on, and what the order database knows is put back
//! into it before anything is sold.
//!
//! No replica has that, so none is in sync from the moment when an adoption begins; each comes back at a later epoch,
//! once it has shown its fence and so has everything before it (D2). Until then a release counts as little as
//! one of any degraded epoch: its record is kept and sent again (K4).

use std::collections::{BTreeMap, HashMap};

use redis::aio::MultiplexedConnection;
use seckill_domain::{Epoch, KeyDigest, LedgerState, OrderId, OrderStatus, Quantity, SaleId, Uid};
use seckill_ledger::admin::{FenceChange, ReclaimEntry, ReclaimOutcome, reclaim};
use seckill_ledger::{Fence, InvalidFence, MAX_BATCH, ReleaseEntry, ReleaseOutcome, read, release};
use serde::Serialize;

use super::ledger::{Ledger, LedgerError};
use crate::orders::{self, AdminOrder, OrderStore};
use crate::topology::Durability;

/// Orders read from the database at once.
const PAGE: u32 = 1000;
/// Paid orders without a claim that a report names one by one; the rest is only counted.
const NAMED_MAX: usize = 1000;
/// Why an order was cancelled that could not be claimed again, as the shop sees it.
const LOST: &str = "ledger_adopted";

/// What became of an adoption.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AdoptReport {
    /// The inventory partition.
    pub partition: u8,
    /// The fence that was found, if there was one.
    pub found: Option<String>,
    /// The epoch that began.
    pub epoch: u64,
    /// Cancelled and expired orders whose units the ledger still held: given back.
    pub released: u64,
    /// Stored orders that the ledger knows.
    pub held: u64,
    /// Stored orders that were claimed again.
    pub reclaimed: u64,
    /// Unpaid orders that could not be claimed again and were cancelled.
    pub cancelled: u64,
    /// Paid orders that could not be claimed again. They stay paid.
    pub paid_without_claim: u64,
    /// The first thousand of these.
    pub paid_orders_without_claim: Vec<PaidWithoutClaim>,
    /// The same by sale, in units: what to take off the stock of a sale that is created again.
    pub units_without_claim: BTreeMap<SaleId, u64>,
}

/// A paid order that the adopted ledger holds no claim for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PaidWithoutClaim {
    /// The order.
    pub order_id: OrderId,
    /// Whose it is.
    pub uid: Uid,
    /// Of which sale.
    pub sale_id: SaleId,
    /// How many units.
    pub quantity: Quantity,
    /// `limit`, `not_enough`, `no_sale`, `archived`, or `other_order`: another order was bought under the same key.
    pub reason: &'static str,
}

/// Why an adoption did not come to its end. It can be begun again at any point.
#[derive(Debug, thiserror::Error)]
pub enum Recovery {
    /// The ledger, its server or the topology.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The order database.
    #[error("the order database: {0}")]
    Orders(#[from] orders::Error),
}

impl From<seckill_ledger::Error> for Recovery {
    fn from(error: seckill_ledger::Error) -> Self {
        Recovery::Ledger(error.into())
    }
}

impl Ledger {
    /// Adopts whatever the server holds: a new epoch above everything known, then the stored orders are put
    /// right, then the topology says that the ledger may be used. Dying in between leaves the topology saying
    /// that an adoption is under way; the next one begins again and finds what is done already.
    ///
    /// An order whose key is among these is claimed under it: whoever still retries hears of this order.
    pub async fn adopt(
        &mut self,
        orders: &OrderStore,
        keys: &HashMap<OrderId, KeyDigest>,
    ) -> Result<AdoptReport, Recovery> {
        let partition = self.place().partition;
        let stored = orders.highest(partition).await?;
        let seen = self.look(stored).await?;
        if let Some(fence) = &seen.standing.fence
            && let Err(error @ InvalidFence::Schema { .. }) = fence.parse::<Fence>()
        {
            return Err(LedgerError::Schema(error).into());
        }
        let fence = self.promote_unrecorded(&seen, &FenceChange::Adopt).await?;
        let Epoch(epoch) = fence.epoch;
        let mut report =
            AdoptReport { partition, found: seen.standing.fence.clone(), epoch, ..AdoptReport::default() };
        tracing::warn!(partition, epoch, found = ?report.found, "adopting the ledger");
        let counts_at_once = self.counts_at_once();
        for sale in orders.sales().await? {
            put_right(self.conn().await?, &fence, &sale, (orders, keys, counts_at_once), &mut report).await?;
        }
        self.record(fence.epoch, &seen.standing.run_id).await?;
        Ok(report)
    }

    /// Whether a write counts once the server's own disk has it.
    fn counts_at_once(&self) -> bool {
        let topology = self.topology();
        match topology.durability {
            Durability::Local => true,
            Durability::Replicated => topology.centers.len() == 1,
        }
    }
}

/// Makes a sale's claims in the ledger agree with its stored orders: gives back what was cancelled or expired
/// (that makes room), then claims paid orders, then unpaid ones.
async fn put_right(
    conn: &mut MultiplexedConnection,
    fence: &Fence,
    sale: &SaleId,
    (orders, keys, counts_at_once): (&OrderStore, &HashMap<OrderId, KeyDigest>, bool),
    report: &mut AdoptReport,
) -> Result<(), Recovery> {
    let known = read::sale(conn, sale).await?;
    if known.is_some_and(|sale| sale.state == LedgerState::Archived) {
        // Claims go when a sale is archived, with every order final: nothing is missing (M1).
        return Ok(());
    }
    let mut pages = Pages::new(orders, sale);
    while let Some(page) = pages.next().await? {
        let gone: Vec<ReleaseEntry> = page
            .into_iter()
            .filter(|order| matches!(order.order.status, OrderStatus::Cancelled | OrderStatus::Expired))
            .map(|order| ReleaseEntry { order_id: order.order.order_id, uid: order.uid })
            .collect();
        for batch in gone.chunks(MAX_BATCH) {
            let outcomes = release(conn, fence, sale, batch).await?;
            let released = outcomes.iter().filter(|outcome| **outcome == ReleaseOutcome::Released);
            report.released += released.count() as u64;
            // Of those that the ledger never heard of a release that still waits has nothing to do, and would only
            // look like a claim that went missing. The others are done once what was done here survives.
            let done = batch.iter().zip(outcomes).filter_map(|(entry, outcome)| match outcome {
                ReleaseOutcome::Released | ReleaseOutcome::AlreadyReleased => {
                    counts_at_once.then_some(entry.order_id)
                }
                ReleaseOutcome::Unknown => Some(entry.order_id),
            });
            orders.releases_done(done.collect(), Vec::new()).await?;
        }
    }
    for status in [OrderStatus::Paid, OrderStatus::Created] {
        let mut pages = Pages::new(orders, sale);
        while let Some(page) = pages.next().await? {
            let open: Vec<ReclaimEntry> = page
                .into_iter()
                .filter(|order| order.order.status == status)
                .map(|order| ReclaimEntry {
                    order_id: order.order.order_id,
                    uid: order.uid,
                    quantity: order.order.quantity,
                    // Order tables do not have it.
                    key: keys.get(&order.order.order_id).copied().unwrap_or_default(),
                })
                .collect();
            for batch in open.chunks(MAX_BATCH) {
                let outcomes = reclaim(conn, fence, sale, batch).await?;
                settle(sale, batch, &outcomes, orders, report).await?;
            }
        }
    }
    Ok(())
}

async fn settle(
    sale: &SaleId,
    batch: &[ReclaimEntry],
    outcomes: &[ReclaimOutcome],
    orders: &OrderStore,
    report: &mut AdoptReport,
) -> Result<(), Recovery> {
    let mut lost = Vec::new();
    for (entry, outcome) in batch.iter().zip(outcomes) {
        let reason = match outcome {
            ReclaimOutcome::Claimed => {
                report.reclaimed += 1;
                continue;
            }
            ReclaimOutcome::Held => {
                report.held += 1;
                continue;
            }
            ReclaimOutcome::OtherOrder => "other_order",
            ReclaimOutcome::Limit => "limit",
            ReclaimOutcome::NotEnough => "not_enough",
            ReclaimOutcome::NoSale => "no_sale",
            ReclaimOutcome::Archived => "archived",
        };
        lost.push((entry, reason));
    }
    if lost.is_empty() {
        return Ok(());
    }
    // Only what is still unpaid at this moment is cancelled; what is paid, or was paid meanwhile, stays.
    let ids = lost.iter().map(|(entry, _)| entry.order_id).collect();
    let cancelled: std::collections::HashSet<OrderId> =
        orders.cancel_lost(ids, LOST).await?.into_iter().collect();
    report.cancelled += cancelled.len() as u64;
    for (entry, reason) in lost {
        if cancelled.contains(&entry.order_id) {
            continue;
        }
        report.paid_without_claim += 1;
        *report.units_without_claim.entry(sale.clone()).or_default() += u64::from(entry.quantity.get());
        if report.paid_orders_without_claim.len() < NAMED_MAX {
            report.paid_orders_without_claim.push(PaidWithoutClaim {
                order_id: entry.order_id,
                uid: entry.uid.clone(),
                sale_id: sale.clone(),
                quantity: entry.quantity,
                reason,
            });
        }
    }
    Ok(())
}

/// The stored orders of a sale, page by page.
struct Pages<'a> {
    orders: &'a OrderStore,
    sale: &'a SaleId,
    cursor: Option<orders::Cursor>,
    done: bool,
}

impl<'a> Pages<'a> {
    fn new(orders: &'a OrderStore, sale: &'a SaleId) -> Pages<'a> {
        Pages { orders, sale, cursor: None, done: false }
    }

    async fn next(&mut self) -> Result<Option<Vec<AdminOrder>>, orders::Error> {
        if self.done {
            return Ok(None);
        }
        let page = self.orders.orders_of_sale(self.sale, PAGE, self.cursor).await?;
        self.done = page.next.is_none();
        self.cursor = page.next;
        Ok(Some(page.items))
    }
}

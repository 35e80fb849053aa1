//! One round over a saved tail: each order is looked up at home, claimed again at the master, and what became of it is
//! written down at home.
//!
//! Scarce stock goes to paid orders first, then to unpaid ones, then to those that are stored nowhere. Every step may be
//! the last one: the next round finds what is done, because the ledger and the home database answer the same again.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use seckill_domain::{CenterId, OrderId, OrderStatus, SaleId, Uid};
use seckill_ledger::ReleaseEntry;
use seckill_ledger::admin::ReclaimEntry;

use super::Settler;
use super::saved::{Lost, LostOrder, SavedLines, Unreadable};
use crate::cross_center::calls::{
    RECLAIM, RELEASE, ReclaimAnswer, ReclaimCall, ReclaimLine, ReclaimOutcome, ReleaseAnswer, ReleaseCall,
    ReleaseOutcome, WireKey,
};
use crate::cross_center::{CallError, CrossCenter};
use crate::inventory::Unavailable;
use crate::orders::{AuditOrder, MAX_PUT_BACK, PutBack, Untold};
use crate::topology::{StoreError, Unclaimed, UnclaimedCause};

/// Orders looked up, claimed and written down at once.
const PAGE: usize = MAX_PUT_BACK;
/// How long the master center may take for one call.
const MASTER_TIMEOUT: Duration = Duration::from_secs(5);

/// Paid orders without a claim that are named one by one, in the topology and so in every service; the others are
/// counted, and the audit names them.
const NAMED_MAX: usize = 10;

/// Why a round ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("the file: {0}")]
    File(#[from] Unreadable),
    #[error("the order database: {0}")]
    Orders(#[from] Untold),
    #[error("the ledger: {0}")]
    Ledger(#[from] Unavailable),
    #[error("the master center: {0}")]
    Master(#[from] CallError),
    #[error("the master center answered for another number of orders")]
    Answers,
    #[error("the history of shifts: {0}")]
    Topology(StoreError),
    #[error("another process settles it")]
    Busy,
    #[cfg(test)]
    #[error("it died on purpose")]
    Died,
}

/// What became of one order of a tail, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Nobody has looked.
    Open,
    /// As `Claimed` or `Closed`, as far as a degraded master knows: it is asked again at a later epoch (K4).
    Kept,
    /// It holds a claim.
    Claimed,
    /// There is no room for its claim, and it is cancelled.
    Cancelled,
    /// It was closed in another way, and holds no claim.
    Closed,
    /// It was never acknowledged, and nobody ever saw it.
    Unseen,
    /// It is paid, and there is no room for its claim.
    Paid,
    /// It is paid, and its sale is archived: there never will be.
    Archived,
}

impl Fate {
    /// Whether it stays like that.
    pub(super) fn is_final(self) -> bool {
        match self {
            Fate::Open | Fate::Kept | Fate::Paid => false,
            Fate::Claimed | Fate::Cancelled | Fate::Closed | Fate::Unseen | Fate::Archived => true,
        }
    }
}

/// What is known of a tail.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// By place in the file.
    pub(super) fates: Vec<Fate>,
    /// The first [`NAMED_MAX`] of those that are paid and hold no claim.
    pub(super) unclaimed: Vec<Unclaimed>,
    /// Entries that cannot be read.
    pub(super) unreadable: u64,
    /// What the lost master had given back is queued again.
    released: bool,
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Paid,
    Unpaid,
    Rest,
}

/// An order and its place in the file.
type Placed = (usize, LostOrder);

/// What is to be done with orders of one home center.
#[derive(Default)]
struct Work {
    claim: BTreeMap<SaleId, Vec<Placed>>,
    release: BTreeMap<SaleId, Vec<(usize, ReleaseEntry)>>,
    call: PutBack,
    /// Those that are claimed, and at which fate; those without room.
    held: Vec<(usize, Fate)>,
    lost: Vec<(usize, Unclaimed)>,
}

impl Settler {
    /// Goes through the file once, as far as it is not settled. With `unseen` the orders that are stored nowhere are put
    /// back, too.
    pub(super) async fn round(
        &self,
        file: &Path,
        unseen: bool,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        if progress.unreadable > 0 {
            // Were that mended meanwhile, every place behind it would be another one.
            *progress = Progress::default();
        }
        // Those that are kept change with the epoch, and then everything is looked at anew.
        for fate in progress.fates.iter_mut().filter(|fate| **fate == Fate::Paid) {
            *fate = Fate::Open;
        }
        progress.unclaimed.retain(|order| order.cause == UnclaimedCause::Archived);
        for pass in [Pass::Paid, Pass::Unpaid, Pass::Rest] {
            let mut saved = SavedLines::open(file).await?;
            let (mut place, mut page) = (0, Vec::new());
            let mut unreadable = 0;
            while let Some(lost) = saved.next().await.map_err(Unreadable::File)? {
                let orders = match lost {
                    Lost::Orders(orders) => orders,
                    Lost::Released(_) => continue,
                    Lost::Unreadable(reason) => {
                        tracing::debug!(file = %file.display(), %reason, "an entry of a saved tail");
                        unreadable += 1;
                        continue;
                    }
                };
                for order in orders {
                    if progress.fates.len() <= place {
                        progress.fates.push(Fate::Open);
                    }
                    if progress.fates[place] == Fate::Open {
                        page.push((place, order));
                    }
                    place += 1;
                    if page.len() == PAGE {
                        self.page(pass, unseen, std::mem::take(&mut page), progress).await?;
                    }
                }
            }
            self.page(pass, unseen, page, progress).await?;
            progress.unreadable = progress.unreadable.max(unreadable);
        }
        if !progress.released {
            self.release_again(file).await?;
            progress.released = true;
        }
        Ok(())
    }

    async fn page(
        &self,
        pass: Pass,
        unseen: bool,
        page: Vec<Placed>,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let homes = self.parts.centers.homes();
        let mut by_home: BTreeMap<usize, Vec<Placed>> = BTreeMap::new();
        for placed in page {
            by_home.entry(homes.of(placed.1.record.order_id.table())).or_default().push(placed);
        }
        for (home, orders) in by_home {
            let home = homes.centers.get(home).cloned().flatten();
            let ids: Vec<OrderId> = orders.iter().map(|(_, order)| order.record.order_id).collect();
            let answer = self.parts.centers.orders(home.as_ref(), &ids).await?;
            self.passes("settle_looked")?;
            let stored = answer.orders.into_iter().map(|order| (order.order_id, order)).collect();
            let work = sort(pass, unseen, orders, &stored, &mut progress.fates);
            self.work(home.as_ref(), work, progress).await?;
        }
        Ok(())
    }

    async fn work(
        &self,
        home: Option<&CenterId>,
        mut work: Work,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let Progress { fates, unclaimed, .. } = progress;
        for (sale, orders) in std::mem::take(&mut work.claim) {
            let answer = self.claim(&sale, &orders).await?;
            let fate = if answer.kept_at.is_some() { Fate::Kept } else { Fate::Claimed };
            for ((place, order), outcome) in orders.into_iter().zip(answer.outcomes) {
                let order_id = order.record.order_id;
                let cause = match outcome {
                    ReclaimOutcome::Claimed | ReclaimOutcome::Held => {
                        work.call.held.push(order_id);
                        work.held.push((place, fate));
                        continue;
                    }
                    ReclaimOutcome::OtherOrder => UnclaimedCause::OtherOrder,
                    ReclaimOutcome::Limit => UnclaimedCause::Limit,
                    ReclaimOutcome::NotEnough => UnclaimedCause::NotEnough,
                    ReclaimOutcome::NoSale => UnclaimedCause::NoSale,
                    ReclaimOutcome::Archived => UnclaimedCause::Archived,
                };
                work.call.lost.push(order_id);
                let (sale_id, quantity) = (sale.clone(), order.record.quantity);
                work.lost.push((place, Unclaimed { order_id, sale_id, quantity, cause }));
            }
        }
        self.passes("settle_claimed")?;
        if !work.call.held.is_empty() || !work.call.lost.is_empty() {
            let done = self.parts.centers.put_back(home, work.call).await?;
            self.passes("settle_put_back")?;
            for (place, fate) in work.held {
                fates[place] = fate;
            }
            for (place, order) in work.lost {
                fates[place] = match (done.paid_without_claim.contains(&order.order_id), order.cause) {
                    (false, _) => Fate::Cancelled,
                    (true, UnclaimedCause::Archived) => Fate::Archived,
                    (true, _) => Fate::Paid,
                };
                if fates[place] != Fate::Cancelled && unclaimed.len() < NAMED_MAX {
                    unclaimed.push(order);
                }
            }
        }
        // A claim that was made while its order was being closed, by a round that died, is nobody's.
        for (sale, orders) in work.release {
            let (places, entries): (Vec<usize>, Vec<ReleaseEntry>) = orders.into_iter().unzip();
            let answer = self.release(&sale, &entries).await?;
            for (place, outcome) in places.into_iter().zip(answer.outcomes) {
                fates[place] = match outcome {
                    ReleaseOutcome::Released | ReleaseOutcome::AlreadyReleased
                        if answer.kept_at.is_some() =>
                    {
                        Fate::Kept
                    }
                    ReleaseOutcome::Released | ReleaseOutcome::AlreadyReleased | ReleaseOutcome::Unknown => {
                        Fate::Closed
                    }
                };
            }
        }
        Ok(())
    }

    /// Claims orders of one sale at the master.
    async fn claim(&self, sale: &SaleId, orders: &[Placed]) -> Result<ReclaimAnswer, Failure> {
        let answer = match self.other_master() {
            None => {
                let entry = |(_, order): &Placed| ReclaimEntry {
                    order_id: order.record.order_id,
                    uid: order.record.uid.clone(),
                    quantity: order.record.quantity,
                    key: order.key,
                };
                let entries: Vec<ReclaimEntry> = orders.iter().map(entry).collect();
                self.parts.inventory.reclaim(sale, &entries).await?
            }
            Some((cross, master)) => {
                let line = |(_, order): &Placed| {
                    let record = &order.record;
                    ReclaimLine(record.order_id, record.uid.clone(), record.quantity, WireKey(order.key))
                };
                let call = ReclaimCall { sale_id: sale.clone(), orders: orders.iter().map(line).collect() };
                cross.call::<_, ReclaimAnswer>(&master, RECLAIM, &call, MASTER_TIMEOUT).await?
            }
        };
        if answer.outcomes.len() == orders.len() { Ok(answer) } else { Err(Failure::Answers) }
    }

    /// Releases closed orders of one sale at the master.
    async fn release(&self, sale: &SaleId, orders: &[ReleaseEntry]) -> Result<ReleaseAnswer, Failure> {
        let answer = match self.other_master() {
            None => self.parts.inventory.release_for_others(sale, orders).await?,
            Some((cross, master)) => {
                let pair = |entry: &ReleaseEntry| -> (OrderId, Uid) { (entry.order_id, entry.uid.clone()) };
                let call = ReleaseCall { sale_id: sale.clone(), orders: orders.iter().map(pair).collect() };
                cross.call::<_, ReleaseAnswer>(&master, RELEASE, &call, MASTER_TIMEOUT).await?
            }
        };
        if answer.outcomes.len() == orders.len() { Ok(answer) } else { Err(Failure::Answers) }
    }

    fn other_master(&self) -> Option<(&CrossCenter, CenterId)> {
        let cross = self.parts.cross.as_ref()?;
        Some((cross, cross.other_master()?))
    }

    /// What the lost master gave back, the new one still holds. Orders that only the lost one had are looked after one by
    /// one; these come from before.
    async fn release_again(&self, file: &Path) -> Result<(), Failure> {
        let mut saved = SavedLines::open(file).await?;
        let mut ids = Vec::new();
        while let Some(lost) = saved.next().await.map_err(Unreadable::File)? {
            let Lost::Released(orders) = lost else { continue };
            for order_id in orders.into_iter().filter(|order_id| order_id.seq() <= saved.common.seq) {
                ids.push(order_id);
                if ids.len() == PAGE {
                    self.release_page(std::mem::take(&mut ids)).await?;
                }
            }
        }
        self.release_page(ids).await
    }

    async fn release_page(&self, ids: Vec<OrderId>) -> Result<(), Failure> {
        let centers = &self.parts.centers;
        let homes = centers.homes();
        let mut by_home: BTreeMap<usize, Vec<OrderId>> = BTreeMap::new();
        for order_id in ids {
            by_home.entry(homes.of(order_id.table())).or_default().push(order_id);
        }
        for (home, released) in by_home {
            let home = homes.centers.get(home).cloned().flatten();
            centers.put_back(home.as_ref(), PutBack { released, ..PutBack::default() }).await?;
            self.passes("settle_released")?;
        }
        Ok(())
    }
}

/// Says for each order of one home center what is to be done in this pass. Those whose turn comes later stay open.
fn sort(
    pass: Pass,
    unseen: bool,
    orders: Vec<Placed>,
    stored: &HashMap<OrderId, AuditOrder>,
    fates: &mut [Fate],
) -> Work {
    let mut work = Work::default();
    for (place, order) in orders {
        let record = &order.record;
        match (stored.get(&record.order_id), pass) {
            (None, Pass::Paid | Pass::Unpaid) => {}
            (None, Pass::Rest) if !unseen => fates[place] = Fate::Unseen,
            (None, Pass::Rest) => {
                work.call.records.push(record.clone());
                work.claim.entry(record.sale_id.clone()).or_default().push((place, order));
            }
            (Some(found), _) => match (found.status, pass) {
                (OrderStatus::Paid, _) | (OrderStatus::Created, Pass::Unpaid | Pass::Rest) => {
                    work.claim.entry(record.sale_id.clone()).or_default().push((place, order));
                }
                (OrderStatus::Created, Pass::Paid) => {}
                (OrderStatus::Cancelled | OrderStatus::Expired, _) if found.lost => {
                    fates[place] = Fate::Cancelled;
                }
                (OrderStatus::Cancelled | OrderStatus::Expired, _) => {
                    let entry = ReleaseEntry { order_id: record.order_id, uid: record.uid.clone() };
                    work.release.entry(record.sale_id.clone()).or_default().push((place, entry));
                }
            },
        }
    }
    work
}

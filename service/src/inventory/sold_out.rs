//! The sold-out marker: once a sale has nothing left, this process says so without asking the ledger again.
//!
//! It may only reject, and never somebody who holds a claim: a winner who retries gets the order (M3). So a
//! marker works only together with an index of everyone who ever got something in that sale, and only once that
//! index contains everything up to the reply that set the marker.
//!
//! The index of a sale is built when its first `SOLD_OUT` comes: the outbox position is noted, the claims are
//! scanned, and from that position on the outbox is followed. A marker goes when stock comes back (the ledger
//! announces it, and the next snapshot shows it where the announcement was lost), when an epoch begins, and when
//! the sale is no longer open.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use redis::aio::MultiplexedConnection;
use seckill_domain::{OutboxId, SaleId, SalePhase, Uid};
use seckill_ledger::outbox::{self, Changed, Event};
use seckill_ledger::read::{News, scan_claims};
use seckill_ledger::{Error, Fence, StockMark};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Purchase;
use super::connection::Target;
use super::snapshot::SalesView;
use crate::tasks::essential;

/// How often the outbox is followed while there is an index.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(20);
/// Outbox entries in one read.
const FOLLOW_PAGE: usize = 256;
/// Users of a claims hash in one scan step.
const SCAN_PAGE: usize = 1000;
/// Pause before a lost connection is opened again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// An index that could not be followed for this long is built anew: the outbox may have been trimmed meanwhile.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// Markers and indexes of this process.
pub(super) struct SoldOut {
    /// How many markers there are, so that a purchase looks at nothing else while nothing is sold out.
    armed: AtomicUsize,
    sales: RwLock<HashMap<SaleId, Indexed>>,
    hasher: RandomState,
    winners_max: usize,
    work: Notify,
    view: Arc<ArcSwap<SalesView>>,
}

/// What is known of one sale.
#[derive(Debug, Default)]
struct Indexed {
    marker: Option<Marker>,
    /// Epoch and revision of the newest return of stock that was heard of: an older reply sets no marker.
    returned: (u64, u64),
    /// Everyone who ever got something, as 64-bit fingerprints under a key of this process. A false hit only
    /// asks the ledger.
    winners: HashSet<u64>,
    /// What `winners` contains everything up to; `None` while it is being built.
    complete_to: Option<OutboxId>,
    /// The index had no room: the ledger is asked every time.
    oversized: bool,
}

#[derive(Debug, Clone)]
struct Marker {
    mark: StockMark,
    /// The sale's limit per user: a purchase above it hears of that first.
    limit: u32,
}

impl Marker {
    fn stock_version(&self) -> (u64, u64) {
        (self.mark.outbox.epoch, self.mark.revision)
    }
}

impl SoldOut {
    /// Starts the tasks that keep markers and indexes true. `winners_max` bounds the index, in buyers.
    pub(super) fn start(
        target: &Target,
        winners_max: usize,
        view: Arc<ArcSwap<SalesView>>,
        tracker: &TaskTracker,
        (stop, fatal): (&CancellationToken, &CancellationToken),
    ) -> Arc<SoldOut> {
        let sold_out = Arc::new(SoldOut {
            armed: AtomicUsize::new(0),
            sales: RwLock::default(),
            hasher: RandomState::new(),
            winners_max,
            work: Notify::new(),
            view,
        });
        let until_stopped = |task| {
            let stop = stop.clone();
            async move {
                stop.run_until_cancelled_owned(task).await;
            }
        };
        let listen: BoxFuture<'static, ()> = Box::pin(Arc::clone(&sold_out).listen(target.clone()));
        let keep: BoxFuture<'static, ()> = Box::pin(Arc::clone(&sold_out).keep(target.clone()));
        essential("sold-out announcements", tracker, fatal, until_stopped(listen));
        essential("sold-out index", tracker, fatal, until_stopped(keep));
        sold_out
    }

    /// Whether a purchase can be answered `sold_out` without asking the ledger.
    pub(super) fn rejects(&self, purchase: &Purchase) -> bool {
        if self.armed.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let sales = self.read();
        let Some(indexed) = sales.get(&purchase.sale_id) else { return false };
        let Some(marker) = &indexed.marker else { return false };
        indexed.complete_to.is_some_and(|to| to >= marker.mark.outbox)
            && purchase.quantity.get() <= marker.limit
            && !indexed.winners.contains(&self.fingerprint(&purchase.uid))
    }

    /// Takes note of a `SOLD_OUT` reply.
    pub(super) fn observe(&self, sale: &SaleId, mark: StockMark) {
        let Some(limit) = self.view.load().get(sale).map(|view| view.sale().spec.per_user_limit) else {
            return;
        };
        let marker = Marker { mark, limit };
        {
            let mut sales = self.write();
            let indexed = sales.entry(sale.clone()).or_default();
            let older = indexed.marker.as_ref().is_some_and(|known| known.mark.outbox >= mark.outbox);
            if indexed.oversized || older || marker.stock_version() < indexed.returned {
                return;
            }
            indexed.marker = Some(marker);
            self.count(&sales);
        }
        self.work.notify_one();
    }

    /// The stock mark of a sale's marker, for other centers' markers.
    pub(super) fn mark_of(&self, sale: &SaleId) -> Option<StockMark> {
        self.read().get(sale).and_then(|indexed| indexed.marker.as_ref()).map(|marker| marker.mark)
    }

    fn fingerprint(&self, uid: &Uid) -> u64 {
        self.hasher.hash_one(uid.as_str())
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<SaleId, Indexed>> {
        self.sales.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<SaleId, Indexed>> {
        self.sales.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, sales: &HashMap<SaleId, Indexed>) {
        self.armed
            .store(sales.values().filter(|indexed| indexed.marker.is_some()).count(), Ordering::Relaxed);
    }

    /// Listens to the ledger's announcements.
    async fn listen(self: Arc<Self>, target: Target) {
        loop {
            if let Ok(mut subscription) = target.subscribe().await {
                let mut messages = subscription.on_message();
                while let Some(message) = messages.next().await {
                    if let Ok(text) = message.get_payload::<String>() {
                        self.hear(&text);
                    }
                }
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    fn hear(&self, message: &str) {
        match News::parse(message) {
            Some(News::Returned { epoch, sale_id, revision }) => {
                let mut sales = self.write();
                let indexed = sales.entry(sale_id).or_default();
                indexed.returned = indexed.returned.max((epoch, revision));
                if indexed.marker.as_ref().is_some_and(|marker| marker.stock_version() < indexed.returned) {
                    indexed.marker = None;
                }
                self.count(&sales);
            }
            // Claims may be other ones now, so the indexes go too.
            Some(News::Epoch(_)) => self.forget_all(),
            None => tracing::warn!(message, "an announcement of the ledger cannot be read"),
        }
    }

    fn forget_all(&self) {
        let mut sales = self.write();
        sales.clear();
        self.count(&sales);
    }

    /// Keeps the indexes complete and takes away markers that the snapshot contradicts.
    async fn keep(self: Arc<Self>, target: Target) {
        let mut follower = Follower { conn: None, position: None, followed_at: Instant::now() };
        loop {
            if self.read().is_empty() {
                follower.position = None;
                self.work.notified().await;
            } else {
                tokio::time::sleep(FOLLOW_INTERVAL).await;
            }
            self.compare_with_snapshot();
            if let Err(error) = self.follow(&target, &mut follower).await {
                tracing::debug!(%error, "the outbox cannot be followed; sold-out answers come from the ledger");
                follower.conn = None;
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }

    /// A snapshot that is newer than a marker and shows the sale as anything but sold out ends the marker.
    fn compare_with_snapshot(&self) {
        let view = self.view.load();
        let mut sales = self.write();
        sales.retain(|id, _| view.get(id).is_some() || !view.is_loaded());
        for (id, indexed) in sales.iter_mut() {
            let (Some(marker), Some(sale)) = (&indexed.marker, view.get(id)) else { continue };
            let newer = view.at() >= marker.mark.outbox;
            if newer
                && (sale.phase() != SalePhase::SoldOut || sale.sale().spec.per_user_limit != marker.limit)
            {
                indexed.marker = None;
            }
        }
        self.count(&sales);
    }

    async fn follow(&self, target: &Target, follower: &mut Follower) -> Result<(), Error> {
        if follower.position.is_some() && follower.followed_at.elapsed() > STALE_AFTER {
            self.forget_all();
            follower.position = None;
        }
        let mut conn = match follower.conn.take() {
            Some(conn) => conn,
            None => target.connect().await?,
        };
        let position = match follower.position {
            Some(position) => position,
            None => newest(&mut conn).await?,
        };
        for sale in self.unbuilt() {
            self.build(&mut conn, &sale, position).await?;
        }
        let reached = self.read_on(&mut conn, position).await?;
        follower.position = Some(reached);
        follower.followed_at = Instant::now();
        follower.conn = Some(conn);
        Ok(())
    }

    fn unbuilt(&self) -> Vec<SaleId> {
        self.read()
            .iter()
            .filter(|(_, indexed)| {
                indexed.marker.is_some() && indexed.complete_to.is_none() && !indexed.oversized
            })
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Indexes everyone who holds, or has held, something: complete up to `position`, which was noted before.
    async fn build(
        &self,
        conn: &mut MultiplexedConnection,
        sale: &SaleId,
        position: OutboxId,
    ) -> Result<(), Error> {
        let mut cursor = 0;
        loop {
            let (next, claims) = scan_claims(conn, sale, cursor, SCAN_PAGE).await?;
            {
                let mut sales = self.write();
                let room = self
                    .winners_max
                    .saturating_sub(sales.values().map(|indexed| indexed.winners.len()).sum());
                let Some(indexed) = sales.get_mut(sale) else { return Ok(()) };
                if claims.len() > room {
                    tracing::warn!(%sale, self.winners_max, "too many buyers to index; sold-out answers of this sale come from the ledger");
                    *indexed = Indexed { oversized: true, ..Indexed::default() };
                    self.count(&sales);
                    return Ok(());
                }
                indexed.winners.extend(claims.iter().map(|claim| self.fingerprint(&claim.uid)));
                if next == 0 {
                    indexed.complete_to = Some(position);
                    return Ok(());
                }
            }
            cursor = next;
        }
    }

    /// Adds what was accepted since; returns how far the outbox has been read.
    async fn read_on(&self, conn: &mut MultiplexedConnection, from: OutboxId) -> Result<OutboxId, Error> {
        let mut position = from;
        loop {
            let page = outbox::read(conn, position, FOLLOW_PAGE).await?;
            let full = page.entries.len() == FOLLOW_PAGE;
            let last = page.entries.last().map_or(position, |entry| entry.id);
            position = if full { last } else { at(page.fence.as_deref(), page.last_seq).max(last) };
            let mut sales = self.write();
            for entry in page.entries {
                match entry.event {
                    Ok(Event::Orders(orders)) => {
                        if let Some(indexed) = orders.first().and_then(|order| sales.get_mut(&order.sale_id))
                            && indexed.complete_to.is_some()
                        {
                            indexed.winners.extend(orders.iter().map(|order| self.fingerprint(&order.uid)));
                        }
                    }
                    Ok(Event::SaleChanged(change)) => match change.what {
                        // Whose orders these are is not said: the index is built anew, and until then the ledger is
                        // asked.
                        Changed::Reclaimed(_) => {
                            if let Some(indexed) = sales.get_mut(&change.sale_id) {
                                indexed.winners.clear();
                                indexed.complete_to = None;
                            }
                        }
                        Changed::State(_) | Changed::Stock(_) => {}
                    },
                    Ok(Event::Released { .. } | Event::Sale(_) | Event::Epoch(_)) | Err(_) => {}
                }
            }
            if !full {
                for indexed in sales.values_mut().filter(|indexed| indexed.complete_to.is_some()) {
                    indexed.complete_to = Some(position);
                }
                return Ok(position);
            }
        }
    }
}

struct Follower {
    conn: Option<MultiplexedConnection>,
    position: Option<OutboxId>,
    followed_at: Instant,
}

/// The id of the outbox's newest entry.
async fn newest(conn: &mut MultiplexedConnection) -> Result<OutboxId, Error> {
    let standing = seckill_ledger::roles::standing(conn).await?;
    Ok(at(standing.fence.as_deref(), standing.seq))
}

/// Epoch and sequence as an outbox id: every epoch begins with an entry, so the newest entry has both.
pub(super) fn at(fence: Option<&str>, seq: u64) -> OutboxId {
    let epoch = fence.and_then(|text| text.parse::<Fence>().ok()).map_or(0, |fence| fence.epoch.0);
    OutboxId { epoch, seq }
}

#[cfg(test)]
mod tests;

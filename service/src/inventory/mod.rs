//! The inventory: what is on sale, and who gets it.
//!
//! A purchase goes through [`Inventory::purchase`]: the sold-out marker of its sale ([`sold_out`]), then a lane
//! ([`lane`]) that decides it in a batch with others in one call of the ledger. Reads come from a snapshot in
//! this process ([`snapshot`]). What the shop does to its sales goes through [`sales`].

mod barrier;
mod connection;
mod error;
mod held;
mod lane;
mod local;
mod metrics;
mod remote;
mod route;
mod sales;
mod serving;
mod snapshot;
mod sold_out;
#[cfg(test)]
mod tests;
mod waiting;

use std::sync::Arc;
use std::time::Duration;

use seckill_domain::{CenterId, Epoch, KeyDigest, OrderId, OrderRecord, Quantity, SaleId, Uid};
use seckill_ledger::roles::Role;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use barrier::{Barrier, Unconfirmed};
pub use connection::{LedgerPool, ledger_pool};
pub use error::{PurchaseError, SaleError, Unavailable};
pub use metrics::{BarrierMetrics, BarrierSeconds, InventoryMetrics};
pub use sales::{Archived, Created, SaleChanged, StockChanged};
pub use snapshot::{SaleView, SalesView};

use crate::config::{InventoryConfig, LedgerConfig};
use crate::cross_center::CrossCenter;
use crate::topology::{Authority, TopologyHandle};

/// The one inventory partition that exists for now.
const PARTITION: u8 = 0;

/// A purchase as a buyer asks for it.
#[derive(Debug, Clone)]
pub struct Purchase {
    /// Who buys.
    pub uid: Uid,
    /// Which sale.
    pub sale_id: SaleId,
    /// Digest of the idempotency key.
    pub key: KeyDigest,
    /// How many units.
    pub quantity: Quantity,
    /// W3C trace context, validated.
    pub traceparent: Option<Box<str>>,
}

#[cfg(test)]
impl Purchase {
    /// One unit of the sale `s`, under the key `k`.
    pub(crate) fn of_a_test(uid: &str) -> Purchase {
        Purchase {
            uid: Uid::new(uid).unwrap(),
            sale_id: SaleId::new("s").unwrap(),
            key: *seckill_domain::IdempotencyKey::new("k").unwrap().digest(),
            quantity: Quantity::ONE,
            traceparent: None,
        }
    }
}

/// An accepted purchase. Its order may not be stored yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The order.
    pub order_id: OrderId,
    /// Whether an earlier call under the same key was the one that was accepted.
    pub replayed: bool,
    /// Where the order is kept.
    pub home_center: CenterId,
}

/// The inventory as every part of the service uses it. Clones share everything.
#[derive(Clone)]
pub struct Inventory(Arc<Inner>);

struct Inner {
    lanes: lane::Lanes,
    sold_out: Arc<sold_out::SoldOut>,
    snapshots: watch::Receiver<u64>,
    view: Arc<arc_swap::ArcSwap<SalesView>>,
    pool: LedgerPool,
    barrier: barrier::WeakBarrier,
    topology: TopologyHandle,
    authority: Authority,
    metrics: Arc<InventoryMetrics>,
    /// How long a shift may hold up a purchase or a change.
    hold: Duration,
    retry_window_ms: u64,
}

/// What an inventory is started with.
pub struct Parts<'a> {
    /// The Redis servers of this center.
    pub ledger: &'a LedgerConfig,
    /// Lanes and snapshots.
    pub inventory: &'a InventoryConfig,
    /// How long after its end a sale's buyers may retry, ms; it is not archived before.
    pub retry_window_ms: u64,
    /// Who is at home where.
    pub topology: TopologyHandle,
    /// Whether, and under which fence, this service may write.
    pub authority: Authority,
    /// The way to other centers, where there are any.
    pub cross: Option<CrossCenter>,
}

impl Inventory {
    /// Starts the lanes, the snapshots and the sold-out index. They end with `stop`; the lanes first finish
    /// what they hold. Should one of them panic, `fatal` is cancelled.
    pub fn start(
        parts: &Parts<'_>,
        tracker: &TaskTracker,
        stop: &CancellationToken,
        fatal: &CancellationToken,
    ) -> Result<Inventory, Unavailable> {
        let url = parts.ledger.partitions.first().map_or("", |url| url.as_str());
        let target = connection::Target::new(url, parts.ledger.response_timeout_ms)?;
        let pool = ledger_pool(url, parts.ledger)?;
        let metrics = Arc::new(InventoryMetrics::default());
        let (view, snapshots) = snapshot::start(
            &target,
            parts.inventory,
            parts.authority.clone(),
            Arc::clone(&metrics),
            tracker,
            (stop, fatal),
        );
        let sold_out = sold_out::SoldOut::start(
            &target,
            parts.inventory.winners_max,
            Arc::clone(&view),
            tracker,
            (stop, fatal),
        );
        let barrier = Barrier::start(&target, &parts.authority, &metrics.barrier, tracker, fatal);
        let route = || {
            let remote = parts.cross.clone().map(|cross| {
                remote::Remote::new(
                    cross,
                    Duration::from_millis(parts.ledger.response_timeout_ms),
                    Arc::clone(&sold_out),
                    Arc::clone(&metrics),
                )
            });
            let local = local::Local::new(
                target.clone(),
                barrier.clone(),
                parts.authority.clone(),
                Arc::clone(&sold_out),
                Arc::clone(&metrics),
            );
            route::Route::new(parts.topology.clone(), parts.authority.clone(), local, remote)
        };
        let lanes =
            lane::Lanes::start(parts.inventory, &parts.topology, &metrics, route, tracker, (stop, fatal));
        Ok(Inventory(Arc::new(Inner {
            lanes,
            sold_out,
            snapshots,
            view,
            pool,
            barrier: barrier.downgrade(),
            topology: parts.topology.clone(),
            authority: parts.authority.clone(),
            metrics,
            hold: Duration::from_millis(parts.inventory.hold_ms),
            retry_window_ms: parts.retry_window_ms,
        })))
    }

    /// Decides a purchase. The future may be dropped at any time: a lane that has the purchase finishes it, and
    /// the same key finds the result.
    pub async fn purchase(&self, purchase: Purchase) -> Result<Accepted, PurchaseError> {
        if self.0.sold_out.rejects(&purchase) {
            self.0.metrics.marker_hits.inc();
            return Err(PurchaseError::SoldOut);
        }
        self.0.lanes.purchase(purchase).await
    }

    /// The sales as the last snapshot saw them.
    pub fn sales(&self) -> Arc<SalesView> {
        self.0.view.load_full()
    }

    /// Changes whenever a snapshot found that a sale had changed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.snapshots.clone()
    }

    /// Looks for an accepted order that may not be stored yet.
    pub async fn find_queued(&self, order_id: OrderId) -> Result<Option<OrderRecord>, Unavailable> {
        let expected = self.0.authority.confirmed()?;
        let grant = self.0.authority.grant();
        let mut conn = self.0.pool.get().await?;
        let Some(found) =
            seckill_ledger::outbox::find_order_there(&mut conn, expected.epoch.0, order_id).await?
        else {
            return Ok(None);
        };
        // The reading rules (R1): an order that the other center may not have is nobody's business yet.
        if found.fence.as_deref() != Some(expected.to_string().as_str()) {
            return Err(Unavailable::NoAuthority("the ledger is not at the topology's fence".into()));
        }
        match &found.role {
            Role::Master { .. } => self.write_of(grant?, conn).await?.counted().await?,
            Role::Replica { link, .. } if link == "connected" => {}
            Role::Replica { .. } => {
                return Err(Unavailable::NoAuthority("the replica is not linked to its master".into()));
            }
        }
        Ok(Some(found.order))
    }

    /// The topology's epoch.
    pub fn epoch(&self) -> Epoch {
        self.0.topology.current().epoch
    }

    /// Connections for work off the purchase path.
    pub fn pool(&self) -> &LedgerPool {
        &self.0.pool
    }

    /// Counters and gauges of the lanes and snapshots.
    pub fn metrics(&self) -> &InventoryMetrics {
        &self.0.metrics
    }
}

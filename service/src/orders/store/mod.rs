//! The order database: SQLite through sqlx.

use std::sync::Arc;

use seckill_domain::{CenterId, Clock, Millis, OrderId, OrderRecord, OutboxId, SaleId, SystemClock, Uid};

use super::error::Error;
use super::metrics::OrderMetrics;
use super::model::{
    AdminOrder, CancelOutcome, Coupon, Cursor, ExpireOutcome, Order, OrderFilter, Page, PayOutcome, Payment,
    Refund, Release, SaleCounts, StoreOutcome, Unreadable,
};
use super::updates::Updates;

/// How the store is opened.
#[derive(Clone)]
pub struct StoreOptions {
    /// This center: the owner of a new database's shards.
    pub center: CenterId,
    /// Connections that read; writes have one of their own.
    pub max_connections: u32,
    /// Where the time comes from.
    pub clock: Arc<dyn Clock>,
    /// What the store counts.
    pub metrics: OrderMetrics,
}

impl StoreOptions {
    /// The defaults for a center.
    pub fn new(center: CenterId) -> StoreOptions {
        StoreOptions {
            center,
            max_connections: 4,
            clock: Arc::new(SystemClock),
            metrics: OrderMetrics::default(),
        }
    }
}

/// A handle of the order database; clones share it.
///
/// Writes are commands to one task that owns its connection: a caller that goes away does not stop them half-way.
#[derive(Clone)]
pub struct OrderStore {
    updates: Updates,
    options: StoreOptions,
}

impl OrderStore {
    /// Opens or creates the database (`sqlite:PATH`) and brings its tables to this release's form.
    pub async fn open(database_url: &str, options: StoreOptions) -> Result<OrderStore, Error> {
        let _ = database_url;
        Ok(OrderStore { updates: Updates::default(), options })
    }

    /// The feed of order changes.
    pub fn updates(&self) -> &Updates {
        &self.updates
    }

    /// What the store counts.
    pub fn metrics(&self) -> &OrderMetrics {
        &self.options.metrics
    }

    /// Finishes what was handed over and closes every connection. Later calls answer [`Error::Closed`].
    pub async fn close(&self) {}

    /// Stores what the outbox entries after `from` up to `to` hold, and moves the position from `from` to `to`, in
    /// one transaction (R2). Orders that are there already are counted and left as they are.
    pub async fn store(
        &self,
        _partition: u8,
        _from: OutboxId,
        _to: OutboxId,
        _orders: Vec<OrderRecord>,
        _unreadable: Vec<Unreadable>,
    ) -> Result<StoreOutcome, Error> {
        Err(Error::Closed)
    }

    /// Up to where a partition's outbox is stored.
    pub async fn position(&self, _partition: u8) -> Result<OutboxId, Error> {
        Err(Error::Closed)
    }

    /// An order.
    pub async fn order(&self, _order_id: OrderId) -> Result<Option<Order>, Error> {
        Err(Error::Closed)
    }

    /// An order with what only the shop sees.
    pub async fn admin_order(&self, _order_id: OrderId) -> Result<Option<AdminOrder>, Error> {
        Err(Error::Closed)
    }

    /// A user's orders, newest first.
    pub async fn orders_of(
        &self,
        _uid: &Uid,
        _limit: u32,
        _cursor: Option<Cursor>,
    ) -> Result<Page<Order>, Error> {
        Err(Error::Closed)
    }

    /// A user's coupons, newest first.
    pub async fn coupons_of(
        &self,
        _uid: &Uid,
        _limit: u32,
        _cursor: Option<Cursor>,
    ) -> Result<Page<Coupon>, Error> {
        Err(Error::Closed)
    }

    /// All orders that fit, newest first.
    pub async fn admin_orders(
        &self,
        _filter: OrderFilter,
        _limit: u32,
        _cursor: Option<Cursor>,
    ) -> Result<Page<AdminOrder>, Error> {
        Err(Error::Closed)
    }

    /// Money that has to go back, newest first.
    pub async fn refunds(&self, _limit: u32, _cursor: Option<Cursor>) -> Result<Page<Refund>, Error> {
        Err(Error::Closed)
    }

    /// Cancels an order of this user.
    pub async fn cancel(&self, _uid: &Uid, _order_id: OrderId) -> Result<CancelOutcome, Error> {
        Err(Error::Closed)
    }

    /// Books a payment.
    pub async fn pay(&self, _payment: Payment) -> Result<PayOutcome, Error> {
        Err(Error::Closed)
    }

    /// Lets at most `limit` orders expire that came due in `(after, until]`.
    pub async fn expire_due(
        &self,
        _after: Option<Millis>,
        _until: Millis,
        _limit: u32,
    ) -> Result<ExpireOutcome, Error> {
        Err(Error::Closed)
    }

    /// The oldest releases that wait for the ledger.
    pub async fn pending_releases(&self, _limit: u32) -> Result<Vec<Release>, Error> {
        Err(Error::Closed)
    }

    /// Forgets releases that the ledger answered; `unknown` are those whose claim it does not hold: they are kept
    /// aside for the audit.
    pub async fn releases_done(&self, _done: Vec<OrderId>, _unknown: Vec<OrderId>) -> Result<(), Error> {
        Err(Error::Closed)
    }

    /// Asks for the release of every cancelled and expired order of a sale again: a ledger that was adopted may
    /// not know of it. Idempotent, here and there. Returns how many.
    pub async fn requeue_releases(&self, _sale_id: &SaleId) -> Result<u64, Error> {
        Err(Error::Closed)
    }

    /// Orders and units of every sale (or of one) by state, and the outbox positions that they stand for, all from
    /// one moment.
    pub async fn counts(&self, _sale_id: Option<&SaleId>) -> Result<Counts, Error> {
        Err(Error::Closed)
    }

    /// Some orders of a sale, in a stable order of no meaning; start with `None`, go on with `next`.
    pub async fn orders_of_sale(
        &self,
        _sale_id: &SaleId,
        _limit: u32,
        _cursor: Option<Cursor>,
    ) -> Result<Page<AdminOrder>, Error> {
        Err(Error::Closed)
    }

    /// The sales of which orders are stored.
    pub async fn sales(&self) -> Result<Vec<SaleId>, Error> {
        Err(Error::Closed)
    }

    /// Cancels orders that an adopted ledger could not claim again: those still `created`. No release is due for
    /// them. Returns which were cancelled; paid ones stay as they are.
    pub async fn cancel_lost(&self, _orders: Vec<OrderId>, _reason: &str) -> Result<Vec<OrderId>, Error> {
        Err(Error::Closed)
    }

    /// Outbox entries that were set aside.
    pub async fn unreadable(&self, _limit: u32, _cursor: Option<Cursor>) -> Result<Page<Unreadable>, Error> {
        Err(Error::Closed)
    }
}

/// What the audit compares the ledger with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// By sale.
    pub sales: std::collections::BTreeMap<SaleId, SaleCounts>,
    /// Up to where each partition's outbox is stored in this picture.
    pub positions: Vec<(u8, OutboxId)>,
    /// Outbox entries set aside as unreadable.
    pub unreadable: u64,
}

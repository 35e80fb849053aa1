//! The order database: SQLite, or MySQL or MariaDB, through sqlx. What is asked and written is the same for both
//! ([`session`] holds what differs); connections, tables and the insert of a batch are each one's own.

mod audit;
mod database;
mod insert;
mod insert_mysql;
mod insert_sqlite;
mod lifecycle;
mod mysql;
mod ownership;
mod positions;
mod put_back;
mod queue;
mod read;
mod replication;
mod schema;
mod session;
mod transaction;
mod writer;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use seckill_domain::{CenterId, Clock, Millis, OrderId, OutboxId, SaleId, Shard, SystemClock, Table, Uid};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::batch::{StoreBatch, StoreOutcome, Unreadable};
use super::error::Error;
use super::metrics::OrderMetrics;
use super::model::{
    AdminOrder, CancelOutcome, Coupon, Cursor, ExpireOutcome, Order, OrderFilter, Page, PayOutcome, Payment,
    Refund, Release, SaleCounts,
};
use super::put_back::{PutBack, PutBackDone};
use super::updates::Updates;
use crate::fail_point::fail_point;
pub use audit::{AuditOrder, AuditRows, UnreadableOrder};
use database::{Database, Readers};
use mysql::Tables;
pub use ownership::{FenceError, Fenced, Owners, ShardRow, Turned};
use positions::Positions;
pub use replication::{ReplicaStatus, ServerStanding};
use session::Session;
use writer::{Hub, Writer};

/// How long a read may take: the server ends a query that runs away sooner.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// How the store is opened.
#[derive(Clone)]
pub struct StoreOptions {
    /// This center.
    pub center: CenterId,
    /// The shards that it owns, for a new database; one that exists says it itself (O1).
    pub shards: Vec<Shard>,
    /// The shards of other centers: for a new database whose server replicates with theirs.
    pub others: Vec<(Shard, CenterId)>,
    /// Where servers replicate each other, one center makes the tables: the others wait for them.
    pub makes_tables: bool,
    /// Connections that read; writes have their own: one with SQLite, eight with MySQL.
    pub max_connections: u32,
    /// Where the time comes from.
    pub clock: Arc<dyn Clock>,
    /// What the store counts.
    pub metrics: OrderMetrics,
}

impl StoreOptions {
    /// The defaults for a center, which owns every shard.
    pub fn new(center: CenterId) -> StoreOptions {
        StoreOptions {
            center,
            shards: Shard::all().collect(),
            others: Vec::new(),
            makes_tables: true,
            max_connections: 4,
            clock: Arc::new(SystemClock),
            metrics: OrderMetrics::default(),
        }
    }
}

/// A handle of the order database; clones share it.
///
/// Writes are commands to one task that owns its connection: a caller that goes away does not stop them
/// half-way.
#[derive(Clone)]
pub struct OrderStore {
    readers: Readers,
    shared: Arc<Shared>,
}

struct Shared {
    center: CenterId,
    database: Arc<Database>,
    /// Counts how often shards have come to this center.
    turns: watch::Sender<u64>,
    /// The shards that the topology gives to this center, as bits: no transaction writes others.
    given: Arc<AtomicU64>,
    // Taken out when the store is closed: the task ends when no sender is left.
    writer: Mutex<Option<Writer>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    clock: Arc<dyn Clock>,
    metrics: OrderMetrics,
    updates: Updates,
}

impl OrderStore {
    /// Opens the database (`sqlite:PATH`, which is created, or `mysql://USER:PASSWORD@HOST:PORT/DATABASE`) and
    /// brings its tables to this release's form.
    pub async fn open(database_url: &str, options: StoreOptions) -> Result<OrderStore, Error> {
        let database = Arc::new(Database::of(database_url)?);
        let StoreOptions { center, shards, others, makes_tables, max_connections, clock, metrics } = options;
        let tables = Tables { center: &center, shards: &shards, others: &others, makes: makes_tables };
        let session = database.open(&tables).await?;
        let readers = database.readers(max_connections).await?;
        let updates = Updates::default();
        let hub = Arc::new(Hub { updates: updates.clone(), metrics: metrics.clone() });
        let given = Arc::new(AtomicU64::new(u64::MAX));
        let (writer, tasks) = Writer::start(&database, session, &center, &clock, &hub, &given);
        let shared = Shared {
            center,
            database,
            turns: watch::Sender::new(0),
            given,
            writer: Mutex::new(Some(writer)),
            tasks: Mutex::new(tasks),
            clock,
            metrics,
            updates,
        };
        Ok(OrderStore { readers, shared: Arc::new(shared) })
    }

    /// The feed of order changes.
    pub fn updates(&self) -> &Updates {
        &self.shared.updates
    }

    /// What the store counts.
    pub fn metrics(&self) -> &OrderMetrics {
        &self.shared.metrics
    }

    /// Where the store takes the time from.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.shared.clock
    }

    /// Finishes what was handed over and closes every connection. Later calls answer [`Error::Closed`].
    pub async fn close(&self) {
        self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let tasks = std::mem::take(&mut *self.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        // The readers first: the last connection that closes moves SQLite's log into the database file.
        self.readers.close().await;
        for task in tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a writer of the order database ended badly");
            }
        }
    }

    /// Reads in a task of its own, so that a caller that goes away leaves no connection in the middle of an answer;
    /// a database that does not answer at all is given up.
    async fn read<T, F>(&self, read: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: for<'a> FnOnce(&'a mut Session) -> BoxFuture<'a, Result<T, Error>> + Send + 'static,
    {
        let readers = self.readers.clone();
        let task = tokio::spawn(async move {
            let mut session = readers.acquire().await?;
            match tokio::time::timeout(READ_TIMEOUT, read(&mut session)).await {
                Ok(Err(error)) if !error.is_answer() => {
                    session.discard().await;
                    Err(error)
                }
                Ok(outcome) => outcome,
                Err(_) => {
                    session.discard().await;
                    Err(Error::Unavailable(sqlx::Error::PoolTimedOut))
                }
            }
        });
        task.await.map_err(|_| Error::Closed)?
    }

    fn writer(&self) -> Result<Writer, Error> {
        self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Error::Closed)
    }

    /// Stores a batch and moves the positions of the queues it came from, in one transaction (R2): it happens
    /// as a whole, or, with [`Error::PositionMoved`] or any other error, not at all. Orders that are there already
    /// are counted and left as they are; entries that cannot be read are set aside.
    pub async fn store(&self, batch: StoreBatch) -> Result<StoreOutcome, Error> {
        Ok(self.writer()?.run_patiently(insert::Store(batch)).await?.outcome)
    }

    /// Up to where a partition's outbox is stored, for all shards of this center, whichever queue brought it.
    pub async fn position(&self, partition: u8) -> Result<OutboxId, Error> {
        Ok(self.positions().await?.stored(partition))
    }

    /// The highest outbox id of a partition that anything stored came with: a ledger that ends before it was rolled
    /// back (F2).
    pub async fn highest(&self, partition: u8) -> Result<OutboxId, Error> {
        Ok(self.positions().await?.highest(partition))
    }

    async fn positions(&self) -> Result<Positions, Error> {
        let center = self.shared.center.clone();
        self.read(move |conn| Box::pin(async move { Positions::read(conn, &center).await })).await
    }

    /// For each of the 64 shards the offset of the next Kafka record to store; 0 before the first.
    pub async fn kafka_offsets(&self) -> Result<Vec<(Shard, i64)>, Error> {
        let center = self.shared.center.clone();
        self.read(move |conn| Box::pin(async move { positions::kafka_offsets(conn, &center).await })).await
    }

    /// An order.
    pub async fn order(&self, order_id: OrderId) -> Result<Option<Order>, Error> {
        self.read(move |conn| Box::pin(async move { read::order(conn, order_id).await })).await
    }

    /// An order with what only the shop sees.
    pub async fn admin_order(&self, order_id: OrderId) -> Result<Option<AdminOrder>, Error> {
        self.read(move |conn| Box::pin(async move { read::admin_order(conn, order_id).await })).await
    }

    /// A user's orders, newest first. Pages have at most 1,000 rows, here and below.
    pub async fn orders_of(
        &self,
        uid: &Uid,
        limit: u32,
        cursor: Option<Cursor>,
    ) -> Result<Page<Order>, Error> {
        let uid = uid.clone();
        self.read(move |conn| Box::pin(async move { read::orders_of(conn, &uid, limit, cursor).await })).await
    }

    /// A user's coupons, newest first.
    pub async fn coupons_of(
        &self,
        uid: &Uid,
        limit: u32,
        cursor: Option<Cursor>,
    ) -> Result<Page<Coupon>, Error> {
        let uid = uid.clone();
        self.read(move |conn| Box::pin(async move { read::coupons_of(conn, &uid, limit, cursor).await }))
            .await
    }

    /// All orders that fit: a user's newest first, everybody's table by table in the order of their ids. A cursor
    /// belongs to the filter it came from.
    pub async fn admin_orders(
        &self,
        filter: &OrderFilter,
        limit: u32,
        cursor: Option<Cursor>,
    ) -> Result<Page<AdminOrder>, Error> {
        let filter = filter.clone();
        self.read(move |conn| Box::pin(async move { read::admin_orders(conn, &filter, limit, cursor).await }))
            .await
    }

    /// Money that has to go back, newest first.
    pub async fn refunds(&self, limit: u32, cursor: Option<Cursor>) -> Result<Page<Refund>, Error> {
        let center = self.shared.center.clone();
        self.read(move |conn| Box::pin(async move { read::refunds(conn, &center, limit, cursor).await }))
            .await
    }

    /// Cancels an order of this user.
    pub async fn cancel(&self, uid: &Uid, order_id: OrderId) -> Result<CancelOutcome, Error> {
        self.writer()?.run(lifecycle::Cancel { uid: uid.clone(), order_id }).await
    }

    /// Books a payment.
    pub async fn pay(&self, payment: Payment) -> Result<PayOutcome, Error> {
        fail_point("paying");
        self.writer()?.run(lifecycle::Pay(payment)).await
    }

    /// Lets at most `limit` orders expire that came due in `(after, until]`.
    pub async fn expire_due(
        &self,
        after: Option<Millis>,
        until: Millis,
        limit: u32,
    ) -> Result<ExpireOutcome, Error> {
        // An idle look costs no place in the writer's queue.
        if self.next_due(after).await?.is_none_or(|due| due > until) {
            return Ok(ExpireOutcome::default());
        }
        let limit = limit.max(1);
        Ok(self.writer()?.run_patiently(lifecycle::Expire { after, until, limit }).await?.outcome)
    }

    /// The first moment behind `after` at which an order may come due.
    pub async fn next_due(&self, after: Option<Millis>) -> Result<Option<Millis>, Error> {
        let center = self.shared.center.clone();
        self.read(move |conn| Box::pin(async move { read::next_due(conn, &center, after).await })).await
    }

    /// The oldest releases that wait for the ledger, those of some sales left out.
    pub async fn pending_releases(&self, limit: u32, except: &[SaleId]) -> Result<Vec<Release>, Error> {
        let except = except.to_vec();
        let center = self.shared.center.clone();
        self.read(move |conn| {
            Box::pin(async move { read::pending_releases(conn, &center, limit, &except).await })
        })
        .await
    }

    /// How many releases wait for the ledger.
    pub async fn pending_release_count(&self) -> Result<i64, Error> {
        let center = self.shared.center.clone();
        self.read(move |conn| Box::pin(async move { read::pending_release_count(conn, &center).await })).await
    }

    /// Forgets releases that the ledger answered; `unknown` are those whose claim it does not hold: they are
    /// kept aside for the audit and not sent again.
    pub async fn releases_done(&self, done: Vec<OrderId>, unknown: Vec<OrderId>) -> Result<(), Error> {
        self.releases_answered(i64::MAX, done, unknown).await
    }

    /// The same for releases that were read up to this place of the queue. One that was asked for again since stays: its
    /// claim may have come after the ledger's answer.
    pub async fn releases_answered(
        &self,
        up_to: i64,
        done: Vec<OrderId>,
        unknown: Vec<OrderId>,
    ) -> Result<(), Error> {
        self.writer()?.run_patiently(queue::ReleasesDone { up_to, done, unknown }).await
    }

    /// Notes where a partition's position is now, or where the other centers' is if it is behind, and returns what was
    /// noted at `before` or last before that: what the outbox may be trimmed to. Without `own_counts` only the others' is
    /// looked at.
    pub async fn mark_position(
        &self,
        partition: u8,
        before: Millis,
        others: Option<OutboxId>,
        own_counts: bool,
    ) -> Result<Option<OutboxId>, Error> {
        let center = self.shared.center.clone();
        self.writer()?.run_patiently(queue::Mark { partition, before, others, own_counts, center }).await
    }

    /// Asks for the release of every cancelled and expired order of a sale again: a ledger that was adopted may
    /// not know of it. Idempotent by order id, here and there. Returns how many wait now.
    pub async fn requeue_releases(&self, sale_id: &SaleId) -> Result<u64, Error> {
        let writer = self.writer()?;
        let mut queued = 0;
        for table in Table::all() {
            queued += writer.run_patiently(queue::Requeue { sale_id: sale_id.clone(), table }).await?;
        }
        Ok(queued)
    }

    /// Orders and units of every sale (or of one) by state, and the outbox positions that they stand for, all
    /// from one moment.
    pub async fn counts(&self, sale_id: Option<&SaleId>) -> Result<Counts, Error> {
        let center = self.shared.center.clone();
        let sale_id = sale_id.cloned();
        self.read(move |conn| Box::pin(async move { read::counts(conn, &center, sale_id.as_ref()).await }))
            .await
    }

    /// Some orders of a sale, in a stable order of no meaning; start with `None`, go on with `next`.
    pub async fn orders_of_sale(
        &self,
        sale_id: &SaleId,
        limit: u32,
        cursor: Option<Cursor>,
    ) -> Result<Page<AdminOrder>, Error> {
        let filter = OrderFilter { sale_id: Some(sale_id.clone()), ..OrderFilter::default() };
        self.admin_orders(&filter, limit, cursor).await
    }

    /// Some rows of one order table, by order id, for the audit: what the table says, whoever wrote it. Start with
    /// `after` empty, go on with `next`.
    pub async fn audit_rows(
        &self,
        table: Table,
        after: &str,
        sale_id: Option<&SaleId>,
        limit: u32,
    ) -> Result<AuditRows, Error> {
        let after = after.to_owned();
        let sale_id = sale_id.cloned();
        self.read(move |conn| {
            Box::pin(async move { audit::rows(conn, table, &after, sale_id.as_ref(), limit).await })
        })
        .await
    }

    /// Whether the database may be replicated with those of other centers: then it holds copies of their rows.
    pub fn may_hold_copies(&self) -> bool {
        match &self.readers {
            Readers::Sqlite(_) => false,
            Readers::MySql(_) => true,
        }
    }

    /// Those of these orders that are stored.
    pub async fn audit_orders(&self, orders: &[OrderId]) -> Result<Vec<AuditOrder>, Error> {
        let orders = orders.to_vec();
        self.read(move |conn| Box::pin(async move { audit::orders(conn, &orders).await })).await
    }

    /// Those of these orders whose units the ledger has not taken back yet.
    pub async fn awaiting_release(&self, orders: &[OrderId]) -> Result<HashSet<OrderId>, Error> {
        let orders = orders.to_vec();
        self.read(move |conn| Box::pin(async move { audit::awaiting_release(conn, &orders).await })).await
    }

    /// The sales of which orders are stored.
    pub async fn sales(&self) -> Result<Vec<SaleId>, Error> {
        self.read(move |conn| Box::pin(async move { read::sales(conn).await })).await
    }

    /// Cancels orders that an adopted ledger could not claim again: those still `created`. No release is due for
    /// them. Returns which were cancelled; paid ones stay as they are.
    pub async fn cancel_lost(&self, orders: Vec<OrderId>, reason: &str) -> Result<Vec<OrderId>, Error> {
        self.writer()?.run_patiently(lifecycle::CancelLost { orders, reason: reason.to_owned() }).await
    }

    /// Writes down what became of orders of a saved tail (H6): stores those that are missing, cancels unpaid ones whose
    /// claim is lost, and has closed ones released again that have a claim. It happens as a whole, or, with
    /// [`Error::NotOwner`] or any other error, not at all; the same again changes nothing more.
    ///
    /// A tail has one reader at a time: an order that one calls lost after another one claimed it would be cancelled
    /// with its claim held.
    pub async fn put_back(&self, call: PutBack) -> Result<PutBackDone, Error> {
        Ok(self.writer()?.run_patiently(put_back::Restore(call)).await?.done)
    }

    /// Outbox entries that were set aside, newest first.
    pub async fn unreadable(&self, limit: u32, cursor: Option<Cursor>) -> Result<Page<Unreadable>, Error> {
        let center = self.shared.center.clone();
        self.read(move |conn| Box::pin(async move { read::unreadable(conn, &center, limit, cursor).await }))
            .await
    }
}

/// What the audit compares the ledger with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// By sale.
    pub sales: BTreeMap<SaleId, SaleCounts>,
    /// Up to where each partition's outbox is stored in this picture.
    pub positions: Vec<(u8, OutboxId)>,
    /// Outbox entries set aside as unreadable.
    pub unreadable: u64,
}

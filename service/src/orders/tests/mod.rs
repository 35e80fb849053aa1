//! The order store on real SQLite files, the workers on a real redis-server.

mod both_queues;
mod kafka;
mod lifecycle;
mod queues;
mod replicated;
mod store;
mod workers;

use std::sync::Arc;

use seckill_domain::{
    CenterId, CenterNumber, Clock, Epoch, ManualClock, Millis, Money, OrderId, OrderRecord, OutboxId,
    Quantity, SaleId, SaleTerms, Uid,
};
use tempfile::TempDir;

use super::{OrderStore, Payment, PaymentId, StoreBatch, StoreOptions, StoreOutcome};

const START: Millis = Millis(1_750_000_000_000);

/// A database in a folder of its own, and a clock that is moved by hand.
struct Fixture {
    folder: TempDir,
    clock: Arc<ManualClock>,
    store: OrderStore,
    /// Sequence of the last entry that was stored with [`Fixture::put`].
    seq: u64,
}

impl Fixture {
    async fn new() -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::new(START));
        let store = open(&folder, &clock, "a").await.unwrap();
        Fixture { folder, clock, store, seq: 0 }
    }

    fn url(&self) -> String {
        url(&self.folder)
    }

    /// Another store on the same file, as a second process would open it.
    async fn again(&self) -> OrderStore {
        open(&self.folder, &self.clock, "a").await.unwrap()
    }

    /// Ends the store and opens the file again.
    async fn reopen(&mut self) {
        self.store.close().await;
        self.store = self.again().await;
    }

    /// Stores orders as the next entry of partition 0.
    async fn put(&mut self, orders: &[OrderRecord]) -> StoreOutcome {
        let from = at(self.seq);
        self.seq += 1;
        self.store.store(StoreBatch::outbox(0, from, at(self.seq), orders.to_vec())).await.unwrap()
    }

    /// Hands a shard over to center `b`.
    async fn give_away(&self, shard: seckill_domain::Shard) {
        let pool = sqlx::SqlitePool::connect(&self.url()).await.unwrap();
        sqlx::query("UPDATE shard_owner SET owner = 'b', epoch = 2 WHERE shard = ?")
            .bind(shard.number())
            .execute(&pool)
            .await
            .unwrap();
        pool.close().await;
    }

    fn now(&self) -> Millis {
        self.clock.now()
    }

    /// A number that a query on the file gives.
    async fn number(&self, sql: &'static str) -> i64 {
        let pool = sqlx::SqlitePool::connect(&self.url()).await.unwrap();
        let number = sqlx::query_scalar(sql).fetch_one(&pool).await.unwrap();
        pool.close().await;
        number
    }
}

fn url(folder: &TempDir) -> String {
    format!("sqlite:{}", folder.path().join("orders.db").display())
}

async fn open(folder: &TempDir, clock: &Arc<ManualClock>, center: &str) -> Result<OrderStore, super::Error> {
    let clock: Arc<dyn Clock> = Arc::<ManualClock>::clone(clock);
    let options = StoreOptions { clock, ..StoreOptions::new(CenterId::new(center).unwrap()) };
    OrderStore::open(&url(folder), options).await
}

fn at(seq: u64) -> OutboxId {
    if seq == 0 { OutboxId::ZERO } else { OutboxId { epoch: 1, seq } }
}

fn sale(id: &str) -> SaleId {
    SaleId::new(id).unwrap()
}

fn user(uid: &str) -> Uid {
    Uid::new(uid).unwrap()
}

fn product(price: i64, payment_ttl_s: u32) -> Arc<SaleTerms> {
    let json = format!(
        r#"{{"kind":"product","unit_price":{price},"currency":"CNY","payment_ttl_s":{payment_ttl_s}}}"#
    );
    Arc::new(serde_json::from_str(&json).unwrap())
}

/// A coupon of 500 off orders of at least 1000, valid for an hour.
fn coupon(price: i64) -> Arc<SaleTerms> {
    let json = format!(
        r#"{{"kind":"coupon","unit_price":{price},"currency":"CNY","payment_ttl_s":900,
            "coupon":{{"discount":500,"min_amount":1000,"valid_until":"{}"}}}}"#,
        START.plus_s(3600)
    );
    Arc::new(serde_json::from_str(&json).unwrap())
}

/// An accepted purchase of one unit of sale `s`; `seq` numbers the order.
fn order(uid: &str, seq: u64, terms: &Arc<SaleTerms>) -> OrderRecord {
    let uid = user(uid);
    let head = OrderId::head_of(CenterNumber::new(1).unwrap(), uid.table(), 0, Epoch(1));
    OrderRecord {
        order_id: OrderId::from_parts(head, seq).unwrap(),
        uid,
        sale_id: sale("s"),
        quantity: Quantity::ONE,
        terms: Arc::clone(terms),
        accepted_at: START,
        traceparent: None,
    }
}

fn payment(order: &OrderRecord, payment_id: &str, amount: i64) -> Payment {
    Payment {
        order_id: order.order_id,
        payment_id: PaymentId::new(payment_id).unwrap(),
        amount: Money::new(amount).unwrap(),
        coupon_id: None,
    }
}

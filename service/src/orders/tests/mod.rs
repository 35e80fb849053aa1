//! The order store on real SQLite files and on a real MariaDB, the workers on a real redis-server.

mod both_queues;
mod kafka;
mod lifecycle;
mod mysql;
mod pair;
mod place;
mod put_back;
mod queues;
mod replicated;
mod store;
mod workers;

use std::sync::Arc;

use super::{OrderStore, Payment, PaymentId, StoreBatch, StoreOptions, StoreOutcome};
use place::{Kind, Place, on_both};
use seckill_domain::{
    CenterId, CenterNumber, Clock, Epoch, ManualClock, Millis, Money, OrderId, OrderRecord, OutboxId,
    Quantity, SaleId, SaleTerms, Uid,
};
use workers::eventually;

const START: Millis = Millis(1_750_000_000_000);

/// A database of the test's own, and a clock that is moved by hand.
struct Fixture {
    // The store goes before the place it lives in.
    store: OrderStore,
    place: Place,
    clock: Arc<ManualClock>,
    /// Sequence of the last entry that was stored with [`Fixture::put`].
    seq: u64,
}

impl Fixture {
    /// On SQLite, for what does not depend on the database.
    async fn new() -> Fixture {
        Fixture::on(Kind::Sqlite).await
    }

    async fn on(kind: Kind) -> Fixture {
        Fixture::in_place(Place::new(kind).await).await
    }

    async fn in_place(place: Place) -> Fixture {
        let clock = Arc::new(ManualClock::new(START));
        let store = open(place.url(), &clock, "a").await.unwrap();
        Fixture { store, place, clock, seq: 0 }
    }

    /// Opens the same database once more.
    async fn open(&self, center: &str) -> Result<OrderStore, super::Error> {
        open(self.place.url(), &self.clock, center).await
    }

    /// Another store on the same database, as a second process would open it.
    async fn again(&self) -> OrderStore {
        self.open("a").await.unwrap()
    }

    /// Ends the store and opens the database again.
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
        self.run(format!("UPDATE shard_owner SET owner = 'b', epoch = 2 WHERE shard = {}", shard.number()))
            .await;
    }

    fn now(&self) -> Millis {
        self.clock.now()
    }

    /// Runs statements past the store.
    async fn run(&self, sql: impl Into<String>) {
        self.place.run(sql.into()).await;
    }

    /// A number that a query past the store gives.
    async fn number(&self, sql: &str) -> i64 {
        self.place.number(sql).await
    }

    /// Two texts a row, as a query past the store gives them.
    async fn pairs(&self, sql: String) -> Vec<(String, String)> {
        self.place.pairs(sql).await
    }
}

async fn open(url: &str, clock: &Arc<ManualClock>, center: &str) -> Result<OrderStore, super::Error> {
    let clock: Arc<dyn Clock> = Arc::<ManualClock>::clone(clock);
    let options = StoreOptions { clock, ..StoreOptions::new(CenterId::new(center).unwrap()) };
    OrderStore::open(url, options).await
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

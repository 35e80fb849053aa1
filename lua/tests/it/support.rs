//! A ledger on a server of its own, and short names for what tests do with it.

use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterNumber, IdempotencyKey, KeyDigest, OrderId, Quantity, SaleId, SaleSpec, Uid};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    CreateOutcome, Error, Fence, ReleaseEntry, ReleaseOutcome, ReserveEntry, ReserveOutcome, ReserveReply,
    create_sale, release, reserve,
};

pub(crate) struct Ledger {
    pub(crate) server: RedisServer,
    pub(crate) conn: MultiplexedConnection,
    pub(crate) fence: Fence,
}

impl Ledger {
    pub(crate) async fn start() -> Ledger {
        Ledger::on(RedisServer::start().await).await
    }

    pub(crate) async fn on(server: RedisServer) -> Ledger {
        let fence = server.init_ledger().await;
        let conn = server.connect().await;
        Ledger { server, conn, fence }
    }

    /// Puts `quantity` units on sale, `limit` for each user.
    pub(crate) async fn sale(&mut self, id: &str, quantity: u64, limit: u32) -> SaleId {
        self.create(&spec(id, quantity, limit)).await
    }

    pub(crate) async fn create(&mut self, spec: &SaleSpec) -> SaleId {
        let outcome = create_sale(&mut self.conn, &self.fence, spec, &key("body")).await.unwrap();
        assert_eq!(outcome, CreateOutcome::Created { version: 1 });
        spec.sale_id.clone()
    }

    pub(crate) async fn try_reserve(
        &mut self,
        sale: &SaleId,
        entries: &[ReserveEntry],
    ) -> Result<ReserveReply, Error> {
        reserve(&mut self.conn, &self.fence, 0, sale, entries).await
    }

    pub(crate) async fn reserve(&mut self, sale: &SaleId, entries: &[ReserveEntry]) -> Vec<ReserveOutcome> {
        self.try_reserve(sale, entries).await.unwrap().outcomes
    }

    pub(crate) async fn buy(&mut self, sale: &SaleId, uid: &str, key: &str, quantity: u32) -> ReserveOutcome {
        self.reserve(sale, &[entry(uid, key, quantity)]).await.remove(0)
    }

    /// Buys one unit, which must succeed.
    pub(crate) async fn order(&mut self, sale: &SaleId, uid: &str, key: &str) -> OrderId {
        match self.buy(sale, uid, key, 1).await {
            ReserveOutcome::Accepted(order) => order,
            other => panic!("{uid} was to buy one unit of {sale}: {other:?}"),
        }
    }

    pub(crate) async fn release(&mut self, sale: &SaleId, orders: &[(&str, OrderId)]) -> Vec<ReleaseOutcome> {
        let entries: Vec<ReleaseEntry> =
            orders.iter().map(|(user, order)| ReleaseEntry { order_id: *order, uid: uid(user) }).collect();
        release(&mut self.conn, &self.fence, sale, &entries).await.unwrap()
    }

    pub(crate) async fn row(&mut self, sale: &SaleId) -> seckill_ledger::read::Sale {
        seckill_ledger::read::sale(&mut self.conn, sale).await.unwrap().unwrap()
    }

    /// Moves the ledger's time: it never goes back behind what is stored.
    pub(crate) async fn set_clock(&mut self, ms: i64) {
        self.raw(&["SET", "sk:clock", &ms.to_string()]).await;
    }

    pub(crate) async fn raw(&mut self, words: &[&str]) -> redis::Value {
        let mut cmd = redis::cmd(words[0]);
        for word in &words[1..] {
            cmd.arg(*word);
        }
        cmd.query_async(&mut self.conn).await.unwrap()
    }

    /// Every key with its content: nothing happened if two of them are equal.
    pub(crate) async fn dump(&mut self) -> Vec<(String, Option<Vec<u8>>)> {
        let mut keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut self.conn).await.unwrap();
        keys.sort();
        let mut dump = Vec::new();
        for key in keys {
            let content = redis::cmd("DUMP").arg(&key).query_async(&mut self.conn).await.unwrap();
            dump.push((key, content));
        }
        dump
    }
}

pub(crate) fn spec(id: &str, quantity: u64, limit: u32) -> SaleSpec {
    let json = format!(
        r#"{{"sale_id":"{id}","kind":"product","title":"a thing","quantity":{quantity},"price":1999,"currency":"CNY","per_user_limit":{limit}}}"#
    );
    serde_json::from_str::<SaleSpec>(&json).unwrap().validate(None).unwrap()
}

pub(crate) fn key(text: &str) -> KeyDigest {
    *IdempotencyKey::new(text).unwrap().digest()
}

pub(crate) fn uid(text: &str) -> Uid {
    Uid::new(text).unwrap()
}

pub(crate) fn entry(user: &str, idempotency_key: &str, quantity: u32) -> ReserveEntry {
    ReserveEntry {
        uid: uid(user),
        key: key(idempotency_key),
        quantity: Quantity::new(quantity).unwrap(),
        center: CenterNumber::new(1).unwrap(),
        traceparent: None,
    }
}

/// Waits until something is true.
pub(crate) async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check().await {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

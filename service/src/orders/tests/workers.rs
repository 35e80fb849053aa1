use std::time::{Duration, Instant};

use redis::Client;
use redis::aio::MultiplexedConnection;
use seckill_domain::{IdempotencyKey, OrderStatus, SaleSpec};
use seckill_ledger::admin::{FenceChange, set_fence};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    Fence, LedgerId, ReleaseEntry, ReserveEntry, ReserveOutcome, create_sale, outbox, read, release, reserve,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::inventory::Barrier;
use crate::orders::Origin;
use crate::orders::expiry::Expiry;
use crate::orders::releases::{Lines, Releases};
use crate::orders::trim::Trim;
use crate::orders::workers::Link;
use crate::orders::{Queue, TailerStatus, WorkerOptions, Workers};
use crate::topology::Authority;

pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// A ledger with a sale of 1000 units, and the order store beside it.
pub(super) struct Shop {
    pub(super) redis: RedisServer,
    pub(super) conn: MultiplexedConnection,
    pub(super) fence: Fence,
    pub(super) db: Fixture,
}

impl Shop {
    pub(super) async fn open() -> Shop {
        let redis = RedisServer::start().await;
        let fence = redis.init_ledger().await;
        let conn = redis.connect().await;
        let db = Fixture::new().await;
        let mut shop = Shop { redis, conn, fence, db };
        shop.sell("s").await;
        shop
    }

    pub(super) async fn sell(&mut self, id: &str) {
        let spec: SaleSpec = serde_json::from_value(serde_json::json!({
            "sale_id": id, "kind": "product", "quantity": 1000, "price": 100, "currency": "CNY",
            "per_user_limit": 1000, "payment_ttl_s": 10,
        }))
        .unwrap();
        create_sale(&mut self.conn, &self.fence, &spec, &[0; 16]).await.unwrap();
    }

    /// Buys one unit of a sale for each of these users, in one call.
    pub(super) async fn buy(&mut self, id: &str, uids: &[&str]) -> Vec<OrderId> {
        let entries: Vec<ReserveEntry> = uids
            .iter()
            .map(|uid| ReserveEntry {
                uid: user(uid),
                key: *IdempotencyKey::new(&format!("k{}", rand::random::<u64>())).unwrap().digest(),
                quantity: Quantity::ONE,
                center: CenterNumber::new(1).unwrap(),
                traceparent: None,
            })
            .collect();
        let reply = reserve(&mut self.conn, &self.fence, 0, &sale(id), &entries).await.unwrap();
        let accepted = reply.outcomes.into_iter().map(|outcome| match outcome {
            ReserveOutcome::Accepted(order_id) => order_id,
            other => panic!("{other:?}"),
        });
        accepted.collect()
    }

    pub(super) fn authority(&self) -> Authority {
        Authority::fixed(self.fence.clone())
    }

    pub(super) fn link(&self) -> Link {
        let (client, authority) = (self.redis.client(), self.authority());
        let barrier =
            Barrier::open(client.clone(), &authority, &TaskTracker::new(), &CancellationToken::new());
        Link { partition: 0, client, authority, barrier, cross: None }
    }

    pub(super) async fn remaining(&mut self, id: &str) -> u64 {
        let found = read::sale(&mut self.conn, &sale(id)).await.unwrap().unwrap();
        assert_eq!(found.total, found.remaining + found.claimed);
        found.remaining
    }

    pub(super) async fn stored(&self, id: &str) -> u64 {
        let counts = self.db.store.counts(None).await.unwrap();
        let Some(counts) = counts.sales.get(&sale(id)) else { return 0 };
        OrderStatus::ALL.iter().map(|status| counts.of(*status).orders).sum()
    }
}

/// Workers that end with the test.
pub(super) struct Running {
    pub(super) workers: Workers,
    tracker: TaskTracker,
    pub(super) token: CancellationToken,
}

pub(super) fn options() -> WorkerOptions {
    WorkerOptions {
        store_batch: 16,
        expiry_interval_ms: 10,
        expiry_grace_s: 120,
        release_interval_ms: 10,
        outbox_retention_s: 0,
        cross: None,
        centers: None,
    }
}

fn start(store: &OrderStore, client: Client, authority: &Authority) -> Running {
    start_with(store, client, authority, &Queue::Outbox)
}

pub(super) fn start_with(
    store: &OrderStore,
    client: Client,
    authority: &Authority,
    queue: &Queue,
) -> Running {
    let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
    let workers = Workers::spawn(store, &[client], authority, queue, &options(), &tracker, (&token, &token));
    Running { workers, tracker, token }
}

impl Running {
    /// Tells the workers to end and does not wait: the next ones meet them.
    pub(super) fn abandon(self) {
        self.token.cancel();
    }

    pub(super) async fn stop(self) {
        self.token.cancel();
        self.tracker.close();
        tokio::time::timeout(DEADLINE, self.tracker.wait()).await.expect("workers end when told to");
    }

    async fn until(&self, wanted: impl FnMut(&TailerStatus) -> bool) -> TailerStatus {
        let mut status = self.workers.tailer(0).unwrap();
        let found = tokio::time::timeout(DEADLINE, status.wait_for(wanted)).await;
        found.expect("the status comes").unwrap().clone()
    }
}

pub(super) async fn eventually(mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition().await {
        assert!(Instant::now() < deadline, "it did not come true in time");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn every_accepted_order_becomes_one_row() {
    let mut shop = Shop::open().await;
    let mut accepted = shop.buy("s", &["early", "bird"]).await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    for round in 0..20 {
        let uids: Vec<String> = (0..=round).map(|n| format!("u{round}-{n}")).collect();
        accepted.extend(shop.buy("s", &uids.iter().map(String::as_str).collect::<Vec<_>>()).await);
    }
    eventually(async || shop.stored("s").await == accepted.len() as u64).await;
    for order_id in &accepted {
        assert!(shop.db.store.order(*order_id).await.unwrap().is_some());
    }
    let last = outbox::last_id(&mut shop.conn).await.unwrap().unwrap();
    running.until(|status| *status == TailerStatus::Following { position: last }).await;
    running.stop().await;
    assert_eq!(shop.db.store.metrics().stored.get(), accepted.len() as u64);
}

#[tokio::test]
async fn two_tailers_at_once_store_each_order_once() {
    let mut shop = Shop::open().await;
    let other = shop.db.again().await;
    let one = start(&shop.db.store, shop.redis.client(), &shop.authority());
    let two = start(&other, shop.redis.client(), &shop.authority());
    let mut accepted = Vec::new();
    for round in 0..40 {
        let uids: Vec<String> = (0..5).map(|n| format!("u{round}-{n}")).collect();
        accepted.extend(shop.buy("s", &uids.iter().map(String::as_str).collect::<Vec<_>>()).await);
    }
    eventually(async || shop.stored("s").await == accepted.len() as u64).await;
    one.stop().await;
    two.stop().await;
    let (first, second) = (shop.db.store.metrics(), other.metrics());
    assert_eq!(first.stored.get() + second.stored.get(), accepted.len() as u64);
    assert_eq!(first.duplicates.get() + second.duplicates.get(), 0);
    other.close().await;
}

#[tokio::test]
async fn a_tailer_that_dies_between_storing_and_reading_on_loses_and_doubles_nothing() {
    let mut shop = Shop::open().await;
    let mut accepted = 0;
    for round in 0..6 {
        accepted += shop.buy("s", &[format!("u{round}").as_str(), "again"]).await.len() as u64;
        let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
        eventually(async || shop.stored("s").await > 0).await;
        // Dropped with its connection, without a word; the file is opened anew, as after a kill.
        running.token.cancel();
        running.tracker.close();
        running.tracker.wait().await;
        shop.db.reopen().await;
    }
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    eventually(async || shop.stored("s").await == accepted).await;
    running.stop().await;
}

#[tokio::test]
async fn a_restarted_ledger_is_followed_again() {
    let mut shop = Shop::open().await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    shop.buy("s", &["a"]).await;
    eventually(async || shop.stored("s").await == 1).await;
    shop.redis.kill();
    running.until(|status| matches!(status, TailerStatus::Waiting { .. })).await;
    shop.redis.restart().await;
    shop.conn = shop.redis.connect().await;
    shop.buy("s", &["b"]).await;
    eventually(async || shop.stored("s").await == 2).await;
    running.stop().await;
}

#[tokio::test]
async fn a_rolled_back_ledger_is_noticed() {
    let mut shop = Shop::open().await;
    shop.buy("s", &["a", "b", "c"]).await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    eventually(async || shop.stored("s").await == 3).await;
    running.stop().await;
    let position = shop.db.store.position(0).await.unwrap();
    // Yesterday's copy, under the same fence.
    redis::cmd("FLUSHALL").query_async::<()>(&mut shop.conn).await.unwrap();
    shop.fence = shop.redis.init_ledger().await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    let status = running.until(|status| matches!(status, TailerStatus::RolledBack { .. })).await;
    assert_eq!(status, TailerStatus::RolledBack { position, ledger: at(1) });
    running.stop().await;
    // Adopted, it goes on under a new epoch.
    shop.fence = shop.fence.at(Epoch(2));
    set_fence(&mut shop.conn, &FenceChange::Adopt, &shop.fence).await.unwrap();
    shop.sell("s").await;
    shop.buy("s", &["d"]).await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    eventually(async || shop.stored("s").await == 4).await;
    running.stop().await;
}

#[tokio::test]
async fn nothing_is_stored_from_a_ledger_that_is_not_the_topologys() {
    let mut shop = Shop::open().await;
    shop.buy("s", &["a"]).await;
    let foreign = Fence { ledger_id: LedgerId::new("another").unwrap(), ..shop.fence.clone() };
    for fence in [foreign, shop.fence.at(Epoch(2))] {
        let running = start(&shop.db.store, shop.redis.client(), &Authority::fixed(fence));
        running.until(|status| matches!(status, TailerStatus::Waiting { .. })).await;
        running.stop().await;
    }
    redis::cmd("REPLICAOF").arg("127.0.0.1").arg(1).query_async::<()>(&mut shop.conn).await.unwrap();
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    running.until(|status| matches!(status, TailerStatus::Waiting { .. })).await;
    running.stop().await;
    assert_eq!((shop.stored("s").await, shop.db.store.position(0).await.unwrap()), (0, OutboxId::ZERO));
}

#[tokio::test]
async fn an_unreadable_entry_does_not_hold_up_the_others() {
    let mut shop = Shop::open().await;
    shop.buy("s", &["a"]).await;
    let last = outbox::last_id(&mut shop.conn).await.unwrap().unwrap();
    let broken = OutboxId { seq: last.seq + 1, ..last };
    redis::pipe()
        .cmd("XADD")
        .arg("sk:outbox")
        .arg(broken.to_string())
        .arg(&["v", "1", "k", "orders", "s", "s", "a", "5", "t", "{", "o", "nonsense\n"])
        .cmd("INCR")
        .arg("sk:seq")
        .query_async::<()>(&mut shop.conn)
        .await
        .unwrap();
    shop.buy("s", &["b"]).await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    eventually(async || shop.stored("s").await == 2).await;
    running.stop().await;
    let aside = shop.db.store.unreadable(10, None).await.unwrap().items;
    assert_eq!((aside.len(), aside[0].origin), (1, Origin::Outbox { partition: 0, id: broken }));
    assert!(aside[0].raw.contains("nonsense"), "{aside:?}");
}

#[tokio::test]
async fn what_came_due_while_the_service_was_away_gets_its_grace() {
    let mut shop = Shop::open().await;
    shop.db.put(&[order("away", 1, &product(100, 10))]).await;
    // The service is away for a minute; another order comes due after it is back.
    shop.db.clock.advance_ms(60_000);
    shop.db.put(&[order("back", 2, &product(100, 10))]).await;
    let expiry = Expiry::new(shop.db.store.clone(), &options());
    let token = CancellationToken::new();
    let expired = async || {
        expiry.round(&token).await.unwrap();
        shop.db.store.counts(None).await.unwrap().sales[&sale("s")].of(OrderStatus::Expired).orders
    };
    assert_eq!(expired().await, 0);
    shop.db.clock.advance_ms(10_000);
    assert_eq!(expired().await, 1);
    shop.db.clock.advance_ms(109_999);
    assert_eq!(expired().await, 1);
    shop.db.clock.advance_ms(1);
    assert_eq!(expired().await, 2);
}

#[tokio::test]
async fn a_round_of_expiry_has_an_end_and_the_next_one_goes_on_where_it_stopped() {
    let mut db = Fixture::new().await;
    let orders: Vec<_> = (1..=10).map(|seq| order(&format!("u{seq}"), seq, &product(100, 10))).collect();
    db.put(&orders).await;
    let expiry =
        Expiry::new(db.store.clone(), &WorkerOptions { expiry_grace_s: 0, ..options() }).bounded(2, 3);
    db.clock.advance_ms(10_000);
    let token = CancellationToken::new();
    for expired in [6, 10, 10] {
        expiry.round(&token).await.unwrap();
        let counts = db.store.counts(None).await.unwrap();
        assert_eq!(counts.sales[&sale("s")].of(OrderStatus::Expired).orders, expired);
    }
}

#[tokio::test]
async fn an_unpaid_order_returns_its_units_by_itself() {
    let mut shop = Shop::open().await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    let unpaid = shop.buy("s", &["a", "b", "c"]).await;
    eventually(async || shop.stored("s").await == 3).await;
    assert_eq!(shop.remaining("s").await, 997);
    shop.db.store.cancel(&user("a"), unpaid[0]).await.unwrap();
    shop.db.clock.advance_ms(10_000);
    eventually(async || shop.db.store.metrics().released.get() == 3).await;
    running.stop().await;
    assert_eq!((shop.remaining("s").await, shop.db.store.pending_release_count().await.unwrap()), (1000, 0));
}

/// The steps of a release are: the order's change with its record; the call; the record's end. The process dies
/// after each of them, and everything is opened again.
#[tokio::test]
async fn units_return_once_wherever_the_process_dies() {
    let mut shop = Shop::open().await;
    let ids = shop.buy("s", &["a", "b", "c"]).await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    eventually(async || shop.stored("s").await == 3).await;
    running.stop().await;
    let token = CancellationToken::new();
    let deliver = async |shop: &Shop| {
        let releases = Releases::new(shop.db.store.clone(), vec![shop.link()], &options());
        releases.round(&mut Lines::default(), &token).await.unwrap();
    };
    // After the order's change.
    shop.db.store.cancel(&user("a"), ids[0]).await.unwrap();
    shop.db.reopen().await;
    assert_eq!(shop.remaining("s").await, 997);
    deliver(&shop).await;
    assert_eq!(shop.remaining("s").await, 998);
    // After the call, before the record's end; the ledger restarts too.
    shop.db.store.cancel(&user("b"), ids[1]).await.unwrap();
    let entry = ReleaseEntry { order_id: ids[1], uid: user("b") };
    release(&mut shop.conn, &shop.fence, &sale("s"), &[entry]).await.unwrap();
    shop.db.reopen().await;
    shop.redis.restart().await;
    shop.conn = shop.redis.connect().await;
    assert_eq!(shop.db.store.pending_release_count().await.unwrap(), 1);
    deliver(&shop).await;
    assert_eq!((shop.remaining("s").await, shop.db.store.pending_release_count().await.unwrap()), (999, 0));
    // After the record's end, and again by two at once.
    shop.db.store.cancel(&user("c"), ids[2]).await.unwrap();
    tokio::join!(deliver(&shop), deliver(&shop));
    shop.db.reopen().await;
    deliver(&shop).await;
    assert_eq!(shop.remaining("s").await, 1000);
    assert_eq!(shop.db.store.requeue_releases(&sale("s")).await.unwrap(), 3);
    deliver(&shop).await;
    assert_eq!((shop.remaining("s").await, shop.db.store.pending_release_count().await.unwrap()), (1000, 0));
}

#[tokio::test]
async fn a_sale_that_cannot_take_its_units_back_holds_up_no_other() {
    let mut shop = Shop::open().await;
    shop.sell("other").await;
    let bad = shop.buy("s", &["a"]).await;
    let good = shop.buy("other", &["b"]).await;
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    eventually(async || shop.stored("s").await + shop.stored("other").await == 2).await;
    running.stop().await;
    shop.db.store.cancel(&user("a"), bad[0]).await.unwrap();
    shop.db.store.cancel(&user("b"), good[0]).await.unwrap();
    redis::pipe()
        .cmd("RENAME")
        .arg("sk:c:s")
        .arg("kept")
        .cmd("SET")
        .arg("sk:c:s")
        .arg("damaged")
        .query_async::<()>(&mut shop.conn)
        .await
        .unwrap();
    let releases = Releases::new(shop.db.store.clone(), vec![shop.link()], &options());
    let token = CancellationToken::new();
    assert!(releases.round(&mut Lines::default(), &token).await.is_err());
    assert_eq!(
        (shop.remaining("other").await, shop.db.store.pending_release_count().await.unwrap()),
        (1000, 1)
    );
    redis::cmd("RENAME").arg("kept").arg("sk:c:s").query_async::<()>(&mut shop.conn).await.unwrap();
    releases.round(&mut Lines::default(), &token).await.unwrap();
    assert_eq!((shop.remaining("s").await, shop.db.store.pending_release_count().await.unwrap()), (1000, 0));
}

#[tokio::test]
async fn a_claim_that_the_ledger_does_not_hold_is_kept_aside() {
    let mut shop = Shop::open().await;
    let stranger = order("ghost", 4711, &product(100, 10));
    shop.db.put(std::slice::from_ref(&stranger)).await;
    shop.db.store.cancel(&stranger.uid, stranger.order_id).await.unwrap();
    let releases = Releases::new(shop.db.store.clone(), vec![shop.link()], &options());
    releases.round(&mut Lines::default(), &CancellationToken::new()).await.unwrap();
    assert_eq!((shop.remaining("s").await, shop.db.store.pending_release_count().await.unwrap()), (1000, 0));
    let counts = shop.db.store.counts(None).await.unwrap();
    assert_eq!(counts.sales[&sale("s")].release_unknown.orders, 1);
}

#[tokio::test]
async fn only_what_is_stored_long_enough_leaves_the_outbox() {
    let mut shop = Shop::open().await;
    // Entries go in whole nodes of the stream: fill some.
    redis::cmd("CONFIG")
        .arg("SET")
        .arg("stream-node-max-entries")
        .arg(1)
        .query_async::<()>(&mut shop.conn)
        .await
        .unwrap();
    let running = start(&shop.db.store, shop.redis.client(), &shop.authority());
    for n in 0..5 {
        shop.buy("s", &[format!("u{n}").as_str()]).await;
    }
    eventually(async || shop.stored("s").await == 5).await;
    running.stop().await;
    let stored = shop.db.store.position(0).await.unwrap();
    shop.buy("s", &["late"]).await;
    let trim = |retention| {
        let options = WorkerOptions { outbox_retention_s: retention, ..options() };
        Trim::new(shop.db.store.clone(), shop.link(), &options, true)
    };
    let length = async || -> u64 {
        let mut conn = shop.redis.connect().await;
        redis::cmd("XLEN").arg("sk:outbox").query_async(&mut conn).await.unwrap()
    };
    let before = length().await;
    trim(3600).round().await.unwrap();
    assert_eq!(length().await, before);
    shop.db.clock.advance_ms(3_600_000);
    trim(3600).round().await.unwrap();
    let mut conn = shop.redis.connect().await;
    let first = outbox::first_id(&mut conn).await.unwrap().unwrap();
    assert!(length().await < before && first <= stored, "{first} {stored}");
    assert_eq!(length().await, 2, "the last stored entry and the one that is not stored stay");
}

//! Lanes, the sold-out marker and snapshots against a real redis-server.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use seckill::config::{InventoryConfig, LedgerConfig, SecretUrl};
use seckill::cross_center::calls::ReclaimOutcome;
use seckill::inventory::{Accepted, Inventory, Parts, Purchase, PurchaseError};
use seckill::topology::{Authority, Center, FileStore, Limits, Topology, TopologyHandle};
use seckill_domain::{
    CenterId, CenterNumber, Epoch, IdempotencyKey, OrderId, Quantity, SaleId, SalePhase, SaleSpec, Uid,
};
use seckill_ledger::admin::ReclaimEntry;
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{Executed, Fence, ReleaseEntry, StateChange};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::support::eventually;

/// An inventory on a ledger of its own.
struct Shop {
    redis: RedisServer,
    fence: Fence,
    inventory: Inventory,
    tracker: TaskTracker,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Shop {
    async fn open(config: InventoryConfig) -> Shop {
        let redis = RedisServer::start().await;
        let fence = redis.init_ledger().await;
        Shop::on(redis, fence, config).await
    }

    async fn on(redis: RedisServer, fence: Fence, config: InventoryConfig) -> Shop {
        let dir = tempfile::tempdir().unwrap();
        let url = "http://127.0.0.1:1".to_owned();
        let center = Center {
            number: CenterNumber::new(1).unwrap(),
            public_url: url.clone(),
            admin_url: url.clone(),
            internal_url: url,
            ledger: Vec::new(),
            extra: serde_json::Map::new(),
        };
        let mut topology =
            Topology::single(fence.ledger_id.clone(), CenterId::new("a").unwrap(), center, Limits::default());
        topology.epoch = fence.epoch;
        let authority = Authority::fixed(fence.clone());
        let store = FileStore::new(dir.path().join("topology.json"));
        let topology = TopologyHandle::open_or_create(store, authority.clone(), topology).await.unwrap();
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let ledger =
            LedgerConfig { partitions: vec![SecretUrl::new(redis.url())], ..LedgerConfig::default() };
        let parts = Parts {
            ledger: &ledger,
            inventory: &config,
            retry_window_ms: 0,
            topology,
            authority,
            cross: None,
        };
        let inventory = Inventory::start(&parts, &tracker, &stop, &CancellationToken::new()).unwrap();
        Shop { redis, fence, inventory, tracker, stop, _dir: dir }
    }

    async fn sale(&self, id: &str, quantity: u64) -> SaleId {
        let spec: SaleSpec = serde_json::from_value(json!({
            "sale_id": id, "kind": "product", "quantity": quantity, "price": 100, "currency": "CNY",
        }))
        .unwrap();
        self.inventory.create_sale(spec, None).await.unwrap();
        let id = SaleId::new(id).unwrap();
        eventually("the sale is in the snapshot", async || self.inventory.sales().get(&id).map(|_| ())).await;
        id
    }

    async fn buy(&self, sale: &SaleId, uid: &str, key: &str) -> Result<Accepted, PurchaseError> {
        self.inventory.purchase(purchase(sale, uid, key)).await
    }

    async fn release(&self, sale: &SaleId, uid: &str, bought: &Accepted) {
        let mut conn = self.redis.connect().await;
        let entry = ReleaseEntry { order_id: bought.order_id, uid: Uid::new(uid).unwrap() };
        seckill_ledger::release(&mut conn, &self.fence, sale, &[entry]).await.unwrap();
    }

    fn marker_hits(&self) -> u64 {
        self.inventory.metrics().marker_hits.get()
    }

    /// Asks until the marker answers.
    async fn until_marked(&self, sale: &SaleId) {
        let before = self.marker_hits();
        eventually("the marker answers", async || {
            assert_eq!(self.buy(sale, "loser", "k").await, Err(PurchaseError::SoldOut));
            (self.marker_hits() > before).then_some(())
        })
        .await;
    }
}

fn purchase(sale: &SaleId, uid: &str, key: &str) -> Purchase {
    Purchase {
        uid: Uid::new(uid).unwrap(),
        sale_id: sale.clone(),
        key: *IdempotencyKey::new(key).unwrap().digest(),
        quantity: Quantity::ONE,
        traceparent: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_winner_never_hears_sold_out() {
    let shop = Shop::open(InventoryConfig::default()).await;
    let sale = shop.sale("s", 50).await;
    let mut won = Vec::new();
    for n in 0..50 {
        won.push(shop.buy(&sale, &format!("u{n}"), "k").await.unwrap());
    }
    shop.until_marked(&sale).await;
    for (n, accepted) in won.iter().enumerate() {
        let again = shop.buy(&sale, &format!("u{n}"), "k").await.unwrap();
        assert_eq!((again.order_id, again.replayed), (accepted.order_id, true));
        assert_eq!(shop.buy(&sale, &format!("u{n}"), "other").await, Err(PurchaseError::LimitExceeded));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stock_that_comes_back_is_sold_and_its_buyer_is_a_winner_like_any_other() {
    let shop = Shop::open(InventoryConfig::default()).await;
    let sale = shop.sale("s", 1).await;
    let mut holder = ("u0".to_owned(), shop.buy(&sale, "u0", "k").await.unwrap());
    for round in 1..6 {
        shop.until_marked(&sale).await;
        shop.release(&sale, &holder.0, &holder.1).await;
        let uid = format!("u{round}");
        let accepted =
            eventually("the unit is sold again", async || shop.buy(&sale, &uid, "k").await.ok()).await;
        shop.until_marked(&sale).await;
        assert_eq!(shop.buy(&sale, &uid, "k").await.unwrap().order_id, accepted.order_id);
        // Who gave it back is remembered too.
        assert_eq!(shop.buy(&sale, &holder.0, "k").await.unwrap().order_id, holder.1.order_id);
        holder = (uid, accepted);
    }
}

// M3, H6.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_winner_whose_order_was_claimed_again_never_hears_sold_out() {
    let shop = Shop::open(InventoryConfig::default()).await;
    let sale = shop.sale("s", 1).await;
    let first = shop.buy(&sale, "u0", "k").await.unwrap();
    // The winners are indexed by now.
    shop.until_marked(&sale).await;
    shop.release(&sale, "u0", &first).await;
    let Purchase { uid, key, .. } = purchase(&sale, "lost", "k");
    let head = OrderId::head_of(CenterNumber::new(1).unwrap(), uid.table(), 0, Epoch(0));
    let order_id = OrderId::from_parts(head, 77).unwrap();
    let lost = ReclaimEntry { order_id, uid, quantity: Quantity::ONE, key };
    let answer = shop.inventory.reclaim(&sale, &[lost]).await.unwrap();
    assert_eq!((answer.outcomes, answer.kept_at), (vec![ReclaimOutcome::Claimed], None));
    shop.until_marked(&sale).await;
    let again = shop.buy(&sale, "lost", "k").await.unwrap();
    assert_eq!((again.order_id, again.replayed), (order_id, true));
    assert_eq!(shop.buy(&sale, "u0", "k").await.unwrap().order_id, first.order_id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_marker_ends_with_the_sale() {
    let shop = Shop::open(InventoryConfig::default()).await;
    let sale = shop.sale("s", 1).await;
    shop.buy(&sale, "u0", "k").await.unwrap();
    shop.until_marked(&sale).await;
    shop.inventory.set_state(&sale, StateChange::Pause).await.unwrap();
    eventually("the pause is heard", async || {
        (shop.buy(&sale, "u1", "k").await == Err(PurchaseError::Paused)).then_some(())
    })
    .await;
    shop.inventory.set_state(&sale, StateChange::Resume).await.unwrap();
    shop.until_marked(&sale).await;
    shop.inventory.set_state(&sale, StateChange::End).await.unwrap();
    eventually("the end is heard", async || {
        (shop.buy(&sale, "u1", "k").await == Err(PurchaseError::Ended)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_winners_to_remember_only_cost_a_question() {
    let shop = Shop::open(InventoryConfig { winners_max: 5, ..InventoryConfig::default() }).await;
    let sale = shop.sale("s", 10).await;
    let mut won = Vec::new();
    for n in 0..10 {
        won.push(shop.buy(&sale, &format!("u{n}"), "k").await.unwrap().order_id);
    }
    for round in 0..20 {
        assert_eq!(shop.buy(&sale, "loser", "k").await, Err(PurchaseError::SoldOut));
        let n = round % 10;
        assert_eq!(shop.buy(&sale, &format!("u{n}"), "k").await.unwrap().order_id, won[n]);
    }
    assert_eq!(shop.marker_hits(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn purchases_of_many_sales_share_lanes_without_mixing() {
    let shop = Shop::open(InventoryConfig::default()).await;
    let mut sales = Vec::new();
    for n in 0..8 {
        sales.push(shop.sale(&format!("s{n}"), 20).await);
    }
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..400 {
        let (inventory, sale) = (shop.inventory.clone(), sales[n % 8].clone());
        tasks.spawn(async move { inventory.purchase(purchase(&sale, &format!("u{n}"), "k")).await });
    }
    let mut ids = HashSet::new();
    let mut sold_out = 0;
    while let Some(outcome) = tasks.join_next().await {
        match outcome.unwrap() {
            Ok(accepted) => assert!(ids.insert(accepted.order_id)),
            Err(PurchaseError::SoldOut) => sold_out += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((ids.len(), sold_out), (160, 240));
    assert!(shop.inventory.metrics().batches.get() < 400, "purchases were not batched");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_reply_is_asked_for_again_under_the_same_key() {
    let mut shop = Shop::open(InventoryConfig::default()).await;
    let sale = shop.sale("s", 10).await;
    let first = shop.buy(&sale, "u0", "k").await.unwrap();
    // The server dies and comes back: the lane's connection breaks under the next purchase.
    shop.redis.kill();
    let inventory = shop.inventory.clone();
    let (asked, asked_sale) = (Arc::new(tokio::sync::Notify::new()), sale.clone());
    let waiting = tokio::spawn({
        let asked = Arc::clone(&asked);
        async move {
            asked.notify_one();
            inventory.purchase(purchase(&asked_sale, "u1", "k")).await
        }
    });
    asked.notified().await;
    shop.redis.restart().await;
    let second = waiting.await.unwrap().unwrap();
    assert!(!second.replayed, "an attempt of the lane's own is no replay");
    assert_ne!(first.order_id, second.order_id);
    assert_eq!(shop.buy(&sale, "u0", "k").await.unwrap().order_id, first.order_id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_never_sent_is_answered_as_such_and_what_may_have_been_as_unknown() {
    let config = InventoryConfig { deadline_ms: 300, ..InventoryConfig::default() };
    let mut shop = Shop::open(config).await;
    let sale = shop.sale("s", 10).await;
    shop.buy(&sale, "u0", "k").await.unwrap();
    shop.redis.kill();
    // The first meets a broken connection: nobody knows. Later ones cannot connect: nothing happened.
    let first = shop.buy(&sale, "u1", "k").await;
    assert!(matches!(first, Err(PurchaseError::MasterUnreachable { .. })), "{first:?}");
    let second = shop.buy(&sale, "u1", "k").await;
    assert_eq!(second, Err(PurchaseError::MasterUnreachable { executed: Executed::No }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_lane_turns_away_at_once() {
    let config = InventoryConfig { lanes: 1, queue_len: 4, deadline_ms: 1000, ..InventoryConfig::default() };
    let mut shop = Shop::open(config).await;
    let sale = shop.sale("s", 1000).await;
    shop.redis.kill();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..600 {
        let (inventory, sale) = (shop.inventory.clone(), sale.clone());
        tasks.spawn(async move { inventory.purchase(purchase(&sale, &format!("u{n}"), "k")).await });
    }
    let mut overloaded = 0;
    while let Some(outcome) = tasks.join_next().await {
        match outcome.unwrap() {
            Err(PurchaseError::Overloaded) => overloaded += 1,
            Err(PurchaseError::MasterUnreachable { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(overloaded > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purchase_goes_on_when_its_client_is_gone() {
    let shop = Shop::open(InventoryConfig::default()).await;
    let sale = shop.sale("s", 10).await;
    {
        let mut future = Box::pin(shop.inventory.purchase(purchase(&sale, "u0", "k")));
        // One poll puts it into the lane; then the client goes away.
        assert!(futures_util::poll!(&mut future).is_pending());
    }
    let again = eventually("the purchase has happened", async || {
        let accepted = shop.buy(&sale, "u0", "k").await.unwrap();
        accepted.replayed.then_some(accepted)
    })
    .await;
    assert!(again.replayed);
    assert_eq!(shop.inventory.sale(&sale).await.unwrap().unwrap().claimed, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_answers_everything_that_waits() {
    let shop = Shop::open(InventoryConfig::default()).await;
    let sale = shop.sale("s", 1000).await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..500 {
        let (inventory, sale) = (shop.inventory.clone(), sale.clone());
        tasks.spawn(async move { inventory.purchase(purchase(&sale, &format!("u{n}"), "k")).await });
    }
    tokio::task::yield_now().await;
    shop.stop.cancel();
    shop.tracker.close();
    tokio::time::timeout(Duration::from_secs(10), shop.tracker.wait()).await.unwrap();
    let mut accepted = 0;
    while let Some(outcome) = tasks.join_next().await {
        match outcome.unwrap() {
            Ok(_) => accepted += 1,
            Err(PurchaseError::Overloaded) => {}
            other => panic!("{other:?}"),
        }
    }
    let mut conn = shop.redis.connect().await;
    let claimed = seckill_ledger::read::sale(&mut conn, &sale).await.unwrap().unwrap().claimed;
    assert_eq!(claimed, accepted, "an acceptance was not answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_follow_the_ledger_and_say_how_old_they_are() {
    let shop = Shop::open(InventoryConfig::default()).await;
    let sale = shop.sale("s", 2).await;
    let etag = shop.inventory.sales().get(&sale).unwrap().etag().clone();
    shop.buy(&sale, "u0", "k").await.unwrap();
    eventually("the purchase shows", async || {
        shop.inventory.sales().get(&sale).filter(|view| view.sale().remaining == 1).map(|_| ())
    })
    .await;
    let view = shop.inventory.sales();
    assert_ne!(*view.get(&sale).unwrap().etag(), etag);
    assert!(view.age_ms() < 2000, "{}", view.age_ms());
    let body: serde_json::Value = serde_json::from_slice(&view.get(&sale).unwrap().body()).unwrap();
    assert_eq!(
        (&body["remaining"], &body["state"], &body["quantity"]),
        (&json!(1), &json!("on_sale"), &json!(2))
    );
    shop.buy(&sale, "u1", "k").await.unwrap();
    eventually("it shows as sold out", async || {
        (shop.inventory.sales().get(&sale)?.phase() == SalePhase::SoldOut).then_some(())
    })
    .await;
}

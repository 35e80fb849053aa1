//! Tails of a master that was lost, settled: a redis-server that went another way, one that is the master now, and two
//! centers with their order databases that talk to each other.

use std::collections::BTreeMap;
use std::sync::Mutex;

use seckill_domain::{
    CenterNumber, IdempotencyKey, KeyDigest, OrderId, OrderRecord, OrderStatus, Quantity, SaleId, SaleSpec,
    Uid,
};
use seckill_ledger::admin::{FenceChange, FenceOutcome, ReclaimEntry, set_fence};
use seckill_ledger::read::{Claim, Sale, scan_claims};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    CreateOutcome, Fence, ReserveEntry, ReserveOutcome, add_stock, create_sale, outbox, read, reserve, roles,
};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;

use super::*;
use crate::config::{CenterSpec, ClusterConfig, InventoryConfig, LedgerConfig, SecretUrl};
use crate::cross_center::session::Sessions;
use crate::cross_center::{CrossKey, Keyring};
use crate::http::{InternalState, ServeOptions, internal_router, serve};
use crate::inventory::Parts;
use crate::orders::{OrderStore, Payment, PaymentId, StoreBatch, StoreOptions};
use crate::shift::tail::{self, Owner};
use crate::telemetry::Metrics;
use crate::topology::{
    Authority, Durability, Exposure, FileStore, Instances, Limits, Shift, Tail, TopologyState,
};

/// The longest that anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(30);

fn id(name: &str) -> CenterId {
    CenterId::new(name).unwrap()
}

fn ring(of: &str) -> Keyring {
    let key = |name: &str| CrossKey {
        id: format!("{name}-1"),
        center: id(name),
        secret: [name.as_bytes()[0]; 32].to_vec(),
    };
    Keyring::new(id(of), [key("a"), key("b")]).unwrap()
}

fn key(text: &str) -> KeyDigest {
    *IdempotencyKey::new(text).unwrap().digest()
}

async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// One center's service, as far as it takes part.
struct Side {
    redis: RedisServer,
    topology: TopologyHandle,
    authority: Authority,
    inventory: Inventory,
    orders: OrderStore,
    cross: CrossCenter,
}

/// Center a, whose ledger is lost, and b, the master since.
struct World {
    a: Side,
    b: Side,
    /// Of a's lost ledger, and of b's.
    before: Fence,
    fence: Fence,
    sale: SaleId,
    tracker: TaskTracker,
    stop: CancellationToken,
    dies_at: Arc<Mutex<Vec<&'static str>>>,
    dir: TempDir,
}

impl World {
    /// Both have a sale of so many units, and then go different ways: a sells on, b is the master.
    async fn parted(quantity: u64, common: &[(&str, &str)]) -> World {
        let redis_a = RedisServer::start().await;
        let before = redis_a.init_ledger().await;
        let spec: SaleSpec = serde_json::from_value(json!({
            "sale_id": "s", "kind": "product", "quantity": quantity, "price": 100, "currency": "EUR",
            "per_user_limit": 2,
        }))
        .unwrap();
        let mut conn = redis_a.connect().await;
        let created = create_sale(&mut conn, &before, &spec, &KeyDigest::default()).await.unwrap();
        assert!(matches!(created, CreateOutcome::Created { .. }));
        for (uid, under) in common {
            bought(buy(&redis_a, &before, &spec.sale_id, uid, under).await);
        }
        let redis_b = RedisServer::start_replica_of(&redis_a).await;
        let mut conn_b = redis_b.connect().await;
        let last = outbox::last_id(&mut conn).await.unwrap();
        eventually("b has what a has", async || {
            (outbox::last_id(&mut conn_b).await.unwrap() == last).then_some(())
        })
        .await;
        redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut conn_b).await.unwrap();
        let fence = Fence { master: id("b"), ..before.at(Epoch(2)) };
        let lift = FenceChange::Lift { from: before.clone() };
        assert_eq!(set_fence(&mut conn_b, &lift, &fence).await.unwrap(), FenceOutcome::Set);

        let dir = tempfile::tempdir().unwrap();
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let mut listeners = BTreeMap::new();
        let mut centers = Vec::new();
        for (number, name) in [(1, "a"), (2, "b")] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            centers.push(CenterSpec {
                id: id(name),
                number: CenterNumber::new(number).unwrap(),
                public_url: String::new(),
                admin_url: String::new(),
                internal_url: format!("http://{}", listener.local_addr().unwrap()),
                ledger: Vec::new(),
            });
            listeners.insert(name, listener);
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let cluster = ClusterConfig { durability: Durability::Replicated, centers };
        let mut document =
            Topology::of_centers(fence.ledger_id.clone(), &cluster, Limits::default()).unwrap();
        // b is alone: what it says does not count yet (H5).
        (document.master, document.epoch) = (id("b"), fence.epoch);
        document.state = TopologyState::Degraded;
        let mut sides = Vec::new();
        for (name, redis) in [("a", redis_a), ("b", redis_b)] {
            let listener = listeners.remove(name).unwrap();
            let (document, dir) = (document.clone(), dir.path());
            sides.push(side(name, redis, document, dir, listener, (&tracker, &stop)).await);
        }
        let (b, a) = (sides.pop().unwrap(), sides.pop().unwrap());
        let world =
            World { a, b, before, fence, sale: spec.sale_id, tracker, stop, dies_at: Arc::default(), dir };
        world.admit().await;
        world
    }

    async fn admit(&self) {
        let run_id = roles::standing(&mut self.b.redis.connect().await).await.unwrap().run_id;
        self.b.authority.admit(0, self.fence.clone(), &run_id, 0);
        eventually("b may write", async || self.b.authority.grant().ok().map(drop)).await;
    }

    /// Another epoch begins in which what b's own disk has counts.
    async fn settle_epoch(&mut self) {
        let fence = self.fence.at(self.fence.epoch.next());
        let lift = FenceChange::Lift { from: self.fence.clone() };
        assert_eq!(
            set_fence(&mut self.b.redis.connect().await, &lift, &fence).await.unwrap(),
            FenceOutcome::Set
        );
        self.fence = fence;
        let epoch = self.fence.epoch;
        let begin = move |topology: &mut Topology| {
            (topology.epoch, topology.durability) = (epoch, Durability::Local);
            topology.state = TopologyState::Steady;
            Ok::<_, Infallible>(())
        };
        self.b.topology.update(begin).await.unwrap();
        self.admit().await;
    }

    /// Somebody who is at home there.
    fn user(&self, name: &str, at: &str) -> String {
        let topology = self.a.topology.current();
        (0..)
            .map(|n| format!("{name}{n}"))
            .find(|uid| topology.home_center(Uid::new(uid).unwrap().table().shard()).as_str() == at)
            .unwrap()
    }

    /// Buys at the lost master.
    async fn lose(&self, uid: &str) -> OrderRecord {
        let order_id = bought(buy(&self.a.redis, &self.before, &self.sale, uid, "k").await);
        let epoch = self.before.epoch.0;
        outbox::find_order(&mut self.a.redis.connect().await, epoch, order_id).await.unwrap().unwrap()
    }

    fn home(&self, record: &OrderRecord) -> &Side {
        let topology = self.a.topology.current();
        match topology.home_center(record.order_id.table().shard()).as_str() {
            "a" => &self.a,
            _ => &self.b,
        }
    }

    /// The same, and it was stored before the master was lost.
    async fn lose_stored(&self, uid: &str) -> OrderRecord {
        let record = self.lose(uid).await;
        let batch = StoreBatch { orders: vec![record.clone()], ..StoreBatch::default() };
        assert_eq!(self.home(&record).orders.store(batch).await.unwrap().stored, 1);
        record
    }

    /// The same, and paid.
    async fn lose_paid(&self, uid: &str) -> OrderRecord {
        let record = self.lose_stored(uid).await;
        let payment = Payment {
            payment_id: PaymentId::new(&format!("p-{uid}")).unwrap(),
            order_id: record.order_id,
            amount: record.amount(),
            coupon_id: None,
        };
        self.home(&record).orders.pay(payment).await.unwrap();
        record
    }

    /// The same, it was cancelled since, and the new master knew nothing of it.
    async fn lose_closed(&self, uid: &str) -> OrderRecord {
        let record = self.lose_stored(uid).await;
        let orders = &self.home(&record).orders;
        orders.cancel(&record.uid, record.order_id).await.unwrap();
        orders.releases_done(Vec::new(), vec![record.order_id]).await.unwrap();
        record
    }

    /// Saves a's tail as its guardian does, and names it in a shift with this promise.
    async fn save_tail(&self, lossless: bool) -> PathBuf {
        let folder = self.dir.path().join("a");
        let mut own = self.a.redis.connect().await;
        let standing = roles::standing(&mut own).await.unwrap();
        let owner = Owner { center: &id("a"), partition: 0, folder: &folder };
        let mut master = self.b.redis.connect().await;
        let saved = tail::save(&owner, &standing, &mut own, &mut master).await.unwrap().unwrap();
        let named = Tail::from(&saved);
        let name = move |topology: &mut Topology| {
            let exposure = Exposure { lossless, reason: String::new(), entries: None, since: None };
            topology.remember_shift(Shift {
                mode: ShiftMode::Forced,
                state: ShiftState::Done,
                exposure: Some(exposure),
                tails: vec![named.clone()],
                ..Shift::of_a_test()
            });
            Ok::<_, Infallible>(())
        };
        self.a.topology.update(name).await.unwrap();
        saved.file
    }

    /// Starts a's worker.
    fn settle(&self) -> SettleMetrics {
        let parts = SettleParts {
            center: id("a"),
            diverged_dir: self.dir.path().join("a").as_path().into(),
            retry: Duration::from_millis(200),
            topology: self.a.topology.clone(),
            inventory: self.a.inventory.clone(),
            cross: Some(self.a.cross.clone()),
            centers: OrderCenters::new(
                id("a"),
                self.a.orders.clone(),
                self.a.topology.clone(),
                Some(self.a.cross.clone()),
            ),
            dies_at: Arc::clone(&self.dies_at),
        };
        Settler::spawn(parts, &self.tracker, &self.stop)
    }

    /// Waits for the mark; how the history tells of the tail.
    async fn until_settled(&self, file: &Path) -> Settled {
        let mark = PathBuf::from(format!("{}.settled", file.display()));
        let text = eventually("the tail is settled", async || std::fs::read_to_string(&mark).ok()).await;
        let settled: Settled = serde_json::from_str(&text).unwrap();
        assert_eq!(self.told().settled.as_ref(), Some(&settled));
        settled
    }

    fn told(&self) -> Tail {
        let found = FileStore::new(self.dir.path().join("topology.json")).load().unwrap();
        found.topology.history.last().unwrap().tails[0].clone()
    }

    async fn status(&self, record: &OrderRecord) -> Option<(OrderStatus, Option<String>)> {
        let found = self.home(record).orders.admin_order(record.order_id).await.unwrap()?;
        Some((found.order.status, found.reason))
    }

    async fn books(&self) -> Sale {
        let sale = read::sale(&mut self.b.redis.connect().await, &self.sale).await.unwrap().unwrap();
        assert_eq!(sale.total, sale.remaining + sale.claimed);
        sale
    }

    /// The orders that hold a claim at b, by user.
    async fn held(&self) -> BTreeMap<String, Vec<OrderId>> {
        let (mut conn, mut at) = (self.b.redis.connect().await, 0);
        let mut held: BTreeMap<String, Vec<OrderId>> = BTreeMap::new();
        loop {
            let (next, claims) = scan_claims(&mut conn, &self.sale, at, 1000).await.unwrap();
            for Claim { uid, order_id, .. } in claims.into_iter().filter(|claim| !claim.released) {
                held.entry(uid.to_string()).or_default().push(order_id);
            }
            at = next;
            if at == 0 {
                return held;
            }
        }
    }

    /// Who holds which order at b, and nobody else holds any.
    async fn assert_held(&self, expected: &[(&OrderRecord, OrderId)]) {
        let expected: BTreeMap<String, Vec<OrderId>> =
            expected.iter().map(|(record, order_id)| (record.uid.to_string(), vec![*order_id])).collect();
        assert_eq!(self.held().await, expected);
        assert_eq!(self.books().await.claimed, expected.len() as u64);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
        self.tracker.close();
    }
}

async fn side(
    name: &str,
    redis: RedisServer,
    document: Topology,
    dir: &Path,
    listener: TcpListener,
    (tracker, stop): (&TaskTracker, &CancellationToken),
) -> Side {
    let authority = Authority::new(id(name), Duration::from_secs(60), 1);
    let store = FileStore::new(dir.join("topology.json"));
    let topology = TopologyHandle::open_or_create(store, authority.clone(), document).await.unwrap();
    topology.spawn(tracker, stop.clone());
    let cross = CrossCenter::new(ring(name), topology.clone(), Instances::fixed(Vec::new()));
    let ledger = LedgerConfig { partitions: vec![SecretUrl::new(redis.url())], ..LedgerConfig::default() };
    let parts = Parts {
        ledger: &ledger,
        inventory: &InventoryConfig::default(),
        retry_window_ms: 0,
        topology: topology.clone(),
        authority: authority.clone(),
        cross: Some(cross.clone()),
    };
    let inventory = Inventory::start(&parts, tracker, stop, &CancellationToken::new()).unwrap();
    let database = format!("sqlite:{}", dir.join(format!("{name}.db")).display());
    let shards = topology.current().shards_of(&id(name)).collect();
    let options = StoreOptions { shards, ..StoreOptions::new(id(name)) };
    let orders = OrderStore::open(&database, options).await.unwrap();
    let router = internal_router(InternalState {
        sessions: Sessions::new(ring(name), name.to_owned()),
        inventory: inventory.clone(),
        orders: orders.clone(),
        queue: None,
        topology: topology.clone(),
        public: axum::Router::new(),
        admin: axum::Router::new(),
        tasks: tracker.clone(),
        metrics: Arc::new(Metrics::new()),
    });
    let options = ServeOptions { drain_deadline: Duration::ZERO, ..ServeOptions::default() };
    tracker.spawn(serve(listener, router, options, stop.clone()));
    Side { redis, topology, authority, inventory, orders, cross }
}

async fn buy(server: &RedisServer, fence: &Fence, sale: &SaleId, uid: &str, under: &str) -> ReserveOutcome {
    let entry = ReserveEntry {
        uid: Uid::new(uid).unwrap(),
        key: key(under),
        quantity: Quantity::ONE,
        center: CenterNumber::new(1).unwrap(),
        traceparent: None,
    };
    let reply = reserve(&mut server.connect().await, fence, 0, sale, &[entry]).await.unwrap();
    reply.outcomes.into_iter().next().unwrap()
}

fn bought(outcome: ReserveOutcome) -> OrderId {
    match outcome {
        ReserveOutcome::Accepted(order_id) => order_id,
        other => panic!("{other:?}"),
    }
}

fn cancelled() -> Option<(OrderStatus, Option<String>)> {
    Some((OrderStatus::Cancelled, Some("accepted_loss".to_owned())))
}

fn open(status: OrderStatus) -> Option<(OrderStatus, Option<String>)> {
    Some((status, None))
}

// H6, K4.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_of_a_lost_master_are_claimed_again_and_that_counts_in_a_later_epoch() {
    let mut world = World::parted(100, &[]).await;
    let paid = world.lose_paid(&world.user("paid", "a")).await;
    let open_a = world.lose_stored(&world.user("open", "a")).await;
    let open_b = world.lose_stored(&world.user("open", "b")).await;
    // What home databases do not have was acknowledged all the same.
    let queued = [world.lose(&world.user("queued", "a")).await, world.lose(&world.user("queued", "b")).await];
    // Bought again under the same key when a was gone: one order for each key.
    let retried = world.lose_stored(&world.user("again", "b")).await;
    let uid = retried.uid.to_string();
    let again = bought(buy(&world.b.redis, &world.fence, &world.sale, &uid, "k").await);
    let closed = world.lose_closed(&world.user("closed", "a")).await;

    let file = world.save_tail(false).await;
    let metrics = world.settle();
    eventually("a round is over", async || (metrics.open.get() == 1).then_some(())).await;
    // K4: b is alone, and what it says may be lost with it.
    let expected: Vec<(&OrderRecord, OrderId)> = [&paid, &open_a, &open_b, &queued[0], &queued[1]]
        .into_iter()
        .map(|record| (record, record.order_id))
        .chain([(&retried, again)])
        .collect();
    world.assert_held(&expected).await;
    assert_eq!((metrics.settled.get(), world.told().settled), (0, None));

    world.settle_epoch().await;
    let settled = world.until_settled(&file).await;
    assert_eq!((settled.orders, settled.claimed_again, settled.cancelled), (7, 5, 1));
    assert_eq!(settled.paid_without_claim, 0);
    world.assert_held(&expected).await;
    assert_eq!(world.status(&paid).await, open(OrderStatus::Paid));
    for record in [&open_a, &open_b, &queued[0], &queued[1]] {
        assert_eq!(world.status(record).await, open(OrderStatus::Created));
        // Whoever still asks under the key hears of this order.
        let uid = record.uid.as_str();
        let outcome = buy(&world.b.redis, &world.fence, &world.sale, uid, "k").await;
        assert_eq!(outcome, ReserveOutcome::Replay(record.order_id));
    }
    assert_eq!(world.status(&retried).await, cancelled());
    assert_eq!(world.status(&closed).await, open(OrderStatus::Cancelled));
}

// H6: paid orders first; whatever dies in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_room_unpaid_orders_are_cancelled_and_a_paid_one_waits_for_stock_whatever_dies() {
    let mut world = World::parted(5, &[("early", "k")]).await;
    // Given back to the lost master, and the record of it is gone.
    let early = OrderId::clone(&world.held().await["early"][0]);
    world.settle_epoch().await;
    let record = outbox::find_order(&mut world.a.redis.connect().await, 1, early).await.unwrap().unwrap();
    let home = &world.home(&record).orders;
    home.store(StoreBatch { orders: vec![record.clone()], ..StoreBatch::default() }).await.unwrap();
    home.cancel(&record.uid, early).await.unwrap();
    home.releases_done(vec![early], Vec::new()).await.unwrap();
    let entry = seckill_ledger::ReleaseEntry { order_id: early, uid: record.uid.clone() };
    let mut lost = world.a.redis.connect().await;
    seckill_ledger::release(&mut lost, &world.before, &world.sale, &[entry]).await.unwrap();

    let unpaid = world.lose_stored(&world.user("unpaid", "a")).await;
    let queued = world.lose(&world.user("queued", "b")).await;
    let paid =
        [world.lose_paid(&world.user("paid", "a")).await, world.lose_paid(&world.user("paid", "b")).await];
    // Sold to others: one unit is left.
    for uid in ["x1", "x2", "x3"] {
        bought(buy(&world.b.redis, &world.fence, &world.sale, uid, "k").await);
    }
    let file = world.save_tail(false).await;
    // One after the other: each round goes on where the one before died.
    *world.dies_at.lock().unwrap() =
        vec!["settle_looked", "settle_claimed", "settle_put_back", "settle_released", "settle_told"];
    let metrics = world.settle();
    let left = eventually("one paid order is left", async || {
        let told = world.told();
        (metrics.paid_without_claim.get() == 1 && told.paid_without_claim == 1).then_some(told)
    })
    .await;
    assert_eq!((left.settled, world.dies_at.lock().unwrap().len()), (None, 0));
    let claimed = world.held().await;
    assert_eq!(paid.iter().filter(|record| claimed.contains_key(record.uid.as_str())).count(), 1);
    for record in &paid {
        assert_eq!(world.status(record).await, open(OrderStatus::Paid));
    }
    for record in [&unpaid, &queued] {
        assert_eq!(world.status(record).await, cancelled());
    }
    assert_eq!(world.books().await.remaining, 0);
    let waiting = world.home(&record).orders.pending_releases(10, &[]).await.unwrap();
    assert_eq!(waiting.iter().map(|release| release.order_id).collect::<Vec<_>>(), [early]);

    let mut conn = world.b.redis.connect().await;
    add_stock(&mut conn, &world.fence, &world.sale, 2, &key("more")).await.unwrap();
    let settled = world.until_settled(&file).await;
    assert_eq!((settled.orders, settled.claimed_again, settled.cancelled), (4, 2, 2));
    let claimed = world.held().await;
    for record in &paid {
        assert_eq!(claimed[record.uid.as_str()], [record.order_id]);
    }
    assert_eq!(world.books().await.remaining, 1);
    eventually("nothing is left", async || {
        ((metrics.open.get(), metrics.paid_without_claim.get()) == (0, 0)).then_some(())
    })
    .await;
}

// R1: what a shift without loss left behind was never acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_that_nobody_was_told_of_are_not_put_back_and_a_claim_that_nobody_wants_is_given_back() {
    let mut world = World::parted(5, &[]).await;
    world.settle_epoch().await;
    let unseen = world.lose(&world.user("unseen", "a")).await;
    // Cancelled while a round that died claimed it: the release came before the claim.
    let late = world.lose_closed(&world.user("late", "b")).await;
    let OrderRecord { order_id, uid, quantity, .. } = late.clone();
    let claim = ReclaimEntry { order_id, uid, quantity, key: key("k") };
    world.b.inventory.reclaim(&world.sale, &[claim]).await.unwrap();
    let file = world.save_tail(true).await;
    world.settle();
    let settled = world.until_settled(&file).await;
    assert_eq!((settled.orders, settled.claimed_again, settled.cancelled), (2, 0, 0));
    assert_eq!(world.status(&late).await, open(OrderStatus::Cancelled));
    assert_eq!((world.status(&unseen).await, world.books().await.claimed), (None, 0));
}

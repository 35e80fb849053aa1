//! Purchases while the master moves: two centers, each with a redis-server, lanes and an internal listener, and a
//! topology that the test changes as a coordinator would.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use seckill_ledger::roles::standing;
use seckill_parts::Link;
use tokio::net::TcpListener;

use super::*;
use crate::cross_center::Keyring;
use crate::cross_center::calls::{ReserveCall, ReserveLine, ReserveOutcome, WireKey};
use crate::http::{InternalState, ServeOptions, internal_router, serve};
use crate::orders::{OrderStore, StoreOptions};
use crate::topology::{Instances, Shift, TopologyState};

/// The longest that anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(20);

struct Side {
    redis: RedisServer,
    authority: Authority,
    topology: TopologyHandle,
    inventory: Inventory,
}

/// Centers a (the master) and b; b's calls to a go through a line that can be cut.
struct Centers {
    a: Side,
    b: Side,
    line: Link,
    tracker: TaskTracker,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

fn id(name: &str) -> CenterId {
    CenterId::new(name).unwrap()
}

async fn run_id(redis: &RedisServer) -> String {
    standing(&mut redis.connect().await).await.unwrap().run_id
}

async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check().await {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

impl Centers {
    async fn open(config: InventoryConfig) -> Centers {
        Centers::that_wait(2000, config).await
    }

    /// Centers that wait for so long for an answer of Redis, or of each other.
    async fn that_wait(response_timeout_ms: u64, config: InventoryConfig) -> Centers {
        let redis_a = RedisServer::start().await;
        let fence = redis_a.init_ledger().await;
        let redis_b = RedisServer::start_replica_of(&redis_a).await;
        let dir = tempfile::tempdir().unwrap();
        let of_a = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let of_b = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let line = Link::start(of_a.local_addr().unwrap()).unwrap();
        let described = |number, internal: std::net::SocketAddr| Center {
            number: CenterNumber::new(number).unwrap(),
            public_url: "http://127.0.0.1:1".to_owned(),
            admin_url: "http://127.0.0.1:1".to_owned(),
            internal_url: format!("http://{internal}"),
            ledger: Vec::new(),
            extra: serde_json::Map::new(),
        };
        let mut document = Topology::single(
            fence.ledger_id.clone(),
            id("a"),
            described(1, line.address()),
            Limits::default(),
        );
        document.centers.insert(id("b"), described(2, of_b.local_addr().unwrap()));
        document.epoch = fence.epoch;
        document.durability = Durability::Replicated;
        document.in_sync =
            vec![InSync { center: id("b"), run_id: run_id(&redis_b).await, extra: serde_json::Map::new() }];
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let mut sides = Vec::new();
        for (name, redis, listener) in [("a", redis_a, of_a), ("b", redis_b, of_b)] {
            let authority = Authority::new(id(name), Duration::from_secs(30), 1);
            let store = FileStore::new(dir.path().join("topology.json"));
            let topology =
                TopologyHandle::open_or_create(store, authority.clone(), document.clone()).await.unwrap();
            topology.spawn(&tracker, stop.clone());
            let cross =
                CrossCenter::new(Keyring::of_a_test(name), topology.clone(), Instances::fixed(Vec::new()));
            let ledger = LedgerConfig {
                partitions: vec![SecretUrl::new(redis.url())],
                response_timeout_ms,
                ..LedgerConfig::default()
            };
            let parts = Parts {
                ledger: &ledger,
                inventory: &config,
                retry_window_ms: 0,
                topology: topology.clone(),
                authority: authority.clone(),
                cross: Some(cross),
            };
            let inventory = Inventory::start(&parts, &tracker, &stop, &CancellationToken::new()).unwrap();
            let database = format!("sqlite:{}", dir.path().join(format!("{name}.db")).display());
            let orders = OrderStore::open(&database, StoreOptions::new(id(name))).await.unwrap();
            let (of_inventory, tasks) = (inventory.clone(), tracker.clone());
            let state = InternalState::of_a_test(name, of_inventory, orders, topology.clone(), tasks);
            let router = internal_router(state);
            let options = ServeOptions { drain_deadline: Duration::ZERO, ..ServeOptions::default() };
            tracker.spawn(serve(listener, router, options, stop.clone()));
            sides.push(Side { redis, authority, topology, inventory });
        }
        let (b, a) = (sides.pop().unwrap(), sides.pop().unwrap());
        a.authority.admit(0, fence, &run_id(&a.redis).await, 1);
        Centers { a, b, line, tracker, stop, _dir: dir }
    }

    async fn sale(&self, quantity: u64) {
        let spec: SaleSpec = serde_json::from_value(json!({
            "sale_id": "s", "kind": "product", "quantity": quantity, "price": 100, "currency": "CNY",
        }))
        .unwrap();
        self.a.inventory.create_sale(spec, None).await.unwrap();
    }

    /// The topology records a shift; both centers have heard of it.
    async fn freeze(&self) {
        let shift = |topology: &mut Topology| {
            topology.shift = Some(Box::new(Shift::of_a_test()));
            topology.state = TopologyState::Shifting;
            Ok::<_, ()>(())
        };
        self.b.topology.update(shift).await.unwrap();
        for side in [&self.a, &self.b] {
            let mut topology = side.topology.subscribe();
            topology.wait_for(|topology| topology.master_shift().is_some()).await.unwrap();
        }
        // The read that follows the watch has ended the authority, too.
        eventually("a's authority ends", async || self.a.authority.grant().is_err()).await;
    }

    /// The shift is given up, at a new epoch.
    async fn abort(&self) {
        let fence = self.fence_at(3, "a").await;
        let over = |topology: &mut Topology| {
            topology.shift = None;
            topology.state = TopologyState::Steady;
            topology.epoch = Epoch(3);
            Ok::<_, ()>(())
        };
        self.a.topology.update(over).await.unwrap();
        self.a.authority.admit(0, fence, &run_id(&self.a.redis).await, 1);
    }

    /// Sets a's fence, and waits until b's Redis shows it.
    async fn fence_at(&self, epoch: u64, master: &str) -> Fence {
        let from = self.a.topology.current().fence();
        let to = Fence { master: id(master), ..from.at(Epoch(epoch)) };
        let set = set_fence(&mut self.a.redis.connect().await, &FenceChange::Lift { from }, &to).await;
        assert_eq!(set.unwrap(), FenceOutcome::Set);
        let text = to.to_string();
        let mut conn = self.b.redis.connect().await;
        eventually("b shows the fence", async || {
            standing(&mut conn).await.unwrap().fence.as_deref() == Some(&text)
        })
        .await;
        to
    }

    /// What a coordinator does after the freeze: fence, promote, redirect, attach.
    async fn move_to_b(&self) {
        let fence = self.fence_at(2, "b").await;
        let mut conn = self.b.redis.connect().await;
        redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut conn).await.unwrap();
        let in_sync =
            InSync { center: id("a"), run_id: run_id(&self.a.redis).await, extra: serde_json::Map::new() };
        let redirect = move |topology: &mut Topology| {
            topology.shift = None;
            topology.state = TopologyState::Steady;
            topology.master = id("b");
            topology.epoch = Epoch(2);
            topology.in_sync = vec![in_sync.clone()];
            Ok::<_, ()>(())
        };
        self.b.topology.update(redirect).await.unwrap();
        self.b.authority.admit(0, fence, &run_id(&self.b.redis).await, 1);
        self.a.redis.follow(&self.b.redis).await;
    }

    /// How many orders each user holds in this center's ledger.
    async fn claims(&self, of: &Side) -> HashMap<String, usize> {
        let mut orders: HashMap<String, HashSet<OrderId>> = HashMap::new();
        let mut conn = of.redis.connect().await;
        let (sale, mut at) = (SaleId::new("s").unwrap(), 0);
        loop {
            let (next, claims) = scan_claims(&mut conn, &sale, at, 1000).await.unwrap();
            for claim in claims {
                orders.entry(claim.uid.to_string()).or_default().insert(claim.order_id);
            }
            if next == 0 {
                return orders.into_iter().map(|(uid, orders)| (uid, orders.len())).collect();
            }
            at = next;
        }
    }
}

/// The epoch in an order's id.
fn epoch_of(order: OrderId) -> u32 {
    order.head() % 10_000
}

impl Side {
    /// A purchase under way.
    fn buying(&self, uid: &str) -> tokio::task::JoinHandle<Result<Accepted, PurchaseError>> {
        let (inventory, purchase) = (self.inventory.clone(), Purchase::of_a_test(uid));
        tokio::spawn(async move { inventory.purchase(purchase).await })
    }

    fn held(&self) -> i64 {
        self.inventory.metrics().held.get()
    }

    async fn holds(&self, purchases: i64) {
        eventually("purchases are held", async || self.held() == purchases).await;
    }
}

impl Drop for Centers {
    fn drop(&mut self) {
        self.stop.cancel();
        self.tracker.close();
    }
}

/// The promise of a planned shift: buyers of both centers notice nothing but a delay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn purchases_of_both_centers_are_held_and_flow_to_the_next_master() {
    let centers = Centers::open(InventoryConfig::default()).await;
    centers.sale(1_000_000).await;
    let over = Arc::new(AtomicBool::new(false));
    let mut buyers = tokio::task::JoinSet::new();
    for buyer in 0..64 {
        let side = if buyer % 2 == 0 { &centers.a } else { &centers.b };
        let (inventory, over) = (side.inventory.clone(), Arc::clone(&over));
        buyers.spawn(async move {
            let mut accepted = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let uid = format!("b{buyer}n{}", accepted.len());
                let order = inventory.purchase(Purchase::of_a_test(&uid)).await;
                let order = order.unwrap_or_else(|error| panic!("{uid}: {error}"));
                accepted.push((uid, order.order_id));
            }
            accepted
        });
    }
    let bought = |side: &Side| side.inventory.metrics().batched.get();
    eventually("both sell", async || bought(&centers.a) > 200 && bought(&centers.b) > 100).await;
    centers.freeze().await;
    for side in [&centers.a, &centers.b] {
        side.holds(32).await;
    }
    let before = bought(&centers.a) + bought(&centers.b);
    centers.move_to_b().await;
    eventually("both sell again", async || bought(&centers.a) + bought(&centers.b) > before + 400).await;
    over.store(true, Ordering::Relaxed);
    let mut accepted = HashMap::new();
    while let Some(buyer) = buyers.join_next().await {
        accepted.extend(buyer.unwrap());
    }
    let claims = centers.claims(&centers.b).await;
    assert_eq!(claims.len(), accepted.len(), "a claim for each acknowledged purchase, and no other");
    assert!(accepted.keys().all(|uid| claims.get(uid) == Some(&1)));
    assert!(accepted.values().any(|order| epoch_of(*order) == 1));
    assert!(accepted.values().any(|order| epoch_of(*order) == 2));
    for side in [&centers.a, &centers.b] {
        assert_eq!(side.held(), 0);
        assert_eq!(side.inventory.metrics().held_total.get(), 32);
        assert_eq!(side.inventory.metrics().shifting.get(), 0);
    }
}

/// First in, first out, in full batches; here the shift is given up, and the master stays where it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_purchases_go_out_in_their_order_and_in_full_batches() {
    let config = InventoryConfig { max_batch: 100, ..InventoryConfig::default() };
    let centers = Centers::open(config).await;
    centers.sale(250).await;
    centers.freeze().await;
    let mut buyers = Vec::new();
    for buyer in 0..300 {
        buyers.push(centers.a.buying(&format!("u{buyer}")));
        centers.a.holds(buyer + 1).await;
    }
    let before = centers.a.inventory.metrics().batches.get();
    centers.abort().await;
    let mut outcomes = Vec::new();
    for buyer in buyers {
        outcomes.push(buyer.await.unwrap().map(|_| ()));
    }
    assert!(outcomes[..250].iter().all(Result::is_ok));
    assert!(outcomes[250..].iter().all(|outcome| *outcome == Err(PurchaseError::SoldOut)), "{outcomes:?}");
    assert_eq!(centers.a.inventory.metrics().batches.get() - before, 3);
}

/// A freeze that does not end: whoever was held for `hold_ms` hears that nothing happened, in both centers, and what
/// comes beyond the bound hears it at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn purchases_held_for_too_long_or_beside_too_many_are_turned_away() {
    let config = InventoryConfig { hold_ms: 400, hold_max: 2, ..InventoryConfig::default() };
    let centers = Centers::open(config).await;
    centers.sale(10).await;
    centers.freeze().await;
    for side in [&centers.a, &centers.b] {
        let begun = Instant::now();
        let held = [side.buying("alice"), side.buying("bob")];
        side.holds(2).await;
        assert_eq!(side.inventory.purchase(Purchase::of_a_test("carol")).await, Err(PurchaseError::Shifting));
        assert!(begun.elapsed() < Duration::from_millis(400), "carol was held");
        for buyer in held {
            assert_eq!(buyer.await.unwrap(), Err(PurchaseError::Shifting));
        }
        let took = begun.elapsed();
        assert!((400..2000).contains(&took.as_millis()), "{took:?}");
        assert_eq!((side.held(), side.inventory.metrics().shifting.get()), (0, 3));
    }
    assert!(centers.claims(&centers.a).await.is_empty());
}

/// K3, H1: the old master accepted both, and neither buyer heard of it. The same keys find the same orders at the next
/// master.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_that_a_shift_swallowed_gives_one_order() {
    let centers = Centers::open(InventoryConfig::default()).await;
    centers.sale(10).await;
    // Accepted, but not confirmed.
    centers.b.redis.pause();
    let (alice, bob) = (centers.a.buying("alice"), centers.b.buying("bob"));
    eventually("a has both", async || centers.claims(&centers.a).await.len() == 2).await;
    centers.line.cut();
    centers.freeze().await;
    centers.a.holds(1).await;
    centers.b.redis.resume();
    centers.line.heal();
    centers.move_to_b().await;
    let orders = [alice.await.unwrap().unwrap(), bob.await.unwrap().unwrap()];
    // To the buyers these are no replays: they have heard of no attempt before.
    assert!(orders.iter().all(|order| !order.replayed && epoch_of(order.order_id) == 1), "{orders:?}");
    let claims = centers.claims(&centers.b).await;
    assert_eq!(claims.values().copied().collect::<Vec<_>>(), [1, 1]);
    let replay = centers.a.inventory.purchase(Purchase::of_a_test("bob")).await.unwrap();
    assert_eq!((replay.order_id, replay.replayed), (orders[1].order_id, true));
}

/// The old master does not answer any more: once there is another one, nobody waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_the_old_master_once_there_is_another() {
    let config = InventoryConfig { deadline_ms: 60_000, hold_ms: 30_000, ..InventoryConfig::default() };
    let centers = Centers::that_wait(60_000, config).await;
    centers.sale(10).await;
    centers.b.inventory.purchase(Purchase::of_a_test("before")).await.unwrap();
    centers.line.stall();
    let sent = || centers.b.inventory.metrics().batched.get();
    let before = sent();
    let bob = centers.b.buying("bob");
    eventually("bob's purchase is on its way", async || sent() > before).await;
    centers.freeze().await;
    centers.move_to_b().await;
    let order = tokio::time::timeout(PATIENCE, bob).await.expect("in time").unwrap().unwrap();
    assert_eq!(epoch_of(order.order_id), 2);
}

/// What may have been accepted before the freeze is not said to be undone when its time is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purchase_in_doubt_stays_in_doubt_when_it_is_held_for_too_long() {
    let config = InventoryConfig { hold_ms: 300, hold_max: 0, ..InventoryConfig::default() };
    let centers = Centers::open(config).await;
    centers.sale(10).await;
    centers.b.redis.pause();
    let (alice, bob) = (centers.a.buying("alice"), centers.b.buying("bob"));
    eventually("a has both", async || centers.claims(&centers.a).await.len() == 2).await;
    centers.freeze().await;
    assert_eq!(alice.await.unwrap(), Err(PurchaseError::NotReplicated));
    assert_eq!(bob.await.unwrap(), Err(PurchaseError::NotReplicated));
    centers.b.redis.resume();
}

/// The master holds nothing for others: they know where it goes as soon as it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_center_sent_on_goes_back_undone_while_the_master_moves() {
    let centers = Centers::open(InventoryConfig::default()).await;
    centers.sale(10).await;
    let call = |uid: &str| ReserveCall {
        sale_id: SaleId::new("s").unwrap(),
        deadline_ms: 2000,
        entries: vec![ReserveLine(
            Uid::new(uid).unwrap(),
            WireKey(*IdempotencyKey::new("k").unwrap().digest()),
            Quantity::ONE,
            CenterNumber::new(2).unwrap(),
            None,
        )],
    };
    let answer = centers.a.inventory.decide_for_others(Epoch(1), call("before")).await;
    assert!(matches!(answer.outcomes[..], [ReserveOutcome::Accepted(_)]), "{answer:?}");
    centers.freeze().await;
    let answer = centers.a.inventory.decide_for_others(Epoch(1), call("during")).await;
    assert_eq!(answer.outcomes, [ReserveOutcome::Shifting]);
    centers.abort().await;
    eventually("a sells again", async || centers.a.authority.grant().is_ok()).await;
    // It was under way for an epoch that has passed.
    let answer = centers.a.inventory.decide_for_others(Epoch(1), call("after")).await;
    assert_eq!(answer.outcomes, [ReserveOutcome::Shifting]);
    let answer = centers.a.inventory.decide_for_others(Epoch(3), call("now")).await;
    assert!(matches!(answer.outcomes[..], [ReserveOutcome::Accepted(_)]), "{answer:?}");
    let mut claims: Vec<String> = centers.claims(&centers.a).await.into_keys().collect();
    claims.sort();
    assert_eq!(claims, ["before", "now"]);
}

/// A change of the shop's waits for the end of a shift, as a purchase does; past that nothing has happened.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_a_sale_waits_while_the_master_moves() {
    let config = InventoryConfig { hold_ms: 500, ..InventoryConfig::default() };
    let centers = Centers::open(config).await;
    centers.sale(10).await;
    centers.freeze().await;
    let (sale, key) = (SaleId::new("s").unwrap(), *IdempotencyKey::new("k").unwrap().digest());
    assert!(matches!(centers.a.inventory.settled().await, Err(Unavailable::Shifting)));
    let stock = centers.a.inventory.add_stock(&sale, 5, &key).await;
    let Err(SaleError::Unavailable(error)) = stock else { panic!("{stock:?}") };
    assert!(matches!(error, Unavailable::Shifting) && error.executed() == Executed::No, "{error}");
    let (waiting, moved) = tokio::join!(centers.b.inventory.settled(), centers.move_to_b());
    let () = moved;
    waiting.unwrap();
    assert_eq!(centers.b.inventory.add_stock(&sale, 5, &key).await.unwrap().total, 15);
}

/// Redis hangs: each purchase is answered when its own time is over, also those that wait behind a call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_purchase_is_answered_at_its_own_deadline() {
    let config = InventoryConfig { deadline_ms: 800, ..InventoryConfig::default() };
    let centers = Centers::open(config).await;
    centers.sale(10).await;
    centers.a.redis.pause();
    let mut buyers = Vec::new();
    for buyer in 0..4 {
        let (inventory, begun) = (centers.a.inventory.clone(), Instant::now());
        buyers.push(tokio::spawn(async move {
            let outcome = inventory.purchase(Purchase::of_a_test(&format!("u{buyer}"))).await;
            (outcome, begun.elapsed())
        }));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for (place, buyer) in buyers.into_iter().enumerate() {
        let (outcome, took) = buyer.await.unwrap();
        // Whether it was sent depends on when the call before it was given up.
        assert!(
            matches!(outcome, Err(PurchaseError::MasterUnreachable { .. } | PurchaseError::Overloaded)),
            "purchase {place}: {outcome:?}"
        );
        assert!((800..1200).contains(&took.as_millis()), "purchase {place}: {took:?}");
    }
    centers.a.redis.resume();
}

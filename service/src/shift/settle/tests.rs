//! Tails of a master that was lost, settled: a redis-server that went another way, one that is the master now, and two
//! centers with their order databases that talk to each other.

use std::collections::BTreeMap;
use std::sync::Mutex;

use seckill_domain::{
    CenterNumber, IdempotencyKey, KeyDigest, OrderId, OrderRecord, OrderStatus, SaleId, SaleSpec, Uid,
};
use seckill_ledger::admin::{FenceChange, FenceOutcome, ReclaimEntry, set_fence};
use seckill_ledger::read::{Claim, Sale, scan_claims};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    ArchiveOutcome, CreateOutcome, Fence, ReserveOutcome, StateChange, add_stock, archive, create_sale,
    outbox, read, roles, set_state,
};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;

use super::*;
use crate::config::{CenterSpec, ClusterConfig, InventoryConfig, LedgerConfig, SecretUrl};
use crate::cross_center::Keyring;
use crate::http::{InternalState, ServeOptions, internal_router, serve};
use crate::inventory::Parts;
use crate::orders::{OrderStore, Payment, PaymentId, StoreBatch, StoreOptions};
use crate::patience::eventually;
use crate::shift::tail::{self, Owner};
use crate::topology::{
    Authority, Durability, Exposure, FileStore, Instances, Limits, Shift, ShiftMode, ShiftState, Tail,
    TopologyState, Unclaimed, UnclaimedCause,
};

mod outcomes;

fn id(name: &str) -> CenterId {
    CenterId::new(name).unwrap()
}

fn key(text: &str) -> KeyDigest {
    *IdempotencyKey::new(text).unwrap().digest()
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
            bought(redis_a.buy(&before, &spec.sale_id, uid, key(under)).await);
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
        self.begin_epoch(|_| ()).await;
    }

    /// What b's Redis holds now, as its replica has it.
    async fn copy(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut conn = self.b.redis.connect().await;
        let keys: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query_async(&mut conn).await.unwrap();
        let mut copy = Vec::new();
        for key in keys {
            let value: Vec<u8> = redis::cmd("DUMP").arg(&key).query_async(&mut conn).await.unwrap();
            copy.push((key, value));
        }
        copy
    }

    /// The master is lost, too: whoever goes on has only this copy of its Redis.
    async fn go_back(&self, copy: &[(Vec<u8>, Vec<u8>)]) {
        let mut restored = redis::pipe();
        restored.atomic().cmd("FLUSHALL");
        for (key, value) in copy {
            restored.cmd("RESTORE").arg(key).arg(0).arg(value);
        }
        restored.exec_async(&mut self.b.redis.connect().await).await.unwrap();
    }

    /// The shift to whoever goes on is over, and its loss was accepted.
    async fn lose_again(&mut self) {
        self.begin_epoch(|topology| {
            let exposure = Exposure { lossless: false, reason: String::new(), entries: None, since: None };
            topology.remember_shift(Shift {
                id: "shift-lost-again".to_owned(),
                mode: ShiftMode::Forced,
                state: ShiftState::Done,
                from: id("b"),
                epoch: topology.epoch,
                exposure: Some(exposure),
                ..Shift::of_a_test()
            });
        })
        .await;
    }

    async fn begin_epoch(&mut self, change: impl Fn(&mut Topology) + Send + Sync + 'static) {
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
            change(topology);
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
        let order_id = bought(self.a.redis.buy(&self.before, &self.sale, uid, key("k")).await);
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

    /// The sale is over, and its claims go.
    async fn archive(&self) {
        let mut conn = self.b.redis.connect().await;
        set_state(&mut conn, &self.fence, &self.sale, StateChange::End).await.unwrap();
        let touched = self.books().await.touched;
        let archived = archive(&mut conn, &self.fence, &self.sale, 0, touched).await.unwrap();
        assert!(matches!(archived, ArchiveOutcome::Archived { .. }), "{archived:?}");
    }

    fn told(&self) -> Tail {
        let found = FileStore::new(self.dir.path().join("topology.json")).load().unwrap();
        found.topology.history.iter().find_map(|shift| shift.tails.first()).unwrap().clone()
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
    let cross = CrossCenter::new(Keyring::of_a_test(name), topology.clone(), Instances::fixed(Vec::new()));
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
    let (of_inventory, of_orders) = (inventory.clone(), orders.clone());
    let state = InternalState::of_a_test(name, of_inventory, of_orders, topology.clone(), tracker.clone());
    let router = internal_router(state);
    let options = ServeOptions { drain_deadline: Duration::ZERO, ..ServeOptions::default() };
    tracker.spawn(serve(listener, router, options, stop.clone()));
    Side { redis, topology, authority, inventory, orders, cross }
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

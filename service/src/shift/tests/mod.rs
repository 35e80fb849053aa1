//! The guardian against a real redis-server and a real order database.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use seckill_domain::{
    CenterId, CenterNumber, Epoch, KeyDigest, Money, OrderId, OrderStatus, SaleId, SaleSpec, Uid,
};
use seckill_ledger::admin::{FenceChange, FenceOutcome, set_fence};
use seckill_ledger::roles::{self, Role};
use seckill_ledger::testkit::{RedisServer, one_unit};
use seckill_ledger::{CreateOutcome, Fence, LedgerId, ReserveOutcome, create_sale, read, reserve};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod adoption;
mod guards;
mod record;
mod tail;
mod two_centers;

use super::*;
use crate::orders::{OrderStore, Payment, PaymentId, StoreOptions, WorkerOptions, Workers};
use crate::patience::{PATIENCE, eventually};
use crate::topology::{
    Authority, Cause, Center, Extra, FileStore, Limits, NoAuthority, Topology, TopologyHandle, new_ledger_id,
};

fn center() -> CenterId {
    CenterId::new("a").unwrap()
}

fn first_topology() -> Topology {
    let urls = Center {
        number: CenterNumber::new(1).unwrap(),
        public_url: String::new(),
        admin_url: String::new(),
        internal_url: String::new(),
        ledger: Vec::new(),
        extra: Extra::new(),
    };
    Topology::single(new_ledger_id(), center(), urls, Limits::default())
}

/// A center: its Redis, its folder, and (between `start` and `stop`) its service.
struct World {
    server: RedisServer,
    dir: TempDir,
    init: InitPolicy,
    service: Option<Service>,
}

struct Service {
    topology: TopologyHandle,
    authority: Authority,
    orders: OrderStore,
    guardian: GuardianHandle,
    tracker: TaskTracker,
    token: CancellationToken,
}

impl World {
    async fn new(init: InitPolicy) -> World {
        let server = RedisServer::start_with(&[("replicaof", "127.0.0.1 1")]).await;
        let mut world = World { server, dir: tempfile::tempdir().unwrap(), init, service: None };
        world.start().await;
        world
    }

    /// A world that sells.
    async fn selling() -> World {
        let world = World::new(InitPolicy::Automatic).await;
        world.granted().await;
        world
    }

    fn store(&self) -> FileStore {
        FileStore::new(self.dir.path().join("topology.json"))
    }

    async fn start(&mut self) {
        let authority = Authority::new(center(), Duration::from_secs(20), 1);
        let topology =
            TopologyHandle::open_or_create(self.store(), authority.clone(), first_topology()).await.unwrap();
        let url = format!("sqlite:{}", self.dir.path().join("orders.db").display());
        let orders = OrderStore::open(&url, StoreOptions::new(center())).await.unwrap();
        let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
        topology.spawn(&tracker, token.clone());
        Workers::spawn(
            &orders,
            &[self.server.client()],
            &authority,
            &crate::orders::Queue::Outbox,
            &WorkerOptions::default(),
            &tracker,
            (&token, &token),
        );
        let options = GuardianOptions {
            center: center(),
            partition: 0,
            redis_url: self.server.url(),
            init: self.init,
            diverged_dir: self.dir.path().into(),
            degrade_after: Duration::from_secs(5),
            process: None,
        };
        let guardian = Guardian::spawn(
            options,
            topology.clone(),
            authority.clone(),
            orders.clone(),
            &tracker,
            token.clone(),
        )
        .unwrap();
        self.service = Some(Service { topology, authority, orders, guardian, tracker, token });
    }

    async fn stop(&mut self) {
        let service = self.service.take().expect("it runs");
        service.token.cancel();
        service.tracker.close();
        service.tracker.wait().await;
        service.orders.close().await;
    }

    fn service(&self) -> &Service {
        self.service.as_ref().expect("it runs")
    }

    /// Waits until sales are possible.
    async fn granted(&self) -> Fence {
        let mut status = self.service().authority.subscribe();
        let granted = tokio::time::timeout(PATIENCE, status.wait_for(Result::is_ok)).await;
        let granted =
            granted.unwrap_or_else(|_| panic!("no authority: {:?}", self.service().authority.status()));
        granted.unwrap().as_ref().unwrap().fence.clone()
    }

    async fn granted_after(&self, epoch: Epoch) -> Fence {
        let authority = &self.service().authority;
        eventually("a later epoch", async || {
            authority.grant().ok().filter(|grant| grant.fence.epoch > epoch).map(|grant| grant.fence.clone())
        })
        .await
    }

    async fn refused(&self, cause: Cause) -> NoAuthority {
        let mut status = self.service().authority.subscribe();
        let refused = tokio::time::timeout(
            PATIENCE,
            status.wait_for(|status| matches!(status, Err(refusal) if refusal.cause == cause)),
        )
        .await;
        let refused = refused
            .unwrap_or_else(|_| panic!("no {cause:?}: {:?}", self.service().authority.status()))
            .unwrap()
            .clone()
            .unwrap_err();
        assert!(self.service().authority.grant().is_err());
        refused
    }

    async fn conn(&self) -> MultiplexedConnection {
        self.server.connect().await
    }

    async fn role(&self) -> Role {
        roles::standing(&mut self.conn().await).await.unwrap().role
    }

    async fn eval_fence(&self, fence: &str) {
        let mut conn = self.conn().await;
        redis::cmd("SET").arg("sk:fence").arg(fence).query_async::<()>(&mut conn).await.unwrap();
    }

    async fn create_sale(&self, id: &str, quantity: u64) -> SaleId {
        let fence = self.granted().await;
        let spec: SaleSpec = serde_json::from_value(serde_json::json!({
            "sale_id": id, "kind": "product", "quantity": quantity, "price": 100, "currency": "EUR",
        }))
        .unwrap();
        let outcome = create_sale(&mut self.conn().await, &fence, &spec, &KeyDigest::default()).await;
        assert!(matches!(outcome, Ok(CreateOutcome::Created { .. })), "{outcome:?}");
        spec.sale_id
    }

    /// Buys one unit; the order is stored when this returns.
    async fn buy(&self, sale: &SaleId, uid: &str) -> OrderId {
        let ReserveOutcome::Accepted(order_id) = self.try_buy(sale, uid).await else {
            panic!("{uid} got nothing")
        };
        let orders = &self.service().orders;
        eventually("the order is stored", async || orders.order(order_id).await.unwrap()).await;
        order_id
    }

    async fn try_buy(&self, sale: &SaleId, uid: &str) -> ReserveOutcome {
        let fence = self.granted().await;
        self.server.buy(&fence, sale, uid, KeyDigest::default()).await
    }

    /// Leaves a tail behind that has one order, under this key.
    fn save_tail_of(&self, order_id: OrderId, uid: &str, key: KeyDigest) {
        let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let claims = format!("{key}{:08x}00000100{:010x}", order_id.head(), order_id.seq());
        let id = format!("1-{}", order_id.seq());
        let terms = serde_json::json!({ "kind": "product", "unit_price": 100, "currency": "CNY", "payment_ttl_s": 900 });
        let line = serde_json::json!({
            "id": id,
            "fields": {
                "v": "1", "k": "orders", "s": "s", "t": terms.to_string(), "a": "1",
                "o": format!("{:09} 1 {uid}\n", order_id.head()),
            },
            "orders": [{ "order_id": order_id, "uid": uid, "quantity": 1, "claims": claims }],
        });
        let head = serde_json::json!({ "kind": "diverged", "v": 1, "common": null, "last": id });
        let file = self.dir.path().join("diverged-1-1.ndjson");
        std::fs::write(file, format!("{head}\n{line}\n")).unwrap();
    }

    async fn pay(&self, order_id: OrderId) {
        let payment = Payment {
            order_id,
            payment_id: PaymentId::new(&format!("p{order_id}")).unwrap(),
            amount: serde_json::from_value::<Money>(100.into()).unwrap(),
            coupon_id: None,
        };
        self.service().orders.pay(payment).await.unwrap();
        assert_eq!(self.status(order_id).await, OrderStatus::Paid);
    }

    async fn status(&self, order_id: OrderId) -> OrderStatus {
        self.service().orders.order(order_id).await.unwrap().unwrap().status
    }

    async fn sale(&self, sale: &SaleId) -> read::Sale {
        read::sale(&mut self.conn().await, sale).await.unwrap().unwrap()
    }

    /// The files of the ledger, while its server is down.
    fn copy_ledger(&self, to: &Path) {
        copy(&self.server.folder().join("appendonlydir"), to);
    }

    /// Copies the ledger as it is now; its server goes on at a later epoch.
    async fn back_up(&mut self) -> TempDir {
        self.server.kill();
        let copy = tempfile::tempdir().unwrap();
        self.copy_ledger(copy.path());
        let before = self.service().topology.current().epoch;
        self.server.restart().await;
        self.granted_after(before).await;
        copy
    }

    fn restore_ledger(&self, from: &Path) {
        let data = self.server.folder().join("appendonlydir");
        std::fs::remove_dir_all(&data).unwrap();
        copy(from, &data);
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_start_creates_the_ledger_and_gives_the_server_its_role() {
    let world = World::new(InitPolicy::Automatic).await;
    let fence = world.granted().await;
    assert!(matches!(world.role().await, Role::Master { .. }));
    let topology = world.service().topology.current();
    assert_eq!((topology.fence(), topology.ledger_exists(0)), (fence, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_production_only_ledger_init_creates_the_ledger() {
    let world = World::new(InitPolicy::Explicit).await;
    let refusal = world.refused(Cause::NotInitialised).await;
    assert!(refusal.reason.contains("seckill ledger init"), "{refusal}");
    assert!(world.role().await.is_isolated());
    let fence = world.service().guardian.init().await.unwrap();
    assert_eq!(world.granted().await, fence);
    let again = world.service().guardian.init().await;
    assert!(matches!(again, Err(RequestError::Failed(InitError::Exists { .. }))), "{again:?}");
    assert_eq!(world.granted().await, fence);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_with_other_data_does_not_become_the_ledger() {
    let mut world = World::new(InitPolicy::Automatic).await;
    world.stop().await;
    world.server.kill();
    std::fs::remove_file(world.dir.path().join("topology.json")).unwrap();
    std::fs::remove_dir_all(world.server.folder().join("appendonlydir")).unwrap();
    world.server.restart().await;
    let mut conn = world.conn().await;
    redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut conn).await.unwrap();
    redis::cmd("SET").arg("somebody:else").arg(1).query_async::<()>(&mut conn).await.unwrap();
    // The first world's epoch entry was stored, and would say that there was a ledger.
    for file in ["orders.db", "orders.db-wal", "orders.db-shm"] {
        let _ = std::fs::remove_file(world.dir.path().join(file));
    }
    world.start().await;
    world.refused(Cause::Foreign).await;
    assert!(matches!(world.role().await, Role::Master { .. }), "somebody else's server is left alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_restarted_gets_a_new_epoch_and_a_service_that_restarted_does_not() {
    let mut world = World::selling().await;
    let sale = world.create_sale("s", 10).await;
    let first = world.buy(&sale, "u1").await;
    let before = world.granted().await;
    world.stop().await;
    world.start().await;
    assert_eq!(world.granted().await, before);
    world.server.restart().await;
    let after = world.granted_after(before.epoch).await;
    assert_eq!(after.ledger_id, before.ledger_id);
    let second = world.buy(&sale, "u2").await;
    assert_ne!(first, second);
    assert_eq!(world.sale(&sale).await.remaining, 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_does_not_answer_stops_sales_until_it_is_back() {
    let mut world = World::selling().await;
    world.server.kill();
    let refusal = world.refused(Cause::Unreachable).await;
    assert!(refusal.reason.contains(&world.server.port().to_string()), "{refusal}");
    let before = world.service().topology.current().epoch;
    world.server.restart().await;
    world.granted_after(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guardian_that_died_before_the_promotion_is_no_obstacle() {
    let mut world = World::selling().await;
    let before = world.granted().await;
    world.stop().await;
    world.server.restart().await;
    // The epochs were written down, the fence was not set: twice.
    let found = world.store().load().unwrap();
    let mut topology = Topology::clone(&found.topology);
    topology.epoch = Epoch(before.epoch.0 + 2);
    world.store().compare_and_set(Some(found.revision), &topology).unwrap();
    world.start().await;
    world.granted_after(topology.epoch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_ahead_of_the_topology_lifts_the_topology() {
    let mut world = World::selling().await;
    let before = world.granted().await;
    world.stop().await;
    let ahead = before.at(Epoch(before.epoch.0 + 5));
    let change = FenceChange::Lift { from: before };
    let outcome = set_fence(&mut world.conn().await, &change, &ahead).await.unwrap();
    assert_eq!(outcome, FenceOutcome::Set);
    world.start().await;
    world.granted_after(ahead.epoch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_came_up_as_a_master_is_taken_over_at_a_new_epoch() {
    let mut world = World::selling().await;
    let before = world.granted().await;
    world.server.kill();
    world.refused(Cause::Unreachable).await;
    world.server.restart().await;
    let mut conn = world.conn().await;
    redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut conn).await.unwrap();
    world.granted_after(before.epoch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topology_that_cannot_be_written_stops_a_promotion_and_uses_up_nothing() {
    let mut world = World::selling().await;
    let before = world.granted().await;
    let lock = world.dir.path().join("topology.json.lock");
    std::fs::remove_file(&lock).unwrap();
    std::fs::create_dir(&lock).unwrap();
    world.server.restart().await;
    let refusal = world.refused(Cause::TopologyUnwritable).await;
    assert!(refusal.reason.contains("topology.json"), "{refusal}");
    assert_eq!(world.store().load().unwrap().topology.epoch, before.epoch);
    assert!(world.role().await.is_isolated());
    std::fs::remove_dir(&lock).unwrap();
    let after = world.granted().await;
    assert_eq!(after.epoch, before.epoch.next());
}

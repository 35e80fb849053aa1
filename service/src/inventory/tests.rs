//! Acknowledging on pairs of real redis-servers: rules A2 and K1 to K4.

mod shift;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use seckill_domain::{
    CenterId, CenterNumber, Epoch, IdempotencyKey, OrderId, Quantity, SaleId, SaleSpec, Uid,
};
use seckill_ledger::admin::{FenceChange, FenceOutcome, ReclaimEntry, set_fence};
use seckill_ledger::read::scan_claims;
use seckill_ledger::roles::standing;
use seckill_ledger::testkit::{RedisServer, one_unit};
use seckill_ledger::{Executed, Fence};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::config::SecretUrl;
use crate::cross_center::calls::ReclaimOutcome;
use crate::topology::{
    Acknowledge, Center, Durability, FileStore, Grant, InSync, Limits, Topology, boottime_ns,
};

/// A master with a replica, and an inventory that acknowledges what both have.
struct Pair {
    master: RedisServer,
    replica: RedisServer,
    fence: Fence,
    inventory: Inventory,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

fn grant(fence: &Fence, replicas: usize) -> Arc<Grant> {
    let acknowledge = Acknowledge::Replicated { replicas };
    Arc::new(Grant { fence: fence.clone(), acknowledge, run_ids: Box::default(), degraded: false })
}

impl Pair {
    async fn open(deadline_ms: u64) -> Pair {
        let master = RedisServer::start().await;
        let fence = master.init_ledger().await;
        let replica = RedisServer::start_replica_of(&master).await;
        Pair::on(master, replica, fence, deadline_ms).await
    }

    async fn on(master: RedisServer, replica: RedisServer, fence: Fence, deadline_ms: u64) -> Pair {
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
        let authority = Authority::fixed_grant(Grant::clone(&grant(&fence, 1)));
        let store = FileStore::new(dir.path().join("topology.json"));
        let topology = TopologyHandle::open_or_create(store, authority.clone(), topology).await.unwrap();
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let ledger =
            LedgerConfig { partitions: vec![SecretUrl::new(master.url())], ..LedgerConfig::default() };
        let config = InventoryConfig { deadline_ms, ..InventoryConfig::default() };
        let parts = Parts {
            ledger: &ledger,
            inventory: &config,
            retry_window_ms: 0,
            topology,
            authority,
            cross: None,
        };
        let inventory = Inventory::start(&parts, &tracker, &stop, &CancellationToken::new()).unwrap();
        Pair { master, replica, fence, inventory, stop, _dir: dir }
    }

    async fn sale(&self, id: &str) -> Result<Created, SaleError> {
        let spec: SaleSpec = serde_json::from_value(json!({
            "sale_id": id, "kind": "product", "quantity": 1_000_000, "price": 100, "currency": "CNY",
        }))
        .unwrap();
        self.inventory.create_sale(spec, None).await
    }

    /// The sale exists, in both servers.
    async fn open_sale(&self) {
        once_replicated(async || self.sale("s").await).await;
    }

    async fn buys(&self, uid: &str) -> Accepted {
        once_replicated(async || self.buy(uid).await).await
    }

    async fn buy(&self, uid: &str) -> Result<Accepted, PurchaseError> {
        self.inventory.purchase(Purchase::of_a_test(uid)).await
    }

    /// A barrier of its own on the master, whose authority grants this fence.
    fn barrier(&self, authority: &Authority) -> Barrier {
        Barrier::open(self.master.client(), authority, &TaskTracker::new(), &CancellationToken::new())
    }

    async fn run_id(&self) -> Arc<str> {
        Arc::from(standing(&mut self.master.connect().await).await.unwrap().run_id)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Asks until it is granted: a busy disk may hold the replica up for longer than a barrier waits.
async fn once_replicated<T, E: std::fmt::Debug>(mut ask: impl AsyncFnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match ask().await {
            Ok(granted) => return granted,
            Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// K2, K3: with the replica stopped nothing is acknowledged, neither an acceptance nor a replay of one; and the
/// same key finds the result later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_acknowledged_that_the_replica_has_not_confirmed() {
    let pair = Pair::open(1200).await;
    pair.open_sale().await;
    let before = pair.buys("alice").await;
    pair.replica.pause();
    // K3: the ledger knows the order, but who says that the replica does? In a batch of its own: one with an acceptance
    // waits for that.
    let batches = || pair.inventory.metrics().batches.get();
    let (sent, inventory) = (batches(), pair.inventory.clone());
    let replay = tokio::spawn(async move { inventory.purchase(Purchase::of_a_test("alice")).await });
    let begun = Instant::now();
    while batches() == sent {
        assert!(begun.elapsed() < Duration::from_secs(20), "the replay is not sent");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let first = pair.buy("bob").await;
    assert_eq!(replay.await.unwrap(), Err(PurchaseError::NotReplicated), "a replay");
    assert_eq!(first, Err(PurchaseError::NotReplicated), "an acceptance");
    assert!(pair.inventory.metrics().barrier.unknown.get() > 0);
    pair.replica.resume();
    let bob = pair.buys("bob").await;
    assert!(bob.replayed, "the first attempt was accepted by the master");
    assert_eq!(pair.buys("alice").await.order_id, before.order_id);
}

/// A sale that is not open promises nothing and waits for nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_needs_no_replica() {
    let pair = Pair::open(5000).await;
    pair.replica.pause();
    assert_eq!(pair.buy("alice").await, Err(PurchaseError::SaleNotFound));
    pair.replica.resume();
}

/// K1: `WAIT` is satisfied by any replica, so one that is not known makes it worthless.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_not_known_confirms_nothing() {
    let pair = Pair::open(5000).await;
    let (grant, run_id) = (grant(&pair.fence, 1), pair.run_id().await);
    let barrier = pair.barrier(&Authority::fixed_grant(Grant::clone(&grant)));
    once_replicated(async || barrier.confirm(&grant, &run_id).await).await;
    let stranger = RedisServer::start_replica_of(&pair.master).await;
    // The replica knows that it is attached a moment before the master counts it.
    let mut conn = pair.master.connect().await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !matches!(
        seckill_ledger::roles::standing(&mut conn).await.unwrap().role,
        seckill_ledger::roles::Role::Master { replicas: 2, .. }
    ) {
        assert!(Instant::now() < deadline, "the master does not count the stranger");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(barrier.confirm(&grant, &run_id).await, Err(Unconfirmed));
    drop(stranger);
}

/// K2: a barrier speaks for the epoch that its fence carries, and for no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_barrier_is_refused_once_another_epoch_began() {
    let pair = Pair::open(5000).await;
    let (old, run_id) = (grant(&pair.fence, 1), pair.run_id().await);
    let barrier = pair.barrier(&Authority::fixed_grant(Grant::clone(&old)));
    once_replicated(async || barrier.confirm(&old, &run_id).await).await;
    let to = pair.fence.at(Epoch(2));
    let change = FenceChange::Lift { from: pair.fence.clone() };
    let outcome = set_fence(&mut pair.master.connect().await, &change, &to).await.unwrap();
    assert_eq!(outcome, FenceOutcome::Set);
    let late = barrier.confirm(&old, &run_id).await;
    assert_eq!(late, Err(Unconfirmed), "a barrier of the epoch before was confirmed");
}

/// K2: the reply came from one run of the server, the barrier would go to another: what was written may be gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_restarted_between_reply_and_barrier_confirms_nothing() {
    let mut pair = Pair::open(5000).await;
    let (grant, before) = (grant(&pair.fence, 1), pair.run_id().await);
    let barrier = pair.barrier(&Authority::fixed_grant(Grant::clone(&grant)));
    pair.master.restart().await;
    pair.replica.follow(&pair.master).await;
    let now = pair.run_id().await;
    once_replicated(async || barrier.confirm(&grant, &now).await).await;
    // However often it is asked, and whether or not there is a connection to the new run that has nothing to do.
    let anew = pair.barrier(&Authority::fixed_grant(Grant::clone(&grant)));
    for _ in 0..5 {
        assert_eq!(anew.confirm(&grant, &before).await, Err(Unconfirmed), "confirmed by a new connection");
    }
    for _ in 0..5 {
        assert_eq!(barrier.confirm(&grant, &before).await, Err(Unconfirmed), "confirmed by one at hand");
    }
}

/// A2: the epoch, or the lease, ends while the acknowledgement is on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authority_is_asked_again_when_a_purchase_is_acknowledged() {
    let pair = Pair::open(5000).await;
    // The lease is over, and nobody has noticed yet: only who asks hears it.
    let authority = Authority::new(CenterId::new("a").unwrap(), Duration::from_millis(500), 1);
    authority.admit(0, pair.fence.clone(), &pair.run_id().await, 1);
    let topology = Topology {
        durability: Durability::Replicated,
        in_sync: vec![InSync {
            center: CenterId::new("b").unwrap(),
            run_id: "run".to_owned(),
            extra: serde_json::Map::new(),
        }],
        ..Topology::clone(&pair.inventory.0.topology.current())
    };
    authority.confirm(&Arc::new(topology), boottime_ns());
    let sent_under = authority.grant().unwrap();
    assert_eq!(sent_under.acknowledge, Acknowledge::Replicated { replicas: 1 });
    while authority.grant().is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(authority.status().is_ok());
    let run_id = pair.run_id().await;
    let confirmed = pair.barrier(&authority).confirm(&sent_under, &run_id).await;
    assert_eq!(confirmed, Err(Unconfirmed), "the lease is over");
    // The service's authority is at a later epoch already; the ledger's fence is not lifted yet.
    let grant = grant(&pair.fence, 1);
    let later = Authority::fixed(pair.fence.at(Epoch(2)));
    assert_eq!(pair.barrier(&later).confirm(&grant, &run_id).await, Err(Unconfirmed));
    // The durability that counts is the one of the write's own grant: a local one waits for no replica.
    pair.replica.pause();
    let local = Arc::new(Grant { acknowledge: Acknowledge::Local, ..Grant::clone(&grant) });
    let barrier = pair.barrier(&Authority::fixed(pair.fence.clone()));
    barrier.confirm(&local, &run_id).await.unwrap();
    assert_eq!(barrier.confirm(&grant, &run_id).await, Err(Unconfirmed));
    pair.replica.resume();
}

/// A2: a batch that was decided under an authority that has ended meanwhile is in doubt, whatever it would have waited
/// for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acceptance_is_in_doubt_once_its_authority_has_ended() {
    let pair = Pair::open(5000).await;
    pair.open_sale().await;
    let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
    // The ledger is still at the fence of the grant; this service has heard of the next epoch.
    let later = Authority::fixed(pair.fence.at(Epoch(2)));
    let target = connection::Target::of(pair.master.client(), Duration::from_secs(20));
    let mut local = local::Local::new(
        target.clone(),
        Barrier::start(&target, &later, &Arc::default(), &tracker, &stop),
        later,
        sold_out::SoldOut::start(&target, 10, Arc::default(), &tracker, (&stop, &stop)),
        Arc::default(),
    );
    let replicated = grant(&pair.fence, 1);
    let alone = Arc::new(Grant { acknowledge: Acknowledge::Local, ..Grant::clone(&replicated) });
    let unknown = PurchaseError::MasterUnreachable { executed: Executed::Unknown };
    for (uid, grant, doubt) in [("alice", alone, unknown), ("bob", replicated, PurchaseError::NotReplicated)]
    {
        let entry = one_unit(uid, *IdempotencyKey::new("k").unwrap().digest());
        let verdicts = match local.attempt(&grant, &SaleId::new("s").unwrap(), &[entry]).await {
            route::Attempt::Done(verdicts) => verdicts,
            route::Attempt::Pending { rest, .. } => rest.await,
        };
        assert_eq!(verdicts, [route::Verdict::Unknown(doubt)], "{:?}", grant.acknowledge);
    }
    stop.cancel();
}

/// K4: a change of the shop's counts behind the barrier, and repeating an unknown one is safe.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_a_sale_counts_once_the_replica_has_it() {
    let pair = Pair::open(5000).await;
    pair.replica.pause();
    let error = pair.sale("s").await.unwrap_err();
    assert!(matches!(&error, SaleError::Unavailable(Unavailable::NotReplicated)), "{error}");
    let SaleError::Unavailable(error) = error else { unreachable!() };
    assert_eq!(error.executed(), Executed::Unknown);
    // The same body again is no other sale, but it counts no sooner.
    assert!(matches!(pair.sale("s").await, Err(SaleError::Unavailable(Unavailable::NotReplicated))));
    pair.replica.resume();
    let again = once_replicated(async || pair.sale("s").await).await;
    assert_eq!(again, Created { version: 1, new: false });
    let key = *IdempotencyKey::new("k").unwrap().digest();
    let sale = SaleId::new("s").unwrap();
    pair.replica.pause();
    // So does an order that is claimed again.
    let uid = Uid::new("u").unwrap();
    let head = OrderId::head_of(CenterNumber::new(1).unwrap(), uid.table(), 0, Epoch(0));
    let order_id = OrderId::from_parts(head, 77).unwrap();
    let lost = [ReclaimEntry { order_id, uid, quantity: Quantity::ONE, key }];
    let (stock, claimed) =
        tokio::join!(pair.inventory.add_stock(&sale, 5, &key), pair.inventory.reclaim(&sale, &lost));
    assert!(matches!(stock, Err(SaleError::Unavailable(Unavailable::NotReplicated))));
    assert!(matches!(claimed, Err(Unavailable::NotReplicated)));
    pair.replica.resume();
    let claimed = once_replicated(async || pair.inventory.reclaim(&sale, &lost).await).await;
    assert_eq!(claimed.outcomes, [ReclaimOutcome::Held]);
    let stock = once_replicated(async || pair.inventory.add_stock(&sale, 5, &key).await).await;
    assert!(stock.replayed);
    assert_eq!(stock.total, 1_000_005);
}

/// R1: an order that only the master has is nobody's business.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queued_order_is_shown_once_the_replica_has_it() {
    let pair = Pair::open(1200).await;
    pair.open_sale().await;
    let alice = pair.buys("alice").await;
    // A busy disk may hold the replica up for longer than a barrier waits.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !matches!(pair.inventory.find_queued(alice.order_id).await, Ok(Some(_))) {
        assert!(Instant::now() < deadline, "the order is not shown");
    }
    pair.replica.pause();
    let hidden = pair.inventory.find_queued(alice.order_id).await;
    assert!(matches!(hidden, Err(Unavailable::NotReplicated)), "{hidden:?}");
    pair.replica.resume();
}

/// Load, and in each round something happens to the servers: the master is killed, killed while the replica
/// hangs, or loses its replica. Whatever was acknowledged is on the replica that is promoted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_replica_has_everything_that_was_acknowledged() {
    for round in 0..3 {
        let mut pair = Pair::open(900).await;
        pair.open_sale().await;
        let stop = CancellationToken::new();
        let buyers: Vec<_> = (0..64)
            .map(|buyer| {
                let (inventory, stop) = (pair.inventory.clone(), stop.clone());
                tokio::spawn(async move {
                    let mut acknowledged = Vec::new();
                    let mut n = 0;
                    while !stop.is_cancelled() {
                        n += 1;
                        let uid = format!("r{round}b{buyer}n{n}");
                        if let Ok(accepted) = inventory.purchase(Purchase::of_a_test(&uid)).await {
                            acknowledged.push((uid, accepted.order_id));
                        }
                    }
                    acknowledged
                })
            })
            .collect();
        let batches = || pair.inventory.metrics().batches.get();
        let begun = Instant::now();
        while batches() < 100 {
            assert!(begun.elapsed() < Duration::from_secs(10), "nothing is sold");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        match round {
            0 => pair.master.kill(),
            1 => {
                pair.replica.pause();
                // The master goes on accepting what nobody may hear of.
                let before = batches();
                let paused = Instant::now();
                while batches() < before + 2 && paused.elapsed() < Duration::from_secs(2) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                pair.master.kill();
                pair.replica.resume();
            }
            _ => {
                let mut conn = pair.replica.connect().await;
                redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut conn).await.unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
                pair.master.kill();
            }
        }
        stop.cancel();
        let mut acknowledged: HashMap<String, OrderId> = HashMap::new();
        for buyer in buyers {
            acknowledged.extend(buyer.await.unwrap());
        }
        assert!(acknowledged.len() > 64, "only {} acknowledged", acknowledged.len());
        // Promoted: it drops the link and keeps what it has.
        let mut conn = pair.replica.connect().await;
        redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut conn).await.unwrap();
        let sale = SaleId::new("s").unwrap();
        let mut missing = 0;
        for (uid, order_id) in &acknowledged {
            let found = seckill_ledger::outbox::find_order(&mut conn, 1, *order_id).await.unwrap();
            missing += u64::from(found.is_none_or(|order| order.uid.as_str() != uid));
        }
        assert_eq!(missing, 0, "of {} acknowledged in round {round}", acknowledged.len());
        let (_, held) = scan_claims(&mut conn, &sale, 0, 1).await.unwrap();
        assert!(!held.is_empty());
    }
}

//! Two centers whose databases replicate each other, both ways, on real servers.

use std::time::Duration;

use seckill_domain::Shard;
use seckill_parts::MariadbPair;

use super::*;
use crate::orders::{Error, FenceError, Origin, Owners, PayOutcome, Turned, Unreadable};
use crate::topology::{Center, Extra, Limits, Topology, new_ledger_id};

/// How long one may take to have what the other one wrote.
const SOON: Duration = Duration::from_secs(60);

struct Pair {
    databases: MariadbPair,
    clock: Arc<ManualClock>,
}

fn center(id: &str) -> CenterId {
    CenterId::new(id).unwrap()
}

/// Shards 0–31 are a's, the others b's.
fn topology() -> Topology {
    let place = |number| Center {
        number: CenterNumber::new(number).unwrap(),
        public_url: String::new(),
        admin_url: String::new(),
        internal_url: String::new(),
        ledger: Vec::new(),
        extra: Extra::new(),
    };
    let mut topology = Topology::single(new_ledger_id(), center("a"), place(1), Limits::default());
    topology.centers.insert(center("b"), place(2));
    topology.shard_owners[32..].fill(center("b"));
    topology
}

impl Pair {
    async fn start() -> Pair {
        let databases = MariadbPair::start("seckill").await.unwrap();
        Pair { databases, clock: Arc::new(ManualClock::new(START)) }
    }

    async fn open(&self, which: usize) -> OrderStore {
        let topology = topology();
        let id = center(["a", "b"][which]);
        let others = Shard::all().map(|shard| (shard, topology.home_center(shard).clone()));
        let clock: Arc<dyn Clock> = Arc::<ManualClock>::clone(&self.clock);
        let options = StoreOptions {
            clock,
            shards: topology.shards_of(&id).collect(),
            others: others.filter(|(_, owner)| *owner != id).collect(),
            makes_tables: topology.master == id,
            ..StoreOptions::new(id)
        };
        OrderStore::open(&self.databases.urls[which], options).await.unwrap()
    }

    async fn both(&self) -> [OrderStore; 2] {
        let (a, b) = tokio::join!(self.open(0), self.open(1));
        [a, b]
    }

    /// Waits until each has what the other one wrote; replication goes on without a conflict.
    async fn settle(&self, [a, b]: [&OrderStore; 2]) {
        let (from_a, from_b) = (a.written().await.unwrap(), b.written().await.unwrap());
        let (at_b, at_a) = tokio::join!(b.reaches(&from_a, SOON), a.reaches(&from_b, SOON));
        for store in [a, b] {
            let server = store.server().await.unwrap().unwrap();
            assert!(server.may_see && server.numbered && server.increments.0 == 8, "{server:?}");
            assert!(server.copies.iter().all(|copy| copy.running && copy.error.is_none()), "{server:?}");
        }
        assert!(at_b.unwrap() && at_a.unwrap(), "one does not follow the other");
    }
}

/// A buyer of a center's shards.
fn buyer(of_a: bool, number: usize) -> String {
    (0..)
        .map(|n| format!("u{number}-{n}"))
        .find(|uid| (user(uid).table().shard().number() < 32) == of_a)
        .unwrap()
}

fn entry(seq: u64, orders: &[OrderRecord]) -> StoreBatch {
    StoreBatch::outbox(0, at(seq - 1), at(seq), orders.to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_centers_write_side_by_side_and_a_shard_changes_hands() {
    let pair = Pair::start().await;
    let [a, b] = pair.both().await;
    // Everything that both centers write in the same moment under what could be the same key.
    let terms = product(100, 900);
    let orders: Vec<OrderRecord> =
        (1..=8).map(|seq| order(&buyer(seq % 2 == 0, seq as usize), seq, &terms)).collect();
    let unreadable = Unreadable {
        origin: Origin::Outbox { partition: 0, id: at(1) },
        reason: "broken".to_owned(),
        raw: "x".to_owned(),
    };
    for (seq, record) in (1..).zip(&orders) {
        let mut batch = entry(seq, std::slice::from_ref(record));
        batch.unreadable = vec![unreadable.clone()];
        let (at_a, at_b) = tokio::join!(a.store(batch.clone()), b.store(batch));
        let (at_a, at_b) = (at_a.unwrap(), at_b.unwrap());
        assert_eq!(
            (at_a.stored + at_b.stored, at_a.foreign + at_b.foreign),
            (1, 1),
            "exactly one is its home"
        );
    }
    let homes = |record: &OrderRecord| if record.uid.table().shard().number() < 32 { &a } else { &b };
    for record in &orders[..4] {
        let paid = homes(record).pay(payment(record, "same-id", 100)).await.unwrap();
        // Once in each center before they hear of each other.
        assert!(matches!(paid, PayOutcome::Paid(_) | PayOutcome::PaymentIdReused), "{paid:?}");
        homes(record).cancel(&record.uid, record.order_id).await.unwrap();
    }
    homes(&orders[4]).cancel(&orders[4].uid, orders[4].order_id).await.unwrap();
    homes(&orders[5]).cancel(&orders[5].uid, orders[5].order_id).await.unwrap();
    let later = pair.clock.now();
    a.mark_position(0, later, None, true).await.unwrap();
    b.mark_position(0, later, None, true).await.unwrap();
    pair.clock.advance_ms(1_000_000);
    for store in [&a, &b] {
        store.expire_due(None, pair.clock.now(), 100).await.unwrap();
        let releases = store.pending_releases(100, &[]).await.unwrap();
        assert!(!releases.is_empty());
        store
            .releases_done(releases.iter().map(|release| release.order_id).collect(), Vec::new())
            .await
            .unwrap();
        assert_eq!(store.unreadable(10, None).await.unwrap().items.len(), 1, "its own");
    }
    pair.settle([&a, &b]).await;
    for store in [&a, &b] {
        assert_eq!(store.pending_release_count().await.unwrap(), 0);
        assert_eq!(store.next_due(None).await.unwrap(), None);
        let copies = store.audit_orders(&orders.iter().map(|order| order.order_id).collect::<Vec<_>>()).await;
        assert_eq!(copies.unwrap().len(), 8, "each has all orders");
    }
    let counts = [a.counts(None).await.unwrap(), b.counts(None).await.unwrap()];
    let own = |counts: &crate::orders::Counts| {
        counts.sales[&sale("s")].by_status.values().map(|status| status.orders).sum::<u64>()
    };
    assert_eq!((own(&counts[0]), own(&counts[1])), (4, 4));

    // a lets go of shards 0–15 in attempt 1; nobody writes them until b takes them.
    let moved: Vec<Shard> = (0..16).map(|number| Shard::new(number).unwrap()).collect();
    let theirs = |number| {
        (0..).map(|n| format!("m{number}-{n}")).find(|uid| user(uid).table().shard().number() < 16).unwrap()
    };
    let mine = order(&theirs(1), 9, &terms);
    a.store(entry(9, std::slice::from_ref(&mine))).await.unwrap();
    let fence = async |epoch, after: &str| a.fence_shards(&moved, &center("b"), epoch, after, SOON).await;
    let fenced = fence(1, &b.written().await.unwrap()).await.unwrap();
    assert_eq!(fenced.stored, [(0, at(9))]);
    assert!(matches!(a.pay(payment(&mine, "p9", 100)).await, Err(Error::NotOwner(_))));
    let late = order(&theirs(2), 10, &terms);
    assert_eq!(a.store(entry(10, std::slice::from_ref(&late))).await.unwrap().foreign, 1);
    // The same again is the same; b is farther than a was, and reads again from there.
    assert_eq!(fence(1, "").await.unwrap().stored, fenced.stored);
    b.store(StoreBatch::outbox(0, at(8), at(10), vec![mine.clone(), late.clone()])).await.unwrap();
    assert!(b.reaches(&fenced.written, SOON).await.unwrap());
    let mut after = topology();
    after.shard_epoch = 1;
    after.shard_owners[..16].fill(center("b"));
    let turned = b.follow_owners(&Owners::of(&after)).await.unwrap();
    assert_eq!(turned, Turned { gained: moved.clone(), lost: Vec::new() });
    assert_eq!(b.position(0).await.unwrap(), at(9));
    let outcome = b.store(StoreBatch::outbox(0, at(9), at(10), vec![late.clone()])).await.unwrap();
    assert_eq!(outcome.stored, 1);
    assert!(matches!(b.pay(payment(&mine, "p9", 100)).await.unwrap(), PayOutcome::Paid(_)));
    pair.settle([&a, &b]).await;
    assert!(matches!(a.pay(payment(&mine, "p9", 100)).await, Err(Error::NotOwner(_))));
    assert_eq!(a.order(late.order_id).await.unwrap().map(|order| order.order_id), Some(late.order_id));

    // A late fence of the attempt that is over changes nothing, and neither does an old topology.
    let refused = fence(1, "").await.unwrap_err();
    assert!(matches!(refused, FenceError::Overtaken { .. }), "{refused}");
    assert_eq!(a.follow_owners(&Owners::of(&topology())).await.unwrap(), Turned::default());
    assert!(matches!(a.cancel(&late.uid, late.order_id).await, Err(Error::NotOwner(_))));
    a.close().await;
    b.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_is_given_up_leaves_nothing_blocked_and_its_late_fence_is_lifted() {
    let pair = Pair::start().await;
    let [a, b] = pair.both().await;
    let moved = [Shard::new(0).unwrap()];
    a.fence_shards(&moved, &center("b"), 1, "", SOON).await.unwrap();
    let mut given_up = topology();
    given_up.shard_epoch = 2;
    a.follow_owners(&Owners::of(&given_up)).await.unwrap();
    let rows = a.shard_rows().await.unwrap();
    assert!(rows[..32].iter().all(|row| row.owner == "a" && row.epoch == 2), "{rows:?}");
    let late = a.fence_shards(&moved, &center("b"), 1, "", SOON).await.unwrap_err();
    assert!(matches!(late, FenceError::Overtaken { .. }), "{late}");
    // A center that comes back after its shards were taken by force gives them up before it writes.
    let mut forced = topology();
    forced.shard_epoch = 3;
    forced.shard_owners.fill(center("b"));
    pair.databases.servers[0].pause();
    let gained = b.follow_owners(&Owners::of(&forced)).await.unwrap().gained;
    assert_eq!(gained.len(), 32);
    pair.databases.servers[0].resume();
    a.follow_owners(&Owners::of(&forced)).await.unwrap();
    assert!(a.shard_rows().await.unwrap().iter().all(|row| row.owner == "b"));
    pair.settle([&a, &b]).await;
    assert!(b.shard_rows().await.unwrap()[..32].iter().all(|row| row.owner == "b" && row.epoch == 3));
    a.close().await;
    b.close().await;
}

#[tokio::test]
async fn on_sqlite_nothing_is_let_go_of() {
    let fixture = Fixture::new().await;
    let moved = [Shard::new(0).unwrap()];
    let refused = fixture.store.fence_shards(&moved, &center("b"), 1, "", SOON).await.unwrap_err();
    assert!(matches!(&refused, FenceError::Unable(reason) if reason.contains("SQLite")), "{refused}");
    let mut topology = topology();
    topology.shard_epoch = 1;
    assert_eq!(fixture.store.follow_owners(&Owners::of(&topology)).await.unwrap(), Turned::default());
    assert!(fixture.store.server().await.unwrap().is_none());
}

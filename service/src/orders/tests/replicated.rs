//! Reading the outbox (R1) and releases (K4) on pairs of real redis-servers.

use seckill_domain::{Epoch, IdempotencyKey, SaleSpec};
use seckill_ledger::admin::{FenceChange, set_fence};
use seckill_ledger::roles::isolate;
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{Cursor, CursorOutcome, Fence, ReserveOutcome, ShardSet, create_sale, read};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::inventory::Barrier;
use crate::orders::reading::{NoPage, Source};
use crate::orders::releases::{Lines, Releases};
use crate::orders::workers::{Link, WorkerOptions};
use crate::topology::{Acknowledge, Authority, Grant};

const NOWHERE: OutboxId = OutboxId { epoch: 0, seq: 0 };

struct Pair {
    master: RedisServer,
    replica: RedisServer,
    fence: Fence,
}

impl Pair {
    async fn open() -> Pair {
        let master = RedisServer::start().await;
        let fence = master.init_ledger().await;
        let replica = RedisServer::start_replica_of(&master).await;
        let spec: SaleSpec = serde_json::from_value(serde_json::json!({
            "sale_id": "s", "kind": "product", "quantity": 1000, "price": 100, "currency": "CNY",
            "per_user_limit": 1000,
        }))
        .unwrap();
        create_sale(&mut master.connect().await, &fence, &spec, &[0; 16]).await.unwrap();
        Pair { master, replica, fence }
    }

    async fn buy(&self, uid: &str) -> OrderId {
        let key = *IdempotencyKey::new("k").unwrap().digest();
        match self.master.buy(&self.fence, &SaleId::new("s").unwrap(), uid, key).await {
            ReserveOutcome::Accepted(order_id) => order_id,
            other => panic!("{other:?}"),
        }
    }
}

fn link(server: &RedisServer, fence: &Fence, acknowledge: Acknowledge, degraded: bool) -> Link {
    let grant = Grant { fence: fence.clone(), acknowledge, run_ids: Box::default(), degraded };
    let authority = Authority::fixed_grant(grant);
    let client = server.client();
    let barrier = Barrier::open(client.clone(), &authority, &TaskTracker::new(), &CancellationToken::new());
    Link { partition: 0, client, authority, barrier, cross: None }
}

const BOTH: Acknowledge = Acknowledge::Replicated { replicas: 1 };

/// The last entry that a reader gets. A busy disk may hold the replica up for longer than a barrier waits.
async fn last_confirmed(source: &mut Source, link: &Link) -> OutboxId {
    let mut last = None;
    eventually(async || match source.read(link, NOWHERE, 100).await {
        Ok(page) => {
            last = page.entries.last().map(|entry| entry.id);
            true
        }
        Err(NoPage::NotReplicated) => false,
        Err(error) => panic!("{error:?}"),
    })
    .await;
    last.expect("an entry")
}

/// R1 on the master: entries are noted, then the barrier, then used. A master that dies in between has given
/// nothing to anybody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_gives_readers_nothing_that_the_replica_has_not_confirmed() {
    let pair = Pair::open().await;
    let link = link(&pair.master, &pair.fence, BOTH, false);
    let mut source = Source::open(&link).await.unwrap();
    let last = last_confirmed(&mut source, &link).await;
    pair.replica.pause();
    pair.buy("alice").await;
    let hidden = source.read(&link, last, 100).await;
    assert!(matches!(hidden, Err(NoPage::NotReplicated)), "read before the replica has it: {hidden:?}");
    // What was confirmed before stays readable, and so does "there is nothing".
    let first = OutboxId { epoch: last.epoch, seq: last.seq - 1 };
    assert_eq!(source.read(&link, first, 1).await.unwrap().entries.len(), 1);
    pair.replica.resume();
    // A busy disk may hold the replica up for longer than a barrier waits.
    eventually(async || match source.read(&link, last, 100).await {
        Ok(page) => page.entries.len() == 1,
        Err(NoPage::NotReplicated) => false,
        Err(error) => panic!("{error:?}"),
    })
    .await;
}

/// R1 on a replica: it is followed without any authority to write, while its link stands and its fence is the
/// topology's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_read_only_while_it_is_linked_at_the_topologys_fence() {
    let pair = Pair::open().await;
    let reader = link(&pair.replica, &pair.fence, Acknowledge::Local, false);
    let mut source = Source::open(&reader).await.unwrap();
    let alice = pair.buy("alice").await;
    eventually_read(&mut source, &reader, alice).await;
    // Another epoch began; this replica has not heard of it.
    let later = link(&pair.replica, &pair.fence.at(Epoch(2)), Acknowledge::Local, false);
    let stale = source.read(&later, NOWHERE, 100).await;
    assert!(matches!(stale, Err(NoPage::OtherFence { .. })), "read at another fence: {stale:?}");
    isolate(&mut pair.replica.connect().await).await.unwrap();
    let cut = source.read(&reader, NOWHERE, 100).await;
    assert!(matches!(cut, Err(NoPage::NotLinked { .. })), "{cut:?}");
}

/// R1: a master that was replaced and has entries of its own serves them to nobody, whatever role it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diverged_master_turned_replica_serves_no_entries() {
    let pair = Pair::open().await;
    isolate(&mut pair.replica.connect().await).await.unwrap();
    pair.buy("lost").await;
    let mut promoted = pair.replica.connect().await;
    redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut promoted).await.unwrap();
    let fence = pair.fence.at(Epoch(2));
    let change = FenceChange::Lift { from: pair.fence.clone() };
    set_fence(&mut promoted, &change, &fence).await.unwrap();
    let reader = link(&pair.master, &fence, Acknowledge::Local, false);
    let mut source = Source::open(&reader).await.unwrap();
    let as_master = source.read(&reader, NOWHERE, 100).await;
    assert!(
        matches!(as_master, Err(NoPage::OtherFence { .. })),
        "read from a master of before: {as_master:?}"
    );
    // It is told to follow, but has not been synced: the new master hangs.
    pair.replica.pause();
    let mut conn = pair.master.connect().await;
    redis::cmd("REPLICAOF")
        .arg("127.0.0.1")
        .arg(pair.replica.port())
        .query_async::<()>(&mut conn)
        .await
        .unwrap();
    let as_replica = source.read(&reader, NOWHERE, 100).await;
    assert!(
        matches!(as_replica, Err(NoPage::OtherFence { .. } | NoPage::NotLinked { .. })),
        "{as_replica:?}"
    );
    pair.replica.resume();
}

async fn eventually_read(source: &mut Source, link: &Link, order: OrderId) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let page = source.read(link, NOWHERE, 100).await.unwrap();
        if page.entries.iter().any(|entry| entry.id.seq == order.seq()) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "the replica does not get the entry");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// K4: a release is forgotten behind the barrier only; while degraded it is kept, and sent again in the next
/// epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_is_forgotten_only_once_the_replica_has_it() {
    let pair = Pair::open().await;
    let fixture = Fixture::new().await;
    let alice = pair.buy("alice").await;
    let reader = link(&pair.master, &pair.fence, Acknowledge::Local, false);
    let page = Source::open(&reader).await.unwrap().read(&reader, NOWHERE, 100).await.unwrap();
    for entry in page.entries {
        if let Ok(seckill_ledger::outbox::Event::Orders(orders)) = entry.event {
            fixture.store.store(StoreBatch::outbox(0, NOWHERE, entry.id, orders)).await.unwrap();
        }
    }
    fixture.store.cancel(&Uid::new("alice").unwrap(), alice).await.unwrap();
    let pending = async || fixture.store.pending_release_count().await.unwrap();
    assert_eq!(pending().await, 1);
    let worker = |link: Link| Releases::new(fixture.store.clone(), vec![link], &WorkerOptions::default());
    let remaining = async || {
        let mut conn = pair.master.connect().await;
        read::sale(&mut conn, &SaleId::new("s").unwrap()).await.unwrap().unwrap().remaining
    };
    let (mut lines, token) = (Lines::default(), CancellationToken::new());
    pair.replica.pause();
    let replicated = worker(link(&pair.master, &pair.fence, BOTH, false));
    let alone = replicated.round(&mut lines, &token).await;
    assert!(alone.is_err(), "forgotten without the replica");
    assert_eq!((pending().await, remaining().await), (1, 1000), "the ledger has it, the replica not");
    let degraded = worker(link(&pair.master, &pair.fence, Acknowledge::Local, true));
    degraded.round(&mut lines, &token).await.unwrap();
    degraded.round(&mut lines, &token).await.unwrap();
    assert_eq!(pending().await, 1, "kept while degraded");
    pair.replica.resume();
    let fence = pair.fence.at(Epoch(2));
    let change = FenceChange::Lift { from: pair.fence.clone() };
    set_fence(&mut pair.master.connect().await, &change, &fence).await.unwrap();
    let replicated = worker(link(&pair.master, &fence, BOTH, false));
    eventually(async || replicated.round(&mut lines, &token).await.is_ok()).await;
    assert_eq!((pending().await, remaining().await), (0, 1000));
}

/// K4: how far a destination has everything counts once the replica has it, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_counts_only_once_the_replica_has_it() {
    let pair = Pair::open().await;
    let link = link(&pair.master, &pair.fence, BOTH, false);
    let mut source = Source::open(&link).await.unwrap();
    let id = last_confirmed(&mut source, &link).await;
    let (home, cursor) = (CenterId::new("b").unwrap(), Cursor { id, shards: ShardSet::default() });
    pair.replica.pause();
    let noted = source.note_cursor(&link, &home, cursor).await;
    assert!(matches!(noted, Err(NoPage::Wait(_))), "counted without the replica: {noted:?}");
    pair.replica.resume();
    // Said again it is confirmed, whether or not the ledger has it already. A busy disk may hold the replica up for
    // longer than a barrier waits.
    eventually(async || match source.note_cursor(&link, &home, cursor).await {
        Ok(CursorOutcome::Noted) => true,
        Err(NoPage::Wait(_)) => false,
        other => panic!("{other:?}"),
    })
    .await;
    let there = seckill_ledger::cursor(&mut pair.replica.connect().await, &home).await.unwrap();
    assert_eq!(there, Some(cursor));
}

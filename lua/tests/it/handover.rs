//! Handing the ledger over from the master to its replica (H2), and going on in the place of whoever began with it.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterId, Epoch};
use seckill_ledger::admin::{FenceChange, FenceOutcome};
use seckill_ledger::handover::{Held, fence_and_pause, follow, hold, ping_period, resume};
use seckill_ledger::roles::{self, Role, promote, standing};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{Error, Fence, Refusal, reserve};

use crate::support::{Ledger, entry, eventually};

/// Longer than the test has patience: what waits for the end of the pause fails.
const PAUSE_MS: u64 = 120_000;
const PATIENCE: Duration = Duration::from_secs(20);

// H2, H4.
#[tokio::test]
async fn a_master_that_a_dead_coordinator_holds_up_is_held_up_again_at_once() {
    let ledger = Ledger::start().await;
    let mut dead = ledger.server.connect().await;
    let to = Fence { master: CenterId::new("b").unwrap(), ..ledger.fence.at(Epoch(2)) };
    let ping_s = ping_period(&mut dead).await;
    let fenced = fence_and_pause(&mut dead, &ledger.fence, &to, PAUSE_MS, ping_s).await.unwrap();
    drop(dead);
    let mut next = ledger.server.connect().await;
    let held = tokio::time::timeout(PATIENCE, hold(&mut next, &to, PAUSE_MS)).await;
    let held = held.expect("it waits for nothing").unwrap().expect("it has the fence");
    assert_eq!(held.offset, fenced.offset);
    // On the connection that watches its fence since then.
    assert!(follow(&mut next, "127.0.0.1", 1, (None, None), held.ping_s).await.unwrap());
    assert!(standing(&mut next).await.unwrap().role.is_isolated());
    assert_eq!(ping_period(&mut next).await, ping_s);
}

#[tokio::test]
async fn a_server_with_another_fence_or_another_role_is_left_alone() {
    let ledger = Ledger::start().await;
    let mut conn = ledger.server.connect().await;
    let usual = ping_period(&mut conn).await;
    assert_eq!(hold(&mut conn, &ledger.fence.at(Epoch(7)), PAUSE_MS).await.unwrap(), None);
    let replica = RedisServer::start_with(&[("repl-diskless-sync-delay", "0")]).await;
    let mut there = replica.connect().await;
    assert!(roles::follow(&mut there, None, "127.0.0.1", ledger.server.port()).await.unwrap());
    eventually("it follows", async || {
        let now = standing(&mut there).await;
        now.is_ok_and(|now| matches!(now.role, Role::Replica { .. }) && now.fence.is_some())
    })
    .await;
    assert_eq!(hold(&mut there, &ledger.fence, PAUSE_MS).await.unwrap(), None);
    assert_eq!((ping_period(&mut conn).await, ping_period(&mut there).await), (usual, usual));
    // Neither waits: what the one takes the other gets.
    let held = tokio::time::timeout(PATIENCE, hold(&mut conn, &ledger.fence, 1)).await.unwrap().unwrap();
    assert!(matches!(held, Some(Held { .. })), "{held:?}");
    resume(&mut conn).await.unwrap();
    assert_eq!(ping_period(&mut conn).await, usual);
}

struct Pair {
    ledger: Ledger,
    replica: RedisServer,
    /// What the replica's center takes.
    next: Fence,
}

impl Pair {
    async fn start() -> Pair {
        let ledger = Ledger::start().await;
        let replica = RedisServer::start_replica_of(&ledger.server).await;
        let next = Fence { master: CenterId::new("b").unwrap(), ..ledger.fence.at(Epoch(2)) };
        Pair { ledger, replica, next }
    }

    async fn conn(&self) -> MultiplexedConnection {
        self.ledger.server.connect().await
    }

    /// Where the master's stream of changes ends.
    async fn end(&self) -> u64 {
        match standing(&mut self.conn().await).await.unwrap().role {
            Role::Master { offset, .. } => offset,
            role @ Role::Replica { .. } => panic!("{role:?}"),
        }
    }
}

/// A write waits, whoever sends it, and so does what a `WAIT` would have put into the stream: that ends where it was
/// said, or the old master could not become a replica without a full copy.
#[tokio::test]
async fn a_master_that_is_handed_over_writes_nothing_more() {
    let mut pair = Pair::start().await;
    // `WAIT` asks nobody unless its own connection has written.
    pair.ledger.sale("s", 9, 9).await;
    let mut source = pair.conn().await;
    let fenced = fence_and_pause(&mut source, &pair.ledger.fence, &pair.next, PAUSE_MS, Some(10)).await;
    let fenced = fenced.unwrap();
    assert_eq!(fenced.outcome, FenceOutcome::Set);

    // One that knows no fence, as an operator's would be.
    let mut other = pair.conn().await;
    let write =
        tokio::spawn(async move { redis::cmd("SET").arg("x").arg(1).query_async::<()>(&mut other).await });
    eventually("the write is held up", async || {
        assert!(!write.is_finished(), "a write was answered while the target catches up");
        pair.ledger.server.info("blocked_clients").await >= 1.0
    })
    .await;
    pair.ledger.raw(&["WAIT", "2", "100"]).await;
    assert_eq!(fenced.offset, pair.end().await, "the stream of changes ends where it was said");

    let mut target = pair.replica.connect().await;
    eventually("the target has everything", async || {
        let now = standing(&mut target).await.unwrap();
        let has_all = matches!(now.role, Role::Replica { offset, .. } if offset >= fenced.offset);
        has_all && now.fence == Some(pair.next.to_string())
    })
    .await;
    resume(&mut source).await.unwrap();
    write.await.unwrap().unwrap();
}

/// Whoever has not heard of the shift is refused by the fence, however long after it: also when nobody attaches the old
/// master and its writes go on.
#[tokio::test]
async fn a_master_that_was_handed_over_takes_no_write_of_the_epoch_before() {
    let mut pair = Pair::start().await;
    let sale = pair.ledger.sale("s", 9, 9).await;
    let before = pair.ledger.fence.clone();
    let mut source = pair.conn().await;
    let fenced = fence_and_pause(&mut source, &before, &pair.next, PAUSE_MS, Some(10)).await.unwrap();
    assert_eq!(fenced.outcome, FenceOutcome::Set);
    resume(&mut pair.conn().await).await.unwrap();
    let late = reserve(&mut pair.conn().await, &before, 0, &sale, &[entry("bob", "k", 1)]).await;
    assert!(
        matches!(late, Err(Error::Refused(Refusal::StaleEpoch { ledger_epoch: 2 }))),
        "a purchase of the epoch before: {late:?}"
    );
}

/// The old master becomes the new one's replica by the part of the stream that it lacks, of which there is none.
#[tokio::test]
async fn a_master_that_was_handed_over_follows_without_a_full_copy() {
    let mut pair = Pair::start().await;
    pair.ledger.sale("s", 9, 9).await;
    let (before, mut source) = (pair.ledger.fence.clone(), pair.conn().await);
    let fenced = fence_and_pause(&mut source, &before, &pair.next, PAUSE_MS, Some(10)).await.unwrap();
    let mut target = pair.replica.connect().await;
    eventually("the target has everything", async || {
        let now = standing(&mut target).await.unwrap();
        matches!(now.role, Role::Replica { offset, .. } if offset >= fenced.offset)
    })
    .await;
    let shown = standing(&mut target).await.unwrap().fence;
    assert_eq!(shown, Some(pair.next.to_string()), "what ends where the fence ends shows the fence");
    let change = FenceChange::Lift { from: pair.next.clone() };
    let promoted = promote(&mut target, shown.as_deref(), &change, &pair.next).await.unwrap();
    assert_eq!(promoted, Some(FenceOutcome::Same));
    assert!(follow(&mut source, "127.0.0.1", pair.replica.port(), (None, None), Some(10)).await.unwrap());
    eventually("it is attached", async || {
        standing(&mut source).await.is_ok_and(|now| now.replication.linked)
    })
    .await;
    assert_eq!(pair.replica.info("sync_full").await, 0.0);
    assert_eq!(pair.replica.info("sync_partial_ok").await, 1.0);
}

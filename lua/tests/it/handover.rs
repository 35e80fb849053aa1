//! Handing the ledger over: a server is held up once more by whoever goes on in the place of the one that fenced it.

use std::time::Duration;

use seckill_domain::{CenterId, Epoch};
use seckill_ledger::Fence;
use seckill_ledger::handover::{Held, fence_and_pause, follow, hold, ping_period, resume};
use seckill_ledger::roles::{self, Role, standing};
use seckill_ledger::testkit::RedisServer;

use crate::support::Ledger;

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
    crate::support::eventually("it follows", async || {
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

//! Changes of role: only under the fence that whoever orders them expects (S2).

use std::time::{Duration, Instant};

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{Cmd, Pipeline, RedisFuture, Value};
use seckill_domain::{CenterId, Epoch};
use seckill_ledger::admin::{FenceChange, FenceOutcome, set_fence};
use seckill_ledger::roles::{Role, follow, isolate, open_as_source, promote, standing};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{Fence, outbox, read};

use crate::support::{Ledger, eventually, uid};

/// The longest that anything may take that has to happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection that is held up before it sends a `MULTI`, as a coordinator that is paused after it looked at the
/// fence: meanwhile somebody else lifts it.
struct HeldUp {
    own: MultiplexedConnection,
    /// To the same server, or to its master.
    other: MultiplexedConnection,
    lift: Option<(Fence, Fence)>,
    /// Another one to the same server.
    looking: MultiplexedConnection,
}

impl ConnectionLike for HeldUp {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        self.own.req_packed_command(cmd)
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        cmd: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        Box::pin(async move {
            if let Some((from, to)) = self.lift.take() {
                let outcome = set_fence(&mut self.other, &FenceChange::Lift { from }, &to).await;
                assert_eq!(outcome.unwrap(), FenceOutcome::Set);
                let (shown, deadline) = (to.to_string(), Instant::now() + PATIENCE);
                while standing(&mut self.looking).await.unwrap().fence.as_ref() != Some(&shown) {
                    assert!(Instant::now() < deadline, "the server does not show the fence");
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
            self.own.req_packed_commands(cmd, offset, count).await
        })
    }

    fn get_db(&self) -> i64 {
        self.own.get_db()
    }
}

/// A connection to `server`, which is the ledger's or a replica of it.
async fn held_up(ledger: &Ledger, server: &RedisServer) -> (HeldUp, Fence) {
    let later = Fence { master: CenterId::new("b").unwrap(), ..ledger.fence.at(Epoch(9)) };
    let lift = Some((ledger.fence.clone(), later.clone()));
    let (own, other) = (server.connect().await, ledger.server.connect().await);
    (HeldUp { own, other, lift, looking: server.connect().await }, later)
}

// S2.
#[tokio::test]
async fn a_coordinator_that_wakes_up_after_the_fence_changed_changes_no_role() {
    for what in ["follow", "open as source"] {
        let ledger = Ledger::start().await;
        let (mut conn, later) = held_up(&ledger, &ledger.server).await;
        let expected = ledger.fence.to_string();
        let changed = match what {
            "follow" => follow(&mut conn, Some(&expected), "127.0.0.1", 1).await.unwrap(),
            _ => open_as_source(&mut conn, &expected).await.unwrap(),
        };
        assert!(!changed, "{what}: the role changed under another fence");
        let now = standing(&mut ledger.server.connect().await).await.unwrap();
        assert_eq!(now.fence, Some(later.to_string()));
        assert!(matches!(now.role, Role::Master { .. }), "{what}: {:?}", now.role);
        // The connection can be used again: nothing is watched any more.
        assert!(follow(&mut conn, now.fence.as_deref(), "127.0.0.1", 1).await.unwrap());
    }
}

// S2: what the old master did since the look is on its way to the replica that is to be promoted.
#[tokio::test]
async fn a_fence_that_arrives_during_a_promotion_stops_it() {
    let ledger = Ledger::start().await;
    let replica = RedisServer::start_replica_of(&ledger.server).await;
    let expected = ledger.fence.to_string();
    let mut own = replica.connect().await;
    eventually("the replica shows the fence", async || {
        standing(&mut own).await.unwrap().fence.as_ref() == Some(&expected)
    })
    .await;
    let (mut conn, later) = held_up(&ledger, &replica).await;
    let lift = FenceChange::Lift { from: ledger.fence.clone() };
    let outcome = promote(&mut conn, Some(&expected), &lift, &ledger.fence.at(Epoch(5))).await;
    let now = standing(&mut own).await.unwrap();
    assert!(matches!(now.role, Role::Replica { .. }), "it became a master: {:?}, {outcome:?}", now.role);
    assert_eq!(outcome.unwrap(), None);
    assert_eq!(now.fence, Some(later.to_string()));
}

// S2.
#[tokio::test]
async fn a_role_changes_only_under_the_expected_fence() {
    let ledger = Ledger::start().await;
    let mut conn = ledger.server.connect().await;
    let other = ledger.fence.at(Epoch(7)).to_string();
    assert!(!follow(&mut conn, Some(&other), "127.0.0.1", 1).await.unwrap());
    assert!(!follow(&mut conn, None, "127.0.0.1", 1).await.unwrap());
    assert!(!open_as_source(&mut conn, &other).await.unwrap());
    assert!(matches!(standing(&mut conn).await.unwrap().role, Role::Master { .. }));
    let empty = RedisServer::start().await;
    let mut conn = empty.connect().await;
    assert!(!follow(&mut conn, Some(&other), "127.0.0.1", 1).await.unwrap());
    assert!(follow(&mut conn, None, "127.0.0.1", 1).await.unwrap());
    assert!(standing(&mut conn).await.unwrap().role.is_isolated());
}

#[tokio::test]
async fn what_a_master_lost_can_be_copied_from_its_replica_and_ids_go_on() {
    let mut ledger = Ledger::start().await;
    ledger.server.config_set("repl-diskless-sync-delay", "0").await;
    let sale = ledger.sale("s", 5, 5).await;
    let order = ledger.order(&sale, "bob", "k").await;
    let replica = RedisServer::start_with(&[("repl-diskless-sync-delay", "0")]).await;
    let mut there = replica.connect().await;
    assert!(follow(&mut there, None, "127.0.0.1", ledger.server.port()).await.unwrap());
    let all = async |conn: &mut MultiplexedConnection, seq: u64| {
        let now = standing(conn).await;
        now.is_ok_and(|now| now.replication.linked && now.seq == seq && now.log_ready)
    };
    eventually("the replica has everything", async || all(&mut there, order.seq()).await).await;
    let here = standing(&mut ledger.conn).await.unwrap();
    assert_eq!(here.replication.stream, standing(&mut there).await.unwrap().replication.stream);
    assert_eq!(here.replication.replicas.len(), 1);
    assert!(here.replication.replicas[0].online);

    // It comes back without its disk, and out of harm's way (S1): nobody becomes empty by that.
    let lost = RedisServer::start_with(&[("replicaof", "127.0.0.1 1")]).await;
    ledger.server.kill();
    let fence = ledger.fence.to_string();
    assert!(open_as_source(&mut there, &fence).await.unwrap());
    let mut conn = lost.connect().await;
    assert!(follow(&mut conn, None, "127.0.0.1", replica.port()).await.unwrap());
    eventually("everything is back", async || all(&mut conn, order.seq()).await).await;
    isolate(&mut conn).await.unwrap();
    let next = ledger.fence.at(Epoch(2));
    let lift = FenceChange::Lift { from: ledger.fence.clone() };
    assert_eq!(promote(&mut conn, Some(&fence), &lift, &next).await.unwrap(), Some(FenceOutcome::Set));
    let found = outbox::find_order(&mut conn, 2, order).await.unwrap().unwrap();
    assert_eq!(found.uid, uid("bob"));
    let claims = read::raw_claims(&mut conn, &sale, &[uid("bob"), uid("eve")]).await.unwrap();
    assert_eq!(claims.iter().map(|c| c.as_ref().map(Vec::len)).collect::<Vec<_>>(), [Some(29), None]);
    // The source is attached again: it has nothing that the master lacks.
    assert!(follow(&mut there, Some(&fence), "127.0.0.1", lost.port()).await.unwrap());
    eventually("the source follows", async || {
        standing(&mut there).await.is_ok_and(|now| now.fence == Some(next.to_string()))
    })
    .await;
}

// A master at its memory bound queues nothing in MULTI.
#[tokio::test]
async fn a_server_at_its_memory_bound_becomes_a_replica_all_the_same() {
    let ledger = Ledger::start().await;
    ledger.server.config_set("maxmemory", "1").await;
    let mut conn = ledger.server.connect().await;
    let expected = ledger.fence.to_string();
    assert!(follow(&mut conn, Some(&expected), "127.0.0.1", 9).await.unwrap());
    let now = standing(&mut conn).await.unwrap();
    assert!(matches!(&now.role, Role::Replica { of, .. } if of == "127.0.0.1:9"), "{:?}", now.role);
}

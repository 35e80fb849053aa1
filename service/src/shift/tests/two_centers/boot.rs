//! What a Redis holds when the service starts, beside what the topology says: it gets its role, or is left alone with
//! a message that says what to do.

use super::*;

impl Pair {
    /// A connection to a center's server.
    async fn conn(&self, id: &str) -> MultiplexedConnection {
        self.centers[id].server.connect().await
    }

    async fn replicaof(&self, id: &str, host: &str, port: &str) {
        let mut conn = self.conn(id).await;
        redis::cmd("REPLICAOF").arg(host).arg(port).query_async::<()>(&mut conn).await.unwrap();
    }

    /// Waits until b's guardian leaves its server alone; why.
    async fn until_refused(&self) -> String {
        let mut state = self.service("b").guardian.server();
        let refused = state.wait_for(|state| matches!(state, ServerState::Refused(_)));
        let refused = tokio::time::timeout(PATIENCE, refused).await.expect("b is refused").unwrap().clone();
        let ServerState::Refused(reason) = refused else { unreachable!() };
        reason.to_string()
    }

    /// a sells, and b's server stands as it stood before its service started.
    async fn assert_b_is_left_alone(&mut self, says: &[&str]) {
        let before = self.standing("b").await;
        self.start("b").await;
        let reason = self.until_refused().await;
        for text in says {
            assert!(reason.contains(text), "{text:?} in {reason:?}");
        }
        self.until_sells("a sells alone", |grant| grant.acknowledge == Acknowledge::Local).await;
        let after = self.standing("b").await;
        assert_eq!((after.fence, after.seq, after.run_id), (before.fence, before.seq, before.run_id));
        assert_eq!(std::mem::discriminant(&after.role), std::mem::discriminant(&before.role));
        assert!(self.topology().in_sync.is_empty());
    }
}

/// Two centers of which only a's service runs.
async fn alone() -> Pair {
    let mut pair = Pair::stopped(Durability::Replicated).await;
    pair.start("a").await;
    pair.until_sells("a sells alone", |grant| grant.acknowledge == Acknowledge::Local).await;
    pair
}

async fn set(conn: &mut MultiplexedConnection, key: &str, value: &str) {
    redis::cmd("SET").arg(key).arg(value).query_async::<()>(conn).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_to_be_with_a_ledger_of_a_newer_schema_is_left_alone() {
    let mut pair = alone().await;
    pair.replicaof("b", "NO", "ONE").await;
    let fence = pair.topology().fence().to_string();
    let newer = format!("9{}", fence.strip_prefix('1').unwrap());
    set(&mut pair.conn("b").await, "sk:fence", &newer).await;
    pair.assert_b_is_left_alone(&["Run the release that wrote it"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_to_be_with_other_data_is_left_alone() {
    let mut pair = alone().await;
    pair.replicaof("b", "NO", "ONE").await;
    set(&mut pair.conn("b").await, "somebody:else", "1").await;
    pair.assert_b_is_left_alone(&["1 keys that are not a ledger's", "a Redis of its own"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_a_stranger_with_another_ledger_stays_with_the_stranger() {
    let mut pair = alone().await;
    let stranger = RedisServer::start().await;
    stranger.init_ledger().await;
    pair.replicaof("b", "127.0.0.1", &stranger.port().to_string()).await;
    eventually("b has the stranger's ledger", async || pair.standing("b").await.fence.map(drop)).await;
    pair.assert_b_is_left_alone(&["another ledger", "Correct the address"]).await;
    let Role::Replica { of, .. } = pair.standing("b").await.role else { panic!("it is no replica") };
    assert_eq!(of, format!("127.0.0.1:{}", stranger.port()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_an_empty_stranger_follows_the_master() {
    let mut pair = alone().await;
    let stranger = RedisServer::start().await;
    pair.replicaof("b", "127.0.0.1", &stranger.port().to_string()).await;
    pair.start("b").await;
    pair.until_attached().await;
    let Role::Replica { of, .. } = pair.standing("b").await.role else { panic!("it is no replica") };
    assert_eq!(of, format!("127.0.0.1:{}", pair.centers["a"].server.port()));
}

// S1, S2: two masters of one ledger, whichever way they came about.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_in_the_wrong_center_becomes_a_replica_and_what_only_it_has_is_saved() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    pair.until_replicated().await;
    let before = pair.topology();
    pair.stop("b").await;
    pair.replicaof("b", "NO", "ONE").await;
    // Somebody sold there, under the fence that both have.
    let lost = pair.buy_at("b", &before.fence(), &sale, "u1").await;
    pair.start("b").await;
    // Attached again soon enough, it was never taken off; otherwise it comes back at a later epoch.
    pair.until_attached().await;
    pair.until_in_sync(Epoch(before.epoch.0 - 1)).await;
    assert!(matches!(pair.standing("b").await.role, Role::Replica { .. }));
    assert!(!pair.holds("b", lost).await && !pair.holds("a", lost).await);
    let tails = pair.tails("b");
    assert_eq!(tails.len(), 1, "what only it had is saved in {tails:?}");
    assert!(tails[0].contains(&lost.to_string()), "{tails:?}");
}

// H1: the fence of an attempt that came to nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_that_names_the_other_center_is_lifted_where_the_topology_has_the_master() {
    let mut pair = Pair::in_sync().await;
    let before = pair.topology();
    pair.stop("a").await;
    let other = Fence { master: CenterId::new("b").unwrap(), ..before.fence().at(before.epoch.next()) };
    let lift = FenceChange::Lift { from: before.fence() };
    let outcome = set_fence(&mut pair.conn("a").await, &lift, &other).await.unwrap();
    assert_eq!(outcome, FenceOutcome::Set);
    // Until then nobody sells: not under the old fence, and b has no authority for the new one.
    let refusal = pair.service("b").authority.grant().unwrap_err();
    assert_eq!(refusal.cause, Cause::NotMaster);
    pair.start("a").await;
    let after = pair.until_in_sync(other.epoch).await;
    assert_eq!((after.master.as_str(), after.epoch > other.epoch), ("a", true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_masters_redis_that_follows_a_stranger_is_left_to_the_stranger() {
    let mut world = World::selling().await;
    world.stop().await;
    let stranger = RedisServer::start().await;
    stranger.init_ledger().await;
    let mut conn = world.conn().await;
    let port = stranger.port();
    redis::cmd("REPLICAOF").arg("127.0.0.1").arg(port).query_async::<()>(&mut conn).await.unwrap();
    eventually("it has the stranger's ledger", async || {
        let standing = roles::standing(&mut world.conn().await).await.ok()?;
        standing.fence.filter(|fence| fence.contains("test-ledger")).map(drop)
    })
    .await;
    world.start().await;
    let refusal = world.refused(Cause::Foreign).await;
    assert!(
        refusal.reason.contains("Correct the address") && refusal.reason.contains("seckill ledger adopt"),
        "{refusal}"
    );
    let Role::Replica { of, .. } = world.role().await else { panic!("it was opened") };
    assert_eq!(of, format!("127.0.0.1:{port}"));
}

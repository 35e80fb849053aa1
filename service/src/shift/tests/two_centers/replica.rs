//! The other center's Redis: attached, in sync, taken off, back, refused.

use super::*;

// D2: without the replica having shown the new fence it does not count; S4, K1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_pair_sells_at_once_and_is_in_sync_from_a_later_epoch_on() {
    let mut pair = Pair::stopped(Durability::Replicated).await;
    pair.start("a").await;
    let alone = pair.until_sells("a sells alone", |grant| grant.acknowledge == Acknowledge::Local).await;
    assert_eq!(pair.topology().state, TopologyState::Degraded);
    // S1: b's server stays out of harm's way until its own guardian gives it its role.
    assert!(pair.standing("b").await.role.is_isolated());
    pair.start("b").await;
    let both = pair.until_in_sync(alone.epoch).await;
    assert!(both.epoch > alone.epoch);
    pair.until_attached().await;
    let refusal = pair.service("b").authority.grant().unwrap_err();
    assert_eq!(refusal.cause, Cause::NotMaster);
}

// S4: `in_sync` is empty with durability `local`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_durability_local_the_replica_is_attached_and_never_waited_for() {
    let mut pair = Pair::stopped(Durability::Local).await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_attached().await;
    pair.create_sale(5).await;
    pair.until_replicated().await;
    let topology = pair.topology();
    assert_eq!((topology.in_sync.len(), topology.state), (0, TopologyState::Steady));
    assert_eq!(pair.service("a").authority.grant().unwrap().acknowledge, Acknowledge::Local);
}

// D1, D2: off after `degrade_after`, back at a later epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_stands_still_is_taken_off_and_comes_back_at_a_later_epoch() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let before = pair.topology().epoch;
    pair.signal("b", Signal::STOP);
    let stopped = Instant::now();
    let alone = pair.until_sells("degraded", |grant| grant.acknowledge == Acknowledge::Local).await;
    assert!(stopped.elapsed() >= DEGRADE_AFTER, "taken off after {:?}", stopped.elapsed());
    let topology = pair.topology();
    assert_eq!((topology.state, topology.in_sync.len()), (TopologyState::Degraded, 0));
    // Taking it off needs no epoch: what was in flight goes on.
    assert_eq!(alone.epoch, before);
    let order_id = pair.buy_at("a", &alone, &sale, "u1").await;
    pair.signal("b", Signal::CONT);
    let back = pair.until_in_sync(before).await;
    assert!(back.epoch > before);
    assert!(pair.holds("b", order_id).await);
    assert_eq!(pair.service("a").guardian.metrics().degradations.get(), 1);
}

// D2: attached, online and well is not enough: what counts is the fence that the replica shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_in_sync_only_once_it_shows_the_fence_of_its_epoch() {
    let mut pair = Pair::stopped_with(Durability::Replicated, LEASE, Duration::from_millis(2)).await;
    pair.start("a").await;
    pair.start("b").await;
    let before = pair.until_in_sync(Epoch(0)).await;
    // No change arrives there any more; that it is there does.
    pair.links["a"].set(LinkState::StalledToClient);
    pair.change(|topology| {
        topology.in_sync.clear();
        topology.state = TopologyState::Degraded;
    });
    let next = eventually("the next epoch", async || {
        Some(pair.topology()).filter(|topology| topology.epoch > before.epoch)
    })
    .await;
    assert_eq!(pair.standing("b").await.fence, Some(before.to_string()));
    assert!(next.in_sync.is_empty(), "in sync without having shown its epoch");
    pair.links["a"].heal();
    pair.until_in_sync(next.epoch).await;
}

// D1: only while no shift is recorded. S3: the guardian does nothing meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_shift_is_recorded_nobody_is_taken_off_and_no_role_changes() {
    let mut pair = Pair::in_sync().await;
    // Its coordinator lives, as far as anybody can tell.
    pair.change(|topology| {
        let shift = crate::topology::Shift::of_a_test();
        topology.shift = Some(Box::new(crate::topology::Shift { freeze_ms: 60_000, ..shift }));
    });
    eventually("a sees the shift", async || pair.service("a").authority.grant().is_err().then_some(())).await;
    let topology = pair.topology();
    pair.server("b").restart().await;
    tokio::time::sleep(DEGRADE_AFTER + Duration::from_secs(1)).await;
    assert_eq!(pair.topology(), topology);
    assert!(pair.standing("b").await.role.is_isolated());
    assert!(matches!(pair.standing("a").await.role, Role::Master { .. }));
    pair.change(|topology| topology.shift = None);
    pair.until_in_sync(topology.epoch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_comes_back_empty_is_filled_again() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let order_id = pair.buy_at("a", &fence, &sale, "u1").await;
    pair.until_replicated().await;
    let before = pair.topology();
    pair.server("b").kill();
    pair.empty("b");
    pair.server("b").restart().await;
    pair.until_in_sync(before.epoch).await;
    assert_ne!(pair.topology().in_sync[0].run_id, before.in_sync[0].run_id);
    assert!(pair.holds("b", order_id).await && pair.holds("a", order_id).await);
    assert!(pair.tails("b").is_empty());
}

// S3 and F2: somebody else's data are left alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_with_another_ledger_is_left_alone_and_the_message_says_what_to_do() {
    let mut pair = Pair::stopped(Durability::Replicated).await;
    let mut conn = pair.centers["b"].server.connect().await;
    redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut conn).await.unwrap();
    let other = pair.centers["b"].server.init_ledger().await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_sells("a sells alone", |grant| grant.acknowledge == Acknowledge::Local).await;
    let mut state = pair.service("b").guardian.server();
    let refused = state.wait_for(|state| matches!(state, ServerState::Refused(_)));
    let refused = tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap().clone();
    let ServerState::Refused(reason) = refused else { unreachable!() };
    assert!(reason.contains("another ledger") && reason.contains("data folder"), "{reason}");
    assert_eq!(pair.standing("b").await.fence, Some(other.to_string()));
    assert!(matches!(pair.standing("b").await.role, Role::Master { .. }));
}

// H1: a delayed fence must not keep a replica away for ever, and its number is never an epoch of the topology's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_fence_is_ahead_lifts_the_topology() {
    let mut pair = Pair::in_sync().await;
    let before = pair.until_sells("a sells", |_| true).await;
    pair.stop("b").await;
    // Nobody but b changes the topology.
    pair.stop("a").await;
    let ahead = before.at(Epoch(before.epoch.0 + 5));
    let mut conn = pair.centers["b"].server.connect().await;
    let lift = FenceChange::Lift { from: before.clone() };
    let outcome = roles::promote(&mut conn, Some(&before.to_string()), &lift, &ahead).await.unwrap();
    assert_eq!(outcome, Some(FenceOutcome::Set));
    pair.start("b").await;
    let lifted = eventually("the topology is lifted", async || {
        let epoch = pair.topology().epoch;
        (epoch != before.epoch).then_some(epoch)
    })
    .await;
    assert_eq!(lifted, ahead.epoch.next(), "the fence at epoch {} was somebody's", ahead.epoch);
    pair.start("a").await;
    let after = pair.until_in_sync(ahead.epoch).await;
    assert!(after.epoch > lifted);
}

// K1: `WAIT 1` is satisfied by any replica, also by one that nobody would promote.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_no_center_knows_is_an_alarm_and_counts_among_those_waited_for() {
    let pair = Pair::in_sync().await;
    let stranger = RedisServer::start().await;
    let mut conn = stranger.connect().await;
    let port = pair.centers["a"].server.port();
    redis::cmd("REPLICAOF").arg("127.0.0.1").arg(port).query_async::<()>(&mut conn).await.unwrap();
    pair.until_sells("two confirm", |grant| grant.acknowledge == Acknowledge::Replicated { replicas: 2 })
        .await;
    let metrics = pair.service("a").guardian.metrics();
    eventually("the alarm", async || (metrics.unknown_replicas.get() == 1).then_some(())).await;
}

// K4: what an adoption puts right counts once the replica has it. Until then no replica may be promoted without loss,
// and the record of a release stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adoption_takes_the_replica_off_and_keeps_the_records_of_its_releases() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(5).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let order_id = pair.buy_at("a", &fence, &sale, "u1").await;
    let (client, authority) = (pair.centers["a"].server.client(), pair.service("a").authority.clone());
    let orders = pair.service("a").orders.clone();
    let work = || {
        let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
        Workers::spawn(
            &orders,
            std::slice::from_ref(&client),
            &authority,
            &crate::orders::Queue::Outbox,
            &WorkerOptions::default(),
            &tracker,
            (&token, &token),
        );
        (tracker, token)
    };
    let (tracker, token) = work();
    eventually("the order is stored", async || orders.order(order_id).await.unwrap()).await;
    token.cancel();
    tracker.close();
    tracker.wait().await;
    orders.cancel(&Uid::new("u1").unwrap(), order_id).await.unwrap();
    assert_eq!(orders.pending_release_count().await.unwrap(), 1);

    pair.signal("b", Signal::STOP);
    let report = pair.service("a").guardian.adopt().await.unwrap();
    assert_eq!(report.released, 1);
    let topology = pair.topology();
    assert_eq!((topology.in_sync.len(), topology.state), (0, TopologyState::Degraded));
    assert_eq!(orders.pending_release_count().await.unwrap(), 1, "the replica does not have it");

    pair.signal("b", Signal::CONT);
    pair.until_in_sync(Epoch(report.epoch)).await;
    let (_tracker, token) = work();
    eventually("the record is done", async || {
        (orders.pending_release_count().await.unwrap() == 0).then_some(())
    })
    .await;
    token.cancel();
    let mut conn = pair.centers["b"].server.connect().await;
    assert_eq!(read::sale(&mut conn, &sale).await.unwrap().unwrap().remaining, 5);
}

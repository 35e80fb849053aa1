//! A ledger that is not what it was, and what becomes of it once somebody adopts it.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_ledger_stops_sales_and_once_adopted_repeats_no_order_id() {
    let world = World::selling().await;
    let sale = world.create_sale("s", 10).await;
    let unpaid = world.buy(&sale, "u1").await;
    let paid = world.buy(&sale, "u2").await;
    world.pay(paid).await;
    let before = world.granted().await;
    redis::cmd("FLUSHALL").query_async::<()>(&mut world.conn().await).await.unwrap();
    let emptied = Instant::now();
    let refusal = world.refused(Cause::Empty).await;
    assert!(emptied.elapsed() < Duration::from_secs(5), "sales went on for {:?}", emptied.elapsed());
    assert!(refusal.reason.contains("seckill ledger adopt"), "{refusal}");
    eventually("the server is isolated", async || world.role().await.is_isolated().then_some(())).await;

    let report = world.service().guardian.adopt().await.unwrap();
    assert!(Epoch(report.epoch) > before.epoch);
    assert_eq!((report.reclaimed, report.cancelled, report.paid_without_claim), (0, 1, 1));
    assert_eq!(report.paid_orders_without_claim[0].order_id, paid);
    assert_eq!(report.units_without_claim[&sale], 1);
    assert_eq!(world.status(unpaid).await, OrderStatus::Cancelled);
    assert_eq!(world.status(paid).await, OrderStatus::Paid);
    let sale = world.create_sale("s2", 10).await;
    for n in 0..3 {
        let order_id = world.buy(&sale, &format!("v{n}")).await;
        assert!(order_id != unpaid && order_id != paid);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_of_yesterday_stops_sales_and_once_adopted_oversells_nothing() {
    let mut world = World::selling().await;
    let sale = world.create_sale("s", 4).await;
    let kept = world.buy(&sale, "u1").await;
    let cancelled = world.buy(&sale, "u2").await;
    let yesterday = world.back_up().await;
    let later = [world.buy(&sale, "u3").await, world.buy(&sale, "u4").await];
    world.pay(later[0]).await;
    world.service().orders.cancel(&Uid::new("u2").unwrap(), cancelled).await.unwrap();
    eventually("the units are back", async || (world.sale(&sale).await.remaining == 1).then_some(())).await;
    let before = world.granted().await;

    world.server.kill();
    world.restore_ledger(yesterday.path());
    world.server.restart().await;
    let refusal = world.refused(Cause::RolledBack).await;
    assert!(refusal.reason.contains("seckill ledger adopt"), "{refusal}");
    assert!(world.role().await.is_isolated());

    // A tail that was saved of the ledger knows a key.
    world.save_tail_of(later[1], "u4", [7; 16]);
    let report = world.service().guardian.adopt().await.unwrap();
    assert_eq!((report.released, report.held, report.reclaimed, report.cancelled), (1, 1, 2, 0));
    let (_, claims) = read::scan_claims(&mut world.conn().await, &sale, 0, 1000).await.unwrap();
    let keys: HashMap<OrderId, KeyDigest> =
        claims.into_iter().map(|claim| (claim.order_id, claim.key)).collect();
    assert_eq!([keys[&later[0]], keys[&later[1]]], [[0; 16], [7; 16]]);
    let fence = world.granted().await;
    assert!(fence.epoch > before.epoch);
    let books = world.sale(&sale).await;
    assert_eq!((books.total, books.remaining, books.claimed), (4, 1, 3));
    let last = world.buy(&sale, "u5").await;
    assert!(![kept, cancelled, later[0], later[1]].contains(&last));
    assert_eq!(world.try_buy(&sale, "u6").await, ReserveOutcome::SoldOut);
}

// F2: in the same epoch only the stored orders tell that the end of the log is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_ends_before_what_is_stored_stops_sales() {
    let mut world = World::selling().await;
    let sale = world.create_sale("s", 4).await;
    world.buy(&sale, "u1").await;
    let earlier = tempfile::tempdir().unwrap();
    copy(&world.server.folder().join("appendonlydir"), earlier.path());
    world.buy(&sale, "u2").await;
    let before = world.granted().await;
    world.server.kill();
    world.restore_ledger(earlier.path());
    world.server.restart().await;
    let mut status = world.service().authority.subscribe();
    let judged = status.wait_for(|status| match status {
        Ok(grant) => grant.fence.epoch > before.epoch,
        Err(refusal) => refusal.cause == Cause::RolledBack,
    });
    let judged = tokio::time::timeout(PATIENCE, judged).await.expect("it is judged").unwrap().clone();
    let Err(refusal) = judged else { panic!("an order that is stored is not in the ledger that sells") };
    assert!(refusal.reason.contains("are stored"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_ledger_is_found_by_its_epoch_even_if_no_order_tells() {
    let mut world = World::selling().await;
    let yesterday = world.back_up().await;
    world.stop().await;
    for file in ["orders.db", "orders.db-wal", "orders.db-shm"] {
        let _ = std::fs::remove_file(world.dir.path().join(file));
    }
    world.server.kill();
    world.restore_ledger(yesterday.path());
    world.server.restart().await;
    world.start().await;
    world.refused(Cause::RolledBack).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_of_somebody_else_is_left_alone_until_it_is_adopted() {
    let world = World::selling().await;
    let before = world.granted().await;
    let other = Fence { ledger_id: LedgerId::new("other").unwrap(), ..before.at(Epoch(before.epoch.0 + 9)) };
    set_fence(&mut world.conn().await, &FenceChange::Adopt, &other).await.unwrap();
    let refusal = world.refused(Cause::Foreign).await;
    assert!(refusal.reason.contains("seckill ledger adopt"), "{refusal}");
    assert!(matches!(world.role().await, Role::Master { .. }));
    let report = world.service().guardian.adopt().await.unwrap();
    assert_eq!(report.found, Some(other.to_string()));
    let fence = world.granted().await;
    assert!(fence.epoch > other.epoch);
    assert_eq!(fence.ledger_id, before.ledger_id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_of_another_schema_is_not_even_adopted() {
    let world = World::selling().await;
    let fence = world.granted().await.to_string();
    let later = format!("9{}", fence.strip_prefix('1').unwrap());
    world.eval_fence(&later).await;
    world.refused(Cause::Schema).await;
    let adopted = world.service().guardian.adopt().await;
    assert!(
        matches!(adopted, Err(RequestError::Failed(Recovery::Ledger(LedgerError::Schema(_))))),
        "{adopted:?}"
    );
    let standing = roles::standing(&mut world.conn().await).await.unwrap();
    assert_eq!(standing.fence, Some(later));
    world.refused(Cause::Schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adoption_that_was_interrupted_is_finished_by_the_next_start() {
    let mut world = World::selling().await;
    let sale = world.create_sale("s", 2).await;
    world.buy(&sale, "u1").await;
    let before = world.granted().await;
    world.stop().await;
    let found = world.store().load().unwrap();
    let mut topology = Topology::clone(&found.topology);
    topology.epoch = topology.epoch.next();
    topology.adopting.insert(0);
    world.store().compare_and_set(Some(found.revision), &topology).unwrap();
    world.start().await;
    world.granted_after(before.epoch.next()).await;
    assert!(world.store().load().unwrap().topology.adopting.is_empty());
    assert_eq!(world.sale(&sale).await.remaining, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adoption_of_a_sound_ledger_changes_the_epoch_and_nothing_else() {
    let world = World::selling().await;
    let sale = world.create_sale("s", 2).await;
    let order_id = world.buy(&sale, "u1").await;
    let before = world.granted().await;
    let report = world.service().guardian.adopt().await.unwrap();
    assert_eq!((report.held, report.reclaimed, report.cancelled), (1, 0, 0));
    assert!(world.granted().await.epoch > before.epoch);
    assert_eq!(world.status(order_id).await, OrderStatus::Created);
    assert_eq!(world.sale(&sale).await.remaining, 1);
}

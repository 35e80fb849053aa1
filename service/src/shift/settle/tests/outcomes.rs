//! What becomes of the orders of a lost master.

use super::*;

// H6, K4.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_of_a_lost_master_are_claimed_again_and_that_counts_in_a_later_epoch() {
    let mut world = World::parted(100, &[]).await;
    let paid = world.lose_paid(&world.user("paid", "a")).await;
    let open_a = world.lose_stored(&world.user("open", "a")).await;
    let open_b = world.lose_stored(&world.user("open", "b")).await;
    // What home databases do not have was acknowledged all the same.
    let queued = [world.lose(&world.user("queued", "a")).await, world.lose(&world.user("queued", "b")).await];
    // Bought again under the same key when a was gone: one order for each key.
    let retried = world.lose_stored(&world.user("again", "b")).await;
    let uid = retried.uid.to_string();
    let again = bought(world.b.redis.buy(&world.fence, &world.sale, &uid, key("k")).await);
    let closed = world.lose_closed(&world.user("closed", "a")).await;

    let file = world.save_tail(false).await;
    let metrics = world.settle();
    eventually("a round is over", async || (metrics.open.get() == 1).then_some(())).await;
    // K4: b is alone, and what it says may be lost with it.
    let expected: Vec<(&OrderRecord, OrderId)> = [&paid, &open_a, &open_b, &queued[0], &queued[1]]
        .into_iter()
        .map(|record| (record, record.order_id))
        .chain([(&retried, again)])
        .collect();
    world.assert_held(&expected).await;
    assert_eq!((metrics.settled.get(), world.told().settled), (0, None));

    world.settle_epoch().await;
    let settled = world.until_settled(&file).await;
    assert_eq!((settled.orders, settled.claimed_again, settled.cancelled), (7, 5, 1));
    assert_eq!(settled.paid_without_claim, 0);
    world.assert_held(&expected).await;
    assert_eq!(world.status(&paid).await, open(OrderStatus::Paid));
    for record in [&open_a, &open_b, &queued[0], &queued[1]] {
        assert_eq!(world.status(record).await, open(OrderStatus::Created));
        // Whoever still asks under the key hears of this order.
        let uid = record.uid.as_str();
        let outcome = world.b.redis.buy(&world.fence, &world.sale, uid, key("k")).await;
        assert_eq!(outcome, ReserveOutcome::Replay(record.order_id));
    }
    assert_eq!(world.status(&retried).await, cancelled());
    assert_eq!(world.status(&closed).await, open(OrderStatus::Cancelled));
}

// H6: paid orders first; whatever dies in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_room_unpaid_orders_are_cancelled_and_a_paid_one_waits_for_stock_whatever_dies() {
    let mut world = World::parted(5, &[("early", "k")]).await;
    // Given back to the lost master, and the record of it is gone.
    let early = OrderId::clone(&world.held().await["early"][0]);
    world.settle_epoch().await;
    let record = outbox::find_order(&mut world.a.redis.connect().await, 1, early).await.unwrap().unwrap();
    let home = &world.home(&record).orders;
    home.store(StoreBatch { orders: vec![record.clone()], ..StoreBatch::default() }).await.unwrap();
    home.cancel(&record.uid, early).await.unwrap();
    home.releases_done(vec![early], Vec::new()).await.unwrap();
    let entry = seckill_ledger::ReleaseEntry { order_id: early, uid: record.uid.clone() };
    let mut lost = world.a.redis.connect().await;
    seckill_ledger::release(&mut lost, &world.before, &world.sale, &[entry]).await.unwrap();

    let unpaid = world.lose_stored(&world.user("unpaid", "a")).await;
    let queued = world.lose(&world.user("queued", "b")).await;
    let paid =
        [world.lose_paid(&world.user("paid", "a")).await, world.lose_paid(&world.user("paid", "b")).await];
    // Sold to others: one unit is left.
    for uid in ["x1", "x2", "x3"] {
        bought(world.b.redis.buy(&world.fence, &world.sale, uid, key("k")).await);
    }
    let file = world.save_tail(false).await;
    // One after the other: each round goes on where the one before died.
    *world.dies_at.lock().unwrap() =
        vec!["settle_looked", "settle_claimed", "settle_put_back", "settle_released", "settle_told"];
    let metrics = world.settle();
    let left = eventually("one paid order is left", async || {
        let told = world.told();
        (metrics.paid_without_claim.get() == 1 && told.paid_without_claim == 1).then_some(told)
    })
    .await;
    assert_eq!((left.settled, world.dies_at.lock().unwrap().len()), (None, 0));
    let claimed = world.held().await;
    assert_eq!(paid.iter().filter(|record| claimed.contains_key(record.uid.as_str())).count(), 1);
    for record in &paid {
        assert_eq!(world.status(record).await, open(OrderStatus::Paid));
    }
    for record in [&unpaid, &queued] {
        assert_eq!(world.status(record).await, cancelled());
    }
    assert_eq!(world.books().await.remaining, 0);
    let waiting = world.home(&record).orders.pending_releases(10, &[]).await.unwrap();
    assert_eq!(waiting.iter().map(|release| release.order_id).collect::<Vec<_>>(), [early]);

    let mut conn = world.b.redis.connect().await;
    add_stock(&mut conn, &world.fence, &world.sale, 2, &key("more")).await.unwrap();
    let settled = world.until_settled(&file).await;
    assert_eq!((settled.orders, settled.claimed_again, settled.cancelled), (4, 2, 2));
    let claimed = world.held().await;
    for record in &paid {
        assert_eq!(claimed[record.uid.as_str()], [record.order_id]);
    }
    assert_eq!(world.books().await.remaining, 1);
    eventually("nothing is left", async || {
        ((metrics.open.get(), metrics.paid_without_claim.get()) == (0, 0)).then_some(())
    })
    .await;
}

// R1: what a shift without loss left behind was never acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_that_nobody_was_told_of_are_not_put_back_and_a_claim_that_nobody_wants_is_given_back() {
    let mut world = World::parted(5, &[]).await;
    world.settle_epoch().await;
    let unseen = world.lose(&world.user("unseen", "a")).await;
    // Cancelled while a round that died claimed it: the release came before the claim.
    let late = world.lose_closed(&world.user("late", "b")).await;
    let OrderRecord { order_id, uid, quantity, .. } = late.clone();
    let claim = ReclaimEntry { order_id, uid, quantity, key: key("k") };
    world.b.inventory.reclaim(&world.sale, &[claim]).await.unwrap();
    let file = world.save_tail(true).await;
    world.settle();
    let settled = world.until_settled(&file).await;
    assert_eq!((settled.orders, settled.claimed_again, settled.cancelled), (2, 0, 0));
    assert_eq!(world.status(&late).await, open(OrderStatus::Cancelled));
    assert_eq!((world.status(&unseen).await, world.books().await.claimed), (None, 0));
}

// H6: what was claimed again is in nobody's tail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_claimed_again_and_lost_with_the_next_master_is_claimed_once_more() {
    let mut world = World::parted(4, &[]).await;
    world.settle_epoch().await;
    let paid = world.lose_paid(&world.user("paid", "a")).await;
    let open_b = world.lose_stored(&world.user("open", "b")).await;
    let queued = world.lose(&world.user("queued", "a")).await;
    let copy = world.copy().await;
    let file = world.save_tail(false).await;
    let metrics = world.settle();
    let first = world.until_settled(&file).await;
    assert_eq!((first.orders, first.claimed_again, first.cancelled), (3, 3, 0));
    // Two of the units are sold once more.
    world.go_back(&copy).await;
    assert_eq!(world.held().await.len(), 0);
    for uid in ["x1", "x2"] {
        bought(world.b.redis.buy(&world.fence, &world.sale, uid, key("k")).await);
    }
    world.lose_again().await;
    eventually("it is settled once more", async || (metrics.settled.get() == 2).then_some(())).await;
    let again = world.until_settled(&file).await;
    assert!(again.settled_at >= first.settled_at);
    assert_eq!((again.orders, again.claimed_again, again.cancelled), (3, 2, 1));
    assert_eq!(world.books().await.remaining, 0);
    assert_eq!(world.held().await[paid.uid.as_str()], [paid.order_id]);
    assert_eq!(world.status(&paid).await, open(OrderStatus::Paid));
    let statuses = [world.status(&open_b).await, world.status(&queued).await];
    assert_eq!(statuses.iter().filter(|status| **status == cancelled()).count(), 1, "{statuses:?}");
    eventually("nothing is left", async || (metrics.open.get() == 0).then_some(())).await;
}

// M1: the claims of an archived sale are gone, and so is what would be claimed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paid_order_of_an_archived_sale_is_told_and_keeps_no_tail_open() {
    let mut world = World::parted(2, &[]).await;
    world.settle_epoch().await;
    let paid = world.lose_paid(&world.user("paid", "a")).await;
    for uid in ["x1", "x2"] {
        bought(world.b.redis.buy(&world.fence, &world.sale, uid, key("k")).await);
    }
    let file = world.save_tail(false).await;
    let metrics = world.settle();
    let told = eventually("it is told", async || {
        let told = world.told();
        (told.paid_without_claim == 1).then_some(told)
    })
    .await;
    let named = |cause| {
        let OrderRecord { order_id, sale_id, quantity, .. } = paid.clone();
        vec![Unclaimed { order_id, sale_id, quantity, cause }]
    };
    assert_eq!((told.paid_orders, told.settled), (named(UnclaimedCause::NotEnough), None));
    world.archive().await;
    let settled = world.until_settled(&file).await;
    assert_eq!((settled.orders, settled.claimed_again, settled.cancelled), (1, 0, 0));
    assert_eq!(settled.paid_without_claim, 1);
    let told = world.told();
    assert_eq!((told.paid_without_claim, told.paid_orders), (0, named(UnclaimedCause::Archived)));
    assert_eq!(world.status(&paid).await, open(OrderStatus::Paid));
    eventually("nothing is left", async || {
        ((metrics.open.get(), metrics.paid_without_claim.get()) == (0, 0)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn tails_are_gone_through_from_the_oldest_on_without_those_that_are_settled() {
    let folder = tempfile::tempdir().unwrap();
    let named = |name: &str| folder.path().join(name);
    for name in ["9-1700000000000", "10-1700000000001", "10-1700000000000", "8-1699999999999"] {
        std::fs::write(named(&format!("diverged-{name}.ndjson")), "").unwrap();
    }
    std::fs::write(named("diverged-8-1699999999999.ndjson.settled"), "").unwrap();
    std::fs::write(named("diverged-11-1700000000002.ndjson.new"), "").unwrap();
    let expected = ["9-1700000000000", "10-1700000000000", "10-1700000000001"];
    let expected = expected.map(|name| named(&format!("diverged-{name}.ndjson")));
    assert_eq!(unsettled(folder.path(), None).await.unwrap(), expected);
    assert_eq!(unsettled(&named("nothing"), None).await.unwrap(), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_cannot_be_read_keeps_the_tail_open_and_nobody_from_the_others() {
    let mut world = World::parted(5, &[]).await;
    world.settle_epoch().await;
    let record = world.lose_stored(&world.user("open", "a")).await;
    let file = world.save_tail(false).await;
    let whole = std::fs::read_to_string(&file).unwrap();
    let (head, entries) = whole.split_once('\n').unwrap();
    let of_later_release = json!({ "id": "1-2", "fields": { "v": "9", "k": "orders" } });
    std::fs::write(&file, format!("{head}\n{of_later_release}\n{entries}")).unwrap();
    let metrics = world.settle();
    eventually("the other one is claimed", async || (!world.held().await.is_empty()).then_some(())).await;
    eventually("the round is over", async || (metrics.open.get() == 1).then_some(())).await;
    world.assert_held(&[(&record, record.order_id)]).await;
    assert_eq!((world.told().settled, metrics.settled.get()), (None, 0));
    std::fs::write(&file, whole).unwrap();
    let settled = world.until_settled(&file).await;
    assert_eq!((settled.orders, settled.claimed_again), (1, 1));
}

use seckill_domain::{CouponState, Money, OrderStatus, OutboxId, Quantity, Shard, TABLES};

use super::*;
use crate::orders::{Advance, Error, OrderFilter, Origin, Unreadable};

on_both! {
    what_is_stored_survives_and_is_stored_once,
    every_table_takes_orders_and_coupons_under_its_own_name,
    a_position_moves_once_and_takes_its_orders_with_it,
    two_stores_on_one_file_store_each_entry_once,
    bob_is_not_bob,
    pages_of_a_list_are_stable_while_it_grows,
    a_walk_over_all_orders_sees_each_once,
    an_unreadable_entry_is_set_aside_and_blocks_nothing,
    an_order_id_that_names_two_orders_is_reported,
    a_database_belongs_to_one_center_and_one_release,
    many_may_open_a_new_database_at_once,
    a_shard_of_another_center_is_left_alone,
    a_closed_store_says_so,
    an_offset_moves_once_and_takes_its_orders_with_it,
    with_kafka_a_partition_is_stored_as_far_as_its_slowest_shard,
    a_batch_of_a_shard_that_is_not_ours_moves_no_offset,
    what_was_set_aside_is_settled_by_the_batch_that_stores_it,
}

async fn what_is_stored_survives_and_is_stored_once(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(1999, 900);
    // More than one insert of each size, and tables with none, one and several.
    let orders: Vec<_> = (1..=1500).map(|n| order(&format!("user-{n}"), n, &terms)).collect();
    assert_eq!(fixture.put(&orders).await, StoreOutcome { stored: 1500, duplicates: 0, foreign: 0 });
    assert_eq!(fixture.put(&orders[..100]).await, StoreOutcome { stored: 0, duplicates: 100, foreign: 0 });
    fixture.reopen().await;
    assert_eq!(fixture.store.position(0).await.unwrap(), at(2));
    for record in &orders {
        let found = fixture.store.order(record.order_id).await.unwrap().unwrap();
        assert_eq!(
            (&found.uid, &found.sale_id, found.quantity),
            (&record.uid, &record.sale_id, Quantity::ONE)
        );
        assert_eq!((found.status, found.amount), (OrderStatus::Created, Money::new(1999).unwrap()));
        assert_eq!((found.created_at, found.expires_at), (START, START.plus_s(900)));
    }
    let counts = fixture.store.counts(None).await.unwrap();
    assert_eq!(counts.sales[&sale("s")].of(OrderStatus::Created).orders, 1500);
    assert_eq!((counts.positions, counts.unreadable), (vec![(0, at(2))], 0));
}

async fn every_table_takes_orders_and_coupons_under_its_own_name(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let mut one_each = vec![None; usize::from(TABLES)];
    let mut seq = 0;
    for n in 0.. {
        let uid = format!("u{n}");
        let place = &mut one_each[usize::from(user(&uid).table().number())];
        if place.is_none() {
            seq += 1;
            *place = Some(order(&uid, seq, &coupon(0)));
            if seq == u64::from(TABLES) {
                break;
            }
        }
    }
    let orders: Vec<_> = one_each.into_iter().flatten().collect();
    assert_eq!(fixture.put(&orders).await.stored, u64::from(TABLES));
    for record in &orders {
        let table = record.uid.table().number();
        for (kind, id) in [("orders", "order_id"), ("coupons", "coupon_id")] {
            let rows = fixture.pairs(format!("SELECT uid, {id} FROM {kind}_{table:03}")).await;
            assert_eq!(rows, [(record.uid.to_string(), record.order_id.to_string())]);
        }
    }
}

async fn a_position_moves_once_and_takes_its_orders_with_it(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(1, 900);
    fixture.put(&[order("bob", 1, &terms)]).await;
    let late = [order("bob", 2, &terms)];
    let lost = fixture.store.store(StoreBatch::outbox(0, at(0), at(1), late.to_vec())).await;
    assert!(
        matches!(&lost, Err(Error::PositionMoved { place: crate::orders::Place::Outbox(0), found, .. }) if *found == at(1).to_string()),
        "{lost:?}"
    );
    assert_eq!(fixture.store.order(late[0].order_id).await.unwrap(), None);
    // Partitions know nothing of each other.
    fixture.store.store(StoreBatch::outbox(1, at(0), at(7), late.to_vec())).await.unwrap();
    assert_eq!(fixture.store.position(0).await.unwrap(), at(1));
    assert_eq!(fixture.store.position(1).await.unwrap(), at(7));
}

async fn two_stores_on_one_file_store_each_entry_once(kind: Kind) {
    let fixture = Fixture::on(kind).await;
    let other = fixture.again().await;
    let terms = product(1, 900);
    let feed = |store: OrderStore| {
        let terms = Arc::clone(&terms);
        async move {
            let mut stored = 0;
            loop {
                let from = store.position(0).await.unwrap();
                if from.seq == 40 {
                    return stored;
                }
                let seq = from.seq + 1;
                let orders = vec![order(&format!("u{seq}"), seq, &terms)];
                match store.store(StoreBatch::outbox(0, from, at(seq), orders)).await {
                    Ok(outcome) => stored += outcome.stored,
                    Err(Error::PositionMoved { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    let (one, two) = tokio::join!(feed(fixture.store.clone()), feed(other.clone()));
    assert_eq!(one + two, 40);
    assert_eq!(
        fixture.store.counts(None).await.unwrap().sales[&sale("s")].of(OrderStatus::Created).orders,
        40
    );
    other.close().await;
}

async fn bob_is_not_bob(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(1, 900);
    let orders = [order("Bob", 1, &terms), order("bob", 2, &terms), order("BOB", 3, &terms)];
    fixture.put(&orders).await;
    for record in &orders {
        let own = fixture.store.orders_of(&record.uid, 10, None).await.unwrap();
        assert_eq!(own.items.iter().map(|order| order.order_id).collect::<Vec<_>>(), [record.order_id]);
    }
    // Also where the table is the same: ids that differ in case only are different rows.
    let cancelled = fixture.store.cancel(&user("bob"), orders[0].order_id).await.unwrap();
    assert_eq!(cancelled, crate::orders::CancelOutcome::NotFound);
}

async fn pages_of_a_list_are_stable_while_it_grows(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(1, 900);
    let mut expected = Vec::new();
    for n in 1..=25 {
        let record = order("bob", n, &terms);
        fixture.put(std::slice::from_ref(&record)).await;
        expected.push(record.order_id);
        // Several in the same millisecond: then the id decides.
        if n % 3 == 0 {
            fixture.clock.advance_ms(1);
        }
    }
    expected.reverse();
    let (mut seen, mut cursor) = (Vec::new(), None);
    for n in 0.. {
        let page = fixture.store.orders_of(&user("bob"), 4, cursor).await.unwrap();
        seen.extend(page.items.iter().map(|order| order.order_id));
        fixture.put(&[order("bob", 100 + n, &terms)]).await;
        // As a client sends it back.
        cursor = page.next.map(|cursor| cursor.to_string().parse().unwrap());
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(seen, expected);
    assert_eq!(fixture.store.orders_of(&user("bob"), 0, None).await.unwrap().items.len(), 1);
    assert_eq!(fixture.store.orders_of(&user("nobody"), 10, None).await.unwrap().items, []);
}

async fn a_walk_over_all_orders_sees_each_once(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(1, 900);
    let orders: Vec<_> = (1..=300).map(|n| order(&format!("u{n}"), n, &terms)).collect();
    fixture.put(&orders).await;
    fixture.store.cancel(&orders[7].uid, orders[7].order_id).await.unwrap();
    let walk = async |filter: OrderFilter| {
        let (mut seen, mut cursor) = (Vec::new(), None);
        loop {
            let page = fixture.store.admin_orders(&filter, 7, cursor).await.unwrap();
            seen.extend(page.items.iter().map(|found| found.order.order_id));
            cursor = page.next;
            if cursor.is_none() {
                break;
            }
        }
        seen.sort_unstable();
        seen
    };
    let mut all: Vec<_> = orders.iter().map(|order| order.order_id).collect();
    all.sort_unstable();
    assert_eq!(walk(OrderFilter::default()).await, all);
    assert_eq!(walk(OrderFilter { sale_id: Some(sale("other")), ..OrderFilter::default() }).await, []);
    let cancelled = OrderFilter { status: Some(OrderStatus::Cancelled), ..OrderFilter::default() };
    assert_eq!(walk(cancelled).await, [orders[7].order_id]);
    let of_one = OrderFilter { uid: Some(orders[9].uid.clone()), ..OrderFilter::default() };
    assert_eq!(walk(of_one).await, [orders[9].order_id]);
    assert_eq!(fixture.store.sales().await.unwrap(), [sale("s")]);
}

async fn an_unreadable_entry_is_set_aside_and_blocks_nothing(kind: Kind) {
    let fixture = Fixture::on(kind).await;
    let bad = Unreadable {
        origin: Origin::Outbox { partition: 0, id: at(1) },
        reason: "kind \"later\"".to_owned(),
        raw: "v=2".to_owned(),
    };
    let good = order("bob", 2, &product(1, 900));
    let batch = StoreBatch {
        unreadable: vec![bad.clone()],
        ..StoreBatch::outbox(0, at(0), at(2), vec![good.clone()])
    };
    let stored = fixture.store.store(batch).await.unwrap();
    assert_eq!(stored.stored, 1);
    assert_eq!(fixture.store.unreadable(10, None).await.unwrap().items, [bad]);
    assert_eq!(fixture.store.counts(None).await.unwrap().unreadable, 1);
    assert!(fixture.store.order(good.order_id).await.unwrap().is_some());
}

async fn an_order_id_that_names_two_orders_is_reported(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(1, 900);
    let first = order("bob", 1, &terms);
    fixture.put(std::slice::from_ref(&first)).await;
    let impostor = OrderRecord { sale_id: sale("other"), ..first.clone() };
    assert_eq!(fixture.put(&[impostor]).await, StoreOutcome { stored: 0, duplicates: 1, foreign: 0 });
    let aside = fixture.store.unreadable(10, None).await.unwrap().items;
    assert!(aside[0].reason.contains("belongs to an order of sale s"), "{aside:?}");
    assert_eq!(fixture.store.order(first.order_id).await.unwrap().unwrap().sale_id, sale("s"));
}

async fn a_database_belongs_to_one_center_and_one_release(kind: Kind) {
    // Servers that replicate each other hold the tables of both centers.
    let fixture = Fixture::in_place(Place::alone(kind).await).await;
    let foreign = fixture.open("b").await;
    let Err(foreign) = foreign else { panic!("it was opened") };
    assert!(
        matches!(&foreign, Error::ForeignCenter { owner, center } if owner == "a" && center == "b"),
        "{foreign}"
    );
    assert_eq!(fixture.number("SELECT COUNT(*) FROM shard_owner WHERE owner = 'a'").await, 64);
    fixture
        .run(match kind {
            Kind::Sqlite => "PRAGMA user_version = 99",
            Kind::MySql => "UPDATE schema_version SET version = 99, oldest = 99",
        })
        .await;
    assert!(matches!(fixture.open("a").await, Err(Error::Migrate(_))));
    if kind == Kind::MySql {
        // A later release that only added something works beside this one.
        fixture.run("UPDATE schema_version SET oldest = 1").await;
        fixture.open("a").await.unwrap().close().await;
        fixture.run("UPDATE schema_version SET version = 1").await;
    }
}

async fn many_may_open_a_new_database_at_once(kind: Kind) {
    let place = Place::empty(kind).await;
    let clock = Arc::new(ManualClock::new(START));
    let open = || open(place.url(), &clock, "a");
    let (one, two, three) = tokio::join!(open(), open(), open());
    for store in [one, two, three] {
        let store = store.unwrap();
        assert_eq!(store.position(0).await.unwrap(), OutboxId::ZERO);
        store.close().await;
    }
}

async fn a_shard_of_another_center_is_left_alone(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(1, 900);
    let (bob, eve) = (order("bob", 1, &terms), order("eve", 2, &terms));
    assert_ne!(bob.uid.table().shard(), eve.uid.table().shard());
    fixture.put(std::slice::from_ref(&bob)).await;
    fixture.give_away(bob.uid.table().shard()).await;
    let late = order("bob", 3, &terms);
    assert_eq!(
        fixture.put(&[late.clone(), eve]).await,
        StoreOutcome { stored: 1, duplicates: 0, foreign: 1 }
    );
    assert_eq!(fixture.store.order(late.order_id).await.unwrap(), None);
    assert!(matches!(fixture.store.cancel(&bob.uid, bob.order_id).await, Err(Error::NotOwner(_))));
    assert!(matches!(fixture.store.pay(payment(&bob, "p", 1)).await, Err(Error::NotOwner(_))));
    assert_eq!(fixture.store.expire_due(None, START.plus_s(900), 10).await.unwrap().expired, 1);
}

#[tokio::test]
async fn errors_of_the_file_name_it() {
    for bad in
        ["mysql://x", "mysql://user:secret@host/", "sqlite:", "sqlite::memory:", "sqlite:a?mode=ro", ""]
    {
        let options = StoreOptions::new(CenterId::new("a").unwrap());
        assert!(matches!(OrderStore::open(bad, options).await, Err(Error::Url)), "{bad}");
    }
    let options = StoreOptions::new(CenterId::new("a").unwrap());
    let missing = OrderStore::open("sqlite:/nowhere/orders.db", options).await.err().unwrap();
    assert!(missing.to_string().contains("/nowhere/orders.db"), "{missing}");
}

#[tokio::test]
async fn a_new_database_owns_the_shards_of_its_center() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("sqlite:{}", dir.path().join("orders.db").display());
    let (bob, eve) = (order("bob", 1, &product(1, 900)), order("eve", 2, &product(1, 900)));
    let shard = bob.uid.table().shard();
    assert_ne!(shard, eve.uid.table().shard());
    let options =
        |center: &str, shards| StoreOptions { shards, ..StoreOptions::new(CenterId::new(center).unwrap()) };
    // A center that joined without shards stores nobody's orders, and finds its database again.
    for _ in 0..2 {
        let store = OrderStore::open(&url, options("c", Vec::new())).await.unwrap();
        store.close().await;
    }
    std::fs::remove_file(dir.path().join("orders.db")).unwrap();
    let store = OrderStore::open(&url, options("a", vec![shard])).await.unwrap();
    let batch = StoreBatch::outbox(0, at(0), at(1), vec![bob.clone(), eve.clone()]);
    assert_eq!(store.store(batch).await.unwrap(), StoreOutcome { stored: 1, duplicates: 0, foreign: 1 });
    assert!(store.order(bob.order_id).await.unwrap().is_some());
    assert_eq!(store.order(eve.order_id).await.unwrap(), None);
    store.close().await;
    let foreign = OrderStore::open(&url, options("b", vec![shard])).await.err().unwrap();
    assert!(matches!(&foreign, Error::ForeignCenter { owner, .. } if owner == "a"), "{foreign}");
}

async fn a_closed_store_says_so(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let record = order("bob", 1, &coupon(0));
    fixture.put(std::slice::from_ref(&record)).await;
    let own = fixture.store.coupons_of(&record.uid, 10, None).await.unwrap().items;
    assert_eq!((own.len(), own[0].state), (1, CouponState::Granted));
    fixture.store.close().await;
    assert!(matches!(fixture.store.pay(payment(&record, "p", 1)).await, Err(Error::Closed)));
    assert!(matches!(fixture.store.order(record.order_id).await, Err(Error::Closed)));
}

/// A batch of one shard's Kafka partition.
fn records(shard: Shard, from: i64, to: i64, mark: u64, orders: Vec<OrderRecord>) -> StoreBatch {
    let advance = vec![Advance::Kafka { shard, from, to, outbox: vec![(0, at(mark))] }];
    StoreBatch { advance, orders, ..StoreBatch::default() }
}

async fn an_offset_moves_once_and_takes_its_orders_with_it(kind: Kind) {
    let fixture = Fixture::on(kind).await;
    let terms = product(1, 900);
    let [first, late] = [1, 2].map(|seq| order("bob", seq, &terms));
    let shard = first.uid.table().shard();
    assert!(fixture.store.kafka_offsets().await.unwrap().iter().all(|(_, offset)| *offset == 0));
    fixture.store.store(records(shard, 0, 4, 9, vec![first])).await.unwrap();
    let lost = fixture.store.store(records(shard, 0, 5, 9, vec![late.clone()])).await;
    assert!(
        matches!(&lost, Err(Error::PositionMoved { place, found, .. }) if *place == crate::orders::Place::Kafka(shard) && found == "4"),
        "{lost:?}"
    );
    assert_eq!(fixture.store.order(late.order_id).await.unwrap(), None);
    assert!(fixture.store.kafka_offsets().await.unwrap().contains(&(shard, 4)));
    // Several steps happen together or not at all.
    let other = Shard::new((shard.number() + 1) % 64).unwrap();
    let mut both = records(shard, 4, 5, 10, vec![late.clone()]);
    both.advance.extend(records(other, 7, 8, 10, Vec::new()).advance);
    assert!(fixture.store.store(both).await.is_err());
    assert!(fixture.store.kafka_offsets().await.unwrap().contains(&(shard, 4)));
    assert_eq!(fixture.store.order(late.order_id).await.unwrap(), None);
}

async fn with_kafka_a_partition_is_stored_as_far_as_its_slowest_shard(kind: Kind) {
    let fixture = Fixture::on(kind).await;
    let mark = async |shard: u8, from: i64, mark: u64| {
        let shard = Shard::new(shard).unwrap();
        fixture.store.store(records(shard, from, from + 1, mark, Vec::new())).await.unwrap();
    };
    for shard in 0..63 {
        mark(shard, 0, 20 + u64::from(shard)).await;
    }
    assert_eq!(fixture.store.position(0).await.unwrap(), OutboxId::ZERO);
    assert_eq!(fixture.store.highest(0).await.unwrap(), at(82));
    mark(63, 0, 5).await;
    assert_eq!(fixture.store.position(0).await.unwrap(), at(5));
    mark(63, 1, 90).await;
    assert_eq!(fixture.store.position(0).await.unwrap(), at(20));
    assert_eq!(fixture.store.counts(None).await.unwrap().positions, [(0, at(20))]);
    // Records that are published again carry older marks.
    mark(0, 1, 3).await;
    assert_eq!(fixture.store.position(0).await.unwrap(), at(20));
    assert_eq!(fixture.store.mark_position(0, fixture.now(), None, true).await.unwrap(), Some(at(20)));
    assert_eq!(fixture.store.position(1).await.unwrap(), OutboxId::ZERO);
}

async fn a_batch_of_a_shard_that_is_not_ours_moves_no_offset(kind: Kind) {
    let fixture = Fixture::on(kind).await;
    let [bob, eve] = [("bob", 1), ("eve", 2)].map(|(uid, seq)| order(uid, seq, &product(1, 900)));
    let [bobs, eves] = [&bob, &eve].map(|record| record.uid.table().shard());
    fixture.give_away(bobs).await;
    let refused = fixture.store.store(records(bobs, 0, 1, 1, vec![bob.clone()])).await;
    assert!(matches!(refused, Err(Error::NotOwner(shard)) if shard == bobs), "{refused:?}");
    // Nor is an order skipped that lies in a partition of another shard.
    let astray = fixture.store.store(records(eves, 0, 1, 1, vec![bob])).await;
    assert!(matches!(astray, Err(Error::NotOwner(shard)) if shard == bobs), "{astray:?}");
    assert!(fixture.store.kafka_offsets().await.unwrap().iter().all(|(_, offset)| *offset == 0));
    fixture.store.store(records(eves, 0, 1, 1, vec![eve])).await.unwrap();
}

async fn what_was_set_aside_is_settled_by_the_batch_that_stores_it(kind: Kind) {
    let fixture = Fixture::on(kind).await;
    let record = order("bob", 1, &product(1, 900));
    let shard = record.uid.table().shard();
    let origin = Origin::Kafka { shard, offset: 3 };
    let bad = Unreadable { origin, reason: "version 9".to_owned(), raw: "{}".to_owned() };
    let batch = StoreBatch { unreadable: vec![bad.clone()], ..records(shard, 0, 4, 1, Vec::new()) };
    fixture.store.store(batch).await.unwrap();
    assert_eq!(fixture.store.unreadable(10, None).await.unwrap().items, [bad]);
    let replay = StoreBatch { orders: vec![record], settled: vec![origin], ..StoreBatch::default() };
    assert_eq!(fixture.store.store(replay).await.unwrap().stored, 1);
    assert_eq!(fixture.store.unreadable(10, None).await.unwrap().items, []);
}

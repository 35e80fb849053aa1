//! The outbox: complete records, in order, that can be found and trimmed.

use seckill_domain::{
    CenterId, CenterNumber, Epoch, LedgerState, Millis, OrderId, OrderRecord, OutboxId, Quantity, SaleKind,
    Shard,
};
use seckill_ledger::admin::{FenceChange, set_fence, trim};
use seckill_ledger::outbox::{
    self, Changed, Event, SaleChange, center_of, find_order, first_id, last_id, parse_raw, wait_for_entry,
};
use seckill_ledger::{
    Cursor, CursorOutcome, ReserveOutcome, ShardSet, StateChange, add_stock, cursor, set_cursor, set_state,
    update_sale,
};

use crate::support::{Ledger, entry, key, spec, uid};

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

async fn events(ledger: &mut Ledger) -> Vec<(OutboxId, Event)> {
    let page = outbox::read(&mut ledger.conn, OutboxId::ZERO, 1000).await.unwrap();
    page.entries.into_iter().map(|entry| (entry.id, entry.event.unwrap())).collect()
}

#[tokio::test]
async fn a_record_is_complete() {
    let mut ledger = Ledger::start().await;
    let mut coupon = spec("c", 100, 10);
    coupon.kind = SaleKind::Coupon;
    coupon.discount = Some(seckill_domain::Money::new(500).unwrap());
    coupon.valid_until = Some(Millis(4_000_000_000_000));
    coupon.payment_ttl_s = 77;
    let sale = ledger.create(&coupon).await;
    let long = "~".repeat(128);
    let mut entries =
        [entry("bob", "k", 1), entry(&long, "k", 10), entry("a:b c".replace(' ', "\"").as_str(), "k", 3)];
    entries[1].traceparent = Some(TRACE.into());
    entries[1].center = CenterNumber::new(8).unwrap();
    entries[2].traceparent = Some("torn\napart".into());
    let reply = seckill_ledger::reserve(&mut ledger.conn, &ledger.fence, 7, &sale, &entries).await.unwrap();
    let expected: Vec<OrderRecord> = entries
        .iter()
        .zip(&reply.outcomes)
        .map(|(entry, outcome)| OrderRecord {
            order_id: match outcome {
                ReserveOutcome::Accepted(order) => *order,
                other => panic!("{other:?}"),
            },
            uid: entry.uid.clone(),
            sale_id: sale.clone(),
            quantity: entry.quantity,
            terms: coupon.terms().unwrap().into(),
            accepted_at: reply.now,
            traceparent: entry.traceparent.clone().filter(|trace| &**trace == TRACE),
        })
        .collect();
    let (id, event) = events(&mut ledger).await.pop().unwrap();
    assert_eq!(event, Event::Orders(expected.clone()));
    assert_eq!(
        (id, reply.mark.outbox),
        (reply.mark.outbox, OutboxId { epoch: 1, seq: expected[2].order_id.seq() })
    );
    assert_eq!(expected[1].order_id.partition(), 7);
    assert_eq!(center_of(expected[1].order_id), Some(CenterNumber::new(8).unwrap()));
    for record in expected {
        assert_eq!(find_order(&mut ledger.conn, 1, record.order_id).await.unwrap(), Some(record));
    }
}

#[tokio::test]
async fn every_change_is_an_entry_and_ids_grow_over_epochs() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    let order = ledger.order(&sale, "bob", "k1").await;
    let sold_out = ledger.buy(&sale, "bob", "k2", 9).await;
    assert_eq!(sold_out, ReserveOutcome::Limit);
    ledger.release(&sale, &[("bob", order)]).await;
    add_stock(&mut ledger.conn, &ledger.fence, &sale, 2, &key("x")).await.unwrap();
    set_state(&mut ledger.conn, &ledger.fence, &sale, StateChange::Pause).await.unwrap();
    let mut changed = spec("s", 5, 2);
    changed.title = "another \"title\" – 名".to_owned();
    update_sale(&mut ledger.conn, &ledger.fence, &changed, 3, false).await.unwrap();
    let next = ledger.fence.at(Epoch(12));
    let lift = FenceChange::Lift { from: ledger.fence.clone() };
    set_fence(&mut ledger.conn, &lift, &next).await.unwrap();
    let events = events(&mut ledger).await;
    let ids: Vec<String> = events.iter().map(|(id, _)| id.to_string()).collect();
    assert_eq!(ids, ["1-1", "1-2", "1-3", "1-4", "1-5", "1-6", "1-7", "12-8"]);
    assert_eq!(events[0].1, Event::Epoch(ledger.fence.clone()));
    assert_eq!(events[1].1, Event::Sale(Box::new(spec("s", 5, 5))));
    assert!(matches!(&events[2].1, Event::Orders(orders) if orders.len() == 1));
    assert_eq!(events[3].1, Event::Released { sale_id: sale.clone(), orders: vec![order] });
    let changed_to = |what| Event::SaleChanged(SaleChange { sale_id: sale.clone(), what });
    assert_eq!(events[4].1, changed_to(Changed::Stock(2)));
    assert_eq!(events[5].1, changed_to(Changed::State(LedgerState::Paused)));
    assert_eq!(events[6].1, Event::Sale(Box::new(changed)));
    assert_eq!(events[7].1, Event::Epoch(next));

    let page = outbox::read(&mut ledger.conn, OutboxId { epoch: 1, seq: 6 }, 1).await.unwrap();
    assert_eq!((page.entries.len(), page.entries[0].id.seq, page.last_seq), (1, 7, 8));
    assert!(wait_for_entry(&mut ledger.conn, OutboxId { epoch: 1, seq: 6 }, 1).await.unwrap());
    assert!(!wait_for_entry(&mut ledger.conn, OutboxId { epoch: 12, seq: 8 }, 1).await.unwrap());
}

#[tokio::test]
async fn an_order_is_found_by_its_id_alone_also_when_the_epoch_has_wrapped() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 1000, 5).await;
    let mut orders = Vec::new();
    for epoch in [9_998, 9_999, 10_000, 10_001, 20_001] {
        let next = ledger.fence.at(Epoch(epoch));
        let lift = FenceChange::Lift { from: ledger.fence.clone() };
        set_fence(&mut ledger.conn, &lift, &next).await.unwrap();
        ledger.fence = next;
        let entries: Vec<_> = (0..20).map(|n| entry(&format!("u{n}"), &format!("k{epoch}"), 1)).collect();
        for outcome in ledger.reserve(&sale, &entries).await {
            let ReserveOutcome::Accepted(order) = outcome else { panic!("{outcome:?}") };
            orders.push((epoch, order));
        }
    }
    for (epoch, order) in &orders {
        for now in [*epoch, epoch + 1, epoch + 9_999] {
            let found = find_order(&mut ledger.conn, now, *order).await.unwrap();
            assert_eq!(found.map(|record| record.order_id), Some(*order), "{epoch} seen from {now}");
        }
        // Whole turns later it counts as another epoch's; before its epoch it cannot have been.
        assert_eq!(find_order(&mut ledger.conn, epoch + 10_000, *order).await.unwrap(), None);
        assert_eq!(find_order(&mut ledger.conn, epoch - 1, *order).await.unwrap(), None);
    }
    let (_, known) = orders[30];
    let nobody = OrderId::from_parts(known.head(), 999_999).unwrap();
    assert_eq!(find_order(&mut ledger.conn, 10_000, nobody).await.unwrap(), None);
    let other_head = OrderId::from_parts(known.head() + 100_000_000, known.seq()).unwrap();
    assert_eq!(find_order(&mut ledger.conn, 10_000, other_head).await.unwrap(), None);
}

#[tokio::test]
async fn what_cannot_be_read_is_handed_over_and_hides_nothing() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    ledger.order(&sale, "bob", "k1").await;
    let table = uid("bob").table();
    let line = format!("1{table}00001 1 bob\n");
    let terms = r#"{"kind":"product","unit_price":1,"currency":"CNY","payment_ttl_s":9,"later":1}"#;
    let wrong_table = "151100001 1 bob\n";
    let odd: &[&[&str]] = &[
        &["v", "2", "k", "orders", "s", "s", "t", terms, "a", "1", "o", &line],
        &["v", "1", "k", "gift", "s", "s", "a", "1", "o", "x"],
        &["v", "1", "k", "orders", "s", "s", "t", "{", "a", "1", "o", &line],
        &["v", "1", "k", "orders", "s", "S", "t", terms, "a", "1", "o", &line],
        &["v", "1", "k", "orders", "s", "s", "t", terms, "a", "now", "o", &line],
        &["v", "1", "k", "orders", "s", "s", "t", terms, "a", "1", "o", ""],
        &["v", "1", "k", "orders", "s", "s", "t", terms, "a", "1", "o", "x 1 bob\n"],
        &["v", "1", "k", "orders", "s", "s", "t", terms, "a", "1", "o", wrong_table],
        &["v", "1", "k", "orders", "s", "s", "t", terms, "a", "1", "o", line.trim_end()],
        &["v", "1", "k", "orders", "s", "s", "t", terms, "a", "1", "o", &line.replace(" 1 ", " 0 ")],
        &["v", "1", "k", "released", "s", "s", "a", "1", "o", "77\n"],
        &["v", "1", "k", "sale", "s", "s", "a", "1", "o", "{}"],
        &["v", "1", "k", "epoch", "s", "", "a", "1", "o", "2:x:1:a"],
        &["x", "y"],
    ];
    for (n, fields) in odd.iter().enumerate() {
        let id = format!("1-{}", 100 + n);
        ledger.raw(&[&["XADD", "sk:outbox", &id], *fields].concat()).await;
    }
    let fields = ["v", "1", "k", "orders", "s", "s", "t", terms, "a", "1", "z", "new", "o", &line];
    ledger.raw(&[&["XADD", "sk:outbox", "1-200"], &fields[..]].concat()).await;
    let page = outbox::read(&mut ledger.conn, OutboxId { epoch: 1, seq: 99 }, 100).await.unwrap();
    assert_eq!(page.entries.len(), odd.len() + 1);
    for (entry, fields) in page.entries.iter().zip(odd) {
        let unreadable = entry.event.as_ref().expect_err(&format!("{fields:?}"));
        assert!(!unreadable.reason.is_empty());
        // What is kept of it gives the same answer, today and to a later release.
        assert_eq!(parse_raw(entry.id, &unreadable.raw), Err(unreadable.reason.clone()));
    }
    let Ok(Event::Orders(orders)) = &page.entries[odd.len()].event else { panic!("{page:?}") };
    assert_eq!((orders[0].order_id.seq(), orders[0].quantity), (200, Quantity::ONE));
}

#[tokio::test]
async fn trimming_drops_what_is_stored_and_never_the_newest_entry() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 1_000_000, 5).await;
    ledger.raw(&["CONFIG", "SET", "stream-node-max-entries", "10"]).await;
    for n in 0..100 {
        ledger.order(&sale, &format!("u{n}"), "k").await;
    }
    let last = last_id(&mut ledger.conn).await.unwrap().unwrap();
    assert_eq!(first_id(&mut ledger.conn).await.unwrap(), Some(OutboxId { epoch: 1, seq: 1 }));
    let keep = OutboxId { epoch: 1, seq: 50 };
    let dropped = trim(&mut ledger.conn, &ledger.fence, keep).await.unwrap();
    let first = first_id(&mut ledger.conn).await.unwrap().unwrap();
    assert!((30..50).contains(&dropped), "{dropped}");
    assert!(first <= keep);
    assert_eq!(trim(&mut ledger.conn, &ledger.fence, keep).await.unwrap(), 0);

    for beyond in [OutboxId { epoch: 1, seq: last.seq + 1 }, OutboxId { epoch: 2, seq: 0 }] {
        trim(&mut ledger.conn, &ledger.fence, beyond).await.unwrap();
        assert_eq!(last_id(&mut ledger.conn).await.unwrap(), Some(last));
    }
    let next = ledger.order(&sale, "amy", "k").await;
    assert_eq!(next.seq(), last.seq + 1);
}

#[tokio::test]
async fn a_cursor_goes_forward_under_the_ledgers_fence_and_never_ahead_of_it() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    ledger.order(&sale, "bob", "k1").await;
    let b = CenterId::new("b").unwrap();
    assert_eq!(cursor(&mut ledger.conn, &b).await.unwrap(), None);
    let shards: ShardSet = [0, 63].map(|number| Shard::new(number).unwrap()).into_iter().collect();
    let at = |seq| Cursor { id: OutboxId { epoch: 1, seq }, shards };
    for (step, outcome) in [
        (at(2), CursorOutcome::Noted),
        (at(2), CursorOutcome::Noted),
        (at(3), CursorOutcome::Noted),
        (at(2), CursorOutcome::Behind),
        (at(4), CursorOutcome::Ahead),
        (Cursor { id: OutboxId { epoch: 2, seq: 1 }, shards }, CursorOutcome::Ahead),
    ] {
        assert_eq!(set_cursor(&mut ledger.conn, &ledger.fence, &b, step).await.unwrap(), outcome, "{step:?}");
    }
    assert_eq!(cursor(&mut ledger.conn, &b).await.unwrap(), Some(at(3)));
    assert_eq!(cursor(&mut ledger.conn, &CenterId::new("a").unwrap()).await.unwrap(), None);
    ledger.raw(&["HSET", "sk:cursors", "b", "3"]).await;
    assert!(matches!(cursor(&mut ledger.conn, &b).await, Err(seckill_ledger::Error::Damaged(_))));
    let damaged = set_cursor(&mut ledger.conn, &ledger.fence, &b, at(3)).await;
    assert!(matches!(damaged, Err(seckill_ledger::Error::Damaged(_))));
}

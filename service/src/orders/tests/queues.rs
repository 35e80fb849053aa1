//! Releases, marks, what adoption needs, and the feed.

use seckill_domain::OrderStatus;

use super::*;
use crate::orders::CancelOutcome;

on_both! {
    a_release_waits_until_it_is_answered,
    an_adopted_ledger_is_told_of_every_closed_order_again,
    marks_say_where_the_position_was,
    subscribers_hear_of_every_change,
}

async fn a_release_waits_until_it_is_answered(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let [known, unknown] = [("a", 1), ("b", 2)].map(|(uid, seq)| order(uid, seq, &product(100, 900)));
    fixture.put(&[known.clone(), unknown.clone()]).await;
    for record in [&known, &unknown] {
        fixture.store.cancel(&record.uid, record.order_id).await.unwrap();
    }
    fixture.reopen().await;
    let waiting = fixture.store.pending_releases(10, &[]).await.unwrap();
    let ids: Vec<_> = waiting.iter().map(|release| release.order_id).collect();
    assert_eq!(ids, [known.order_id, unknown.order_id]);
    assert_eq!(fixture.store.pending_releases(10, &[sale("s")]).await.unwrap(), []);
    let counts = fixture.store.counts(Some(&sale("s"))).await.unwrap().sales[&sale("s")].clone();
    assert_eq!((counts.releasing.orders, counts.release_unknown.orders), (2, 0));
    fixture.store.releases_done(vec![known.order_id], vec![unknown.order_id]).await.unwrap();
    assert_eq!(fixture.store.pending_releases(10, &[]).await.unwrap(), []);
    let counts = fixture.store.counts(None).await.unwrap().sales[&sale("s")].clone();
    assert_eq!((counts.releasing.orders, counts.release_unknown.orders), (0, 1));
}

async fn an_adopted_ledger_is_told_of_every_closed_order_again(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let [open, closed, lost, paid] =
        [("a", 1), ("b", 2), ("c", 3), ("d", 4)].map(|(uid, seq)| order(uid, seq, &product(100, 900)));
    fixture.put(&[open.clone(), closed.clone(), lost.clone(), paid.clone()]).await;
    fixture.store.cancel(&closed.uid, closed.order_id).await.unwrap();
    fixture.store.pay(payment(&paid, "p", 100)).await.unwrap();
    fixture.store.releases_done(vec![closed.order_id], Vec::new()).await.unwrap();
    let cancelled =
        fixture.store.cancel_lost(vec![lost.order_id, paid.order_id], "lost with the ledger").await.unwrap();
    assert_eq!(cancelled, [lost.order_id]);
    let lost_row = fixture.store.admin_order(lost.order_id).await.unwrap().unwrap();
    assert_eq!(lost_row.reason.as_deref(), Some("lost with the ledger"));
    assert_eq!(lost_row.order.status, OrderStatus::Cancelled);
    assert_eq!(fixture.store.pending_release_count().await.unwrap(), 0);
    assert!(matches!(
        fixture.store.cancel(&lost.uid, lost.order_id).await.unwrap(),
        CancelOutcome::Already(_)
    ));
    for _ in 0..2 {
        assert_eq!(fixture.store.requeue_releases(&sale("s")).await.unwrap(), 1);
        let waiting = fixture.store.pending_releases(10, &[]).await.unwrap();
        assert_eq!(waiting.iter().map(|release| release.order_id).collect::<Vec<_>>(), [closed.order_id]);
    }
    let orders = fixture.store.orders_of_sale(&sale("s"), 100, None).await.unwrap().items;
    assert_eq!(orders.len(), 4);
}

async fn marks_say_where_the_position_was(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    assert_eq!(fixture.store.mark_position(0, START, None, true).await.unwrap(), None);
    fixture.put(&[order("bob", 1, &product(1, 900))]).await;
    assert_eq!(fixture.store.mark_position(0, fixture.now().plus_ms(-1), None, true).await.unwrap(), None);
    fixture.clock.advance_ms(1000);
    fixture.put(&[order("bob", 2, &product(1, 900))]).await;
    fixture.reopen().await;
    assert_eq!(fixture.store.mark_position(0, START.plus_ms(999), None, true).await.unwrap(), Some(at(1)));
    assert_eq!(fixture.store.mark_position(0, START.plus_ms(1000), None, true).await.unwrap(), Some(at(2)));
    assert_eq!(fixture.number("SELECT COUNT(*) FROM outbox_trim").await, 1);
}

async fn subscribers_hear_of_every_change(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let record = order("bob", 1, &product(100, 900));
    let mut feed = fixture.store.updates().subscribe(record.order_id).unwrap();
    fixture.put(std::slice::from_ref(&record)).await;
    let heard = async |feed: &mut crate::orders::Subscription| {
        let begin = std::time::Instant::now();
        feed.changed().await;
        // Announced, not found by looking.
        assert!(begin.elapsed() < std::time::Duration::from_secs(2));
    };
    heard(&mut feed).await;
    assert_eq!(fixture.store.order(record.order_id).await.unwrap().unwrap().version(), 1);
    fixture.store.cancel(&record.uid, record.order_id).await.unwrap();
    heard(&mut feed).await;
    let settled = fixture.store.order(record.order_id).await.unwrap().unwrap();
    assert!(settled.is_settled() && settled.version() == 2);
}

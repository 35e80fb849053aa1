//! Orders of a lost master's tail, put back into the database where they are at home (H6).

use seckill_domain::{CouponState, OrderStatus};

use super::*;
use crate::orders::{ACCEPTED_LOSS, CancelOutcome, Error, MAX_PUT_BACK, PayOutcome, PutBack, PutBackDone};

on_both! {
    an_order_that_is_missing_is_stored_and_one_that_is_there_stays,
    a_claim_that_comes_after_its_order_was_closed_is_released,
    an_order_whose_claim_is_lost_is_cancelled_and_gives_nothing_back,
    an_order_that_costs_nothing_is_withdrawn_only_if_nobody_had_it,
    orders_of_another_center_are_refused_as_a_whole,
    a_release_asked_for_again_outlives_the_answer_to_the_one_before,
}

/// How an order stands: its state, and why it was closed.
async fn standing(fixture: &Fixture, record: &OrderRecord) -> (OrderStatus, Option<String>) {
    let found = fixture.store.admin_order(record.order_id).await.unwrap().unwrap();
    (found.order.status, found.reason)
}

async fn queued(fixture: &Fixture) -> Vec<OrderId> {
    let waiting = fixture.store.pending_releases(100, &[]).await.unwrap();
    let mut orders: Vec<OrderId> = waiting.into_iter().map(|release| release.order_id).collect();
    orders.sort_unstable();
    orders
}

async fn coupon_state(fixture: &Fixture, record: &OrderRecord) -> CouponState {
    fixture.store.coupons_of(&record.uid, 10, None).await.unwrap().items[0].state
}

async fn an_order_that_is_missing_is_stored_and_one_that_is_there_stays(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let [missing, paid] = [("a", 1), ("b", 2)].map(|(uid, seq)| order(uid, seq, &product(100, 900)));
    fixture.put(std::slice::from_ref(&paid)).await;
    fixture.store.pay(payment(&paid, "p", 100)).await.unwrap();
    let mut feed = fixture.store.updates().subscribe(missing.order_id).unwrap();
    let call = PutBack {
        held: vec![missing.order_id, paid.order_id],
        records: vec![missing.clone(), paid.clone()],
        ..PutBack::default()
    };
    let done = fixture.store.put_back(call.clone()).await.unwrap();
    assert_eq!(done, PutBackDone { inserted: 1, ..PutBackDone::default() });
    // Its buyer is told at once.
    tokio::time::timeout(std::time::Duration::from_secs(2), feed.changed()).await.unwrap();
    assert_eq!(standing(&fixture, &missing).await, (OrderStatus::Created, None));
    assert_eq!(standing(&fixture, &paid).await, (OrderStatus::Paid, None));
    assert_eq!(fixture.store.next_due(None).await.unwrap(), Some(START.plus_s(900)));
    // The queue may still bring it, and the same call may come again.
    assert_eq!(fixture.put(std::slice::from_ref(&missing)).await.duplicates, 1);
    assert_eq!(fixture.store.put_back(call).await.unwrap(), PutBackDone::default());
    assert_eq!(queued(&fixture).await, []);
    assert!(matches!(fixture.store.pay(payment(&missing, "q", 100)).await.unwrap(), PayOutcome::Paid(_)));
    // An id that is another order's changes neither.
    let other = OrderRecord { sale_id: sale("other"), ..missing.clone() };
    let call = PutBack { lost: vec![other.order_id], records: vec![other], ..PutBack::default() };
    let refused = fixture.store.put_back(call).await;
    assert!(
        matches!(&refused, Err(Error::Row(reason)) if reason.contains("of sale s already")),
        "{refused:?}"
    );
}

async fn a_claim_that_comes_after_its_order_was_closed_is_released(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(100, 900);
    let [open, paid, cancelled, given_back, lost] =
        [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)].map(|(uid, seq)| order(uid, seq, &terms));
    fixture.put(&[open.clone(), paid.clone(), cancelled.clone(), given_back.clone(), lost.clone()]).await;
    fixture.store.pay(payment(&paid, "p", 100)).await.unwrap();
    for record in [&cancelled, &given_back] {
        fixture.store.cancel(&record.uid, record.order_id).await.unwrap();
    }
    // The ledger answered when it had no claim of the one, and had given the other one's units back.
    fixture.store.releases_done(vec![given_back.order_id], vec![cancelled.order_id]).await.unwrap();
    let gone = PutBack { lost: vec![lost.order_id], ..PutBack::default() };
    assert_eq!(fixture.store.put_back(gone).await.unwrap().cancelled, 1);
    assert_eq!(queued(&fixture).await, []);
    for _ in 0..2 {
        let call = PutBack {
            held: vec![open.order_id, paid.order_id, cancelled.order_id, lost.order_id],
            released: vec![open.order_id, given_back.order_id],
            ..PutBack::default()
        };
        let done = fixture.store.put_back(call).await.unwrap();
        assert_eq!(done, PutBackDone { released_again: 3, ..PutBackDone::default() });
        let mut closed = [cancelled.order_id, given_back.order_id, lost.order_id];
        closed.sort_unstable();
        assert_eq!(queued(&fixture).await, closed);
    }
    let counts = fixture.store.counts(None).await.unwrap().sales[&sale("s")].clone();
    assert_eq!((counts.releasing.orders, counts.releasing.units), (3, 3));
    assert_eq!(counts.release_unknown.orders, 0);
    assert_eq!(standing(&fixture, &open).await, (OrderStatus::Created, None));
}

async fn an_order_whose_claim_is_lost_is_cancelled_and_gives_nothing_back(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(100, 900);
    let [open, missing, paid, cancelled] =
        [("a", 1), ("b", 2), ("c", 3), ("d", 4)].map(|(uid, seq)| order(uid, seq, &terms));
    let coupon = order("e", 5, &coupon(50));
    fixture.put(&[open.clone(), paid.clone(), cancelled.clone(), coupon.clone()]).await;
    fixture.store.pay(payment(&paid, "p", 100)).await.unwrap();
    fixture.store.cancel(&cancelled.uid, cancelled.order_id).await.unwrap();
    let all = [&open, &missing, &paid, &cancelled, &coupon];
    let call = PutBack {
        lost: all.map(|record| record.order_id).to_vec(),
        records: vec![missing.clone()],
        ..PutBack::default()
    };
    for inserted in [1, 0] {
        let done = fixture.store.put_back(call.clone()).await.unwrap();
        let paid_without_claim = vec![paid.order_id];
        assert_eq!(done, PutBackDone { inserted, cancelled: 3, released_again: 0, paid_without_claim });
    }
    let reason = Some(ACCEPTED_LOSS.to_owned());
    for record in [&open, &missing, &coupon] {
        assert_eq!(standing(&fixture, record).await, (OrderStatus::Cancelled, reason.clone()));
    }
    assert_eq!(coupon_state(&fixture, &coupon).await, CouponState::Void);
    assert_eq!(standing(&fixture, &paid).await, (OrderStatus::Paid, None));
    assert_eq!(standing(&fixture, &cancelled).await, (OrderStatus::Cancelled, None));
    // What the ledger does not hold is not given back: only the buyer's own cancel was on its way before.
    assert_eq!(queued(&fixture).await, [cancelled.order_id]);
    assert_eq!(fixture.store.expire_due(None, START.plus_s(900), 10).await.unwrap().expired, 0);
    let again = fixture.store.cancel(&open.uid, open.order_id).await.unwrap();
    assert!(matches!(again, CancelOutcome::Already(_)), "{again:?}");
    // The audit tells such an order from one whose claim is missing.
    let audited = fixture.store.audit_orders(&all.map(|record| record.order_id)).await.unwrap();
    let lost = audited.iter().filter(|order| order.lost).count();
    assert_eq!((audited.len(), lost), (5, 3));
}

async fn an_order_that_costs_nothing_is_withdrawn_only_if_nobody_had_it(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let [had, unknown] = [("a", 1), ("b", 2)].map(|(uid, seq)| order(uid, seq, &coupon(0)));
    fixture.put(std::slice::from_ref(&had)).await;
    fixture.clock.advance_ms(5);
    let call = PutBack {
        lost: vec![had.order_id, unknown.order_id],
        records: vec![had.clone(), unknown.clone()],
        ..PutBack::default()
    };
    for inserted in [1, 0] {
        let done = fixture.store.put_back(call.clone()).await.unwrap();
        let paid_without_claim = vec![had.order_id];
        assert_eq!(done, PutBackDone { inserted, cancelled: 1, released_again: 0, paid_without_claim });
        fixture.clock.advance_ms(5);
    }
    assert_eq!(coupon_state(&fixture, &had).await, CouponState::Granted);
    assert_eq!(standing(&fixture, &had).await, (OrderStatus::Paid, None));
    assert_eq!(coupon_state(&fixture, &unknown).await, CouponState::Void);
    let withdrawn = fixture.store.order(unknown.order_id).await.unwrap().unwrap();
    assert_eq!((withdrawn.status, withdrawn.paid_at), (OrderStatus::Cancelled, None));
    assert_eq!(withdrawn.paid_amount, None);
    assert_eq!(queued(&fixture).await, []);
}

async fn orders_of_another_center_are_refused_as_a_whole(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(100, 900);
    let own = order("a", 1, &terms);
    let theirs = (0..)
        .map(|n| order(&format!("u{n}"), 2, &terms))
        .find(|record| record.order_id.table().shard() != own.order_id.table().shard())
        .unwrap();
    fixture.put(&[own.clone(), theirs.clone()]).await;
    fixture.give_away(theirs.order_id.table().shard()).await;
    let [one, other] = [own.order_id, theirs.order_id];
    for call in [
        PutBack { lost: vec![one, other], ..PutBack::default() },
        PutBack { lost: vec![one], held: vec![other], ..PutBack::default() },
        PutBack { lost: vec![one], released: vec![other], ..PutBack::default() },
        PutBack { lost: vec![one], records: vec![theirs.clone()], ..PutBack::default() },
    ] {
        let refused = fixture.store.put_back(call).await;
        assert!(matches!(&refused, Err(Error::NotOwner(_))), "{refused:?}");
    }
    assert_eq!(standing(&fixture, &own).await, (OrderStatus::Created, None));
    let call = PutBack { lost: vec![one], ..PutBack::default() };
    assert_eq!(fixture.store.put_back(call).await.unwrap().cancelled, 1);
}

async fn a_release_asked_for_again_outlives_the_answer_to_the_one_before(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let record = order("a", 1, &product(100, 900));
    fixture.put(std::slice::from_ref(&record)).await;
    fixture.store.cancel(&record.uid, record.order_id).await.unwrap();
    let read = fixture.store.pending_releases(10, &[]).await.unwrap()[0].place;
    // The ledger held no claim when it was asked. It does now, and its answer arrives only now.
    let call = PutBack { held: vec![record.order_id], ..PutBack::default() };
    assert_eq!(fixture.store.put_back(call).await.unwrap().released_again, 1);
    fixture.store.releases_answered(read, Vec::new(), vec![record.order_id]).await.unwrap();
    assert_eq!(queued(&fixture).await, [record.order_id]);
    fixture.store.releases_answered(read, vec![record.order_id], Vec::new()).await.unwrap();
    assert_eq!(queued(&fixture).await, [record.order_id]);
    let read = fixture.store.pending_releases(10, &[]).await.unwrap()[0].place;
    fixture.store.releases_answered(read, vec![record.order_id], Vec::new()).await.unwrap();
    assert_eq!(queued(&fixture).await, []);
}

/// Between centers a call has to fit into a body, whatever its orders are.
#[test]
fn the_largest_call_survives_the_wire() {
    let json = format!(
        r#"{{"kind":"coupon","unit_price":999999999999,"currency":"CNY","payment_ttl_s":999999,
            "coupon":{{"discount":999999999999,"min_amount":999999999999,"valid_until":"{START}"}}}}"#
    );
    let terms: Arc<SaleTerms> = Arc::new(serde_json::from_str(&json).unwrap());
    let record = |seq| OrderRecord {
        sale_id: sale(&"s".repeat(48)),
        traceparent: Some("0".repeat(55).into()),
        ..order(&"\\".repeat(128), seq, &terms)
    };
    let records: Vec<OrderRecord> = (1..=MAX_PUT_BACK as u64).map(record).collect();
    let held = records.iter().map(|record| record.order_id).collect();
    let call = PutBack { held, records, ..PutBack::default() };
    assert!(call.is_bounded());
    let text = serde_json::to_vec(&call).unwrap();
    assert!(text.len() < crate::cross_center::calls::MAX_BODY_BYTES, "{} bytes", text.len());
    assert_eq!(serde_json::from_slice::<PutBack>(&text).unwrap(), call);
    let more = PutBack { lost: vec![call.held[0]], ..call };
    assert!(!more.is_bounded());
}

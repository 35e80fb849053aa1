use seckill_domain::{CouponState, Money, OrderStatus};

use super::*;
use crate::orders::{CancelOutcome, PayOutcome};

on_both! {
    a_payment_counts_once,
    money_for_a_closed_order_goes_on_the_refunds_list_once,
    cancelling_twice_gives_back_once,
    of_pay_cancel_and_expire_at_once_exactly_one_wins,
    a_coupon_lives_with_its_purchase,
    a_coupon_is_used_up_by_one_payment,
    a_coupon_that_does_not_fit_changes_nothing,
    only_what_is_due_and_unpaid_expires,
    a_caller_that_goes_away_stops_nothing,
}

async fn status(fixture: &Fixture, record: &OrderRecord) -> OrderStatus {
    fixture.store.order(record.order_id).await.unwrap().unwrap().status
}

async fn coupon_state(fixture: &Fixture, record: &OrderRecord) -> CouponState {
    fixture.store.coupons_of(&record.uid, 10, None).await.unwrap().items[0].state
}

async fn releases(fixture: &Fixture) -> i64 {
    fixture.store.pending_release_count().await.unwrap()
}

async fn a_payment_counts_once(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let record = order("bob", 1, &product(1999, 900));
    fixture.put(std::slice::from_ref(&record)).await;
    let wrong = fixture.store.pay(payment(&record, "p1", 1998)).await.unwrap();
    assert_eq!(wrong, PayOutcome::AmountMismatch { due: Money::new(1999).unwrap() });
    fixture.clock.advance_ms(5);
    let PayOutcome::Paid(paid) = fixture.store.pay(payment(&record, "p1", 1999)).await.unwrap() else {
        panic!()
    };
    assert_eq!((paid.status, paid.paid_at), (OrderStatus::Paid, Some(START.plus_ms(5))));
    assert_eq!(paid.paid_amount, Some(Money::new(1999).unwrap()));
    assert_eq!(fixture.store.pay(payment(&record, "p1", 1999)).await.unwrap(), PayOutcome::Replay(paid));
    // The same name for something else is neither a payment nor a refund.
    for other in [
        payment(&record, "p1", 2000),
        Payment { coupon_id: Some(record.order_id), ..payment(&record, "p1", 1999) },
        payment(&order("eve", 9, &product(1999, 900)), "p1", 1999),
    ] {
        assert_eq!(fixture.store.pay(other).await.unwrap(), PayOutcome::PaymentIdReused);
    }
    assert_eq!(fixture.store.refunds(10, None).await.unwrap().items, []);
    let stranger = fixture.store.pay(payment(&order("eve", 9, &product(1, 1)), "p2", 1)).await.unwrap();
    assert_eq!(stranger, PayOutcome::NotFound);
}

async fn money_for_a_closed_order_goes_on_the_refunds_list_once(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let terms = product(100, 900);
    let [paid, cancelled, expired] = ["a", "b", "c"].map(|uid| order(uid, 1, &terms));
    fixture.put(&[paid.clone(), cancelled.clone(), expired.clone()]).await;
    fixture.store.pay(payment(&paid, "first", 100)).await.unwrap();
    fixture.store.cancel(&cancelled.uid, cancelled.order_id).await.unwrap();
    fixture.store.expire_due(None, START.plus_s(900), 10).await.unwrap();
    for (record, id) in [(&paid, "r1"), (&cancelled, "r2"), (&expired, "r3")] {
        let first = fixture.store.pay(payment(record, id, 77)).await.unwrap();
        let PayOutcome::Closed { order, refund } = &first else { panic!("{first:?}") };
        assert_eq!((order.order_id, refund.amount), (record.order_id, Money::new(77).unwrap()));
        assert_eq!(refund.order_status, order.status);
        assert_eq!(fixture.store.pay(payment(record, id, 77)).await.unwrap(), first);
        assert_eq!(fixture.store.pay(payment(record, id, 78)).await.unwrap(), PayOutcome::PaymentIdReused);
    }
    let page = fixture.store.refunds(2, None).await.unwrap();
    let ids = |page: &crate::orders::Page<crate::orders::Refund>| {
        page.items.iter().map(|refund| refund.payment_id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&page), ["r3", "r2"]);
    let rest = fixture.store.refunds(2, page.next).await.unwrap();
    assert_eq!((ids(&rest), rest.next), (vec!["r1".to_owned()], None));
    assert_eq!(releases(&fixture).await, 2);
}

async fn cancelling_twice_gives_back_once(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let record = order("bob", 1, &product(100, 900));
    fixture.put(std::slice::from_ref(&record)).await;
    let stranger = fixture.store.cancel(&user("eve"), record.order_id).await.unwrap();
    assert_eq!(stranger, CancelOutcome::NotFound);
    let cancel = || fixture.store.cancel(&record.uid, record.order_id);
    assert!(matches!(cancel().await.unwrap(), CancelOutcome::Cancelled(_)));
    assert!(matches!(cancel().await.unwrap(), CancelOutcome::Already(_)));
    assert_eq!(releases(&fixture).await, 1);
    assert_eq!(fixture.store.expire_due(None, START.plus_s(900), 10).await.unwrap().expired, 0);
    assert_eq!((status(&fixture, &record).await, releases(&fixture).await), (OrderStatus::Cancelled, 1));
    let paid = order("eve", 2, &product(100, 900));
    fixture.put(std::slice::from_ref(&paid)).await;
    fixture.store.pay(payment(&paid, "p", 100)).await.unwrap();
    let late = fixture.store.cancel(&paid.uid, paid.order_id).await.unwrap();
    assert!(matches!(late, CancelOutcome::Closed(_)));
}

async fn of_pay_cancel_and_expire_at_once_exactly_one_wins(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let other = fixture.again().await;
    let terms = product(100, 900);
    let orders: Vec<_> = (1..=60).map(|n| order(&format!("u{n}"), n, &terms)).collect();
    fixture.put(&orders).await;
    let due = START.plus_s(900);
    let mut won = [0u64; 3];
    for record in &orders {
        let pay = fixture.store.pay(payment(record, &format!("p-{}", record.order_id), 100));
        let cancel = other.cancel(&record.uid, record.order_id);
        let expire = fixture.store.expire_due(None, due, 1);
        let (pay, cancel, expire) = tokio::join!(pay, cancel, expire);
        won[0] += u64::from(matches!(pay.unwrap(), PayOutcome::Paid(_)));
        won[1] += u64::from(matches!(cancel.unwrap(), CancelOutcome::Cancelled(_)));
        won[2] += expire.unwrap().expired;
    }
    while fixture.store.expire_due(None, due, 10).await.unwrap().more {}
    let counts = fixture.store.counts(None).await.unwrap().sales[&sale("s")].clone();
    assert_eq!(counts.of(OrderStatus::Created).orders, 0);
    assert_eq!(counts.of(OrderStatus::Paid).orders, won[0]);
    assert_eq!(counts.of(OrderStatus::Cancelled).orders, won[1]);
    let refunds = fixture.store.refunds(1000, None).await.unwrap().items.len() as u64;
    assert_eq!(refunds, 60 - won[0]);
    assert_eq!(counts.releasing.orders, 60 - won[0]);
    assert_eq!(
        counts.releasing.units,
        counts.of(OrderStatus::Cancelled).units + counts.of(OrderStatus::Expired).units
    );
    other.close().await;
}

async fn a_coupon_lives_with_its_purchase(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let free = order("free", 1, &coupon(0));
    let [bought, given_up, overdue] =
        [("bought", 2), ("given-up", 3), ("overdue", 4)].map(|(uid, seq)| order(uid, seq, &coupon(50)));
    fixture.put(&[free.clone(), bought.clone(), given_up.clone(), overdue.clone()]).await;
    // What costs nothing is settled at once; nothing of it expires.
    assert_eq!(status(&fixture, &free).await, OrderStatus::Paid);
    assert_eq!(coupon_state(&fixture, &free).await, CouponState::Granted);
    assert!(matches!(
        fixture.store.cancel(&free.uid, free.order_id).await.unwrap(),
        CancelOutcome::Closed(_)
    ));
    for record in [&bought, &given_up, &overdue] {
        assert_eq!(coupon_state(&fixture, record).await, CouponState::Pending);
    }
    fixture.store.pay(payment(&bought, "p", 50)).await.unwrap();
    fixture.store.cancel(&given_up.uid, given_up.order_id).await.unwrap();
    assert_eq!(fixture.store.expire_due(None, START.plus_s(900), 10).await.unwrap().expired, 1);
    assert_eq!(coupon_state(&fixture, &bought).await, CouponState::Granted);
    assert_eq!(coupon_state(&fixture, &given_up).await, CouponState::Void);
    assert_eq!(coupon_state(&fixture, &overdue).await, CouponState::Void);
}

async fn a_coupon_is_used_up_by_one_payment(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let free = order("bob", 1, &coupon(0));
    let [first, second] = [2, 3].map(|seq| order("bob", seq, &product(1200, 900)));
    fixture.put(&[free.clone(), first.clone(), second.clone()]).await;
    let with = |record: &OrderRecord, id: &str, amount| Payment {
        coupon_id: Some(free.order_id),
        ..payment(record, id, amount)
    };
    let full = fixture.store.pay(with(&first, "p1", 1200)).await.unwrap();
    assert_eq!(full, PayOutcome::AmountMismatch { due: Money::new(700).unwrap() });
    assert_eq!(coupon_state(&fixture, &free).await, CouponState::Granted);
    let one = fixture.store.pay(with(&first, "p1", 700));
    let two = fixture.store.pay(with(&second, "p2", 700));
    let (one, two) = tokio::join!(one, two);
    let outcomes = [one.unwrap(), two.unwrap()];
    assert_eq!(outcomes.iter().filter(|outcome| matches!(outcome, PayOutcome::Paid(_))).count(), 1);
    assert!(outcomes.contains(&PayOutcome::CouponUnusable { reason: "the coupon is used" }), "{outcomes:?}");
    let used = fixture.store.coupons_of(&free.uid, 10, None).await.unwrap().items.remove(0);
    assert_eq!(used.state, CouponState::Redeemed);
    let redeemed_by = fixture.store.order(used.redeemed_by.unwrap()).await.unwrap().unwrap();
    assert_eq!((redeemed_by.status, redeemed_by.coupon_id), (OrderStatus::Paid, Some(free.order_id)));
}

async fn a_coupon_that_does_not_fit_changes_nothing(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let free = order("bob", 1, &coupon(0));
    let unpaid = order("bob", 2, &coupon(50));
    let cheap = order("bob", 3, &product(999, 9000));
    let dear = order("bob", 4, &product(1000, 9000));
    let dollars: Arc<SaleTerms> = Arc::new(
        serde_json::from_str(r#"{"kind":"product","unit_price":2000,"currency":"USD","payment_ttl_s":9000}"#)
            .unwrap(),
    );
    let foreign = order("bob", 5, &dollars);
    let others = order("eve", 6, &coupon(0));
    fixture
        .put(&[free.clone(), unpaid.clone(), cheap.clone(), dear.clone(), foreign.clone(), others.clone()])
        .await;
    let pay = async |record: &OrderRecord, coupon: &OrderRecord| {
        let payment = Payment { coupon_id: Some(coupon.order_id), ..payment(record, "p", 500) };
        match fixture.store.pay(payment).await.unwrap() {
            PayOutcome::CouponUnusable { reason } => reason,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(pay(&cheap, &free).await, "the order costs too little for the coupon");
    assert_eq!(pay(&dear, &unpaid).await, "the coupon is not paid");
    assert_eq!(pay(&foreign, &free).await, "the coupon is of another currency");
    assert_eq!(pay(&dear, &others).await, "the buyer has no such coupon");
    assert_eq!(pay(&dear, &dear).await, "the buyer has no such coupon");
    fixture.clock.advance_ms(3_600_001);
    assert_eq!(pay(&dear, &free).await, "the coupon is no longer valid");
    fixture.clock.advance_ms(-1);
    let last = Payment { coupon_id: Some(free.order_id), ..payment(&dear, "p", 500) };
    assert!(matches!(fixture.store.pay(last).await.unwrap(), PayOutcome::Paid(_)));
}

async fn only_what_is_due_and_unpaid_expires(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let [soon, paid, later] =
        [("soon", 10), ("paid", 10), ("later", 11)].map(|(uid, ttl)| order(uid, 1, &product(100, ttl)));
    fixture.put(&[soon.clone(), paid.clone(), later.clone()]).await;
    fixture.store.pay(payment(&paid, "p", 100)).await.unwrap();
    assert_eq!(fixture.store.next_due(None).await.unwrap(), Some(START.plus_s(10)));
    assert_eq!(fixture.store.expire_due(None, START.plus_ms(9_999), 10).await.unwrap().expired, 0);
    let outcome = fixture.store.expire_due(None, START.plus_s(10), 1).await.unwrap();
    assert!(outcome.more);
    let outcome_2 = fixture.store.expire_due(None, START.plus_s(10), 10).await.unwrap();
    assert_eq!(outcome.expired + outcome_2.expired, 1);
    assert_eq!(status(&fixture, &soon).await, OrderStatus::Expired);
    assert_eq!(status(&fixture, &paid).await, OrderStatus::Paid);
    assert_eq!(status(&fixture, &later).await, OrderStatus::Created);
    // What came due while nobody looked may be left out for a while.
    assert_eq!(
        fixture.store.expire_due(Some(START.plus_s(11)), START.plus_s(20), 10).await.unwrap().expired,
        0
    );
    assert_eq!(fixture.store.expire_due(None, START.plus_s(20), 10).await.unwrap().expired, 1);
    assert_eq!(fixture.number("SELECT COUNT(*) FROM expiries").await, 0);
}

async fn a_caller_that_goes_away_stops_nothing(kind: Kind) {
    let mut fixture = Fixture::on(kind).await;
    let orders: Vec<_> = (1..=50).map(|n| order(&format!("u{n}"), n, &product(100, 900))).collect();
    fixture.put(&orders).await;
    for record in &orders {
        let mut pay = Box::pin(fixture.store.pay(payment(record, &format!("p{}", record.order_id), 100)));
        // Polled once, then dropped, as a handler whose client is gone.
        assert!(futures_util::FutureExt::now_or_never(&mut pay).is_none());
    }
    eventually(async || {
        let counts = fixture.store.counts(None).await.unwrap().sales[&sale("s")].clone();
        counts.of(OrderStatus::Paid).orders == 50
    })
    .await;
}

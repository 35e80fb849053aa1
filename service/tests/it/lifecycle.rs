//! From the stored order to its end, and the stock that comes back.

use hyper::Method;
use serde_json::json;

use crate::support::eventually;
use crate::up::Up;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_order_gives_its_unit_to_the_next_buyer_without_a_restart() {
    let up = Up::start();
    let client = up.client();
    client.create_sale("s", 1, json!({})).await;
    let won = client.buy_until_known("s", "alice", "k").await;
    let id = won.body["order_id"].as_str().unwrap().to_owned();
    client.stored_order("alice", &id).await;
    // Often enough that the marker answers.
    for n in 0..50 {
        assert_eq!(client.buy_until_known("s", &format!("loser-{n}"), "k").await.code(), "sold_out");
    }
    let again = client.buy_until_known("s", "alice", "k").await;
    assert_eq!((again.status, again.body["order_id"].as_str()), (202, Some(id.as_str())));

    let cancelled = client.user(Method::POST, &format!("/v1/orders/{id}/cancel"), "alice", None).await;
    assert_eq!(
        (cancelled.status, cancelled.body["status"].as_str()),
        (200, Some("cancelled")),
        "{}",
        cancelled.body
    );
    eventually("the unit is sold again", async || {
        let answer = client.buy_until_known("s", "bob", "k").await;
        (answer.status == 202).then_some(())
    })
    .await;
    // A cancel that is repeated gives nothing back a second time.
    client.user(Method::POST, &format!("/v1/orders/{id}/cancel"), "alice", None).await;
    assert_eq!(client.buy_until_known("s", "carol", "k").await.code(), "sold_out");
    let replay = client.buy_until_known("s", "alice", "k").await;
    assert_eq!(
        (replay.status, replay.body["order_id"].as_str()),
        (202, Some(id.as_str())),
        "a tombstone replays"
    );
    up.assert_books_balance();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unpaid_order_expires_once_even_when_the_process_dies_meanwhile() {
    let mut up = Up::start();
    let client = up.client();
    client.create_sale("s", 20, json!({"payment_ttl_s": 1})).await;
    let mut ids = Vec::new();
    for n in 0..20 {
        let uid = format!("u{n}");
        let answer = client.buy_until_known("s", &uid, "k").await;
        ids.push((uid, answer.body["order_id"].as_str().unwrap().to_owned()));
    }
    for (uid, id) in &ids {
        client.stored_order(uid, id).await;
    }
    // Die as soon as the first one has expired: others are half-way.
    eventually("one has expired", async || {
        for (uid, id) in &ids {
            if client.order_status(uid, id).await == "expired" {
                return Some(());
            }
        }
        None
    })
    .await;
    up.kill();
    up.spawn(&[("SECKILL__ORDERS__EXPIRY_GRACE_S", "0")]);
    up.wait_ready();
    let client = up.client();
    eventually("all stock is back", async || (client.remaining("s").await == 20).then_some(())).await;
    let late = client.pay(&ids[0].1, json!({"payment_id": "p1", "amount": 1999})).await;
    assert_eq!((late.status, late.code()), (409, "order_closed"), "{}", late.body);
    let refunds = client.admin(Method::GET, "/admin/v1/refunds", &[], None).await;
    assert!(refunds.body.to_string().contains("p1"), "{}", refunds.body);
    let audit = up.assert_books_balance();
    assert_eq!(audit["sales"][0]["remaining"], json!(20), "{audit}");
    assert_eq!(audit["sales"][0]["orders"]["expired"], json!(20), "{audit}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coupon_is_claimed_and_lowers_a_payment_once() {
    let up = Up::start();
    let client = up.client();
    client.create_sale("s", 10, json!({"per_user_limit": 5})).await;
    client
        .create_sale(
            "c",
            10,
            json!({"kind": "coupon", "price": 0, "discount": 500, "min_amount": 1000, "valid_until": "2099-01-01T00:00:00Z"}),
        )
        .await;
    let coupon = client.buy_until_known("c", "alice", "k").await;
    let coupon_id = coupon.body["order_id"].as_str().unwrap().to_owned();
    client.stored_order("alice", &coupon_id).await;
    let list = client.user(Method::GET, "/v1/coupons", "alice", None).await;
    assert!(list.body.to_string().contains(&coupon_id), "{}", list.body);

    let mut orders = Vec::new();
    for key in ["k1", "k2"] {
        let answer = client.buy_until_known("s", "alice", key).await;
        orders.push(answer.body["order_id"].as_str().unwrap().to_owned());
        client.stored_order("alice", &orders[orders.len() - 1]).await;
    }
    let wrong =
        client.pay(&orders[0], json!({"payment_id": "p0", "amount": 1999, "coupon_id": coupon_id})).await;
    assert_eq!((wrong.status, wrong.code()), (422, "amount_mismatch"), "{}", wrong.body);
    let payment = json!({"payment_id": "p1", "amount": 1499, "coupon_id": coupon_id});
    let paid = client.pay(&orders[0], payment.clone()).await;
    assert_eq!((paid.status, paid.body["status"].as_str()), (200, Some("paid")), "{}", paid.body);
    let replay = client.pay(&orders[0], payment).await;
    assert_eq!((replay.status, replay.body["status"].as_str()), (200, Some("paid")), "{}", replay.body);
    let twice =
        client.pay(&orders[1], json!({"payment_id": "p2", "amount": 1499, "coupon_id": coupon_id})).await;
    assert_eq!((twice.status, twice.code()), (409, "coupon_unusable"), "{}", twice.body);
    // A buyer cannot mark an order paid.
    let own = client
        .user(
            Method::POST,
            &format!("/v1/orders/{}/pay", orders[1]),
            "alice",
            Some(json!({"payment_id": "p3", "amount": 1999})),
        )
        .await;
    assert_eq!(own.status, 401, "{}", own.body);
    up.assert_books_balance();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_are_seen_by_their_owner_only() {
    let up = Up::start();
    let client = up.client();
    client.create_sale("s", 10, json!({})).await;
    let answer = client.buy_until_known("s", "Bob", "k").await;
    let id = answer.body["order_id"].as_str().unwrap().to_owned();
    client.stored_order("Bob", &id).await;
    for other in ["bob", "alice"] {
        let answer = client.user(Method::GET, &format!("/v1/orders/{id}"), other, None).await;
        assert_eq!((answer.status, answer.code()), (404, "order_not_found"));
        let answer = client.user(Method::POST, &format!("/v1/orders/{id}/cancel"), other, None).await;
        assert_eq!((answer.status, answer.code()), (404, "order_not_found"));
    }
    let mine = client.user(Method::GET, "/v1/orders", "Bob", None).await;
    assert!(mine.body.to_string().contains(&id), "{}", mine.body);
}

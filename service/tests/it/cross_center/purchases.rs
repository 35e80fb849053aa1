//! What reaches the center that is not the master.

use std::sync::atomic::Ordering;

use http::Method;
use seckill::inventory::PurchaseError;
use seckill_domain::{SaleId, Uid};
use serde_json::json;

use crate::pair::Pair;
use crate::support::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_bought_in_the_other_center_is_decided_by_the_master() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    for n in 0..20 {
        let uid = format!("u{n}");
        let home = pair.b.topology.current().home_center(Uid::new(&uid).unwrap().table().shard()).clone();
        let (order, replayed) = pair.b.buy(&sale, &uid, "k").await.unwrap();
        assert!(!replayed);
        assert_eq!(
            &order[..1],
            if home == pair.a.id { "1" } else { "2" },
            "the home center's number travels"
        );
        assert_eq!(pair.b.buy(&sale, &uid, "k").await.unwrap(), (order.clone(), true));
        assert_eq!(pair.a.buy(&sale, &uid, "k").await.unwrap(), (order, true));
        assert_eq!(pair.b.buy(&sale, &uid, "other").await, Err(PurchaseError::LimitExceeded));
    }
    assert_eq!(pair.accepted(&sale).await, 20);
    let unknown = SaleId::new("nothing").unwrap();
    assert_eq!(pair.b.buy(&unknown, "u", "k").await, Err(PurchaseError::SaleNotFound));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_sent_to_both_centers_gives_one_order() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 1000).await;
    let asked = (0..300).map(|n| {
        let (pair, sale, uid) = (&pair, &sale, format!("u{n}"));
        async move {
            let (from_a, from_b) = tokio::join!(pair.a.buy(sale, &uid, "k"), pair.b.buy(sale, &uid, "k"));
            let ((first, replayed_a), (second, replayed_b)) = (from_a.unwrap(), from_b.unwrap());
            assert_eq!(first, second);
            assert_ne!(replayed_a, replayed_b, "one of the two was first");
        }
    });
    futures_util::future::join_all(asked).await;
    assert_eq!(pair.accepted(&sale).await, 300);
    let (batches, batched) =
        (pair.b.inventory.metrics().batches.get(), pair.b.inventory.metrics().batched.get());
    assert!(batches < batched, "{batched} purchases in {batches} calls");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_is_asked_for_again_under_the_same_keys() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    pair.b.buy(&sale, "first", "k").await.unwrap();
    for n in 0..5 {
        pair.line.losing.store(1, Ordering::SeqCst);
        let (order, replayed) = pair.b.buy(&sale, &format!("u{n}"), "k").await.unwrap();
        assert!(!replayed, "an attempt of the service's own is no replay");
        assert_eq!(pair.b.buy(&sale, &format!("u{n}"), "k").await.unwrap(), (order, true));
    }
    assert_eq!(pair.line.lost.load(Ordering::SeqCst), 5);
    assert_eq!(pair.accepted(&sale).await, 6);
    assert!(pair.b.inventory.metrics().unknown.get() > 0, "no answer was lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sold_out_is_known_in_the_other_center_without_asking_again() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 3).await;
    for n in 0..3 {
        pair.b.buy(&sale, &format!("u{n}"), "k").await.unwrap();
    }
    let hits = || pair.b.inventory.metrics().marker_hits.get();
    eventually("the marker answers", async || {
        assert_eq!(pair.b.buy(&sale, "loser", "k").await, Err(PurchaseError::SoldOut));
        (hits() > 0).then_some(())
    })
    .await;
    for n in 0..3 {
        assert!(pair.b.buy(&sale, &format!("u{n}"), "k").await.unwrap().1, "a winner never hears sold_out");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_asked_of_the_wrong_center_is_answered_by_its_own() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    let topology = pair.b.topology.current();
    let mut at_home = (0..)
        .map(|n| format!("u{n}"))
        .filter(|uid| topology.home_center(Uid::new(uid).unwrap().table().shard()) == &pair.a.id);
    let (uid, somebody) = (at_home.next().unwrap(), at_home.next().unwrap());
    let (order, _) = pair.b.buy(&sale, &uid, "k").await.unwrap();
    let path = format!("/v1/orders/{order}");
    let stored = eventually("the order is stored", async || {
        let (status, headers, body) = pair.b.ask(Method::GET, &path, &uid).await;
        assert_eq!((status, headers["seckill-home"].to_str().unwrap()), (200, "a"), "{body}");
        (body["status"] == "created").then_some(body)
    })
    .await;
    assert_eq!(pair.a.ask(Method::GET, &path, &uid).await.2, stored);
    let (_, _, listed) = pair.b.ask(Method::GET, "/v1/orders?limit=5", &uid).await;
    assert_eq!(listed["orders"][0]["order_id"], order);
    assert_eq!(pair.b.ask(Method::GET, "/v1/coupons", &uid).await.0, 200);
    // Somebody else's order does not exist, whoever is asked.
    let other = pair.b.ask(Method::GET, &path, &somebody).await;
    assert_eq!((other.0, &other.2["code"]), (404, &json!("order_not_found")));
    let (status, headers, _) = pair.b.ask(Method::GET, &format!("{path}/events"), &uid).await;
    assert_eq!(
        (status, headers["location"].to_str().unwrap()),
        (307, &*format!("http://public-1{path}/events"))
    );
    let (status, headers, body) = pair.b.ask(Method::POST, &format!("{path}/cancel"), &uid).await;
    assert_eq!((status, &body["status"]), (200, &json!("cancelled")), "{body}");
    assert_eq!(headers["seckill-home"], "a");
}

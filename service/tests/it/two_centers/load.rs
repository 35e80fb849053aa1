//! Shoppers and the back office in both centers at once.

use std::collections::HashSet;
use std::time::Instant;

use http::Method;
use seckill_domain::{SHARDS, Uid};
use serde_json::json;

use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{Crowd, ask_again, assert_audits_clean, compare_books, user_of};
use crate::support::eventually;

use super::behind::Behind;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_on_both_centers_sells_each_unit_once_and_stores_each_order_at_home() {
    load_on_both(&Centers::start(CentersOptions::default()).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_kafka_mariadb_and_etcd_load_on_both_centers_does_the_same() {
    let behind = Behind::start().await;
    load_on_both(&Centers::start(behind.options()).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls_the_back_office_and_shoppers_of_both_centers_are_served() {
    let centers = Centers::start(CentersOptions { tls: true, ..CentersOptions::default() }).await;
    centers.client(Which::B).create_sale("phone", 100, json!({})).await;
    let heard = Crowd::start(&centers, "phone", "u", 16, 150).finish().await;
    assert_eq!((heard.bought.len(), heard.sold_out), (100, 50));
    assert_eq!(compare_books(&centers, Which::A, "phone", &heard.bought).await, 100);
    assert_audits_clean(&centers).await;
}

async fn load_on_both(centers: &Centers) {
    const UNITS: usize = 1500;
    const USERS: usize = 2500;
    let [a, b] = BOTH.map(|which| centers.client(which));
    // The back office asks b; the master decides, and both show it.
    b.create_sale("phone", UNITS as u64, json!({})).await;
    eventually("a shows the sale", async || (a.remaining("phone").await == UNITS as u64).then_some(())).await;

    let started = Instant::now();
    let heard = Crowd::start(centers, "phone", "u", 64, USERS as u64).finish().await;
    println!("{UNITS} of {USERS} purchases in {:?}; asked again: {:?}", started.elapsed(), heard.again);
    assert_eq!((heard.bought.len(), heard.sold_out), (UNITS, (USERS - UNITS) as u64));
    let orders: HashSet<&str> = heard.bought.iter().map(|bought| bought.order_id.as_str()).collect();
    assert_eq!(orders.len(), UNITS, "an order went to two users");
    let shards: HashSet<u8> =
        heard.bought.iter().map(|bought| Uid::new(&bought.uid).unwrap().table().shard().number()).collect();
    assert_eq!(shards.len(), usize::from(SHARDS));
    assert_eq!(compare_books(centers, Which::A, "phone", &heard.bought).await, UNITS as u64);
    for client in [&a, &b] {
        ask_again(client, "phone", &heard.bought[..100]).await;
        eventually("it is shown as sold out", async || {
            (client.get("/v1/sales/phone").await.body["state"] == "sold_out").then_some(())
        })
        .await;
    }

    // Stock comes back: asked of b, twice, it is there once, and both sell at once.
    let stock = async |key: &str, delta: i64| {
        let headers = [("idempotency-key", key)];
        b.admin(Method::POST, "/admin/v1/sales/phone/stock", &headers, Some(json!({"delta": delta}))).await
    };
    for _ in 0..2 {
        let answer = stock("more", 10).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    let mut late = Vec::new();
    for (which, client) in BOTH.into_iter().zip([&a, &b]) {
        let uid = user_of(which.other(), &format!("late-{}-", which.id()));
        let since = Instant::now();
        let order = eventually("it is on sale again", async || {
            let answer = client.buy("phone", &uid, "k", 1).await?;
            (answer.status == 202).then(|| answer.body["order_id"].as_str().unwrap().to_owned())
        })
        .await;
        println!("bought in {} {:?} after the restock", which.id(), since.elapsed());
        late.push((uid, order));
    }
    for client in [&a, &b] {
        eventually("both show what is left", async || (client.remaining("phone").await == 8).then_some(()))
            .await;
    }

    // Paused in b, resumed in a: both refuse, both sell again.
    let call = async |which: Which, what: &str| {
        let path = format!("/admin/v1/sales/phone/{what}");
        let answer = centers.client(which).admin(Method::POST, &path, &[], None).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    call(Which::B, "pause").await;
    for (which, client) in BOTH.into_iter().zip([&a, &b]) {
        let uid = format!("paused-{}", which.id());
        eventually("it is paused", async || {
            (client.buy("phone", &uid, "k", 1).await?.code() == "paused").then_some(())
        })
        .await;
    }
    call(Which::A, "resume").await;
    for (which, client) in BOTH.into_iter().zip([&a, &b]) {
        eventually("it is on sale", async || {
            (client.get("/v1/sales/phone").await.body["state"] == "on_sale").then_some(())
        })
        .await;
        // The order of a user at home in the other center: read, cancelled, and its unit is back in both.
        let (uid, order) = &late[usize::from(which.number() - 1)];
        let stored = client.stored_order(uid, order).await;
        assert_eq!(stored["status"], "created");
        let cancelled = client.user(Method::POST, &format!("/v1/orders/{order}/cancel"), uid, None).await;
        assert_eq!(
            (cancelled.status, &cancelled.body["status"]),
            (200, &json!("cancelled")),
            "{cancelled:?}"
        );
    }
    for client in [&a, &b] {
        eventually("both units are back", async || (client.remaining("phone").await == 10).then_some(()))
            .await;
    }

    // Stock that changed and orders that were given back are in the books, too.
    assert_audits_clean(centers).await;

    // A limit set in b holds in both.
    let limits = b.admin(Method::GET, "/admin/v1/topology", &[], None).await.body["limits"].clone();
    let mut tight = limits.clone();
    tight["per_user"] = json!({"per_second": 1, "burst": 1});
    let answer = b.admin(Method::PUT, "/admin/v1/limits", &[], Some(tight)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    for client in [&a, &b] {
        eventually("the limit holds", async || {
            (client.buy("phone", "eager", "k", 1).await?.status == 429).then_some(())
        })
        .await;
    }
}

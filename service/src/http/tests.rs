//! Both routers over a real ledger, order database and topology.

mod described;
mod hostile;
mod shop;

use std::time::Duration;

use serde_json::json;

use shop::{ADMIN, PAYMENTS, Shop, USERS, token};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purchase_becomes_an_order_that_is_paid() {
    let shop = Shop::open().await;
    shop.sale(json!({"sale_id": "s", "kind": "product", "quantity": 5, "price": 1999, "currency": "CNY"}))
        .await;
    let bought = shop.buy("s", "bob", "key-1").await;
    assert_eq!(bought.status, 202, "{bought:?}");
    let order_id = bought.body["order_id"].as_str().unwrap().to_owned();
    assert_eq!(bought.header("location"), format!("/v1/orders/{order_id}"));
    assert_eq!(
        bought.body,
        json!({"order_id": order_id, "sale_id": "s", "quantity": 1, "status": "queued", "home_center": "a",
               "poll_after_ms": 100})
    );
    assert_eq!(bought.headers.get("idempotent-replayed"), None);

    let replay = shop.buy("s", "bob", "\"key-1\"").await;
    assert_eq!((replay.status, &replay.body), (202, &bought.body));
    assert_eq!(replay.header("idempotent-replayed"), "true");
    let other = shop.purchase("s", &token("bob", USERS), Some("key-1"), r#"{"quantity":2}"#).await;
    other.is_problem(422, "idempotency_key_reused");
    shop.buy("s", "bob", "key-2").await.is_problem(409, "limit_exceeded");

    let path = format!("/v1/orders/{order_id}");
    let order = shop.stored(&path, "bob").await;
    assert_eq!((&order["status"], &order["amount"]), (&json!("created"), &json!(1999)));
    assert!(order.get("uid").is_none());
    shop.get(&path, Some(&token("eve", USERS))).await.is_problem(404, "order_not_found");
    let listed = shop.get("/v1/orders?limit=10", Some(&token("bob", USERS))).await;
    assert_eq!((&listed.body["orders"][0], &listed.body["next_cursor"]), (&order, &json!(null)));

    let pay = format!("{path}/pay");
    let body = |amount: u32| json!({"payment_id": "p-1", "amount": amount}).to_string();
    shop.post(&pay, Some(&token("bob", USERS)), &body(1999)).await.is_problem(401, "unauthenticated");
    let payments = token("shop", PAYMENTS);
    let wrong = shop.post(&pay, Some(&payments), &body(1)).await;
    wrong.is_problem(422, "amount_mismatch");
    assert_eq!(wrong.body["due"], 1999);
    let paid = shop.post(&pay, Some(&payments), &body(1999)).await;
    assert_eq!((paid.status, &paid.body["status"]), (200, &json!("paid")));
    let again = shop.post(&pay, Some(&payments), &body(1999)).await;
    assert_eq!((again.status, again.header("idempotent-replayed"), &again.body), (200, "true", &paid.body));
    let second = json!({"payment_id": "p-2", "amount": 1999}).to_string();
    shop.post(&pay, Some(&payments), &second).await.is_problem(409, "order_closed");
    let refunds = shop.admin_get("/admin/v1/refunds").await;
    assert_eq!(refunds.body["refunds"][0]["payment_id"], "p-2");
    shop.post(&format!("{path}/cancel"), Some(&token("bob", USERS)), "")
        .await
        .is_problem(409, "order_closed");
    let seen = shop.admin_get(&format!("/admin/v1{}", &path[3..])).await;
    assert_eq!(seen.body["uid"], "bob");
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_straight_after_the_purchase_waits_for_the_order() {
    let shop = Shop::open().await;
    shop.sale(json!({"sale_id": "s", "kind": "product", "quantity": 1, "price": 5, "currency": "CNY"})).await;
    let bought = shop.buy("s", "bob", "k").await;
    let path = format!("/v1/orders/{}/cancel", bought.body["order_id"].as_str().unwrap());
    let bob = token("bob", USERS);
    shop.post(&path, Some(&token("eve", USERS)), "{}").await.is_problem(404, "order_not_found");
    let cancelled = shop.post(&path, Some(&bob), "").await;
    assert_eq!((cancelled.status, &cancelled.body["status"]), (200, &json!("cancelled")));
    assert_eq!(shop.post(&path, Some(&bob), "{}").await.body, cancelled.body);
    // The unit is back, and is sold again.
    shop.eventually("the unit is sold again", async || {
        (shop.buy("s", "eve", "k").await.status == 202).then_some(())
    })
    .await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sales_are_cached_and_changed_only_at_the_version_that_was_seen() {
    let shop = Shop::open().await;
    let spec = json!({"sale_id": "s", "kind": "product", "quantity": 5, "price": 5, "currency": "CNY"});
    shop.sale(spec.clone()).await;
    let sale = shop.get("/v1/sales/s", None).await;
    assert_eq!((sale.status, sale.header("cache-control")), (200, "public, max-age=1"));
    assert_eq!((&sale.body["state"], &sale.body["remaining"]), (&json!("on_sale"), &json!(5)));
    let etag = sale.header("etag").to_owned();
    let again = shop.call("GET", "/v1/sales/s", &[("if-none-match", &etag)], "").await;
    assert_eq!((again.status, again.header("etag")), (304, &*etag));
    let list = shop.get("/v1/sales", None).await;
    assert_eq!(list.body["sales"][0]["sale_id"], "s");
    let etag = list.header("etag").to_owned();
    assert_eq!(shop.call("GET", "/v1/sales", &[("if-none-match", &etag)], "").await.status, 304);

    let path = "/admin/v1/sales/s";
    let patch = r#"{"title":"new"}"#;
    shop.admin("PATCH", path, &[], patch).await.is_problem(428, "precondition_required");
    shop.admin("PATCH", path, &[("if-match", "\"9\"")], patch).await.is_problem(412, "version_mismatch");
    let seen = shop.admin_get(path).await;
    let version = seen.header("etag").to_owned();
    let changed = shop.admin("PATCH", path, &[("if-match", &version)], patch).await;
    assert_eq!((changed.status, &changed.body["title"]), (200, &json!("new")));
    let version = changed.header("etag").to_owned();
    let price = shop.admin("PATCH", path, &[("if-match", &version)], r#"{"price":1}"#).await;
    price.is_problem(409, "sale_started");

    let stock = "/admin/v1/sales/s/stock";
    shop.admin("POST", stock, &[], r#"{"delta":3}"#).await.is_problem(400, "idempotency_key_missing");
    let key = [("idempotency-key", "st-1")];
    let added = shop.admin("POST", stock, &key, r#"{"delta":3}"#).await;
    assert_eq!((added.status, &added.body["total"], &added.body["remaining"]), (200, &json!(8), &json!(8)));
    let replayed = shop.admin("POST", stock, &key, r#"{"delta":3}"#).await;
    assert_eq!((replayed.header("idempotent-replayed"), &replayed.body["total"]), ("true", &json!(8)));
    shop.admin("POST", stock, &key, r#"{"delta":4}"#).await.is_problem(422, "idempotency_key_reused");
    let key = [("idempotency-key", "st-2")];
    shop.admin("POST", stock, &key, r#"{"delta":-9}"#).await.is_problem(409, "below_claimed");

    assert_eq!(shop.admin("POST", "/admin/v1/sales/s/pause", &[], "").await.body["state"], "paused");
    shop.buy("s", "bob", "k").await.is_problem(409, "paused");
    assert_eq!(shop.admin("POST", "/admin/v1/sales/s/resume", &[], "{}").await.body["state"], "on_sale");
    shop.admin("POST", "/admin/v1/sales/s/archive", &[], "").await.is_problem(409, "not_ended");
    assert_eq!(shop.admin("POST", "/admin/v1/sales/s/end", &[], "").await.body["state"], "ended");
    let archived = shop.admin("POST", "/admin/v1/sales/s/archive", &[], "").await;
    assert_eq!((archived.status, &archived.body["archived"]), (200, &json!(true)));
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_sales_are_created_with_a_result_per_line() {
    let shop = Shop::open().await;
    let line = |id: &str, price: i64| {
        json!({"sale_id": id, "kind": "product", "quantity": 1, "price": price, "currency": "CNY"})
            .to_string()
    };
    let huge = format!("{{\"title\":\"{}\"}}", "x".repeat(17 * 1024));
    let lines = [
        line("a", 1),
        line("a", 1),
        line("a", 2),
        String::new(),
        "{broken".into(),
        line("b", -1),
        huge,
        line("c", 0),
    ];
    let headers = [("content-type", "application/x-ndjson")];
    let answer = shop.admin("POST", "/admin/v1/sales", &headers, &lines.join("\n")).await;
    assert_eq!(answer.status, 200);
    let results: Vec<(u64, u64, Option<String>)> = answer
        .text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|result| {
            let code = result.get("code").and_then(|code| code.as_str()).map(str::to_owned);
            (result["line"].as_u64().unwrap(), result["status"].as_u64().unwrap(), code)
        })
        .collect();
    // The first three race for one id: one is created, and the one that differs loses to it or wins over both.
    assert_eq!(results.iter().map(|(line, _, _)| *line).collect::<Vec<_>>(), [1, 2, 3, 5, 6, 7, 8]);
    assert_eq!(results[..3].iter().filter(|(_, status, _)| *status == 201).count(), 1);
    assert_eq!(results[3], (5, 400, Some("bad_request".into())));
    assert_eq!(results[4], (6, 400, Some("bad_request".into())));
    assert_eq!(results[5], (7, 413, Some("payload_too_large".into())));
    assert_eq!(results[6], (8, 201, None));
    let single = [("content-type", "application/json")];
    assert_eq!(shop.admin("POST", "/admin/v1/sales", &single, &line("d", 1)).await.status, 201);
    assert_eq!(shop.admin("POST", "/admin/v1/sales", &single, &line("d", 1)).await.status, 200);
    shop.admin("POST", "/admin/v1/sales", &single, &line("d", 2)).await.is_problem(409, "sale_exists");
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_streams_until_it_is_settled_and_a_ticket_opens_it() {
    let shop = Shop::open().await;
    shop.sale(json!({"sale_id": "s", "kind": "product", "quantity": 5, "price": 5, "currency": "CNY"})).await;
    let bought = shop.buy("s", "bob", "k").await;
    let path = format!("/v1/orders/{}", bought.body["order_id"].as_str().unwrap());
    let bob = token("bob", USERS);
    let ticket = shop.post(&format!("{path}/ticket"), Some(&bob), "").await;
    assert_eq!((ticket.status, &ticket.body["expires_in_s"]), (201, &json!(60)));
    shop.post(&format!("{path}/ticket"), Some(&token("eve", USERS)), "")
        .await
        .is_problem(404, "order_not_found");
    let url = ticket.body["events_url"].as_str().unwrap().to_owned();
    shop.get(&format!("{path}/events"), None).await.is_problem(401, "unauthenticated");
    shop.get(&format!("{path}/events?ticket=x"), None).await.is_problem(401, "unauthenticated");

    let mut stream = shop.stream(&url, &[]).await;
    stream.until("event: order", Duration::from_secs(5)).await;
    shop.post(&format!("{path}/cancel"), Some(&bob), "").await;
    let text = stream.rest(Duration::from_secs(10)).await;
    assert!(text.contains("event: settled\nid: 2\ndata: {"), "{text}");
    assert_eq!(shop.call("GET", &url, &[("last-event-id", "2")], "").await.status, 204);
    let first_time = shop.stream(&url, &[]).await.rest(Duration::from_secs(5)).await;
    assert!(first_time.starts_with("event: settled"), "{first_time}");
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sale_streams_its_course_and_ends_with_it_or_with_the_service() {
    let shop = Shop::open().await;
    shop.sale(json!({"sale_id": "s", "kind": "product", "quantity": 1, "price": 5, "currency": "CNY"})).await;
    shop.sale(json!({"sale_id": "t", "kind": "product", "quantity": 1, "price": 5, "currency": "CNY"})).await;
    let mut stream = shop.stream("/v1/sales/s/events", &[]).await;
    stream.until("\"remaining\":1", Duration::from_secs(5)).await;
    shop.buy("s", "bob", "k").await;
    stream.until("\"state\":\"sold_out\"", Duration::from_secs(5)).await;
    shop.admin("POST", "/admin/v1/sales/s/end", &[], "").await;
    let text = stream.rest(Duration::from_secs(10)).await;
    assert!(text.contains("event: settled"), "{text}");
    assert_eq!(shop.call("GET", "/v1/sales/s/events", &[("last-event-id", "99")], "").await.status, 204);

    let mut open = shop.stream("/v1/sales/t/events", &[]).await;
    open.until("event: sale", Duration::from_secs(5)).await;
    let metrics = shop.admin("GET", "/metrics", &[], "").await.text;
    assert!(metrics.contains("seckill_event_streams 1"), "{metrics}");
    shop.shutdown.cancel();
    open.rest(Duration::from_secs(5)).await;
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_set_at_run_time_and_say_when_to_return() {
    let shop = Shop::open().await;
    let limits = json!({"per_user": {"per_second": 1, "burst": 2}});
    assert_eq!(shop.admin("PUT", "/admin/v1/limits", &[], &limits.to_string()).await.status, 200);
    let limited = shop
        .eventually("the limit holds", async || {
            let answer = shop.buy("none", "bob", "k").await;
            (answer.status == 429).then_some(answer)
        })
        .await;
    limited.is_problem(429, "rate_limited");
    assert_eq!(limited.header("ratelimit-policy"), "\"user\";q=2;w=2");
    assert!(limited.header("retry-after").parse::<u32>().unwrap() >= 1);
    shop.buy("none", "eve", "k").await.is_problem(404, "sale_not_found");
    for bad in [r#"{"per_users":null}"#, r#"{"per_user":{"per_second":0,"burst":1}}"#, r#"{"per_user":7}"#] {
        shop.admin("PUT", "/admin/v1/limits", &[], bad).await.is_problem(400, "bad_request");
    }
    assert_eq!(shop.admin_get("/admin/v1/topology").await.body["limits"]["per_user"]["burst"], 2);
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_and_the_inquiry_call_tell_where_things_stand() {
    let shop = Shop::open().await;
    let ready = shop.admin("GET", "/readyz", &[], "").await;
    assert_eq!((ready.status, &ready.body["status"]), (503, &json!("starting")));
    shop.readiness.set(super::Stage::Serving);
    let ready = shop.admin("GET", "/readyz", &[], "").await;
    assert_eq!((ready.status, &ready.body["authority"]["granted"]), (200, &json!(true)));
    assert_eq!(ready.body["store"]["ok"], true);
    assert_eq!(shop.admin("GET", "/livez", &[], "").await.status, 200);
    let route = shop.get("/v1/route", Some(&token("bob", USERS))).await;
    let table = u64::from(seckill_domain::Uid::new("bob").unwrap().table().number());
    assert_eq!((&route.body["table"], &route.body["shard"]), (&json!(table), &json!(table % 64)));
    assert_eq!(
        (&route.body["home_center"], &route.body["centers"]["a"]),
        (&json!("a"), &json!("http://127.0.0.1:1"))
    );
    assert!(route.header("set-cookie").starts_with(&format!("seckill_shard={};", table % 64)));
    let topology = shop.admin("GET", "/admin/v1/topology", &[], "").await;
    assert_eq!((&topology.body["master"], &topology.body["instances"]), (&json!("a"), &json!([])));
    let audit = shop
        .call_admin(
            "GET",
            "/admin/v1/audit",
            &[("authorization", &format!("Bearer {}", token("x", ADMIN)))],
            "",
        )
        .await;
    assert_eq!(audit.body["verdict"], "clean");
    shop.close().await;
}

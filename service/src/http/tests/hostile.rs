//! What should not be sent.

use serde_json::json;

use super::shop::{ADMIN, PAYMENTS, Shop, USERS, signed, token};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_purchase_gets_a_typed_answer_and_changes_nothing() {
    let shop = Shop::open().await;
    shop.sale(json!({"sale_id": "s", "kind": "product", "quantity": 5, "price": 1, "currency": "CNY"})).await;
    let bob = token("bob", USERS);
    let huge = format!(r#"{{"quantity":1,"x":"{}"}}"#, "x".repeat(16 * 1024));
    shop.purchase("s", &bob, Some("k"), &huge).await.is_problem(413, "payload_too_large");
    let deep = "[".repeat(10_000);
    for body in [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "1",
        "\u{0}",
        &deep,
        r#"{"quantity":0}"#,
        r#"{"quantity":-1}"#,
        r#"{"quantity":1.5}"#,
        r#"{"quantity":"1"}"#,
        r#"{"quantity":null}"#,
        r#"{"quantity":1e3}"#,
        r#"{"quantity":99999999999999999999}"#,
        r#"{"quantity":1000001}"#,
        r#"{"quantity":1,"extra":2}"#,
        r#"{"quantity":1,"quantity":1}"#,
        r#"{"quantity":1} x"#,
    ] {
        shop.purchase("s", &bob, Some("k"), body).await.is_problem(400, "bad_request");
    }
    shop.purchase("s", &bob, None, r#"{"quantity":1}"#).await.is_problem(400, "idempotency_key_missing");
    let long = "k".repeat(65);
    for key in ["", "a b", "\"\"", &long, "é"] {
        shop.purchase("s", &bob, Some(key), r#"{"quantity":1}"#).await.is_problem(400, "bad_request");
    }
    for sale in
        ["..", "%2e%2e", "{}", "%7B%7D", "%00", "a%00b", "S", "a_b", "%ff", "%", &"s".repeat(49), "s%2Fx"]
    {
        shop.buy(sale, "bob", "k").await.is_problem(404, "sale_not_found");
        shop.get(&format!("/v1/sales/{sale}"), None).await.is_problem(404, "sale_not_found");
        shop.admin_get(&format!("/admin/v1/sales/{sale}")).await.is_problem(404, "sale_not_found");
    }
    for order in [
        "..",
        "{}",
        "%00",
        "1",
        "0000000000000000000",
        "9999999999999999999",
        "-100000000000000000",
        "1000000010000000001",
    ] {
        shop.get(&format!("/v1/orders/{order}"), Some(&bob)).await.is_problem(404, "order_not_found");
        shop.post(&format!("/v1/orders/{order}/cancel"), Some(&bob), "")
            .await
            .is_problem(404, "order_not_found");
        let pay = json!({"payment_id": "p", "amount": 1}).to_string();
        let path = format!("/v1/orders/{order}/pay");
        shop.post(&path, Some(&token("shop", PAYMENTS)), &pay).await.is_problem(404, "order_not_found");
    }
    for query in ["limit=0", "limit=-1", "limit=x", "cursor=x", "cursor=%00"] {
        shop.get(&format!("/v1/orders?{query}"), Some(&bob)).await.is_problem(400, "bad_request");
    }
    assert_eq!(shop.get("/v1/sales/s", None).await.body["remaining"], 5);
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_not_ours_opens_nothing() {
    let shop = Shop::open().await;
    let exp = seckill_domain::Clock::now(&seckill_domain::SystemClock).0 / 1000 + 60;
    let claims = json!({"sub": "bob", "exp": exp});
    let header = json!({"alg": "HS256"});
    let none = signed(&json!({"alg": "none"}), &claims, USERS);
    let bad = [
        String::new(),
        "x".into(),
        none.clone(),
        format!("{}.", none.rsplit_once('.').unwrap().0),
        signed(&header, &claims, b"another-secret-of-thirty-2-bytes"),
        signed(&header, &json!({"sub": "bob", "exp": exp - 3600}), USERS),
        signed(&header, &json!({"sub": "bob"}), USERS),
        signed(&header, &json!({"sub": "bob\u{0}", "exp": exp}), USERS),
        token("bob", ADMIN),
        token("bob", PAYMENTS),
    ];
    for token in &bad {
        shop.purchase("s", token, Some("k"), r#"{"quantity":1}"#).await.is_problem(401, "unauthenticated");
        shop.get("/v1/orders", Some(token)).await.is_problem(401, "unauthenticated");
    }
    let users = token("bob", USERS);
    for (method, path) in &shop.admin_routes {
        if path.starts_with("/admin/") {
            let path = path.replace("{id}", "s");
            let bearer = format!("Bearer {users}");
            for headers in [&[][..], &[("authorization", &*bearer)]] {
                shop.call_admin(method, &path, headers, "{}").await.is_problem(401, "unauthenticated");
            }
        }
    }
    let answer = shop.call("GET", "/v1/orders", &[("authorization", "Basic eDp5")], "").await;
    answer.is_problem(401, "unauthenticated");
    assert_eq!(answer.header("www-authenticate"), "Bearer");
    shop.close().await;
}

//! An empty, older or foreign ledger under the running service.

use std::collections::HashSet;
use std::path::Path;

use serde_json::json;

use crate::client::Client;
use crate::support::eventually;
use crate::up::Up;

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn aof(up: &Up) -> std::path::PathBuf {
    up.dir().join("a/redis/appendonlydir")
}

async fn buy_stored(client: &Client, sale: &str, users: std::ops::Range<usize>) -> HashSet<String> {
    let mut ids = HashSet::new();
    for user in users {
        let uid = format!("u{user}");
        let answer = client.buy_until_known(sale, &uid, "k").await;
        assert_eq!(answer.status, 202, "{}", answer.body);
        let id = answer.body["order_id"].as_str().unwrap().to_owned();
        client.stored_order(&uid, &id).await;
        assert!(ids.insert(id));
    }
    ids
}

/// Sales are refused with `no_authority`, reads go on, and readiness says what to do.
async fn sales_stop_with_advice(up: &Up, client: &Client, sale: &str) {
    let answer = eventually("sales stop", async || {
        client.buy(sale, "somebody-new", "k", 1).await.filter(|answer| answer.code() == "no_authority")
    })
    .await;
    assert_eq!((answer.status, answer.body["executed"].as_str()), (503, Some("no")), "{}", answer.body);
    // The lanes and the guardian notice by themselves, and what is printed comes here a moment later.
    eventually("readiness says what to do, while reads go on", async || {
        let ready = client.admin(hyper::Method::GET, "/readyz", &[], None).await;
        (ready.status == 200 && ready.body.to_string().contains("seckill ledger adopt")).then_some(())
    })
    .await;
    eventually("the log says what to do", async || up.log().contains("seckill ledger adopt").then_some(()))
        .await;
}

/// Puts other files in the place of the ledger's, with its server killed meanwhile.
async fn replace_ledger(up: &Up, client: &Client, files: &Path) {
    for _ in 0..20 {
        if up.redis_pid().is_some() {
            up.kill_redis();
        }
        let _ = std::fs::remove_dir_all(aof(up));
        copy_dir(files, &aof(up));
        // The supervisor may have been faster than we were: then its server has the old files, or half of the new.
        for _ in 0..100 {
            if client
                .admin(hyper::Method::GET, "/readyz", &[], None)
                .await
                .body
                .to_string()
                .contains("ledger adopt")
            {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
    panic!("the server does not come up with the other files:\n{}", up.log());
}

fn adopt(up: &Up) {
    let (code, out, err) = up.cli(&["ledger", "adopt"]);
    assert_eq!(code, 0, "{out}\n{err}\n{}", up.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_ledger_stops_sales_until_it_is_adopted_and_no_id_repeats() {
    let up = Up::start();
    let client = up.client();
    client.create_sale("s", 100, json!({})).await;
    let before = buy_stored(&client, "s", 0..10).await;

    // The folder is deleted and the server dies.
    std::fs::remove_dir_all(aof(&up)).unwrap();
    up.kill_redis();
    sales_stop_with_advice(&up, &client, "s").await;

    adopt(&up);
    let created = eventually("sales can be created again", async || {
        let sale =
            json!({"sale_id": "s2", "kind": "product", "quantity": 100, "price": 1, "currency": "CNY"});
        let answer = client.admin(hyper::Method::POST, "/admin/v1/sales", &[], Some(sale)).await;
        (answer.status == 201).then_some(answer)
    })
    .await;
    assert_eq!(created.status, 201);
    let after = buy_stored(&client, "s2", 0..10).await;
    assert!(before.is_disjoint(&after), "an order id was given twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flushed_ledger_stops_sales_until_it_is_adopted() {
    let up = Up::start();
    let client = up.client();
    client.create_sale("s", 100, json!({})).await;
    buy_stored(&client, "s", 0..3).await;
    let redis = redis::Client::open(format!("redis://127.0.0.1:{}", up.redis_port())).unwrap();
    let mut conn = redis.get_multiplexed_async_connection().await.unwrap();
    redis::cmd("FLUSHALL").query_async::<()>(&mut conn).await.unwrap();
    sales_stop_with_advice(&up, &client, "s").await;
    adopt(&up);
    client.create_sale("s2", 10, json!({})).await;
    buy_stored(&client, "s2", 0..3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_of_yesterday_stops_sales_and_once_adopted_oversells_nothing() {
    let up = Up::start();
    let client = up.client();
    client.create_sale("s", 20, json!({})).await;
    let yesterday = tempfile::tempdir().unwrap();
    let first = buy_stored(&client, "s", 0..5).await;
    copy_dir(&aof(&up), yesterday.path());
    let second = buy_stored(&client, "s", 5..15).await;

    replace_ledger(&up, &client, yesterday.path()).await;
    sales_stop_with_advice(&up, &client, "s").await;

    adopt(&up);
    // Fifteen of twenty are held by stored orders, so five are left, whatever yesterday's ledger believed.
    let third = eventually("sales go on", async || {
        let answer = client.buy_until_known("s", "u15", "k").await;
        (answer.status == 202).then(|| answer.body["order_id"].as_str().unwrap().to_owned())
    })
    .await;
    let rest = buy_stored(&client, "s", 16..20).await;
    let sold_out = client.buy_until_known("s", "late", "k").await;
    assert_eq!(sold_out.code(), "sold_out", "{}", sold_out.body);
    let all: HashSet<&String> = first.iter().chain(&second).chain([&third]).chain(&rest).collect();
    assert_eq!(all.len(), 20, "an order id was given twice");
    up.assert_books_balance();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_of_somebody_else_stops_sales() {
    let other = Up::start();
    other.client().create_sale("s", 100, json!({})).await;
    let foreign = tempfile::tempdir().unwrap();
    copy_dir(&aof(&other), foreign.path());

    let up = Up::start();
    let client = up.client();
    client.create_sale("s", 100, json!({})).await;
    let before = buy_stored(&client, "s", 0..3).await;
    replace_ledger(&up, &client, foreign.path()).await;
    sales_stop_with_advice(&up, &client, "s").await;
    adopt(&up);
    let after = eventually("sales go on", async || {
        let answer = client.buy_until_known("s", "new-user", "k").await;
        (answer.status == 202).then(|| answer.body["order_id"].as_str().unwrap().to_owned())
    })
    .await;
    assert!(!before.contains(&after));
}

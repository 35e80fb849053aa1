//! More buyers than units.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::client::Client;
use crate::support::eventually;
use crate::up::Up;

pub(crate) const BUYERS: usize = 20_000;
pub(crate) const UNITS: usize = 1_000;

/// 20,000 buyers race for the 1,000 units of the sale `race`; 30 % send everything twice under the same key, 10 % try a
/// second purchase under a new key against a limit of 1. Tells the owner of each order.
pub(crate) async fn race(client: &Client) -> HashMap<String, String> {
    let in_flight = Arc::new(Semaphore::new(256));
    let mut attempts = JoinSet::new();
    for buyer in 0..BUYERS {
        let uid = format!("buyer-{buyer}");
        let mut keys = vec![format!("first-{buyer}")];
        if buyer % 10 < 3 {
            keys.push(format!("first-{buyer}"));
        }
        if buyer % 10 == 5 {
            keys.push(format!("second-{buyer}"));
        }
        for key in keys {
            let (client, in_flight, uid) = (client.clone(), Arc::clone(&in_flight), uid.clone());
            attempts.spawn(async move {
                let _permit = in_flight.acquire_owned().await.unwrap();
                let answer = client.buy_until_known("race", &uid, &key).await;
                (uid, key, answer)
            });
        }
    }
    let mut orders: HashMap<(String, String), String> = HashMap::new();
    let mut owners: HashMap<String, String> = HashMap::new();
    while let Some(attempt) = attempts.join_next().await {
        let (uid, key, answer) = attempt.unwrap();
        match (answer.status, answer.code()) {
            (202, _) => {
                let id = answer.body["order_id"].as_str().unwrap().to_owned();
                let owner = owners.entry(id.clone()).or_insert_with(|| uid.clone());
                assert_eq!(*owner, uid, "order {id} went to two users");
                let known = orders.entry((uid.clone(), key)).or_insert_with(|| id.clone());
                assert_eq!(*known, id, "a replay of {uid} got another order");
            }
            (409, "sold_out" | "limit_exceeded") => {}
            other => panic!("{other:?} for {uid}: {}", answer.body),
        }
    }
    assert_eq!(owners.len(), UNITS, "orders");
    assert_eq!(owners.values().collect::<HashSet<_>>().len(), UNITS, "users with an order");

    // Every winner who asks again gets the same order, sold out or not.
    for ((uid, key), id) in orders.iter().take(100) {
        let again = client.buy_until_known("race", uid, key).await;
        assert_eq!((again.status, again.body["order_id"].as_str()), (202, Some(id.as_str())));
        assert_eq!(again.headers.get("idempotent-replayed").map(|v| v.as_bytes()), Some(&b"true"[..]));
    }
    owners
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_race_sells_every_unit_once_and_replays_the_same_order() {
    let up = Up::start();
    let client = up.client();
    client.create_sale("race", UNITS as u64, json!({})).await;
    let owners = race(&client).await;
    for (id, uid) in owners.iter().take(100) {
        let order = client.stored_order(uid, id).await;
        assert_eq!((order["sale_id"].as_str(), order["quantity"].as_u64()), (Some("race"), Some(1)));
    }
    eventually("every order is stored", async || {
        let audit = up.assert_books_balance();
        (audit["sales"][0]["in_flight"] == 0).then_some(())
    })
    .await;
    let audit = up.assert_books_balance();
    assert_eq!(audit["sales"][0]["orders"]["created"], json!(UNITS), "{audit}");
    assert_eq!(audit["sales"][0]["remaining"], json!(0), "{audit}");
}

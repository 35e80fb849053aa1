//! What may break, breaks while people buy: nothing that was acknowledged is missing afterwards.

use std::time::Duration;

use http::Method;
use seckill_parts::LinkState;
use serde_json::json;

use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{Crowd, ask_again, compare_books, user_of};
use crate::support::eventually;

use super::behind::{Behind, audit, until_no_lag, until_nobody_waits};
use super::lost::lose_the_master;

/// More than anybody buys in these tests.
const PLENTY: u64 = 1_000_000;
/// Shoppers at a time where the two centers have the machine to themselves.
const WIDTH: usize = 24;
/// Shoppers at a time where two Kafkas and two MariaDBs run beside them.
const WIDTH_BEHIND: usize = 8;
/// How long the line between the centers is cut: longer than a replica is waited for, and than all timeouts.
const CUT: Duration = Duration::from_secs(20);
/// How long the replica stands still: longer than it is waited for.
const STANDSTILL: Duration = Duration::from_secs(10);
/// How long nobody may sell without etcd before the test believes it.
const SILENCE: Duration = Duration::from_secs(3);
/// Entries of the outbox that the end of a log loses: more than are on their way to b at any moment.
const TORN_ENTRIES: usize = 40;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_center_that_dies_and_a_line_that_is_cut_cost_nobody_an_order() {
    lose_a_center_and_a_line(CentersOptions::default(), None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_kafka_mariadb_and_etcd_a_center_that_dies_whole_and_a_line_that_is_cut_cost_nobody_an_order() {
    let behind = Behind::start().await;
    lose_a_center_and_a_line(behind.options(), Some(&behind)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_nobody_sells_everybody_reads_and_sales_go_on_when_it_is_back() {
    let centers = Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await;
    lose_etcd(&centers, "phone", WIDTH).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_to_either_redis_nothing_acknowledged_is_missing() {
    break_either_redis(&Centers::start(CentersOptions::default()).await, "phone", WIDTH).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_kafka_mariadb_and_etcd_whatever_happens_to_a_redis_to_etcd_or_to_the_master_is_made_good() {
    let behind = Behind::start().await;
    let mut centers = Centers::start(behind.options()).await;
    // One after another on the same servers, which take long to start: each with a sale of its own.
    break_either_redis(&centers, "phone", WIDTH_BEHIND).await;
    lose_etcd(&centers, "tablet", WIDTH_BEHIND).await;
    lose_the_master(&mut centers, "watch", true).await;
}

/// The whole of b dies and comes back; then both live and cannot reach each other.
async fn lose_a_center_and_a_line(options: CentersOptions, behind: Option<&Behind>) {
    let width = if behind.is_some() { WIDTH_BEHIND } else { WIDTH };
    let mut centers = Centers::start(options).await;
    let [a, b] = BOTH.map(|which| centers.client(which));
    a.create_sale("phone", PLENTY, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", width, PLENTY);
    crowd.until_more(200).await;

    // The whole of b dies. After degrade_after a sells on; orders of a's users are stored, those of b's wait.
    let epoch = centers.epoch(Which::A).await;
    centers.kill_service(Which::B);
    centers.redis(Which::B).kill();
    if let Some(behind) = behind {
        behind.kill(Which::B);
    }
    centers.until_degraded().await;
    let mut orders = Vec::new();
    for which in BOTH {
        let uid = user_of(which, "meanwhile");
        let answer = a.buy_until_known("phone", &uid, "k").await;
        assert_eq!(answer.status, 202, "{answer:?}");
        orders.push((uid, answer.body["order_id"].as_str().unwrap().to_owned()));
    }
    a.stored_order(&orders[0].0, &orders[0].1).await;
    crowd.until_more(200).await;
    let ready = centers.ready(Which::A).await;
    assert_eq!(ready["degraded"], true, "{ready}");
    let report = audit(&centers, Which::A);
    assert_eq!(report["verdict"], "incomplete", "{report:#}");
    assert!(report["problems"].to_string().contains("center b"), "{report:#}");

    // b is back, its service before everything that it stands on: its orders arrive, and it confirms purchases again.
    centers.spawn(Which::B);
    centers.redis(Which::B).restart().await.unwrap();
    if let Some(behind) = behind {
        behind.restart(Which::B).await;
    }
    centers.until_serving(Which::B).await;
    b.stored_order(&orders[1].0, &orders[1].1).await;
    let epoch = centers.until_in_sync(epoch).await;
    crowd.until_more(200).await;

    // Both live and cannot reach each other.
    centers.between(LinkState::Cut);
    tokio::time::sleep(CUT / 2).await;
    centers.until_degraded().await;
    crowd.until_more(100).await;
    let lonely = b.buy("phone", "lonely", "k", 1).await.unwrap();
    assert_eq!((lonely.status, lonely.code()), (503, "master_unreachable"), "{lonely:?}");
    tokio::time::sleep(CUT / 2).await;
    centers.between(LinkState::Healthy);
    assert_eq!(b.buy_until_known("phone", "lonely", "k").await.status, 202);
    centers.until_in_sync(epoch).await;
    crowd.until_more(100).await;

    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    until_nobody_waits(&centers).await;
    // Those who bought by themselves are no part of the crowd.
    assert_eq!(
        compare_books(&centers, Which::A, "phone", &heard.bought).await,
        heard.bought.len() as u64 + orders.len() as u64 + 1
    );
    if behind.is_some() {
        until_no_lag(&centers).await;
    }
    for client in [&a, &b] {
        ask_again(client, "phone", &heard.bought[..50]).await;
    }
}

/// etcd is stopped for longer than the lease, and comes back.
async fn lose_etcd(centers: &Centers, sale: &str, width: usize) {
    let etcd = centers.etcd.as_ref().unwrap();
    let clients = BOTH.map(|which| centers.client(which));
    clients[1].create_sale(sale, PLENTY, json!({})).await;
    let crowd = Crowd::start(centers, sale, sale, width, PLENTY);
    crowd.until_more(200).await;
    let mut orders = Vec::new();
    for which in BOTH {
        let uid = user_of(which, "early");
        let answer = centers.client(which).buy_until_known(sale, &uid, "k").await;
        let order = answer.body["order_id"].as_str().unwrap().to_owned();
        centers.client(which).stored_order(&uid, &order).await;
        orders.push((uid, order));
    }

    etcd.kill();
    let mut meanwhile = Vec::new();
    for client in &clients {
        eventually("nobody sells", async || {
            let uid = format!("late-{}", meanwhile.len());
            let answer = client.buy(sale, &uid, "k", 1).await?;
            meanwhile.push(uid);
            (answer.code() == "no_authority").then(|| assert_eq!(answer.body["executed"], "no", "{answer:?}"))
        })
        .await;
    }
    // What was on its way when the lease ended has its outcome by now: from here on nothing is sold.
    let sold = async || {
        let mut ledger = centers.ledger(Which::A).await;
        let sale = sale.parse().unwrap();
        seckill_ledger::read::sale(&mut ledger, &sale).await.unwrap().unwrap().accepted
    };
    let before = sold().await;
    let acknowledged = crowd.acknowledged();
    tokio::time::sleep(SILENCE).await;
    assert_eq!(
        (sold().await, crowd.acknowledged()),
        (before, acknowledged),
        "somebody sold without authority"
    );
    for (client, (uid, order)) in clients.iter().zip(&orders) {
        let answer = client.user(Method::GET, &format!("/v1/orders/{order}"), uid, None).await;
        assert_eq!((answer.status, &answer.body["status"]), (200, &json!("created")), "{answer:?}");
        assert_eq!(client.get(&format!("/v1/sales/{sale}")).await.status, 200);
        assert_eq!(client.user(Method::GET, "/v1/route", uid, None).await.status, 200);
        let mut answer = client.buy(sale, "nobody", "k", 1).await.unwrap();
        // On a busy machine an attempt's way to the other center may take all of its time: nobody knows then.
        for _ in 0..5 {
            if answer.code() != "master_unreachable" {
                break;
            }
            answer = client.buy(sale, "nobody", "k", 1).await.unwrap();
        }
        assert_eq!((answer.status, answer.code()), (503, "no_authority"), "{answer:?}");
    }
    for which in BOTH {
        let ready = centers.ready(which).await;
        assert_ne!(ready["authority"]["cause"], json!(null), "{ready}");
    }

    etcd.restart().await.unwrap();
    // Whatever they heard, under the same key everybody gets one order.
    for (uid, client) in meanwhile.iter().zip(clients.iter().cycle()) {
        assert_eq!(client.buy_until_known(sale, uid, "k").await.status, 202);
    }
    crowd.until_more(100).await;
    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    until_nobody_waits(centers).await;
    let all = heard.bought.len() + meanwhile.len() + orders.len();
    assert_eq!(compare_books(centers, Which::A, sale, &heard.bought).await, all as u64);
}

/// b's Redis comes back empty, a's is killed, b's stands still, a's loses the end of its log.
async fn break_either_redis(centers: &Centers, sale: &str, width: usize) {
    let [a, b] = BOTH.map(|which| centers.client(which));
    a.create_sale(sale, PLENTY, json!({})).await;
    let crowd = Crowd::start(centers, sale, sale, width, PLENTY);
    crowd.until_more(100).await;
    let mut epoch = centers.epoch(Which::A).await;

    // b's comes back without anything.
    let replica = centers.redis(Which::B);
    replica.kill();
    centers.empty_redis(Which::B);
    replica.restart().await.unwrap();
    epoch = centers.until_in_sync(epoch).await;
    crowd.until_more(100).await;

    // a's is killed and comes back.
    let master = centers.redis(Which::A);
    master.kill();
    master.restart().await.unwrap();
    epoch = centers.until_in_sync(epoch).await;
    crowd.until_more(100).await;

    // b's stands still: purchases wait for it, then it is taken off, then it is back.
    replica.pause();
    tokio::time::sleep(STANDSTILL / 2).await;
    centers.until_degraded().await;
    crowd.until_more(100).await;
    tokio::time::sleep(STANDSTILL / 2).await;
    replica.resume();
    epoch = centers.until_in_sync(epoch).await;
    crowd.until_more(100).await;

    // a's comes back without the end of its log, which b's has: it gets it from there.
    master.kill();
    let log = centers.redis_log(Which::A);
    let written = std::fs::read(&log).unwrap();
    let entries: Vec<usize> = places_of(b"XADD\r\n", &written);
    assert!(entries.len() > TORN_ENTRIES, "{} has {} entries", log.display(), entries.len());
    let torn = entries[entries.len() - TORN_ENTRIES];
    println!("{} of {} bytes are left of a's log", torn, written.len());
    std::fs::OpenOptions::new().write(true).open(&log).unwrap().set_len(torn as u64).unwrap();
    master.restart().await.unwrap();
    eventually("a has again what it lost", async || {
        centers.logged(Which::A, "what was lost is here again").then_some(())
    })
    .await;
    centers.until_in_sync(epoch).await;
    crowd.until_more(100).await;

    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    until_nobody_waits(centers).await;
    for which in BOTH {
        // Both hold the same; readers of either stored nothing that is not there.
        assert_eq!(compare_books(centers, which, sale, &heard.bought).await, heard.bought.len() as u64);
    }
    for client in [&a, &b] {
        ask_again(client, sale, &heard.bought[..50]).await;
    }
}

/// Where something stands, in order.
fn places_of(what: &[u8], text: &[u8]) -> Vec<usize> {
    text.windows(what.len()).enumerate().filter(|(_, window)| *window == what).map(|(at, _)| at).collect()
}

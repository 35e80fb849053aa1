//! A master that was lost with purchases that only it had, and what becomes of them when it is back (H6).

use seckill_parts::LinkState;
use serde_json::{Value, json};

use super::behind::{until_no_lag, until_nobody_waits};
use super::course::arm;
use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{assert_audits_clean, user_of};
use crate::support::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_master_sold_alone_is_claimed_again_or_cancelled_when_it_is_back() {
    let mut centers = Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await;
    lose_the_master(&mut centers, "phone", false).await;
}

/// Center a, the master, sells alone, is lost, and comes back when b has sold on.
pub(super) async fn lose_the_master(centers: &mut Centers, sale: &str, over_kafka: bool) {
    let [a, b] = BOTH.map(|which| centers.client(which));
    centers.until_master(Which::A).await;
    a.create_sale(sale, 6, json!({})).await;
    for uid in BOTH.map(|which| user_of(which, "kept")) {
        assert_eq!(a.buy_until_known(sale, &uid, "k").await.status, 202);
    }
    centers.between(LinkState::Cut);
    centers.until_degraded().await;
    // Two of a's own, stored there, and one of b's, which b never hears of.
    let lost = [user_of(Which::A, "paid"), user_of(Which::A, "open"), user_of(Which::B, "queued")];
    let mut orders = Vec::new();
    for uid in &lost {
        let answer = a.buy_until_known(sale, uid, "k").await;
        assert_eq!(answer.status, 202, "{answer:?}");
        orders.push(answer.body["order_id"].as_str().unwrap().to_owned());
    }
    for place in 0..2 {
        a.stored_order(&lost[place], &orders[place]).await;
    }
    let amount = a.stored_order(&lost[0], &orders[0]).await["amount"].clone();
    let paid = a.pay(&orders[0], json!({"payment_id": "p", "amount": amount})).await;
    assert_eq!(paid.status, 200, "{paid:?}");

    let mut bought = 3..=3;
    if over_kafka {
        // And one more of a's own, which Kafka has when a dies: it may come to its table when it is not to be revived.
        // What is noted of the orders before may already end a; then it is acknowledged to nobody, and may not be there.
        arm(centers, "acknowledged", "kill");
        let answer = a.buy(sale, &user_of(Which::A, "late"), "k", 1).await;
        let acknowledged = answer.is_some_and(|answer| answer.status == 202);
        eventually("a dies", async || centers.ended(Which::A)).await;
        bought = if acknowledged { 4..=4 } else { 3..=4 };
    }
    centers.kill_service(Which::A);
    centers.redis(Which::A).kill();
    let shift = ["master", "shift", "--to", "b", "--mode", "forced", "--accept-loss", "--yes", "-o", "json"];
    let (code, out, err) = centers.command(Which::B, &shift);
    assert_eq!(code, 0, "{out}\n{err}\n{}", centers.logs());
    for n in 0..2 {
        let answer = b.buy_until_known(sale, &user_of(Which::B, &format!("later{n}x")), "k").await;
        assert_eq!(answer.status, 202, "{answer:?}");
    }

    // a comes back, and dies once more when it has claimed the first of them.
    arm(centers, "settle_claimed", "kill");
    centers.between(LinkState::Healthy);
    centers.redis(Which::A).restart().await.unwrap();
    centers.spawn(Which::A);
    eventually("a dies", async || centers.ended(Which::A)).await;
    centers.kill_service(Which::A);
    centers.spawn(Which::A);
    centers.until_serving(Which::A).await;
    centers.until_master(Which::B).await;
    let settled = eventually("the tail is settled", async || {
        let (code, out, err) = centers.command(Which::B, &["shift", "list", "-o", "json"]);
        assert_eq!(code, 0, "{err}");
        let list: Value = serde_json::from_str(&out).unwrap();
        let tail = list["history"][0]["tails"][0].clone();
        tail["settled"].is_object().then_some(tail)
    })
    .await;
    let counts = ["orders", "claimed_again", "cancelled", "paid_without_claim"];
    let all = settled["settled"]["orders"].as_u64().unwrap();
    assert!(bought.contains(&all), "{bought:?}: {settled:#}");
    let expected = [all, 2, all - 2, 0];
    assert_eq!(counts.map(|name| settled["settled"][name].clone()), expected.map(Value::from), "{settled:#}");
    for (place, status) in ["paid", "created", "cancelled"].into_iter().enumerate() {
        assert_eq!(a.order_status(&lost[place], &orders[place]).await, status);
        let again = b.buy_until_known(sale, &lost[place], "k").await;
        match status {
            "cancelled" => assert_eq!(again.code(), "sold_out", "{again:?}"),
            _ => assert_eq!(again.body["order_id"], orders[place], "{again:?}"),
        }
    }
    if over_kafka {
        until_nobody_waits(centers).await;
        until_no_lag(centers).await;
        let late = b.buy_until_known(sale, &user_of(Which::A, "late"), "k").await;
        assert_eq!(late.code(), "sold_out", "{late:?}");
    }
    assert_audits_clean(centers).await;
    let (_, out, _) = centers.command(Which::A, &["audit", "-o", "json"]);
    let audit: Value = serde_json::from_str(&out).unwrap();
    let sales = audit["sales"].as_array().unwrap();
    let sale = sales.iter().find(|found| found["sale_id"] == sale).unwrap();
    assert_eq!((&sale["accepted_loss"], &sale["reclaimed"]), (&json!(all - 2), &json!(2)), "{audit:#}");
    assert_eq!((&sale["remaining"], &sale["claimed"]), (&json!(0), &json!(6)), "{audit:#}");
}

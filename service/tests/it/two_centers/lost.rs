//! A master that was lost with purchases that only it had, and what becomes of them when it is back (H6).

use seckill_parts::LinkState;
use serde_json::{Value, json};

use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{assert_audits_clean, user_of};
use crate::support::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_master_sold_alone_is_claimed_again_or_cancelled_when_it_is_back() {
    let mut centers = Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await;
    let [a, b] = BOTH.map(|which| centers.client(which));
    a.create_sale("phone", 6, json!({})).await;
    for uid in BOTH.map(|which| user_of(which, "kept")) {
        assert_eq!(a.buy_until_known("phone", &uid, "k").await.status, 202);
    }
    centers.between(LinkState::Cut);
    centers.until_degraded().await;
    // Two of a's own, stored there, and one of b's, which b never hears of.
    let lost = [user_of(Which::A, "paid"), user_of(Which::A, "open"), user_of(Which::B, "queued")];
    let mut orders = Vec::new();
    for uid in &lost {
        let answer = a.buy_until_known("phone", uid, "k").await;
        assert_eq!(answer.status, 202, "{answer:?}");
        orders.push(answer.body["order_id"].as_str().unwrap().to_owned());
    }
    for place in 0..2 {
        a.stored_order(&lost[place], &orders[place]).await;
    }
    let amount = a.stored_order(&lost[0], &orders[0]).await["amount"].clone();
    let paid = a.pay(&orders[0], json!({"payment_id": "p", "amount": amount})).await;
    assert_eq!(paid.status, 200, "{paid:?}");

    centers.kill_service(Which::A);
    centers.redis(Which::A).kill();
    let shift = ["master", "shift", "--to", "b", "--mode", "forced", "--accept-loss", "--yes", "-o", "json"];
    let (code, out, err) = centers.command(Which::B, &shift);
    assert_eq!(code, 0, "{out}\n{err}\n{}", centers.logs());
    for n in 0..2 {
        let answer = b.buy_until_known("phone", &user_of(Which::B, &format!("later{n}x")), "k").await;
        assert_eq!(answer.status, 202, "{answer:?}");
    }

    // a comes back, and dies once more when it has claimed the first of them.
    let fail_point = centers.folder().join("fail_point");
    std::fs::write(&fail_point, "settle_claimed 1 kill").unwrap();
    centers.between(LinkState::Healthy);
    centers.redis(Which::A).restart().await.unwrap();
    centers.spawn_with(Which::A, &[("SECKILL_FAIL_POINT", fail_point.to_str().unwrap())]);
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
    assert_eq!(counts.map(|name| settled["settled"][name].clone()), [3, 2, 1, 0].map(Value::from));
    for (place, status) in ["paid", "created", "cancelled"].into_iter().enumerate() {
        assert_eq!(a.order_status(&lost[place], &orders[place]).await, status);
        let again = b.buy_until_known("phone", &lost[place], "k").await;
        match status {
            "cancelled" => assert_eq!(again.code(), "sold_out", "{again:?}"),
            _ => assert_eq!(again.body["order_id"], orders[place], "{again:?}"),
        }
    }
    assert_audits_clean(&centers).await;
    let (_, out, _) = centers.command(Which::A, &["audit", "-o", "json"]);
    let audit: Value = serde_json::from_str(&out).unwrap();
    let sale = &audit["sales"][0];
    assert_eq!((&sale["accepted_loss"], &sale["reclaimed"]), (&json!(1), &json!(2)), "{audit:#}");
    assert_eq!((&sale["remaining"], &sale["claimed"]), (&json!(0), &json!(6)), "{audit:#}");
}

//! A master's Redis that comes back: with everything, without its disk, without the end of its log.

use super::*;

// F3: its log may be behind what a replica saw.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_was_killed_and_comes_back_gets_a_new_epoch_and_its_replica() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let order_id = pair.buy_at("a", &fence, &sale, "u1").await;
    let before = pair.topology();
    pair.server("a").kill();
    pair.server("a").restart().await;
    let after = pair.until_in_sync(before.epoch).await;
    assert!(after.epoch > fence.epoch);
    assert!(pair.holds("a", order_id).await && pair.holds("b", order_id).await);
    assert_eq!(pair.service("a").guardian.metrics().restores.get(), 0);
}

// S1 and S5: a master that lost its disk does not make its replica empty, but gets everything back from it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_lost_its_disk_gets_everything_back_from_the_replica() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let mut orders = Vec::new();
    for n in 0..5 {
        orders.push(pair.buy_at("a", &fence, &sale, &format!("u{n}")).await);
    }
    pair.until_replicated().await;
    pair.server("a").kill();
    pair.empty("a");
    pair.server("a").restart().await;
    let after = pair.until_in_sync(fence.epoch).await;
    for order_id in &orders {
        assert!(pair.holds("a", *order_id).await && pair.holds("b", *order_id).await);
    }
    assert!(pair.topology().restoring.is_empty());
    assert_eq!(pair.service("a").guardian.metrics().restores.get(), 1);
    // F3: ids do not repeat.
    let next = pair.buy_at("a", &after, &sale, "later").await;
    assert!(!orders.contains(&next));
}

// S5: opened only when its fence and last outbox id are at least theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_whose_log_lost_its_end_gets_it_back_from_the_replica() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let kept = pair.buy_at("a", &fence, &sale, "u0").await;
    let earlier = pair.dir.path().join("earlier");
    copy(&pair.server("a").folder().join("appendonlydir"), &earlier);
    let cut = pair.buy_at("a", &fence, &sale, "u1").await;
    pair.until_replicated().await;
    pair.server("a").kill();
    let data = pair.server("a").folder().join("appendonlydir");
    std::fs::remove_dir_all(&data).unwrap();
    copy(&earlier, &data);
    pair.server("a").restart().await;
    pair.until_in_sync(fence.epoch).await;
    assert!(pair.holds("a", kept).await && pair.holds("a", cut).await);
    assert_eq!(pair.service("a").guardian.metrics().restores.get(), 1);
}

// Without an answer of the replica that is in sync nobody knows whether something is missing: it is waited for, but
// not for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_restarts_waits_for_the_replica_in_sync_before_it_goes_on_without() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let kept = pair.buy_at("a", &fence, &sale, "u0").await;
    pair.until_replicated().await;
    let earlier = pair.dir.path().join("earlier");
    copy(&pair.server("a").folder().join("appendonlydir"), &earlier);
    let cut = pair.buy_at("a", &fence, &sale, "u1").await;
    pair.until_replicated().await;
    pair.stop("b").await;
    pair.server("b").kill();
    pair.server("a").kill();
    let data = pair.server("a").folder().join("appendonlydir");
    std::fs::remove_dir_all(&data).unwrap();
    copy(&earlier, &data);
    pair.server("a").restart().await;
    let since = Instant::now();
    let alone = pair.until_sells("a goes on", |grant| grant.fence.epoch > fence.epoch).await;
    let waited = since.elapsed();
    assert!(waited >= DEGRADE_AFTER - Duration::from_secs(1), "it waited for {waited:?}");
    assert_eq!(pair.topology().state, TopologyState::Degraded);
    let later = pair.buy_at("a", &alone, &sale, "u2").await;
    assert_ne!(later, cut);

    // S3: b comes back with an order that a never had again: saved before it becomes a replica.
    pair.server("b").restart().await;
    pair.start("b").await;
    pair.until_in_sync(alone.epoch).await;
    let tails = pair.tails("b");
    assert_eq!(tails.len(), 1, "{tails:?}");
    let lines: Vec<serde_json::Value> =
        tails[0].lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["kind"], "diverged");
    assert_eq!(lines.len(), 2, "{tails:?}");
    assert_eq!(lines[1]["orders"][0]["order_id"], serde_json::json!(cut));
    assert_eq!(lines[1]["orders"][0]["uid"], "u1");
    assert_eq!(lines[1]["orders"][0]["claims"].as_str().unwrap().len(), 2 * 29);
    assert!(!pair.holds("b", cut).await && pair.holds("b", later).await && pair.holds("b", kept).await);
}

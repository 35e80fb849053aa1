//! Forced shifts: the old master is gone, or cut off.

use super::shifts::{done, forced};
use super::*;
use crate::topology::ShiftState;

const SHORT_LEASE: Duration = Duration::from_secs(2);

async fn pair() -> Pair {
    let mut pair = Pair::stopped_with(Durability::Replicated, SHORT_LEASE, Duration::ZERO).await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_in_sync(Epoch(0)).await;
    pair
}

// S4, H5, D1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_master_is_replaced_without_loss_and_follows_when_it_is_back() {
    let mut pair = pair().await;
    let sale = pair.create_sale(1_000_000).await;
    let buyers = pair.buyers(&sale, 4);
    buyers.sell(50).await;
    // The whole center at once.
    pair.server("a").kill();
    pair.stop("a").await;
    let asked = Instant::now();
    let shift = pair.shift(forced("b")).await;
    pair.tells(&shift);
    done(&shift);
    assert!(shift.exposure.as_ref().unwrap().lossless);
    // A1: nobody could know that a's services had not merely fallen silent. From the record on, which was a moment before.
    let waited = shift.steps.iter().find(|step| step.name == "wait_lease").and_then(|step| step.took_ms);
    assert!(waited >= Some(SHORT_LEASE.as_millis() as u64 / 2), "the lease was not waited out: {waited:?}");
    pair.until_master("b", shift.epoch).await;
    buyers.sell(1).await;
    let took = asked.elapsed();
    println!("from the command to the first purchase: {took:?}, lease {SHORT_LEASE:?}");
    assert!(took >= SHORT_LEASE);
    assert_eq!((pair.topology().state, pair.topology().in_sync.len()), (TopologyState::Degraded, 0));
    // H5: by the shift itself. Purchases did not wait until somebody was taken off.
    assert_eq!(pair.service("b").guardian.metrics().degradations.get(), 0, "a was waited for and taken off");
    buyers.sell(10).await;
    pair.server("a").restart().await;
    pair.start("a").await;
    eventually("a is in sync", async || (pair.topology().in_sync.len() == 1).then_some(())).await;
    buyers.sell(10).await;
    let books = buyers.stop().await;
    pair.compare(&sale, &books).await;
}

// A1, A3: a service that is cut off stops by itself before the other center begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_is_alive_and_cut_off_stops_by_itself_within_the_lease() {
    let pair = pair().await;
    let sale = pair.create_sale(1_000_000).await;
    let buyers = pair.buyers(&sale, 4);
    buyers.sell(50).await;
    pair.centers["a"].cut_off.store(true, Ordering::SeqCst);
    let begun = pair.shifts("b").start(forced("b"), "ops").await.unwrap();
    let (a, b) = (pair.service("a").authority.clone(), pair.service("b").authority.clone());
    // At no moment both.
    eventually("b sells", async || {
        let b_sells = b.grant().is_ok();
        assert!(!(b_sells && a.grant().is_ok()), "two masters");
        b_sells.then_some(())
    })
    .await;
    let shift = pair.until_over(&begun.id).await;
    done(&shift);
    buyers.sell(10).await;
    pair.centers["a"].cut_off.store(false, Ordering::SeqCst);
    eventually("a is in sync", async || (pair.topology().in_sync.len() == 1).then_some(())).await;
    buyers.sell(10).await;
    let books = buyers.stop().await;
    pair.compare(&sale, &books).await;
}

// D1, H6, S3.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_replica_in_sync_loss_has_to_be_accepted_and_the_tail_is_saved() {
    let mut pair = Pair::stopped_with(Durability::Replicated, SHORT_LEASE, Duration::from_millis(2)).await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_in_sync(Epoch(0)).await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let kept = pair.buy_at("a", &fence, &sale, "u0").await;
    pair.until_replicated().await;
    pair.links["a"].cut();
    let alone = pair.until_sells("degraded", |grant| grant.acknowledge == Acknowledge::Local).await;
    let lost = pair.buy_at("a", &alone, &sale, "u1").await;
    // H6: a says how far it is.
    let ahead = pair.last("a").await.unwrap().seq;
    eventually("a's position", async || (pair.topology().positions.get(&0)?.seq == ahead).then_some(()))
        .await;
    pair.server("a").kill();
    pair.stop("a").await;
    pair.links["a"].heal();
    let before = pair.topology();
    let refused =
        eventually("b's Redis answers", async || match pair.shifts("b").start(forced("b"), "ops").await {
            Err(ShiftError::Refused { reason, next, checks, .. }) if reason.contains("exposure") => {
                Some((reason, next, checks))
            }
            Err(ShiftError::Refused { .. }) => None,
            other => panic!("{other:?}"),
        })
        .await;
    assert!(refused.1.contains("--accept-loss"), "{refused:?}");
    assert_eq!(pair.topology(), before);
    let shift = pair.shift(ShiftRequest { accept_loss: true, ..forced("b") }).await;
    done(&shift);
    assert!(!shift.exposure.as_ref().unwrap().lossless && shift.accept_loss);
    let exposure = shift.exposure.as_ref().unwrap();
    assert_eq!(exposure.entries, Some(1), "{exposure:?}");
    assert!(exposure.since.is_some());
    assert!(shift.message.as_ref().unwrap().contains("accepted loss"), "{shift:?}");
    pair.until_master("b", shift.epoch).await;
    pair.server("a").restart().await;
    pair.start("a").await;
    eventually("a is in sync", async || (pair.topology().in_sync.len() == 1).then_some(())).await;
    let tails = pair.tails("a");
    assert_eq!(tails.len(), 1, "{tails:?}");
    assert!(tails[0].contains("\"u1\""), "{tails:?}");
    let named = pair.topology().find_shift(&shift.id).unwrap().tails.clone();
    assert_eq!(named.len(), 1);
    assert!(named[0].file.contains("diverged-") && named[0].orders == 1, "{named:?}");
    assert!(!pair.holds("b", lost).await && pair.holds("b", kept).await);
}

// D3.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_durability_local_loss_has_to_be_accepted() {
    let mut pair = Pair::stopped_with(Durability::Local, SHORT_LEASE, Duration::ZERO).await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_attached().await;
    let refused = pair.shifts("b").start(forced("b"), "ops").await;
    assert!(
        matches!(&refused, Err(ShiftError::Refused { next, .. }) if next.contains("--accept-loss")),
        "begun without consent: {refused:?}"
    );
    pair.stop("a").await;
    pair.server("a").kill();
    let shift = pair.shift(ShiftRequest { accept_loss: true, ..forced("b") }).await;
    done(&shift);
    assert_eq!(pair.topology().state, TopologyState::Steady);
}

// H4: also a forced shift.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_shift_whose_coordinator_dies_is_given_up_or_finished() {
    for (place, wanted) in [
        ("recorded", ShiftState::Aborted),
        ("lease_waited", ShiftState::Aborted),
        ("promoted_early", ShiftState::Aborted),
        ("decided", ShiftState::Done),
        ("promoted", ShiftState::Done),
    ] {
        let mut pair = pair().await;
        let sale = pair.create_sale(1_000_000).await;
        let buyers = pair.buyers(&sale, 4);
        buyers.sell(20).await;
        pair.server("a").kill();
        pair.stop("a").await;
        pair.at("b", place, || true);
        let shift = pair.shift(forced("b")).await;
        assert_eq!(shift.state, wanted, "{place}: {shift:#?}");
        let shift = match wanted {
            ShiftState::Done => shift,
            _ => pair.shift(forced("b")).await,
        };
        done(&shift);
        pair.until_master("b", shift.epoch).await;
        buyers.sell(10).await;
        let books = buyers.stop().await;
        pair.compare(&sale, &books).await;
    }
}

// S4: what was promised was promised for a run of the replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_restarts_while_the_lease_is_waited_out_is_not_promoted_unasked() {
    let mut pair = pair().await;
    pair.create_sale(9).await;
    pair.server("a").kill();
    pair.stop("a").await;
    let begun = pair.shifts("b").start(forced("b"), "ops").await.unwrap();
    pair.server("b").restart().await;
    let shift = pair.until_over(&begun.id).await;
    assert_eq!(shift.state, ShiftState::Aborted, "promoted in another run: {shift:#?}");
    assert_eq!(pair.topology().master.as_str(), "a");
}

// S4: between the last look at the replica and its promotion it is still the run that was promised.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_restarts_just_before_it_is_promoted_is_not_promoted_unasked() {
    let mut pair = pair().await;
    let sale = pair.create_sale(9).await;
    pair.server("a").kill();
    pair.stop("a").await;
    let pid = rustix::process::Pid::from_raw(pair.server("b").pid().cast_signed()).unwrap();
    pair.at("b", "looked", move || {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        false
    });
    let begun = pair.shifts("b").start(forced("b"), "ops").await.unwrap();
    let shift = pair.until_over(&begun.id).await;
    assert_eq!(shift.state, ShiftState::Aborted, "{shift:#?}");
    assert_eq!(pair.topology().master.as_str(), "a");
    pair.server("b").restart().await;
    let refused = pair.shifts("b").start(forced("b"), "ops").await;
    assert!(
        matches!(&refused, Err(ShiftError::Refused { next, .. }) if next.contains("--accept-loss")),
        "{refused:?}"
    );
    let shift = pair.shift(ShiftRequest { accept_loss: true, ..forced("b") }).await;
    done(&shift);
    pair.until_master("b", shift.epoch).await;
    pair.buyers(&sale, 1).stop().await;
}

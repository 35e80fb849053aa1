//! Planned shifts under load, and those that are refused.

use super::shifts::{done, forced, to};
use super::*;
use crate::topology::{CheckVerdict, ShiftState};

/// Between centers.
const ROUND_TRIP: Duration = Duration::from_millis(30);

// H1–H3, H5.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_planned_shifts_there_and_back_lose_nothing_that_was_acknowledged() {
    let mut pair = Pair::stopped_with(Durability::Replicated, LEASE, ROUND_TRIP).await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_in_sync(Epoch(0)).await;
    let sale = pair.create_sale(1_000_000).await;
    let buyers = pair.buyers(&sale, 8);
    buyers.sell(20).await;
    for round in 0..10 {
        let id = if round % 2 == 0 { "b" } else { "a" };
        let before = pair.topology();
        let shift = pair.shift(to(id)).await;
        pair.tells(&shift);
        done(&shift);
        let after = pair.topology();
        assert_eq!((after.master.as_str(), after.epoch), (id, shift.epoch));
        assert!(after.epoch > before.epoch);
        assert_eq!((after.state, after.in_sync.len()), (TopologyState::Steady, 1));
        let names: Vec<&str> = shift.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "precheck", "freeze", "fence", "catch_up", "decided", "promote", "redirect", "attach",
                "thaw", "verify"
            ]
        );
        buyers.sell(20).await;
    }
    let books = buyers.stop().await;
    println!("{} purchases, longest gap {:?}", books.orders.len(), books.gap);
    pair.compare(&sale, &books).await;
    // Without the pause most of them would end in a full copy.
    for id in ["a", "b"] {
        println!(
            "{id}: {} full, {} partial copies",
            pair.centers[id].server.info("sync_full").await,
            pair.centers[id].server.info("sync_partial_ok").await
        );
    }
    assert!(pair.tails("a").is_empty() && pair.tails("b").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_durability_local_a_planned_shift_loses_nothing_either() {
    let mut pair = Pair::stopped(Durability::Local).await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_attached().await;
    let sale = pair.create_sale(1_000_000).await;
    pair.until_replicated().await;
    let buyers = pair.buyers(&sale, 4);
    buyers.sell(20).await;
    for id in ["b", "a", "b"] {
        done(&pair.shift(to(id)).await);
        buyers.sell(20).await;
    }
    let books = buyers.stop().await;
    pair.compare(&sale, &books).await;
    assert_eq!(pair.topology().in_sync, Vec::new());
    assert_eq!(pair.topology().state, TopologyState::Steady);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_makes_the_checks_and_changes_nothing() {
    let pair = Pair::in_sync().await;
    let before = pair.topology();
    let shift = pair.shifts("b").start(ShiftRequest { dry_run: true, ..to("b") }, "ops").await.unwrap();
    assert!(shift.dry_run && shift.state == ShiftState::Done);
    let checks = &shift.steps[0].checks;
    assert!(checks.iter().all(|check| check.verdict == CheckVerdict::Ok), "{checks:#?}");
    for name in
        ["target_linked", "target_in_sync", "fence", "lag_bytes", "lag_time", "target_scripts", "clock_skew"]
    {
        assert!(checks.iter().any(|check| check.name == name), "{name}: {checks:#?}");
    }
    assert_eq!(pair.topology(), before);
    assert_eq!(pair.shifts("b").list(), Vec::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_use_is_refused_with_the_next_step_and_changes_nothing() {
    let mut pair = Pair::in_sync().await;
    let before = pair.topology();
    let refused = async |pair: &Pair, at: &str, request: ShiftRequest, wanted: &str| match pair
        .shifts(at)
        .start(request, "ops")
        .await
    {
        Err(ShiftError::Refused { reason, next, .. }) => {
            assert!(reason.contains(wanted), "{reason}");
            assert!(!next.is_empty());
        }
        other => panic!("{wanted}: {other:?}"),
    };
    refused(&pair, "a", to("a"), "is the master already").await;
    refused(&pair, "b", to("z"), "no center z").await;
    let stale = ShiftRequest { expect_epoch: Some(Epoch(1)), ..to("b") };
    refused(&pair, "b", stale, "the topology is at epoch").await;
    let elsewhere = pair.shifts("a").start(to("b"), "ops").await;
    assert_eq!(elsewhere, Err(ShiftError::Elsewhere { center: CenterId::new("b").unwrap() }));
    // Without authority: the topology cannot be confirmed.
    pair.centers["b"].cut_off.store(true, Ordering::SeqCst);
    refused(&pair, "b", to("b"), "cannot be read").await;
    pair.centers["b"].cut_off.store(false, Ordering::SeqCst);
    assert_eq!(pair.topology(), before);
    // A dead replica; the master's guardian must not take it off meanwhile.
    pair.stop("a").await;
    pair.server("b").kill();
    refused(&pair, "b", to("b"), "target_answers").await;
    refused(&pair, "b", forced("b"), "target_answers").await;
    assert_eq!(pair.topology(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_again_is_the_same_shift() {
    let pair = Pair::in_sync().await;
    let request = ShiftRequest { key: Some("k1".to_owned()), ..to("b") };
    let first = pair.shift(request.clone()).await;
    done(&first);
    let again = pair.shifts("b").start(request, "ops").await.unwrap();
    assert_eq!(again, first);
    assert_eq!(pair.topology().epoch, first.epoch);
}

// Two coordinators at once: one wins, the other is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_shifts_at_once_one_wins_and_the_other_is_told() {
    let pair = Pair::in_sync().await;
    let second = Shifts::spawn(
        pair.shift_options("b"),
        pair.service("b").topology.clone(),
        pair.service("b").authority.clone(),
        Instances::fixed(vec![Instance::new(
            CenterId::new("b").unwrap(),
            String::new(),
            String::new(),
            String::new(),
        )]),
        &pair.service("b").tracker,
        pair.service("b").token.clone(),
    )
    .unwrap();
    let (one, other) = tokio::join!(pair.shifts("b").start(to("b"), "one"), second.start(to("b"), "other"));
    let (won, lost) = match (one, other) {
        (Ok(won), Err(lost)) | (Err(lost), Ok(won)) => (won, lost),
        both => panic!("{both:?}"),
    };
    let ShiftError::Refused { reason, .. } = lost else { panic!("{lost:?}") };
    assert!(reason.contains(&won.id) || reason.contains("is the master already"), "{reason}");
    done(&pair.until_over(&won.id).await);
    assert_eq!(pair.topology().history.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_aborts_a_shift_that_is_not_decided() {
    let pair = Pair::in_sync().await;
    pair.at("b", "fenced", || true);
    let begun = pair.shifts("b").start(to("b"), "ops").await.unwrap();
    // From the other center: the record is what counts.
    let aborted = eventually("aborted", async || pair.shifts("a").abort(&begun.id, "boss").await.ok()).await;
    assert_eq!(aborted.state, ShiftState::Aborted);
    assert!(aborted.message.as_ref().unwrap().contains("boss"), "{aborted:?}");
    pair.until_master("a", begun.epoch.next()).await;
    let again = pair.shifts("a").abort(&begun.id, "boss").await;
    assert!(matches!(again, Err(ShiftError::Refused { .. })), "{again:?}");
    let unknown = pair.shifts("a").abort("shift-999", "boss").await;
    assert_eq!(unknown, Err(ShiftError::NotFound { id: "shift-999".to_owned() }));
}

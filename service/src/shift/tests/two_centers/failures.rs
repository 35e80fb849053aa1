//! What goes wrong in the middle of a planned shift: nothing acknowledged is lost, the freeze ends, and the state is
//! told as it is.

use super::shifts::{done, to};
use super::*;
use crate::shift::operation::Hook;
use crate::topology::{Shift, ShiftPhase, ShiftState};

/// Runs a shift to b under load in which something happens at a place; returns how it ended.
async fn shift_in_which(
    pair: &mut Pair,
    place: &'static str,
    hook: impl FnOnce() -> bool + Send + 'static,
) -> Shift {
    let sale = pair.create_sale(1_000_000).await;
    let buyers = pair.buyers(&sale, 4);
    buyers.sell(10).await;
    pair.at("b", place, hook);
    let shift = pair.shift(to("b")).await;
    pair.tells(&shift);
    // Whatever hung goes on, and somebody sells.
    for id in ["a", "b"] {
        let pid = i32::try_from(pair.server(id).pid()).unwrap_or(0);
        let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::CONT);
    }
    buyers.sell(10).await;
    let books = buyers.stop().await;
    println!("{place}: longest gap {:?}", books.gap);
    pair.compare(&sale, &books).await;
    shift
}

async fn dies_at(place: &'static str) -> (Pair, Shift) {
    let mut pair = Pair::in_sync().await;
    let shift = shift_in_which(&mut pair, place, || true).await;
    (pair, shift)
}

// H4: until it is decided a shift whose coordinator died is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_dies_before_the_decision_leaves_everything_as_it_was() {
    for place in ["recorded", "fenced", "caught_up"] {
        let (pair, shift) = dies_at(place).await;
        assert_eq!(shift.state, ShiftState::Aborted, "{place}: {shift:#?}");
        assert_eq!(shift.coordinator.term, 1);
        assert_eq!(pair.topology().master.as_str(), "a");
        // H1: at an epoch of its own.
        assert!(pair.topology().epoch > shift.epoch);
    }
}

// H4: by any service of any center, also when nobody is left in the one that was to take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shift_whose_center_is_gone_is_given_up_by_the_other_one() {
    let mut pair = Pair::in_sync().await;
    let service = pair.service("b").token.clone();
    pair.at("b", "fenced", move || {
        service.cancel();
        true
    });
    let begun = pair.shifts("b").start(to("b"), "ops").await.unwrap();
    pair.stop("b").await;
    let shift = pair.until_over(&begun.id).await;
    assert_eq!(shift.state, ShiftState::Aborted, "{shift:#?}");
    assert_eq!(shift.coordinator.center.as_str(), "a");
    pair.until_master("a", shift.epoch.next()).await;
}

// H3: after it there is only forward.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_dies_after_the_decision_is_replaced_by_one_that_finishes() {
    for place in ["decided", "promoted"] {
        let (pair, shift) = dies_at(place).await;
        done(&shift);
        assert_eq!(shift.coordinator.term, 1);
        assert_eq!((pair.topology().master.as_str(), pair.topology().in_sync.len()), ("b", 1));
        pair.until_master("b", shift.epoch).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shift_that_nobody_verified_is_verified_by_another_service() {
    let (pair, shift) = dies_at("redirected").await;
    done(&shift);
    assert_eq!(shift.coordinator.term, 1);
    assert_eq!(pair.topology().master.as_str(), "b");
}

fn signal(pid: u32, signal: Signal) -> bool {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
    false
}

/// Ends a server and waits until it is gone.
fn kill(pid: u32, port: u16) -> bool {
    signal(pid, Signal::KILL);
    while std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_does_not_catch_up_in_time_gives_the_shift_up() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(1_000_000).await;
    let buyers = pair.buyers(&sale, 4);
    buyers.sell(10).await;
    let pid = pair.server("b").pid();
    pair.at("b", "recorded", move || signal(pid, Signal::STOP));
    let begun = pair.shifts("b").start(to("b"), "ops").await.unwrap();
    let phase = eventually("the shift is decided, or over", async || {
        let topology = pair.topology();
        let shift = topology.find_shift(&begun.id).unwrap();
        (shift.phase == ShiftPhase::Decided || shift.state.is_over()).then_some(shift.phase)
    })
    .await;
    assert_eq!(phase, ShiftPhase::Begun, "decided before the target had everything");
    let shift = pair.until_over(&begun.id).await;
    signal(pid, Signal::CONT);
    assert_eq!(shift.state, ShiftState::Aborted, "{shift:#?}");
    assert!(
        shift.message.as_ref().unwrap().contains("catch up")
            || shift.message.as_ref().unwrap().contains("target")
    );
    assert_eq!(pair.topology().master.as_str(), "a");
    buyers.sell(10).await;
    let books = buyers.stop().await;
    pair.compare(&sale, &books).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_master_that_hangs_gives_the_shift_up_and_sells_again_when_it_goes_on() {
    let mut pair = Pair::in_sync().await;
    let pid = pair.server("a").pid();
    let shift = shift_in_which(&mut pair, "recorded", move || signal(pid, Signal::STOP)).await;
    assert_eq!(shift.state, ShiftState::Aborted, "{shift:#?}");
    assert_eq!(pair.topology().master.as_str(), "a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_dies_after_the_old_master_was_fenced_gives_the_shift_up() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(1_000_000).await;
    let buyers = pair.buyers(&sale, 4);
    buyers.sell(10).await;
    let pid = pair.server("b").pid();
    pair.at("b", "fenced", move || signal(pid, Signal::KILL));
    let shift = pair.shift(to("b")).await;
    assert_eq!(shift.state, ShiftState::Aborted, "{shift:#?}");
    // Without its replica a sells on once that is taken off (D1).
    buyers.sell(10).await;
    pair.server("b").restart().await;
    pair.until_in_sync(shift.epoch).await;
    let books = buyers.stop().await;
    pair.compare(&sale, &books).await;
}

// Only forward: the freeze ends, and what is wrong is said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_dies_after_the_decision_is_the_master_and_sells_when_it_is_back() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(1_000_000).await;
    let buyers = pair.buyers(&sale, 4);
    buyers.sell(10).await;
    let (pid, port) = (pair.server("b").pid(), pair.server("b").port());
    pair.at("b", "decided", move || kill(pid, port));
    let shift = pair.shift(to("b")).await;
    assert_eq!(shift.state, ShiftState::Failed, "{shift:#?}");
    let message = shift.message.as_ref().unwrap();
    assert!(message.contains("does not serve") && message.contains("--mode forced"), "{message}");
    assert_eq!(pair.topology().master.as_str(), "b");
    pair.server("b").restart().await;
    pair.until_master("b", shift.epoch).await;
    buyers.sell(10).await;
    let books = buyers.stop().await;
    pair.compare(&sale, &books).await;
}

// … or the master goes back, and nothing is lost by that either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_gone_after_the_decision_gives_the_master_back_without_loss() {
    let mut pair = Pair::stopped_with(Durability::Replicated, Duration::from_secs(2), Duration::ZERO).await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_in_sync(Epoch(0)).await;
    let sale = pair.create_sale(1_000_000).await;
    let buyers = pair.buyers(&sale, 4);
    buyers.sell(10).await;
    let (pid, port) = (pair.server("b").pid(), pair.server("b").port());
    pair.at("b", "decided", move || kill(pid, port));
    let shift = pair.shift(to("b")).await;
    assert_eq!(shift.state, ShiftState::Failed, "{shift:#?}");
    let back = pair.shift(super::shifts::forced("a")).await;
    done(&back);
    assert!(back.exposure.as_ref().unwrap().lossless, "{back:#?}");
    pair.until_master("a", back.epoch).await;
    buyers.sell(10).await;
    let books = buyers.stop().await;
    pair.compare(&sale, &books).await;
}

/// When a coordinator that is well may be taken for dead: not in this test.
const FOR_EVER_MS: u64 = 600_000;

// H3: whoever waits for the store is the coordinator itself. That the shift would be taken over some time is H4.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_gone_in_mid_shift_is_waited_for() {
    for place in ["caught_up", "fenced", "decided", "promoted"] {
        let pair = Pair::in_sync().await;
        let cut: Vec<_> = pair.centers.values().map(|center| Arc::clone(&center.cut_off)).collect();
        let gone = cut.clone();
        let sale = pair.create_sale(1_000_000).await;
        let buyers = pair.buyers(&sale, 4);
        buyers.sell(10).await;
        let (store, shared) = (pair.store(), Arc::clone(&pair.shifts("b").shared));
        let seen: Vec<_> = ["a", "b"].iter().map(|id| pair.service(id).topology.clone()).collect();
        pair.at("b", "recorded", move || {
            change(&store, |topology| topology.shift.as_mut().unwrap().freeze_ms = FOR_EVER_MS);
            let knows = |one: &TopologyHandle| {
                one.current().shift.as_ref().is_some_and(|shift| shift.freeze_ms == FOR_EVER_MS)
            };
            tokio::task::block_in_place(|| {
                while !seen.iter().all(knows) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let hook: Hook = Box::new(move || {
                gone.iter().for_each(|cut| cut.store(true, Ordering::SeqCst));
                false
            });
            *shared.at.lock().unwrap() = Some((place, hook));
            false
        });
        let begun = pair.shifts("b").start(to("b"), "ops").await.unwrap();
        eventually("it is gone", async || cut[0].load(Ordering::SeqCst).then_some(())).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        // Nobody can know how it ends, and nobody says so.
        assert!(!pair.shifts("b").find(&begun.id).unwrap().state.is_over());
        for cut in &cut {
            cut.store(false, Ordering::SeqCst);
        }
        let shift = pair.until_over(&begun.id).await;
        pair.tells(&shift);
        let wanted = match place {
            "decided" | "promoted" => ShiftState::Done,
            _ => ShiftState::Aborted,
        };
        assert_eq!(shift.state, wanted, "{place}: {shift:#?}");
        assert_eq!(shift.coordinator.term, 0, "{place}: somebody else has gone on with it");
        buyers.sell(10).await;
        let books = buyers.stop().await;
        pair.compare(&sale, &books).await;
    }
}

// S1: no server's own configuration says which role it has, so a restart forgets it, and the guardian gives it anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_redis_may_restart_after_a_shift() {
    for id in ["a", "b"] {
        let mut pair = Pair::in_sync().await;
        let sale = pair.create_sale(1_000_000).await;
        let buyers = pair.buyers(&sale, 4);
        buyers.sell(10).await;
        let shift = pair.shift(to("b")).await;
        done(&shift);
        pair.server(id).kill();
        pair.server(id).restart().await;
        buyers.sell(10).await;
        let books = buyers.stop().await;
        pair.compare(&sale, &books).await;
        assert_eq!(pair.topology().master.as_str(), "b");
    }
}

// The next shift neither hides one that nobody verified nor makes it look failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shift_that_nobody_verified_before_the_next_one_is_told_as_done() {
    let pair = Pair::in_sync().await;
    pair.at("b", "redirected", || true);
    let first = pair.shifts("b").start(to("b"), "ops").await.unwrap();
    pair.until_master("b", first.epoch).await;
    // Refused until a follows b.
    let back = eventually("the way back", async || pair.shifts("a").start(to("a"), "ops").await.ok()).await;
    let back = pair.until_over(&back.id).await;
    done(&back);
    assert!(!pair.topology().find_shift(&first.id).unwrap().state.is_over());
    let first = pair.until_over(&first.id).await;
    done(&first);
    assert_eq!(first.coordinator.term, 1);
    let message = first.message.as_ref().unwrap();
    assert!(message.contains(&back.id), "{message}");
    assert_eq!(pair.topology().master.as_str(), "a");
}

//! The record of a shift: who may change it, and how far back a shift can go.

use seckill_domain::OutboxId;

use super::*;
use crate::shift::record::{
    Aborted, Replaced, abort, add_tail, conclude, decide, left_behind, redirect, take_over,
};
use crate::topology::{Coordinator, Shift, ShiftMode, ShiftPhase, ShiftState, Tail, TopologyState};

fn recorded() -> (Topology, Shift) {
    let mut topology = first_topology();
    let shift = Shift::of_a_test();
    (topology.epoch, topology.state) = (shift.from_epoch, TopologyState::Shifting);
    topology.shift = Some(Box::new(shift.clone()));
    (topology, shift)
}

fn successor() -> Coordinator {
    Coordinator { center: CenterId::new("a").unwrap(), instance: "j".to_owned(), term: 1 }
}

// H4: every change of the record finds the name of whoever makes it there.
#[test]
fn a_coordinator_that_was_replaced_changes_the_record_no_more() {
    let (mut topology, held) = recorded();
    let taken = take_over(&mut topology, &held, &successor()).unwrap();
    let before = topology.clone();
    assert_eq!(decide(&mut topology, &held), Err(Replaced), "decided");
    assert_eq!(redirect(&mut topology, &held, 0, Some("run")), Err(Replaced), "redirected");
    assert_eq!(abort(&mut topology, &held, "late"), Err(Replaced), "aborted");
    assert_eq!(topology, before);
    // Nobody takes over from it what somebody else has by now.
    let third = Coordinator { instance: "k".to_owned(), ..successor() };
    assert_eq!(take_over(&mut topology, &held, &third), Err(Replaced), "taken over");
    assert_eq!(topology, before);

    // Nor when it is over.
    decide(&mut topology, &taken).unwrap();
    redirect(&mut topology, &taken, 0, Some("run")).unwrap();
    let before = topology.clone();
    assert_eq!(redirect(&mut topology, &held, 0, Some("run")), Err(Replaced), "redirected again");
    let done = Shift { state: ShiftState::Done, ..held };
    assert_eq!(conclude(&mut topology, &done), Err(Replaced), "concluded");
    assert_eq!(topology, before);
}

// H3: after `decided` nothing goes back, whoever asks.
#[test]
fn a_shift_that_is_decided_is_not_given_up() {
    let (mut topology, held) = recorded();
    decide(&mut topology, &held).unwrap();
    let before = topology.clone();
    let asked = abort(&mut topology, &held, "an operator").unwrap();
    assert!(
        matches!(&asked, Aborted::Decided(shift) if shift.phase == ShiftPhase::Decided),
        "given up: {asked:?}"
    );
    assert_eq!(topology, before);
}

// H6: what a shift promised (nothing was lost, say) is true of what was written before it.
#[test]
fn a_tail_belongs_to_the_first_forced_shift_after_its_last_entry_or_to_none() {
    let mut topology = first_topology();
    let away = |epoch: u64, mode, state| Shift {
        id: format!("shift-{epoch}"),
        epoch: Epoch(epoch),
        mode,
        state,
        ..Shift::of_a_test()
    };
    topology.remember_shift(away(2, ShiftMode::Forced, ShiftState::Done));
    topology.remember_shift(away(4, ShiftMode::Planned, ShiftState::Done));
    topology.remember_shift(away(5, ShiftMode::Forced, ShiftState::Aborted));
    topology.remember_shift(away(6, ShiftMode::Forced, ShiftState::Failed));
    topology.remember_shift(away(9, ShiftMode::Forced, ShiftState::Done));
    let tail = |epoch: u64| Tail {
        file: format!("diverged-{epoch}-1.ndjson"),
        entries: 1,
        orders: 1,
        paid_without_claim: 0,
        paid_orders: Vec::new(),
        settled: None,
    };
    let a = CenterId::new("a").unwrap();
    for epoch in [1, 3, 7, 9] {
        let last = OutboxId { epoch, seq: 1 };
        add_tail(&mut topology, &a, last, &tail(epoch));
        add_tail(&mut topology, &a, last, &tail(epoch));
    }
    let named = topology.history.iter().map(|shift| shift.tails.clone()).collect::<Vec<_>>();
    assert_eq!(named, [vec![tail(1)], vec![], vec![], vec![tail(3)], vec![tail(7)]]);
    // Saved by the center that took, it is nobody's.
    let b = CenterId::new("b").unwrap();
    assert!(!topology.history.iter().any(|shift| left_behind(shift, &b, OutboxId { epoch: 1, seq: 1 })));
}

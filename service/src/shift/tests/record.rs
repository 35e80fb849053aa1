//! The record of a shift: who may change it, and how far back a shift can go.

use super::*;
use crate::shift::record::{Aborted, Replaced, abort, conclude, decide, redirect, take_over};
use crate::topology::{Coordinator, Shift, ShiftPhase, ShiftState, TopologyState};

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
